# SPDX-License-Identifier: MIT
"""Content-Transfer-Encoding (RFC 2045 section 6), streaming and strict.

A decoder has feed(data) -> decoded octets, and end(). Both raise ValueError for anything a careful
encoder would not write: other programs might decode it to something else than this one does.
"""

from __future__ import annotations

import binascii
import re
from typing import Protocol

MAX_QP_LINE = 1000  # octets; RFC 2045 allows 76, SMTP 998

# a whole number of lines: printable text, escapes, soft line breaks
_QUOTED_PRINTABLE = re.compile(rb"(?:[\t -<>-~]|=[0-9A-Fa-f]{2}|=?\r\n)*\Z")


class Decoder(Protocol):
    def feed(self, data: bytes) -> bytes: ...

    def end(self) -> bytes: ...


class Identity:
    """7bit, 8bit, binary, or no header at all."""

    def feed(self, data: bytes) -> bytes:
        return data

    def end(self) -> bytes:
        return b""


class Base64:
    """RFC 2045 section 6.8; state: up to 3 characters."""

    def __init__(self) -> None:
        self._rest = b""
        self._padded = False

    def feed(self, data: bytes) -> bytes:
        text = self._rest + data.translate(None, b"\r\n")
        if not text:
            return b""
        if self._padded:
            raise ValueError("data after the padding")
        whole = len(text) & ~3
        self._rest = text[whole:]
        if not whole:
            return b""
        self._padded = text[whole - 1] == 0x3D  # "="
        if self._padded and self._rest:
            raise ValueError("data after the padding")
        return binascii.a2b_base64(text[:whole], strict_mode=True)  # binascii.Error is a ValueError

    def end(self) -> bytes:
        if self._rest:
            raise ValueError("incomplete base64")
        return b""


class QuotedPrintable:
    """RFC 2045 section 6.7; state: one incomplete line."""

    def __init__(self) -> None:
        self._line = b""

    def feed(self, data: bytes) -> bytes:
        text = self._line + data
        whole = text.rfind(b"\n") + 1
        self._line = text[whole:]
        if len(self._line) > MAX_QP_LINE:
            raise ValueError("line too long")
        return self._decode(text[:whole])

    def end(self) -> bytes:
        text, self._line = self._line, b""
        return self._decode(text)

    @staticmethod
    def _decode(text: bytes) -> bytes:
        if any(len(line) > MAX_QP_LINE for line in text.split(b"\r\n")):
            raise ValueError("line too long")
        if not _QUOTED_PRINTABLE.match(text):
            raise ValueError("not quoted-printable")
        return binascii.a2b_qp(text)


def decoder(encoding: str) -> Decoder | None:
    """The decoder for the value of a Content-Transfer-Encoding header, None for an unknown one."""
    name = encoding.strip(" \t\r\n").lower()
    if name in ("7bit", "8bit", "binary"):
        return Identity()
    if name == "base64":
        return Base64()
    return QuotedPrintable() if name == "quoted-printable" else None
