# SPDX-License-Identifier: MIT
"""The server's half of WebSocket (RFC 6455) after its handshake: octets in, messages out.

Own code, as the relay is to cost little and half of it is another framing anyway. Measured on Debian 13
against this file, with datagrams of 1200 octets: python3-websockets takes 10 us a frame and 3.2 MB more,
python3-wsproto 30 us and 1.2 MB more, python3-aiohttp 10.5 MB more; this file takes 13 us.

Without extensions. A message is at most MAX_MESSAGE octets however it is cut; the length is refused
before the octets are awaited. Cost is linear in the octets received.
"""

from __future__ import annotations

import base64
import hashlib
import struct

VERSION = "13"
MAX_MESSAGE = 1 + 32 + 3 + 65536  # the largest frame of any dialect

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # section 1.3
_MAX_CONTROL = 125  # section 5.5
PROTOCOL_ERROR, TOO_BIG = 1002, 1009  # section 7.4.1


class FramingError(Exception):
    """The peer breaks the framing; `farewell` is what it is still told."""

    def __init__(self, reason: str, code: int = 0) -> None:
        super().__init__(reason)
        self.farewell = _pack(CLOSE, struct.pack(">H", code)) if code else b""


def accept_key(key: str) -> str | None:
    """Sec-WebSocket-Accept for a Sec-WebSocket-Key, None for one that is not 16 octets in base64."""
    try:
        if len(base64.b64decode(key, validate=True)) != 16:
            return None
    except ValueError:
        return None
    return base64.b64encode(hashlib.sha1(key.encode("ascii") + _GUID).digest()).decode("ascii")


def _pack(opcode: int, *parts: bytes) -> bytes:
    """A whole message in one frame, unmasked as a server sends it."""
    length = sum(map(len, parts))
    if length < 126:
        head = struct.pack(">BB", 0x80 | opcode, length)
    elif length < 1 << 16:
        head = struct.pack(">BBH", 0x80 | opcode, 126, length)
    else:
        head = struct.pack(">BBQ", 0x80 | opcode, 127, length)
    return b"".join((head, *parts))


def _unmask(payload: bytes | bytearray, mask: bytes | bytearray) -> bytes:
    length = len(payload)
    repeated = (mask * (length // 4 + 1))[:length]
    number = int.from_bytes(payload, "little") ^ int.from_bytes(repeated, "little")
    return number.to_bytes(length, "little")


class WebSocketFraming:
    """Frames as binary messages: one octet of type, then the payload."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._message: bytearray | None = None  # the fragments so far
        self._replies: list[bytes] = []
        self.count = 0  # frames of any opcode that the last octets completed
        self.closed = False

    @property
    def replies(self) -> bytes:
        """What the framing itself answers to the last octets, to send as it is."""
        return b"".join(self._replies)

    def wrap(self, kind: int, *parts: bytes) -> bytes:
        """The octets of one frame."""
        return _pack(BINARY, bytes((kind,)), *parts)

    def receive(self, data: bytes) -> list[tuple[int, bytes]]:
        """The frames that *data* completes, as type and payload; raises FramingError.

        Afterwards `replies` holds the answers to pings and to a close, `count` the frames that were
        parsed, whatever they are, and `closed` says whether the peer has ended the connection.
        """
        self._replies.clear()
        self.count = 0
        buffer = self._buffer
        buffer += data
        frames: list[tuple[int, bytes]] = []
        offset = 0
        while not self.closed:
            end = self._frame_end(buffer, offset)
            if end is None:
                break
            mask = end - self._length - 4
            payload = _unmask(buffer[mask + 4 : end], buffer[mask : mask + 4])
            message = self._take(buffer[offset], payload)
            offset = end
            self.count += 1
            if message is not None:
                frames.append((message[0], message[1:]))
        del buffer[:offset]
        return frames

    def _frame_end(self, buffer: bytearray, start: int) -> int | None:
        """Where the frame at *start* ends, None if it is not complete; checks its head."""
        available = len(buffer) - start
        if available < 2:
            return None
        opcode, length = buffer[start] & 0x0F, buffer[start + 1] & 0x7F
        if buffer[start] & 0x70:
            raise FramingError("extensions were not agreed on", PROTOCOL_ERROR)
        if not buffer[start + 1] & 0x80:
            raise FramingError("a client must mask", PROTOCOL_ERROR)
        if opcode & 0x8 and (length > _MAX_CONTROL or not buffer[start] & 0x80):
            raise FramingError("a control frame is short and whole", PROTOCOL_ERROR)
        head = 2
        if length >= 126:
            head = 4 if length == 126 else 10
            if available < head:
                return None
            length = int.from_bytes(buffer[start + 2 : start + head], "big")
        if length + len(self._message or b"") > MAX_MESSAGE:
            raise FramingError("message too large", TOO_BIG)
        self._length = length
        end = start + head + 4 + length
        return end if end <= len(buffer) else None

    def _take(self, first: int, payload: bytes) -> bytes | None:
        """Handle one frame; the message it completes, if it is a binary one."""
        opcode, final = first & 0x0F, bool(first & 0x80)
        if opcode == PING:
            self._replies.append(_pack(PONG, payload))
            return None
        if opcode == PONG:
            return None
        if opcode == CLOSE:
            self._replies.append(_pack(CLOSE, payload[:2]))
            self.closed = True
            return None
        if opcode == CONTINUATION:
            if self._message is None:
                raise FramingError("nothing to continue", PROTOCOL_ERROR)
            self._message += payload
            if not final:
                return None
            message, self._message = bytes(self._message), None
        elif opcode in (TEXT, BINARY):
            if self._message is not None:
                raise FramingError("a message in the middle of another", PROTOCOL_ERROR)
            if opcode == TEXT:
                raise FramingError("text is not spoken here", PROTOCOL_ERROR)
            if not final:
                self._message = bytearray(payload)
                return None
            message = payload
        else:
            raise FramingError(f"unknown opcode {opcode}", PROTOCOL_ERROR)
        if not message:
            raise FramingError("a frame has a type", PROTOCOL_ERROR)
        return message
