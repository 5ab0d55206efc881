# SPDX-License-Identifier: MIT
"""The server's half of HTTP/1.1 for small services behind nginx. No I/O: bytes in, requests out.

For requests that say everything in their first line and head: bodies are read and thrown away.
Everything is bounded: a head of MAX_HEAD bytes, a body of MAX_BODY. Strict where leniency is how
requests are smuggled (RFC 9112 section 11.2): CRLF only, no folded lines, no second Content-Length,
no Transfer-Encoding. Cost is linear in the bytes received.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import NamedTuple

MAX_HEAD = 8192
MAX_BODY = 65536

_REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) (/[!-~]*) HTTP/1\.([01])\Z")
_FIELD_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\0\r\n]*?)[ \t]*\Z")
_END = b"\r\n\r\n"


class BadRequest(Exception):
    """What came is not a request we read; the connection cannot be used any further."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Request(NamedTuple):
    """One request: *path* without the *query*, and whether the connection may be used again.

    *fields* are the header fields by their names in lower case; of a repeated one the last.
    """

    method: str
    path: str
    keep_alive: bool
    fields: Mapping[str, str] = {}
    query: str = ""


class RequestReader:
    """Reads the requests of one connection: `receive` bytes, then call `next` until it is None."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._searched = 0  # no end of head before this
        self._body_left = 0
        self._request: Request | None = None

    @property
    def idle(self) -> bool:
        """Whether the peer is between two requests."""
        return not self._buffer and self._request is None

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer."""
        self._buffer += data

    def next(self) -> Request | None:
        """The next complete request, None if it needs more bytes; raises BadRequest."""
        if self._request is None and not self._read_head():
            return None
        skipped = min(self._body_left, len(self._buffer))
        del self._buffer[:skipped]
        self._body_left -= skipped
        if self._body_left:
            return None
        request, self._request = self._request, None
        return request

    def take_rest(self) -> bytes:
        """What came after the last request: it belongs to the protocol the peer changed to."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def _read_head(self) -> bool:
        while self._buffer.startswith(b"\r\n"):  # RFC 9112 section 2.2: ignore at least one
            del self._buffer[:2]
        end = self._buffer.find(_END, self._searched)
        if end > MAX_HEAD or end < 0 and len(self._buffer) > MAX_HEAD:
            raise BadRequest(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "head too large")
        if end < 0:
            self._searched = max(0, len(self._buffer) - len(_END) + 1)
            return False
        lines = bytes(self._buffer[:end]).split(b"\r\n")
        del self._buffer[: end + len(_END)]
        self._searched = 0
        self._request, self._body_left = _parse_head(lines)
        return True


def _parse_head(lines: list[bytes]) -> tuple[Request, int]:
    """The request and the length of the body that follows."""
    first = _REQUEST_LINE.match(lines[0])
    if not first:
        raise BadRequest(HTTPStatus.BAD_REQUEST, "malformed request line")
    length = None
    keep_alive = first[3] == b"1"
    fields = {}
    for line in lines[1:]:
        field = _FIELD_LINE.match(line)
        if not field:
            raise BadRequest(HTTPStatus.BAD_REQUEST, "malformed header field")
        name, value = field[1].lower(), field[2]
        fields[name.decode("ascii")] = value.decode("latin-1")
        if name == b"transfer-encoding":
            raise BadRequest(HTTPStatus.NOT_IMPLEMENTED, "transfer codings are not supported")
        if name == b"content-length":
            if length is not None or not re.match(rb"[0-9]{1,18}\Z", value):
                raise BadRequest(HTTPStatus.BAD_REQUEST, "malformed Content-Length")
            length = int(value)
        if name == b"connection" and b"close" in value.lower():
            keep_alive = False
    if length is not None and length > MAX_BODY:
        raise BadRequest(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body too large")
    path, _, query = first[2].decode("ascii").partition("?")
    return Request(first[1].decode("ascii"), path, keep_alive, fields, query), length or 0


class Response(NamedTuple):
    """An answer; `render` adds the framing."""

    status: HTTPStatus
    headers: list[tuple[str, str]]
    body: bytes = b""

    def render(self, *, keep_alive: bool, with_body: bool = True) -> bytes:
        """The bytes to send; *with_body* is false for HEAD."""
        fields = [*self.headers, ("Content-Length", str(len(self.body)))]
        if not keep_alive:
            fields.append(("Connection", "close"))
        head = f"HTTP/1.1 {self.status.value} {self.status.phrase}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in fields)
        return head.encode("ascii") + b"\r\n" + (self.body if with_body else b"")
