# SPDX-License-Identifier: MIT
"""The framing of iroh 0.35 without WebSocket: type (one octet), length (four, big endian), payload."""

from __future__ import annotations

import struct

from chatmaild.irohrelay.websocket import MAX_MESSAGE, FramingError

_HEAD = struct.Struct(">BI")


class LengthFraming:
    """The same methods as WebSocketFraming, and the same bounds."""

    replies = b""
    closed = False

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.count = 0

    def wrap(self, kind: int, *parts: bytes) -> bytes:
        """The octets of one frame."""
        return b"".join((_HEAD.pack(kind, sum(map(len, parts))), *parts))

    def receive(self, data: bytes) -> list[tuple[int, bytes]]:
        """The frames that *data* completes, as type and payload; raises FramingError."""
        buffer = self._buffer
        buffer += data
        frames = []
        offset = 0
        while len(buffer) - offset >= _HEAD.size:
            kind, length = _HEAD.unpack_from(buffer, offset)
            if length >= MAX_MESSAGE:
                raise FramingError("frame too large")
            start = offset + _HEAD.size
            if len(buffer) - start < length:
                break
            offset = start + length
            frames.append((kind, bytes(buffer[start:offset])))
        del buffer[:offset]
        self.count = len(frames)
        return frames
