# SPDX-License-Identifier: MIT
"""DKIM keys from the DNS: asyncio, with a bounded cache.

resolver.py asks; this remembers. A name has one of three states: usable keys, none (no such name, no
usable record: cached briefly), or unknown (SERVFAIL, time-out, too many questions at a time: never
cached, the sender tries again).

A peer may have exchanged its key while the old one is cached. Who finds no valid signature with old
keys asks once more, at most once in REFRESH_AFTER for each name: forged mail causes no more questions.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from chatmaild.filtermail.dkim import DkimError, KeyRecord, parse_key_record

RESOLVER = ("127.0.0.1", 53)
TIMEOUT = 10.0  # seconds for one name, everything included
MAX_QUESTIONS = 64  # at a time; as many again may wait, four times over
MAX_WAITING = 256
MAX_ENTRIES = 1000
MAX_TTL = 86400  # seconds
NEGATIVE_TTL = 60
REFRESH_AFTER = 60.0  # seconds since a name was asked for
MAX_RECORDS = 3  # TXT records considered at one name

Keys = tuple[KeyRecord, ...]


class LookupFailed(Exception):
    """The DNS could not say whether there is a key."""


class _Entry(NamedTuple):
    keys: Keys
    expires: float
    asked: float


class KeyStore:
    """Looks up and caches DKIM keys by domain name; one per process, used from one event loop."""

    def __init__(
        self,
        resolver: tuple[str, int] = RESOLVER,
        timeout: float = TIMEOUT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._resolver = resolver
        self._timeout = timeout
        self._clock = clock
        self._cache: OrderedDict[str, _Entry] = OrderedDict()
        self._running: dict[str, asyncio.Task[Keys]] = {}
        self._slots = asyncio.Semaphore(MAX_QUESTIONS)

    def __len__(self) -> int:
        return len(self._cache)

    def cached(self, names: tuple[str, ...]) -> dict[str, Keys | None] | None:
        """The keys of *names* if the cache knows them all."""
        found: dict[str, Keys | None] = {}
        for name in names:
            entry = self._cache.get(name)
            if entry is None or entry.expires <= self._clock():
                return None
            self._cache.move_to_end(name)
            found[name] = entry.keys
        return found

    async def get_all(self, names: tuple[str, ...]) -> dict[str, Keys | None]:
        """The keys of each of *names*; None where the DNS could not say."""
        return await self._gather(self.get, names)

    def may_refresh(self, names: tuple[str, ...]) -> bool:
        """Whether `refresh` may tell something new of one of *names*: it was asked for long ago."""
        return any(map(self._is_old, names))

    async def refresh(self, names: tuple[str, ...]) -> dict[str, Keys | None]:
        """As get_all, but asks anew where that is allowed; what the DNS cannot say stays as it was."""
        return await self._gather(self._get_anew, names)

    def _is_old(self, name: str) -> bool:
        entry = self._cache.get(name)
        if entry is None:
            return False
        return name in self._running or entry.asked + REFRESH_AFTER <= self._clock()

    async def _get_anew(self, name: str) -> Keys:
        if not self._is_old(name):
            return await self.get(name)
        entry = self._cache[name]
        self._cache[name] = entry._replace(asked=self._clock())
        try:
            return await self._ask(name)
        except LookupFailed:
            return entry.keys

    async def _gather(
        self, get: Callable[[str], Awaitable[Keys]], names: tuple[str, ...]
    ) -> dict[str, Keys | None]:
        results = await asyncio.gather(*map(get, names), return_exceptions=True)
        answers: dict[str, Keys | None] = {}
        for name, result in zip(names, results, strict=True):
            if isinstance(result, LookupFailed):
                answers[name] = None
            elif isinstance(result, BaseException):
                raise result
            else:
                answers[name] = result
        return answers

    async def get(self, name: str) -> Keys:
        """The keys at *name*, () if there are none. Raises LookupFailed."""
        known = self.cached((name,))
        if known is not None:
            return known[name] or ()
        return await self._ask(name)

    async def _ask(self, name: str) -> Keys:
        task = self._running.get(name)
        if task is None:
            if len(self._running) >= MAX_QUESTIONS + MAX_WAITING:
                raise LookupFailed("too many lookups at a time")
            task = asyncio.create_task(self._fetch(name))
            self._running[name] = task
            task.add_done_callback(lambda done: self._finished(name, done))
        # shielded: who waits may give up, others wait for the same answer
        return await asyncio.shield(task)

    def _finished(self, name: str, task: asyncio.Task[Keys]) -> None:
        self._running.pop(name, None)
        if not task.cancelled():
            task.exception()  # seen, even if nobody waits any more

    async def _fetch(self, name: str) -> Keys:
        from chatmaild.filtermail import resolver  # when it is needed: it is large

        try:
            async with asyncio.timeout(self._timeout):
                async with self._slots:
                    records, ttl = await resolver.txt_records(self._resolver, name)
        except (TimeoutError, OSError, resolver.NoAnswer) as error:
            raise LookupFailed(str(error)) from None
        keys = _usable(records)
        ttl = min(ttl, MAX_TTL if keys else NEGATIVE_TTL)
        self._cache.pop(name, None)
        if ttl > 0:
            self._cache[name] = _Entry(keys, self._clock() + ttl, self._clock())
            while len(self._cache) > MAX_ENTRIES:
                self._cache.popitem(last=False)
        return keys


def _usable(records: list[bytes]) -> Keys:
    keys = []
    for record in records[:MAX_RECORDS]:
        try:
            keys.append(parse_key_record(record))
        except DkimError:
            continue
    return tuple(keys)
