# SPDX-License-Identifier: MIT
"""How much one sender may send: a generic cell rate algorithm (GCRA), one float a sender.

A sender may send *burst* messages at once and *per_minute* messages a minute in the long run.
A refused message costs the sender nothing. O(1) a message; the table is bounded: beyond
*max_senders* the sender who was quiet longest is forgotten, in the sender's favour.
"""

from __future__ import annotations


class Limiter:
    def __init__(self, per_minute: int, burst: int, max_senders: int = 100_000) -> None:
        """Raises ValueError unless all three are positive."""
        if per_minute < 1 or burst < 1 or max_senders < 1:
            raise ValueError("a rate limit is a positive number")
        self._max_senders = max_senders
        # sender -> when its bucket is full again (seconds); in the order of the last message
        self._full_at: dict[str, float] = {}
        self.set_rate(per_minute, burst)

    def set_rate(self, per_minute: int, burst: int) -> None:
        """From now on *per_minute* and *burst*; what was sent before still counts."""
        self._interval = 60.0 / per_minute  # seconds a message
        self._tolerance = self._interval * burst

    def __len__(self) -> int:
        return len(self._full_at)

    def allow(self, sender: str, now: float) -> bool:
        """Count a message of *sender* at *now*, seconds of a monotonic clock; False if too much."""
        full_at = max(self._full_at.get(sender, now), now) + self._interval
        if full_at - now > self._tolerance + 1e-6:  # 1e-6: the sum of n intervals is not exact
            return False
        self._full_at.pop(sender, None)
        self._full_at[sender] = full_at
        for _ in range(2):  # two for one: the table shrinks when traffic falls
            oldest = next(iter(self._full_at))
            if self._full_at[oldest] > now and len(self._full_at) <= self._max_senders:
                break
            del self._full_at[oldest]
        return True
