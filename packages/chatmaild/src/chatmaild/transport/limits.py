# SPDX-License-Identifier: MIT
"""What one peer may have of /mxdeliv: requests at a time, and messages a minute.

A peer is an IPv4 address, or an IPv6 network of 64 bits. Who has more gets 429 and comes by SMTP, where
Postfix counts. Bounded: at a time by MAX_REQUESTS, and a minute by what Limiter remembers.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from chatmaild.filtermail.limiter import Limiter
from chatmaild.sources import source_of

MAX_REQUESTS = 64  # of all peers; each holds a smtpd(8)
PEER_REQUESTS = 20  # Postfix' own concurrency to one destination
PEER_PER_MINUTE = 600
PEER_BURST = 200
MAX_PEERS = 10_000


class Exceeded(Exception):
    """Too much at the moment; the text says of what."""


class Limits:
    """Counts requests by the address they come from."""

    def __init__(
        self,
        requests: int = MAX_REQUESTS,
        per_peer: int = PEER_REQUESTS,
        per_minute: int = PEER_PER_MINUTE,
        burst: int = PEER_BURST,
    ) -> None:
        self._requests = requests
        self._per_peer = per_peer
        self._rate = Limiter(per_minute, burst, MAX_PEERS)
        self._running: Counter[str] = Counter()

    @contextlib.contextmanager
    def request(self, address: str, now: float) -> Iterator[None]:
        """Count a request of *address* while it runs; *now* is of a monotonic clock. Raises Exceeded."""
        source = source_of(address).hex()
        if self._running.total() >= self._requests:
            raise Exceeded("requests of all")
        if self._running[source] >= self._per_peer:
            raise Exceeded("requests of one peer")
        if not self._rate.allow(source, now):
            raise Exceeded("messages of one peer")
        self._running[source] += 1
        try:
            yield
        finally:
            self._running[source] -= 1
            if not self._running[source]:
                del self._running[source]
