# SPDX-License-Identifier: MIT
"""DNS records, asked of a resolver on loopback that validates DNSSEC and follows aliases.

keys.py imports this module when the first key is needed, and transport when it looks for the first
relay: dnspython takes three megabytes, which a relay that never gets mail from elsewhere saves.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode

RESEND_AFTER = 3.0  # seconds until a UDP question is repeated
EDNS_SIZE = 1232  # octets of a UDP answer, the common safe size

Address = tuple[str, int]


class NoAnswer(Exception):
    """The DNS could not say what there is at a name."""


async def txt_records(resolver: Address, name: str) -> tuple[list[bytes], float]:
    """The TXT records at *name*, each in one piece, and for how many seconds that is so; see lookup."""
    records, ttl = await lookup(resolver, name, "TXT")
    return [b"".join(record.strings) for record in records], ttl


async def lookup(resolver: Address, name: str, kind: str) -> tuple[list[Any], float]:
    """The records of a *kind* ("MX") at *name* as dnspython has them, and for how many seconds that is
    so.

    None if there is no such name or record. Raises NoAnswer and OSError; without an answer at all it
    waits until it is cancelled.
    """
    try:
        query = dns.message.make_query(
            dns.name.from_text(name + "."), kind, use_edns=0, payload=EDNS_SIZE
        )
        answer = await _ask_udp(resolver, query)
        if answer.flags & dns.flags.TC:
            answer = await _ask_tcp(resolver, query)
        return _records(answer)
    except (dns.exception.DNSException, EOFError) as error:
        raise NoAnswer(type(error).__name__) from None


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
            self._answer.set_exception(NoAnswer(type(exc).__name__))


def _parse(query: dns.message.Message, data: bytes) -> dns.message.Message | None:
    """The answer to *query* in *data*, None if it is none."""
    try:
        answer = dns.message.from_wire(data, ignore_trailing=True, raise_on_truncation=False)
    except (dns.exception.DNSException, ValueError, IndexError, struct.error):
        return None
    return answer if query.is_response(answer) else None


async def _ask_udp(resolver: Address, query: dns.message.Message) -> dns.message.Message:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[dns.message.Message] = loop.create_future()
    transport, _ = await loop.create_datagram_endpoint(
        lambda: _Datagram(query, future), remote_addr=resolver
    )
    wire = query.to_wire()
    try:
        while True:
            transport.sendto(wire)
            done, _ = await asyncio.wait([future], timeout=RESEND_AFTER)
            if done:
                return future.result()
    finally:
        transport.close()
        if future.done() and not future.cancelled():
            future.exception()  # it has been seen
        future.cancel()


async def _ask_tcp(resolver: Address, query: dns.message.Message) -> dns.message.Message:
    reader, writer = await asyncio.open_connection(*resolver)
    try:
        wire = query.to_wire()
        writer.write(struct.pack(">H", len(wire)) + wire)
        await writer.drain()
        (length,) = struct.unpack(">H", await reader.readexactly(2))
        answer = _parse(query, await reader.readexactly(length))
    finally:
        writer.close()
    if answer is None or answer.flags & dns.flags.TC:
        raise NoAnswer("not an answer")
    return answer


def _records(answer: dns.message.Message) -> tuple[list[Any], float]:
    rcode = answer.rcode()
    if rcode not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
        raise NoAnswer(dns.rcode.to_text(rcode))
    if not isinstance(answer, dns.message.QueryMessage):
        raise NoAnswer("not an answer to a query")
    chain = answer.resolve_chaining()
    if rcode == dns.rcode.NXDOMAIN or chain.answer is None:
        return [], chain.minimum_ttl
    return list(chain.answer), chain.minimum_ttl
