# SPDX-License-Identifier: MIT
"""The least of a TURN client: a relayed address is asked for and given back. Bytes in, bytes out, no I/O.

STUN over UDP (RFC 8489) with long-term credentials, Allocate and Refresh of TURN (RFC 8656). Whatever does
not come from a server that knows the password is ignored or ends in an error, never in a success.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import struct

MAGIC = 0x2112A442
HEADER = struct.Struct("!HHI12s")  # type, length of what follows, cookie, transaction
ATTRIBUTE = struct.Struct("!HH")

ALLOCATE, REFRESH = 0x0003, 0x0004
SUCCESS, ERROR = 0x0100, 0x0110
USERNAME, INTEGRITY, ERROR_CODE, REALM, NONCE = 0x0006, 0x0008, 0x0009, 0x0014, 0x0015
LIFETIME, XOR_RELAYED_ADDRESS, REQUESTED_TRANSPORT = 0x000D, 0x0016, 0x0019
UDP = b"\x11\0\0\0"
UNAUTHORIZED, STALE_NONCE = 401, 438
TRIES = 4  # requests with credentials: one, and some for stale nonces


class TurnError(Exception):
    """The server refused, or said what no server should."""


class Client:
    """One allocation: send `request`, give each datagram to `receive`, send what it returns.

    Finished when `relayed` is set. *lifetime* in seconds is what a forgotten allocation lives.
    """

    def __init__(self, username: str, password: str, lifetime: int = 60) -> None:
        self.username = username
        self.password = password
        self.relayed: tuple[str, int] | None = None  # address and port, as others see it
        self._lifetime = struct.pack("!I", lifetime)
        self._realm = self._nonce = b""
        self._tries = 0
        self._transaction = b""

    def request(self) -> bytes:
        """An Allocate request; the first has no credentials, as only the answer tells the realm."""
        return self._make(ALLOCATE, [(REQUESTED_TRANSPORT, UDP), (LIFETIME, self._lifetime)])

    def release(self) -> bytes:
        """A Refresh request that ends the allocation (RFC 8656 section 8)."""
        return self._make(REFRESH, [(LIFETIME, bytes(4))])

    def receive(self, data: bytes) -> bytes | None:
        """Take a datagram; the next request, or None if there is none to send. Raises TurnError."""
        try:
            kind, _length, cookie, transaction = HEADER.unpack_from(data)
            found = attributes(data)
        except (struct.error, ValueError):
            return None
        if cookie != MAGIC or transaction != self._transaction:
            return None
        if kind == ALLOCATE | SUCCESS:
            self._succeed(data, found)
        elif kind == ALLOCATE | ERROR:
            return self._retry(found)
        return None

    def _succeed(self, data: bytes, found: dict[int, tuple[int, bytes]]) -> None:
        if not self._realm:
            raise TurnError("gives an allocation to whoever asks, without a password")
        at, code = found.get(INTEGRITY, (0, b""))
        if not hmac.compare_digest(code, self._code(data[:at])):
            raise TurnError("answers with a wrong MESSAGE-INTEGRITY: it does not know the password")
        self.relayed = address(found.get(XOR_RELAYED_ADDRESS, (0, b""))[1], self._transaction)

    def _retry(self, found: dict[int, tuple[int, bytes]]) -> bytes:
        value = found.get(ERROR_CODE, (0, b"\0\0\0\0"))[1]
        if len(value) < 4:
            raise TurnError("answers with an error without a code")
        number = value[2] * 100 + value[3]
        fresh = not self._realm or number == STALE_NONCE
        if number not in (UNAUTHORIZED, STALE_NONCE) or not fresh or self._tries >= TRIES:
            reason = value[4:].decode("utf-8", "replace")
            raise TurnError(f"refuses: {number} {reason}".rstrip())
        self._realm = found.get(REALM, (0, self._realm))[1]
        self._nonce = found.get(NONCE, (0, b""))[1]
        if not self._realm or not self._nonce:
            raise TurnError(f"answers {number} without REALM or NONCE")
        self._tries += 1
        return self.request()

    def _make(self, method: int, given: list[tuple[int, bytes]]) -> bytes:
        self._transaction = os.urandom(12)
        if self._realm:
            name = self.username.encode()
            given = [*given, (USERNAME, name), (REALM, self._realm), (NONCE, self._nonce)]
        body = b"".join(map(_attribute, *zip(*given, strict=True)))
        if not self._realm:
            return HEADER.pack(method, len(body), MAGIC, self._transaction) + body
        # the length counts the code that is made over it (RFC 8489 section 14.5)
        text = HEADER.pack(method, len(body) + 24, MAGIC, self._transaction) + body
        return text + _attribute(INTEGRITY, self._code(text))

    def _code(self, text: bytes) -> bytes:
        """MESSAGE-INTEGRITY over *text*, whose length field is made to end with it."""
        head = text[:2] + struct.pack("!H", len(text) - HEADER.size + 24) + text[4:]
        secret = b":".join((self.username.encode(), self._realm, self.password.encode()))
        # MD5 and SHA-1 are what RFC 8489 section 9.2.2 says
        key = hashlib.md5(secret, usedforsecurity=False).digest()
        return hmac.new(key, head, hashlib.sha1).digest()


def _attribute(kind: int, value: bytes) -> bytes:
    return ATTRIBUTE.pack(kind, len(value)) + value + bytes(-len(value) % 4)


def attributes(data: bytes) -> dict[int, tuple[int, bytes]]:
    """The attributes of a message: kind -> offset and value, the first of each kind.

    What follows MESSAGE-INTEGRITY is not vouched for and left out. Raises ValueError and struct.error for
    what is no STUN message.
    """
    length = HEADER.unpack_from(data)[1]
    if length % 4 or len(data) != HEADER.size + length or data[0] & 0xC0:
        raise ValueError("not a STUN message")
    found: dict[int, tuple[int, bytes]] = {}
    at = HEADER.size
    while at < len(data) and INTEGRITY not in found:
        kind, size = ATTRIBUTE.unpack_from(data, at)
        value = data[at + 4 : at + 4 + size]
        if len(value) != size:
            raise ValueError("an attribute is cut short")
        found.setdefault(kind, (at, value))
        at += 4 + size + -size % 4
    return found


def address(value: bytes, transaction: bytes) -> tuple[str, int]:
    """Address and port of an XOR-...-ADDRESS attribute (RFC 8489 section 14.2); raises TurnError."""
    mask = struct.pack("!I", MAGIC) + transaction
    sizes = {1: 4, 2: 16}
    if len(value) < 4 or len(value) != 4 + sizes.get(value[1], -1):
        raise TurnError("gives no relayed address")
    port = int.from_bytes(value[2:4], "big") ^ (MAGIC >> 16)
    host = bytes(a ^ b for a, b in zip(value[4:], mask, strict=False))
    return str(ipaddress.ip_address(host)), port
