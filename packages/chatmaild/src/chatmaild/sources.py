# SPDX-License-Identifier: MIT
"""How many new addresses one source may get: a window of one hour, opened by its first address.

A source is what one customer of a provider usually has: an IPv4 address, or an IPv6 network of 64
bits. What has no address (or none that can be read) counts as one source together.

O(1) an address; the table is bounded: beyond *max_sources* the oldest window is forgotten, in its
source's favour. Nothing is written to disk, so a restart opens new windows for all.
"""

from __future__ import annotations

import ipaddress
import threading
from collections import OrderedDict

HOUR = 3600.0  # seconds
MAX_SOURCES = 10_000  # about 3 MB

_V6_NETWORK = 8  # bytes: 64 bits


def source_of(address: str) -> bytes:
    """The source an IP *address* belongs to; b"" for what is no address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return b""
    if isinstance(parsed, ipaddress.IPv4Address):
        return parsed.packed
    if parsed.ipv4_mapped is not None:
        return parsed.ipv4_mapped.packed
    return parsed.packed[:_V6_NETWORK]


class SourceLimiter:
    """Counts new addresses by source; safe to use from several threads."""

    def __init__(self, per_hour: int, max_sources: int = MAX_SOURCES) -> None:
        self._per_hour = per_hour
        self._max_sources = max_sources
        self._lock = threading.Lock()
        # source -> when its window ends (seconds), addresses so far; in the order of the windows
        self._windows: OrderedDict[bytes, tuple[float, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._windows)

    def take(self, address: str, now: float) -> bool:
        """Count one new address for the source of the IP *address* at *now*, seconds of a monotonic
        clock; False, and nothing is counted, if it has had its share of this hour."""
        source = source_of(address)
        with self._lock:
            self._forget(now)
            end, count = self._windows.get(source, (now + HOUR, 0))
            if count >= self._per_hour:
                return False
            self._windows[source] = end, count + 1
            if len(self._windows) > self._max_sources:
                self._windows.popitem(last=False)
            return True

    def give_back(self, address: str) -> None:
        """Undo one `take`: there is no new address after all."""
        source = source_of(address)
        with self._lock:
            if source in self._windows:
                end, count = self._windows[source]
                self._windows[source] = end, max(0, count - 1)

    def _forget(self, now: float) -> None:
        while self._windows:
            source = next(iter(self._windows))
            if self._windows[source][0] > now:
                break
            self._windows.popitem(last=False)
