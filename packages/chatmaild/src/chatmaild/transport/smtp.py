# SPDX-License-Identifier: MIT
"""SMTP (RFC 5321) between this service and Postfix, without I/O: bytes in, commands, data, replies out.

Everything is bounded: a line has MAX_LINE octets, a reply MAX_REPLY lines. Cost is linear in the octets.
Lines end with CRLF; a bare CR or LF is an error wherever it would let two programs see different ends
of a message.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_LINE = 2048  # octets, CRLF included; RFC 5321 allows 512, and Postfix' replies quote addresses
MAX_REPLY = 64  # lines of one reply

_REPLY = re.compile(rb"([2-5][0-9][0-9])([ -]?)([\t -~\x80-\xff]*)\Z")
_PATH = re.compile(r"(FROM|TO):[ ]*<([^<>\0\r\n ]*)>((?: [!-~]+)*)\Z", re.IGNORECASE)


class ProtocolError(Exception):
    """The peer does not speak SMTP as we know it; the connection is of no more use."""


class Reply(NamedTuple):
    """A code, and the text of all lines."""

    code: int
    text: str

    def __str__(self) -> str:
        return f"{self.code} {self.text}".rstrip()


class LineReader:
    """Takes octets, gives lines without their CRLF."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def receive(self, data: bytes) -> None:
        """Take octets from the peer."""
        self._buffer += data

    def next_line(self) -> bytes | None:
        """The next whole line; None if more octets are needed. Raises ProtocolError."""
        end = self._buffer.find(b"\n", 0, MAX_LINE)
        if end < 0:
            if len(self._buffer) >= MAX_LINE:
                raise ProtocolError("line too long")
            return None
        line = bytes(self._buffer[: end + 1])
        if not line.endswith(b"\r\n") or b"\r" in line[:-2]:
            raise ProtocolError("a line without CRLF")
        del self._buffer[: end + 1]
        return line[:-2]

    def take_rest(self) -> bytes:
        """Whatever was received and not given out."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest


class ReplyReader(LineReader):
    """Reads a server's replies."""

    def __init__(self) -> None:
        super().__init__()
        self._code = 0
        self._texts: list[str] = []

    def next_reply(self) -> Reply | None:
        """The next whole reply; None if more octets are needed. Raises ProtocolError."""
        while (line := self.next_line()) is not None:
            match = _REPLY.match(line)
            if not match or self._texts and int(match[1]) != self._code:
                raise ProtocolError("not a reply")
            self._code = int(match[1])
            self._texts.append(match[3].decode("latin-1"))
            if match[2] != b"-":
                reply = Reply(self._code, " ".join(filter(None, self._texts)))
                self._texts = []
                return reply
            if len(self._texts) >= MAX_REPLY:
                raise ProtocolError("reply too long")
        return None


def parse_path(argument: str) -> tuple[str, str]:
    """`FROM` or `TO`, and the address, of the argument of MAIL or RCPT: "FROM:<user@domain> SIZE=1".

    ESMTP parameters are for others and ignored. Raises ProtocolError.
    """
    match = _PATH.match(argument)
    if not match:
        raise ProtocolError("not a path")
    return match[1].upper(), match[2]


class DataReader:
    """The mail data after 354: gives out what comes before the line with the dot, still dot-stuffed."""

    def __init__(self) -> None:
        self._held = b""  # what may be the beginning of the end
        self._start = True
        self.ended = False
        self.rest = b""  # what came after the end

    def receive(self, data: bytes) -> bytes:
        """Mail data that certainly belongs to the message."""
        if self.ended:
            raise ProtocolError("data after the end")
        data = self._held + data
        self._held = b""
        if self._start and data[:3] == b".\r\n":  # the message is empty
            self.ended, self.rest = True, data[3:]
            return b""
        if self._start and b".\r\n".startswith(data[:3]) and len(data) < 3:
            self._held = data
            return b""
        self._start = False
        end = data.find(b"\r\n.\r\n")
        if end >= 0:
            self.ended, self.rest = True, data[end + 5 :]
            return data[: end + 2]
        for length in (4, 3, 2, 1):
            if data.endswith(b"\r\n.\r\n"[:length]):
                self._held = data[-length:]
                return data[:-length]
        return data


class BodyCheck:
    """Whether mail data from a stranger is exactly one message, as SMTP would have brought it.

    Lines end with CRLF and there is no other CR or LF; no line is a single dot, for that would end the
    message, and what follows would be commands; the last line is complete.
    """

    def __init__(self) -> None:
        self._tail = b"\r\n"  # the octets before; as if a line had just ended
        self.size = 0

    def receive(self, data: bytes) -> bool:
        """Whether it is all right so far; once False, always stop."""
        self.size += len(data)
        data = self._tail + data
        held = data.endswith(b"\r")
        counted = data[:-1] if held else data
        lines = counted.count(b"\r\n")
        if counted.count(b"\r") != lines or counted.count(b"\n") != lines:
            return False
        if b"\r\n.\r\n" in data:
            return False
        # the last line's beginning matters as far as it may still become ".\r\n"
        for length in (4, 3, 2, 1):
            if data.endswith(b"\r\n.\r"[:length]):
                self._tail = data[-length:]
                return True
        self._tail = b""
        return True

    def end(self) -> bool:
        """Whether the message may end here."""
        return self.size > 0 and self._tail == b"\r\n"
