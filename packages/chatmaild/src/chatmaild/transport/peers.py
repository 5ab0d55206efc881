# SPDX-License-Identifier: MIT
"""Which domains take HTTPS: learnt by asking and by failing, in memory, bounded.

A domain is known to take it, or left alone until a moment, or nobody has asked yet. Beyond *max_peers*
the domain that was used longest ago is forgotten, and asked again at its next message. A restart
forgets all; that costs one question for each.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

MAX_PEERS = 4096  # about 0.6 MB
FORGET_SECONDS = 1800.0  # as the reference system does


class Peers:
    """The table; domains in lower case."""

    def __init__(
        self, max_peers: int = MAX_PEERS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_peers = max_peers
        self._clock = clock
        # domain -> None: takes HTTPS; else when to ask again (seconds). In the order of use.
        self._until: OrderedDict[str, float | None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until)

    @property
    def known(self) -> int:
        """How many take HTTPS."""
        return sum(until is None for until in self._until.values())

    def takes_https(self, domain: str) -> bool | None:
        """Whether it does; None if it should be asked."""
        if domain not in self._until:
            return None
        until = self._until[domain]
        if until is None:
            self._until.move_to_end(domain)
            return True
        if until <= self._clock():
            del self._until[domain]
            return None
        return False

    def learn(self, domain: str, takes_https: bool) -> None:
        """Remember that it does, or leave it alone for a while."""
        self._until[domain] = None if takes_https else self._clock() + FORGET_SECONDS
        self._until.move_to_end(domain)
        if len(self._until) > self._max_peers:
            self._until.popitem(last=False)
