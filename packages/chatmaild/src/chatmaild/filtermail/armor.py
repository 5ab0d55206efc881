# SPDX-License-Identifier: MIT
"""ASCII armor of one encrypted OpenPGP message (RFC 9580 section 6.2), streaming and strict.

    blank lines? BEGIN line, armor headers (inbound only: Version, Comment, Charset), blank line,
    base64, CRC24 (optional, not verified: RFC 9580 section 6.1), END line, blank lines

Lines end with CRLF. The base64 is decoded on the way and handed to the packet walk; inside a packet,
which is nearly everything, its alphabet is checked and nothing decoded. At most MAX_HEAD octets are
kept.
"""

from __future__ import annotations

import binascii
import re

from chatmaild.filtermail.openpgp import PacketWalk

BEGIN = b"-----BEGIN PGP MESSAGE-----"
END = b"-----END PGP MESSAGE-----"
MAX_HEAD = 4096  # octets up to the blank line
MAX_TAIL = 256  # octets from the first "=" to the END line
EDGE = 1024  # octets that are decoded at a time, until one is inside a packet

_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

_HEAD = re.compile(BEGIN + rb"\r\n((?:[!-9;-~]+: [ -~\t]*\r\n)*)[ \t]*\r\n")
_HEADER_ALLOWED = re.compile(rb"(?:(?:Version|Comment|Charset): [ -~\t]*\r\n)*\Z")
_CHECKSUM = re.compile(rb"=[A-Za-z0-9+/]{4}(?:\r\n)+\Z")
_PADDING = re.compile(rb"(={1,2})(?:\r\n)+(?:=[A-Za-z0-9+/]{4}(?:\r\n)+)?\Z")

_IN_HEAD, _IN_DATA, _IN_TAIL, _IN_END, _AFTER, _FAILED = range(6)


class ArmorCheck:
    """Checks that what is fed is exactly one armored, encrypted message."""

    __slots__ = ("_walk", "_headers_allowed", "_state", "_held", "_quad", "_line_start")

    def __init__(self, incoming: bool) -> None:
        self._walk = PacketWalk(old_format=incoming)
        self._headers_allowed = incoming
        self._state = _IN_HEAD
        self._held = b""  # text of the present state that is not complete yet
        self._quad = b""  # up to 3 base64 characters without their fourth
        self._line_start = True  # in the base64: the last octet was the end of a line

    def feed(self, data: bytes) -> bool:
        """Take the next octets of the text; False once it is refused."""
        while data and self._state != _FAILED:
            data = self._step(data)
        return self._state != _FAILED

    def end(self) -> bool:
        """Whether the text was complete."""
        return self._state == _AFTER

    def _fail(self) -> bytes:
        self._state = _FAILED
        self._held = self._quad = b""
        return b""

    def _step(self, data: bytes) -> bytes:
        """Consume *data* in the present state; what belongs to the next state is returned."""
        if self._state == _IN_DATA:
            return self._data(data)
        if self._state == _AFTER:
            return self._fail() if data.strip(b"\r\n \t") else b""
        data = self._held + data
        self._held = b""
        if self._state == _IN_HEAD:
            return self._head(data)
        if self._state == _IN_TAIL:
            end = data.find(b"-")
            if max(end, len(data) if end < 0 else 0) > MAX_TAIL:
                return self._fail()
            if end < 0:
                self._held = data
                return b""
            if not self._tail(data[:end]):
                return self._fail()
            self._state = _IN_END
            return data[end:]
        if len(data) < len(END):  # _IN_END
            self._held = data
            return b""
        if not data.startswith(END) or not self._walk.end():
            return self._fail()
        self._state = _AFTER
        return data[len(END) :]

    def _head(self, data: bytes) -> bytes:
        data = data.lstrip(b"\r\n")
        match = _HEAD.match(data, 0, MAX_HEAD)
        if not match:
            if len(data) > MAX_HEAD or not BEGIN.startswith(data[: len(BEGIN)]):
                return self._fail()
            self._held = data
            return b""
        if match[1] and not (self._headers_allowed and _HEADER_ALLOWED.match(match[1])):
            return self._fail()
        self._state = _IN_DATA
        return data[match.end() :]

    def _data(self, data: bytes) -> bytes:
        # the first "-" is the END line, the first "=" is padding or checksum: neither is base64
        # data
        end = data.find(b"-")
        pad = data.find(b"=", 0, end) if end >= 0 else data.find(b"=")
        stop = pad if pad >= 0 else end if end >= 0 else len(data)
        position = 0
        while position < stop:
            inside = self._walk.indifferent - len(self._quad)
            text = data[position : min(stop, position + max(inside, EDGE))]
            if not (self._pass_over(text) if len(text) <= inside else self._text(text)):
                return self._fail()
            position += len(text)
        if stop:
            self._line_start = data[stop - 1] == 0x0A
        if stop == len(data):
            return b""
        if pad < 0 and (self._quad or not self._line_start):
            return self._fail()
        self._state = _IN_TAIL if pad >= 0 else _IN_END
        return data[stop:]

    def _text(self, text: bytes) -> bool:
        """Decode base64 and line ends; False if it is refused."""
        quads = self._quad + text.translate(None, b"\r\n")
        whole = len(quads) & ~3
        self._quad = quads[whole:]
        return not whole or self._decode(quads[:whole])

    def _pass_over(self, text: bytes) -> bool:
        """As _text(), for what lies inside a packet: one quick pass, four times as fast."""
        line_ends = text.translate(None, _ALPHABET)
        if line_ends.strip(b"\r\n"):
            return False
        size = len(self._quad) + len(text) - len(line_ends)
        rest = size & 3
        # line ends may stand between the last characters
        last = self._quad + text[-len(line_ends) - 4 :].translate(None, b"\r\n")
        self._quad = last[len(last) - rest :]
        self._walk.skip((size >> 2) * 3)
        return True

    def _decode(self, quads: bytes) -> bool:
        try:
            return self._walk.feed(binascii.a2b_base64(quads, strict_mode=True))
        except binascii.Error:
            return False

    def _tail(self, tail: bytes) -> bool:
        """*tail* is what stands between the base64 data and the END line, "=" first."""
        if not self._quad:
            return self._line_start and _CHECKSUM.match(tail) is not None
        match = _PADDING.match(tail)
        if not match or len(self._quad) + len(match[1]) != 4:
            return False
        return self._decode(self._quad + match[1])
