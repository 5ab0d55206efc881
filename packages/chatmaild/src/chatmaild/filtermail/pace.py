# SPDX-License-Identifier: MIT
"""How fast refusals are told: a flood of junk waits for its answers, and so leaves time for others.

Whoever is refused holds a session of the MTA until the answer comes, and the MTA has only so many for
mail from other relays; so the rate of answers is that of junk. The process does not wait, and mail that
is not refused is never slowed down.
"""

from __future__ import annotations


class Pace:
    """A generic cell rate algorithm, as in limiter.py, that gives the time to wait."""

    def __init__(self, per_second: float, burst: int, longest: float) -> None:
        """*burst* at once, *per_second* in the long run; nobody waits more than *longest* seconds."""
        self._interval = 1 / per_second
        self._tolerance = self._interval * burst
        self._longest = longest
        self._free_at = 0.0

    def wait(self, now: float) -> float:
        """Seconds until what comes at *now*, of a monotonic clock, has its turn."""
        free_at = max(self._free_at, now) + self._interval
        # who would wait longer goes together with the last of the line, which does not grow
        self._free_at = min(free_at, now + self._tolerance + self._longest)
        return max(self._free_at - now - self._tolerance, 0.0)
