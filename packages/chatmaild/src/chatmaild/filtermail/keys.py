# SPDX-License-Identifier: MIT
"""DKIM keys from the DNS: asyncio, over a resolver on loopback, with a bounded cache.

The resolver (unbound) validates DNSSEC and follows CNAMEs; this only asks and remembers. A name has
one of three states: usable keys, none (no such name, no usable record: cached briefly), or unknown
(SERVFAIL, time-out, too many questions at a time: never cached, the sender tries again).
"""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype

from chatmaild.filtermail.dkim import DkimError, KeyRecord, parse_key_record

RESOLVER = ("127.0.0.1", 53)
TIMEOUT = 10.0  # seconds for one name, everything included
RESEND_AFTER = 3.0  # seconds until a UDP question is repeated
MAX_QUESTIONS = 64  # at a time; as many again may wait, four times over
MAX_WAITING = 256
MAX_ENTRIES = 1000
MAX_TTL = 86400  # seconds
NEGATIVE_TTL = 60
MAX_RECORDS = 3  # TXT records considered at one name
EDNS_SIZE = 1232  # octets of a UDP answer, the common safe size

Keys = tuple[KeyRecord, ...]

log = logging.getLogger(__name__)


class LookupFailed(Exception):
    """The DNS could not say whether there is a key."""


class _Entry(NamedTuple):
    keys: Keys
    expires: float


class _Datagram(asyncio.DatagramProtocol):
    """Waits for the one answer to *query*; anything else that arrives is ignored."""

    def __init__(self, query: dns.message.Message, answer: asyncio.Future[dns.message.Message]):
        self._query = query
        self._answer = answer

    def datagram_received(self, data: bytes, addr: object) -> None:
        answer = _parse(self._query, data)
        if answer is not None and not self._answer.done():
            self._answer.set_result(answer)

    def error_received(self, exc: Exception) -> None:
        if not self._answer.done():
            self._answer.set_exception(LookupFailed(type(exc).__name__))


def _parse(query: dns.message.Message, data: bytes) -> dns.message.Message | None:
    """The answer to *query* in *data*, None if it is none."""
    try:
        answer = dns.message.from_wire(data, ignore_trailing=True, raise_on_truncation=False)
    except (dns.exception.DNSException, ValueError, IndexError, struct.error):
        return None
    return answer if query.is_response(answer) else None


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

    async def get_all(self, names: tuple[str, ...]) -> dict[str, Keys | None]:
        """The keys of each of *names*; None where the DNS could not say."""
        results = await asyncio.gather(*map(self.get, names), return_exceptions=True)
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
        entry = self._cache.get(name)
        if entry is not None and entry.expires > self._clock():
            self._cache.move_to_end(name)
            return entry.keys
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
        try:
            async with asyncio.timeout(self._timeout):
                async with self._slots:
                    answer = await self._ask(name)
        except (TimeoutError, OSError, EOFError, dns.exception.DNSException) as error:
            raise LookupFailed(type(error).__name__) from None
        keys, ttl = _keys_of(answer)
        if ttl > 0:
            self._cache[name] = _Entry(keys, self._clock() + ttl)
            self._cache.move_to_end(name)
            while len(self._cache) > MAX_ENTRIES:
                self._cache.popitem(last=False)
        return keys

    async def _ask(self, name: str) -> dns.message.Message:
        query = dns.message.make_query(
            dns.name.from_text(name + "."), dns.rdatatype.TXT, use_edns=0, payload=EDNS_SIZE
        )
        answer = await self._ask_udp(query)
        if answer.flags & dns.flags.TC:
            answer = await self._ask_tcp(query)
        return answer

    async def _ask_udp(self, query: dns.message.Message) -> dns.message.Message:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[dns.message.Message] = loop.create_future()
        transport, _ = await loop.create_datagram_endpoint(
            lambda: _Datagram(query, future), remote_addr=self._resolver
        )
        wire = query.to_wire()
        try:
            while True:  # _fetch() ends this
                transport.sendto(wire)
                done, _ = await asyncio.wait([future], timeout=RESEND_AFTER)
                if done:
                    return future.result()
        finally:
            transport.close()
            if future.done() and not future.cancelled():
                future.exception()  # it has been seen
            future.cancel()

    async def _ask_tcp(self, query: dns.message.Message) -> dns.message.Message:
        reader, writer = await asyncio.open_connection(*self._resolver)
        try:
            wire = query.to_wire()
            writer.write(struct.pack(">H", len(wire)) + wire)
            await writer.drain()
            (length,) = struct.unpack(">H", await reader.readexactly(2))
            answer = _parse(query, await reader.readexactly(length))
        finally:
            writer.close()
        if answer is None or answer.flags & dns.flags.TC:
            raise LookupFailed("not an answer")
        return answer


def _keys_of(answer: dns.message.Message) -> tuple[Keys, float]:
    """The usable keys in *answer* and for how many seconds that is so; raises LookupFailed."""
    rcode = answer.rcode()
    if rcode not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
        raise LookupFailed(dns.rcode.to_text(rcode))
    if not isinstance(answer, dns.message.QueryMessage):
        raise LookupFailed("not an answer to a query")
    try:
        chain = answer.resolve_chaining()
    except dns.exception.DNSException:
        raise LookupFailed("CNAME loop") from None
    if rcode == dns.rcode.NXDOMAIN or chain.answer is None:
        return (), min(NEGATIVE_TTL, chain.minimum_ttl)
    keys = []
    for record in list(chain.answer)[:MAX_RECORDS]:
        try:
            keys.append(parse_key_record(b"".join(record.strings)))
        except DkimError:
            continue
    return tuple(keys), min(MAX_TTL if keys else NEGATIVE_TTL, chain.minimum_ttl)
