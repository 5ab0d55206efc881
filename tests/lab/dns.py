# SPDX-License-Identifier: MIT
"""The lab's name server: answers what tests set, and NXDOMAIN at once for everything else.

Clients wait five seconds for every name that nobody answers, so a quick "no" matters as much as an
answer. It lives in a namespace of its own on the bridge; the relay's unbound forwards to it.
"""

from __future__ import annotations

import socket
import struct
import threading

from .network import Namespace, inside

TTL = 1
TYPES = {"A": 1, "NS": 2, "CNAME": 5, "PTR": 12, "MX": 15, "TXT": 16, "AAAA": 28}
NOERROR, SERVFAIL, NXDOMAIN = 0, 2, 3
TRUNCATED = 0x0200


def encode_name(name: str) -> bytes:
    """A domain name on the wire (RFC 1035, 3.1), uncompressed."""
    labels = [label.encode() for label in name.rstrip(".").split(".") if label]
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def encode_data(kind: str, value: str) -> bytes:
    """Record data; *value* is `PREFERENCE NAME` for MX, the bare text for TXT."""
    if kind == "A":
        return socket.inet_pton(socket.AF_INET, value)
    if kind == "AAAA":
        return socket.inet_pton(socket.AF_INET6, value)
    if kind == "MX":
        preference, name = value.split()
        return struct.pack("!H", int(preference)) + encode_name(name)
    if kind == "TXT":
        data = value.encode()
        parts = [data[i : i + 255] for i in range(0, len(data), 255)] or [b""]
        return b"".join(bytes([len(part)]) + part for part in parts)
    return encode_name(value)


def read_question(query: bytes) -> tuple[str, int, bytes]:
    """Name (lower case, no final dot), type and the raw question. ValueError if malformed."""
    labels, at = [], 12
    try:
        while length := query[at]:
            if length > 63:
                raise ValueError("compressed name in a question")
            labels.append(query[at + 1 : at + 1 + length].decode("ascii").lower())
            at += 1 + length
        (kind,) = struct.unpack_from("!H", query, at + 1)
    except (IndexError, struct.error) as error:
        raise ValueError("short query") from error
    return ".".join(labels), kind, query[12 : at + 5]


class NameServer:
    """Records by name and type, served over UDP and TCP on port 53 of *namespace*."""

    def __init__(self, namespace: Namespace) -> None:
        self.address = namespace.ipv4
        self.broken: set[str] = set()  # names that are answered SERVFAIL
        self._records: dict[tuple[str, str], list[str]] = {}
        with inside(namespace):
            self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._udp.bind((namespace.ipv4, 53))
            self._tcp = socket.create_server((namespace.ipv4, 53))
        self._threads = [
            threading.Thread(target=target, daemon=True)
            for target in (self._packets, self._streams)
        ]
        for thread in self._threads:
            thread.start()

    def set(self, name: str, kind: str, *values: str) -> None:
        """Set all records of a name and type (see encode_data); no values: remove them."""
        key = (name.lower().rstrip("."), kind)
        for value in values:
            encode_data(kind, value)  # a mistake is the caller's, not the server thread's
        if values:
            self._records[key] = list(values)
        else:
            self._records.pop(key, None)

    def close(self) -> None:
        """Stop serving."""
        for sock in (self._udp, self._tcp):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:  # "not connected", but it wakes the thread all the same
                pass
        for thread in self._threads:
            thread.join(5)
        self._udp.close()
        self._tcp.close()

    def _packets(self) -> None:
        while True:
            try:
                data, peer = self._udp.recvfrom(4096)
            except OSError:
                return
            if not peer:
                return
            reply = self.answer(data)
            if len(reply) > 1232:
                (flags,) = struct.unpack_from("!H", reply, 2)
                reply = reply[:2] + struct.pack("!H", flags | TRUNCATED) + reply[4:6] + bytes(6)
                reply += read_question(data)[2]
            if reply:
                self._udp.sendto(reply, peer)

    def _streams(self) -> None:
        while True:
            try:
                peer, _address = self._tcp.accept()
            except OSError:
                return
            with peer:
                peer.settimeout(2)
                try:
                    while len(size := peer.recv(2, socket.MSG_WAITALL)) == 2:
                        data = peer.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
                        reply = self.answer(data)
                        peer.sendall(struct.pack("!H", len(reply)) + reply)
                except OSError:
                    continue

    def answer(self, query: bytes) -> bytes:
        """The reply to one query; empty for what is no query."""
        try:
            name, number, question = read_question(query)
        except ValueError:
            return b""
        records = dict(self._records)
        code, answers = NXDOMAIN, []
        if name in self.broken:
            code = SERVFAIL
        elif any(known == name or known.endswith("." + name) for known, _kind in records):
            code = NOERROR
            for kind, wire in TYPES.items():
                if number not in (wire, 255) and kind != "CNAME":
                    continue
                for value in records.get((name, kind), []):
                    data = encode_data(kind, value)
                    answers.append(struct.pack("!HHHIH", 0xC00C, wire, 1, TTL, len(data)) + data)
        flags = 0x8480 | (query[2] & 1) << 8 | code  # QR, AA, RA; RD as asked
        head = query[:2] + struct.pack("!HHHHH", flags, 1, len(answers), 0, 0)
        return head + question + b"".join(answers)
