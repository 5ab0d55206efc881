# SPDX-License-Identifier: MIT
"""How much a client may send: a token bucket that lends, so that the answer is how long to wait."""

from __future__ import annotations


class Bucket:
    """*rate* units a second in the long run, *burst* at once."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._last = now

    def spend(self, units: float, now: float) -> float:
        """Take *units*; returns the seconds until nothing is owed, 0 if that is now."""
        self._level = min(self._burst, self._level + (now - self._last) * self._rate) - units
        self._last = now
        return max(0.0, -self._level / self._rate)
