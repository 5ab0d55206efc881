# SPDX-License-Identifier: MIT
"""What is published: asked at the authoritative servers of a zone, and through resolvers.

Authoritative servers say what the operator has set, at once; a resolver says what others see, which may be
as old as the record's TTL. Each server's answer is kept, so that the one that differs can be named.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdata
import dns.rdatatype
import dns.resolver

TIMEOUT = 5.0  # seconds for one question, TCP after a truncated answer included
SERVERS_MAX = 8  # name servers asked for one zone
THREADS = 8
ALIASES_MAX = 8
NO_RECORD = "no such record"


@dataclass(frozen=True)
class Server:
    """One name server; *authoritative* or a resolver."""

    name: str
    address: str
    authoritative: bool

    def __str__(self) -> str:
        return self.name if self.name == self.address else f"{self.name} ({self.address})"


@dataclass(frozen=True)
class Answer:
    """What one server said to one question. *error*: why there are no values, "" if there are."""

    server: Server
    values: tuple[dns.rdata.Rdata, ...]
    error: str = ""
    validated: bool = False

    @property
    def texts(self) -> list[str]:
        """The values in presentation form, sorted."""
        return sorted(value.to_text() for value in self.values)


class Lookup:
    """Questions to the servers of the zones of one relay; *resolvers* are addresses, the first is used to
    find authoritative servers."""

    def __init__(self, resolvers: Iterable[str], port: int = 53) -> None:
        self.resolvers = [Server(address, address, False) for address in resolvers]
        self.port = port
        self._find = dns.resolver.Resolver(configure=False)
        self._find.nameservers = [self.resolvers[0].address]
        self._find.port = port
        self._find.lifetime = 2 * TIMEOUT
        # a zone with broken signatures has servers, too (RFC 4035 3.2.2)
        self._find.set_flags(dns.flags.RD | dns.flags.CD)
        self._zones: dict[str, list[Server]] = {}

    def servers(self, name: str) -> list[Server]:
        """The authoritative servers of the zone of *name*, by address; empty if there is no such zone."""
        zone = self._zone(name)
        if zone not in self._zones:
            found = []
            for host in self._names(zone):
                found += [Server(host, address, True) for address in self.addresses(host)]
            self._zones[zone] = found[:SERVERS_MAX]
        return self._zones[zone]

    def _zone(self, name: str) -> str:
        try:
            return dns.resolver.zone_for_name(name, resolver=self._find).to_text()
        except (dns.exception.DNSException, OSError):
            return ""

    def _names(self, zone: str) -> list[str]:
        if not zone:
            return []
        try:
            answer: Iterable[Any] = self._find.resolve(zone, "NS")
        except (dns.exception.DNSException, OSError):
            return []
        return sorted(item.target.to_text().rstrip(".") for item in answer)

    def addresses(self, name: str) -> list[str]:
        """The addresses of *name* as the first resolver knows them, aliases followed."""
        found: list[str] = []
        for kind in ("A", "AAAA"):
            with contextlib.suppress(dns.exception.DNSException, OSError):
                answer: Iterable[Any] = self._find.resolve(name, kind, search=False)
                found += [item.address for item in answer]
        return found

    def is_signed(self, name: str) -> bool:
        """Whether the first resolver could validate what the zone of *name* says (RFC 4035 3.2.3)."""
        return self.ask(self.resolvers[0], name, "SOA").validated

    def everybody(self, name: str, kind: str) -> list[Answer]:
        """The answers of all authoritative servers of *name*, then of all resolvers."""
        servers = [*self.servers(name), *self.resolvers]
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(lambda server: self.ask(server, name, kind), servers))

    def ask(self, server: Server, name: str, kind: str) -> Answer:
        """One question to one server."""
        query = dns.message.make_query(name, kind, want_dnssec=not server.authoritative)
        if server.authoritative:
            query.flags &= ~dns.flags.RD
        try:
            reply, _tcp = dns.query.udp_with_fallback(
                query, server.address, timeout=TIMEOUT, port=self.port
            )
        except (dns.exception.Timeout, OSError):
            return Answer(server, (), "no answer")
        except dns.exception.DNSException as error:
            return Answer(server, (), f"a damaged answer ({type(error).__name__})")
        if reply.rcode() != dns.rcode.NOERROR:
            return Answer(server, (), dns.rcode.to_text(reply.rcode()))
        values, alias = _values(reply, dns.name.from_text(name), dns.rdatatype.from_text(kind))
        if alias is not None and server.authoritative:
            values = self.ask(self.resolvers[0], alias.to_text(), kind).values  # another zone's
        validated = bool(reply.flags & dns.flags.AD)
        return Answer(server, values, "" if values else NO_RECORD, validated)


def _values(
    reply: dns.message.Message, name: dns.name.Name, kind: dns.rdatatype.RdataType
) -> tuple[tuple[dns.rdata.Rdata, ...], dns.name.Name | None]:
    """The values of *kind* for *name* in the answer section, along its aliases; where an alias leads to
    that the reply says nothing of."""
    first = name
    for _step in range(ALIASES_MAX):
        alias = None
        for rrset in reply.answer:
            if rrset.name == name and rrset.rdtype == kind:
                return tuple(rrset), None
            if rrset.name == name and rrset.rdtype == dns.rdatatype.CNAME:
                alias = rrset[0].target
        if alias is None:
            break
        name = alias
    return (), name if name != first else None
