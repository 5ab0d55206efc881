# SPDX-License-Identifier: MIT
"""What frames mean in the two generations of iroh's relay protocol: their types and the handshake.

    type                       0.35   1.x
    challenge of the relay      -      0    16 octets at random
    proof of the client         2      1    0.35: magic, key (32), signature (64), 3
                                            1.x: key (32), 64, signature (64)
    accepted, denied            -     2, 3  denied: length, UTF-8 text
    datagrams to another key    4     4, 5  key (32), contents; in 1.x these begin with ECN (1), and
                                            in 5 with the size of each datagram but the last (2)
    datagrams from another key  5     6, 7  the same with the key of the sender
    that key is gone            8      8    key (32)
    ping, pong                12, 13  9, 10 8 octets
    health, status              -    11, 13 text for iroh-relay-v1, one octet for iroh-relay-v2

All other types are ignored, as newer clients may have more. In 0.35 a proof is the same every time: who
could listen to it could present it again. Behind TLS nobody can; 1.x does better.
"""

from __future__ import annotations

import os
from typing import NamedTuple, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from chatmaild.irohrelay.blake3 import derive_key

KEY = 32  # octets of a key
MAX_DATAGRAMS = 65536  # octets of one frame's datagrams in 0.35, of one frame in 1.x

_SIGNATURE = 64
_PING = 8
_MAGIC = "RELAY\N{KEY}".encode()
_LEGACY_VERSION = b"\x03"
_CHALLENGE = 16
_CHALLENGE_CONTEXT = b"iroh-relay handshake v1 challenge signature"

Frame = tuple[int, bytes]  # type and payload


class ProtocolError(Exception):
    """The peer sends what the protocol does not allow; `farewell` is what it is still told."""

    def __init__(self, reason: str, farewell: Frame | None = None) -> None:
        super().__init__(reason)
        self.farewell = farewell


class Datagrams(NamedTuple):
    """To pass on: *kind* is the type of the frame the receiver gets, *contents* the rest of it."""

    destination: bytes
    kind: int
    contents: bytes


class Ping(NamedTuple):
    """To be answered with the same payload."""

    payload: bytes


class Pong(NamedTuple):
    """The answer to a ping of ours."""

    payload: bytes


class Dialect(Protocol):
    """One generation's frames. An instance belongs to one connection."""

    generation: str
    keeps_replaced: bool  # whether a connection stays open when its key connects once more

    def greeting(self) -> Frame | None:
        """What the relay says first."""

    def authenticate(self, frame: Frame) -> bytes:
        """The key that the client's first frame proves; raises ProtocolError."""

    def welcome(self) -> Frame | None:
        """What the relay says to a client that proved its key."""

    def read(self, frame: Frame) -> Datagrams | Ping | Pong | None:
        """What a later frame says, None for nothing of interest; raises ProtocolError."""

    def ping(self, payload: bytes) -> Frame:
        """A question whether the client is alive."""

    def pong(self, payload: bytes) -> Frame:
        """The answer to its ping."""

    def gone(self, key: bytes) -> Frame:
        """The client *key*, which sent datagrams to this one, is not connected any more."""

    def unreachable(self, key: bytes) -> Frame | None:
        """The client *key*, which this one sent datagrams to, is not connected."""

    def replaced(self, active: bool) -> Frame | None:
        """The key connected elsewhere as well; or, *active*, that connection has ended."""


class Legacy:
    """iroh 0.35."""

    generation = "0.35"
    keeps_replaced = False

    def greeting(self) -> Frame | None:
        return None

    def authenticate(self, frame: Frame) -> bytes:
        kind, payload = frame
        start = len(_MAGIC)
        key, signature = (
            payload[start : start + KEY],
            payload[start + KEY : start + KEY + _SIGNATURE],
        )
        if kind != 2 or payload[:start] != _MAGIC or len(signature) != _SIGNATURE:
            raise ProtocolError("not a client of iroh 0.35")
        message = payload[start + KEY + _SIGNATURE :]
        if message != _LEGACY_VERSION:
            raise ProtocolError("not version 3 of the protocol")
        if not _verify(key, message, signature):
            raise ProtocolError("wrong signature")
        return key

    def welcome(self) -> Frame | None:
        return None

    def read(self, frame: Frame) -> Datagrams | Ping | Pong | None:
        kind, payload = frame
        if kind == 4:
            if not KEY <= len(payload) <= KEY + MAX_DATAGRAMS:
                raise ProtocolError("datagrams of a wrong length")
            return Datagrams(payload[:KEY], 5, payload[KEY:])
        if kind in (12, 13):
            return _ping_or_pong(kind == 12, payload)
        return None

    def ping(self, payload: bytes) -> Frame:
        return 12, payload

    def pong(self, payload: bytes) -> Frame:
        return 13, payload

    def gone(self, key: bytes) -> Frame:
        return 8, key

    def unreachable(self, key: bytes) -> Frame | None:
        return None

    def replaced(self, active: bool) -> Frame | None:
        return None


class Current:
    """iroh 1.x, and 0.9x from where it speaks the same; *version* 1 or 2 of the subprotocol."""

    generation = "1"
    keeps_replaced = True

    def __init__(self, version: int) -> None:
        self.version = version
        self._challenge = os.urandom(_CHALLENGE)

    def greeting(self) -> Frame | None:
        return 0, self._challenge

    def authenticate(self, frame: Frame) -> bytes:
        kind, payload = frame
        key, signature = payload[:KEY], payload[KEY + 1 :]
        if kind != 1 or len(signature) != _SIGNATURE or payload[KEY] != _SIGNATURE:
            raise ProtocolError("not a proof of a key", _denied("the challenge was not answered"))
        if not _verify(key, derive_key(_CHALLENGE_CONTEXT, self._challenge), signature):
            raise ProtocolError("wrong signature", _denied("wrong signature"))
        return key

    def welcome(self) -> Frame | None:
        return 2, b""

    def read(self, frame: Frame) -> Datagrams | Ping | Pong | None:
        kind, payload = frame
        if kind in (4, 5):
            # a larger frame would make the receiver end its connection
            if not KEY + (1 if kind == 4 else 3) <= len(payload) <= MAX_DATAGRAMS:
                raise ProtocolError("datagrams of a wrong length")
            return Datagrams(payload[:KEY], kind + 2, payload[KEY:])
        if kind in (9, 10):
            return _ping_or_pong(kind == 9, payload)
        return None

    def ping(self, payload: bytes) -> Frame:
        return 9, payload

    def pong(self, payload: bytes) -> Frame:
        return 10, payload

    def gone(self, key: bytes) -> Frame:
        return 8, key

    def unreachable(self, key: bytes) -> Frame | None:
        return 8, key

    def replaced(self, active: bool) -> Frame | None:
        if self.version > 1:
            return 13, b"\0" if active else b"\1"
        return None if active else (11, b"this key is connected elsewhere as well")


def _verify(key: bytes, message: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _denied(reason: str) -> Frame:
    return 3, bytes((len(reason),)) + reason.encode()


def _ping_or_pong(is_ping: bool, payload: bytes) -> Ping | Pong:
    if len(payload) != _PING:
        raise ProtocolError("ping or pong of a wrong length")
    return Ping(payload) if is_ping else Pong(payload)
