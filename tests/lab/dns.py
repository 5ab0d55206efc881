# SPDX-License-Identifier: MIT
"""The lab's name server: answers what tests set, and NXDOMAIN at once for everything else.

Clients wait five seconds for every name that nobody answers, so a quick "no" matters as much as an
answer. It lives in a namespace of its own on the bridge; the relay's unbound forwards to it.
"""

from __future__ import annotations

import socket
import threading

import dns.exception
import dns.message
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from .network import Namespace, inside

TTL = 1


class NameServer:
    """Records by name and type, served over UDP on port 53 of *namespace*, IPv4 and IPv6."""

    def __init__(self, namespace: Namespace) -> None:
        self.address = namespace.ipv4
        self.address6 = namespace.ipv6
        self.broken: set[str] = set()  # names whose zone answers SERVFAIL
        self._records: dict[tuple[str, str], list[str]] = {}
        with inside(namespace):
            self._socket = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            self._socket.bind(("::", 53))
        self._socket.settimeout(0.2)  # how long close() waits at most
        self._open = True
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def set(self, name: str, kind: str, *values: str) -> None:
        """Set all records of a name and type, in the presentation form of RFC 1035."""
        self._records[name.lower().rstrip(".") + ".", kind] = list(values)

    def close(self) -> None:
        """Stop serving."""
        self._open = False
        self._thread.join(5)
        self._socket.close()

    def _serve(self) -> None:
        while self._open:
            try:
                data, peer = self._socket.recvfrom(4096)
                reply = self._answer(dns.message.from_wire(data))
            except (TimeoutError, dns.exception.DNSException):
                continue
            self._socket.sendto(reply.to_wire(), peer)

    def _answer(self, query: dns.message.Message) -> dns.message.Message:
        reply = dns.message.make_response(query, recursion_available=True)
        question = query.question[0]
        name = question.name.to_text().lower()
        values = self._records.get((name, dns.rdatatype.to_text(question.rdtype)))
        if name.rstrip(".") in self.broken:
            reply.set_rcode(dns.rcode.SERVFAIL)
        elif values:
            reply.answer.append(
                dns.rrset.from_text_list(question.name, TTL, "IN", question.rdtype, values)
            )
        elif not any(known == name for known, _kind in self._records):
            reply.set_rcode(dns.rcode.NXDOMAIN)
        return reply
