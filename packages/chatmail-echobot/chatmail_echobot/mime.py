# SPDX-License-Identifier: MIT
"""Messages in files: header fields, the parts of a multipart, their decoded content (RFC 5322, 2045).

Lenient, because whatever it makes of a message goes back to who wrote it, and bounded: MAX_HEADER octets
of a header, MAX_PARTS parts in MAX_DEPTH levels, and no line is ever held whole. Functions raise
MimeError, a ValueError, for what is beyond that.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from chatmaild.filtermail import transfer
from chatmaild.filtermail.mime import ContentType, MimeError, parse_content_type

MAX_HEADER = 131072  # octets
MAX_FIELDS = 500
MAX_PARTS = 30
MAX_DEPTH = 4
CHUNK = 65536  # octets; longer lines are read in pieces

PLAIN = ("Content-Type: text/plain; charset=utf-8",)
_KEPT = ("content-type", "content-disposition")
TEXT = ContentType("text/plain", {})  # what has no Content-Type, or a broken one
_CONTROL = re.compile("[\0-\x1f\x7f]")  # what could end a line is in no value
_BEGIN, _END = b"-----BEGIN PGP MESSAGE-----", b"-----END PGP MESSAGE-----"


@dataclass(frozen=True)
class Fields:
    """A header: names in lower case, values unfolded, in the order of the message."""

    items: tuple[tuple[str, str], ...]

    def get(self, name: str) -> str:
        """The first field called *name*, "" if there is none."""
        return next((value for key, value in self.items if key == name), "")

    def all(self, name: str) -> list[str]:
        """All fields called *name*."""
        return [value for key, value in self.items if key == name]

    @property
    def content_type(self) -> ContentType:
        """What the body is; text/plain if nothing (readable) says so (RFC 2045 section 5.2)."""
        try:
            return parse_content_type(self.get("content-type"))
        except MimeError:
            return TEXT

    @property
    def disposition(self) -> str:
        """The first word of Content-Disposition in lower case (RFC 2183)."""
        return self.get("content-disposition").partition(";")[0].strip().lower()


@dataclass(frozen=True)
class Part:
    """One part that is no multipart; its body, encoded, are octets *start* to *end* of the file."""

    fields: Fields
    start: int
    end: int

    @property
    def is_file(self) -> bool:
        """Whether it is shown as a file."""
        content_type = self.fields.content_type
        return (
            not content_type.kind.startswith("text/")
            or "name" in content_type.parameters
            or self.fields.disposition == "attachment"
        )

    @property
    def is_text(self) -> bool:
        """Whether it is text that somebody wrote."""
        return self.fields.content_type.kind == "text/plain" and not self.is_file

    @property
    def lines(self) -> tuple[str, ...]:
        """The header lines that say what it is and what it is called, not how it is encoded."""
        kept = [f"{name}: {value}" for name, value in self.fields.items if name in _KEPT]
        return tuple(kept) if self.is_file else PLAIN


def read_fields(file: IO[bytes], limit: int = MAX_HEADER) -> Fields:
    """Read a header from where *file* stands up to and with the empty line, or the end."""
    items: list[tuple[str, list[str]]] = []
    size = 0
    while True:
        line = file.readline(limit)
        size += len(line)
        if size >= limit or len(items) > MAX_FIELDS:
            raise MimeError("header too long")
        text = _CONTROL.sub(" ", line.decode("utf-8", "replace").rstrip("\r\n"))
        name, colon, value = text.partition(":")
        if not text:
            return Fields(tuple((name, " ".join(lines).strip()) for name, lines in items))
        if text[0] == " " and items:
            items[-1][1].append(text.strip())
        elif colon:
            items.append((name.strip().lower(), [value.strip()]))


def parts(file: IO[bytes], fields: Fields) -> list[Part]:
    """All parts of the message whose header, *fields*, was just read from *file*."""
    start = file.tell()
    end = file.seek(0, 2)
    found: list[Part] = []
    _walk(file, Part(fields, start, end), found, 0)
    return found


def _walk(file: IO[bytes], part: Part, found: list[Part], depth: int) -> None:
    content_type = part.fields.content_type
    boundary = content_type.parameters.get("boundary", "")
    if not content_type.kind.startswith("multipart/"):
        found.append(part)
        if len(found) > MAX_PARTS:
            raise MimeError("too many parts")
        return
    if depth == MAX_DEPTH:
        raise MimeError("too many levels")
    if not boundary:
        raise MimeError("no boundary")
    for start, end in _sections(file, part, b"--" + boundary.encode("ascii")):
        file.seek(start)
        fields = read_fields(file, min(end - start + 1, MAX_HEADER))
        _walk(file, Part(fields, min(file.tell(), end), end), found, depth + 1)


def _sections(file: IO[bytes], part: Part, delimiter: bytes) -> list[tuple[int, int]]:
    """From where to where each part between the lines of *delimiter* reaches (RFC 2046 5.1.1)."""
    sections: list[tuple[int, int]] = []
    file.seek(part.start)
    at, start, line_end, at_line_start = part.start, -1, 0, True
    while at < part.end:
        line = file.readline(min(CHUNK, part.end - at))
        if not line:
            break
        if at_line_start and line.startswith(delimiter):
            rest = line[len(delimiter) :].strip()
            if rest in (b"", b"--"):
                if start >= 0:
                    # the line end before a delimiter is the delimiter's
                    sections.append((start, max(at - line_end, start)))
                    if len(sections) > MAX_PARTS:
                        raise MimeError("too many parts")
                start = at + len(line)
                if rest:
                    return sections
        at += len(line)
        at_line_start = line.endswith(b"\n")
        line_end = 2 if line.endswith(b"\r\n") else 1 if at_line_start else 0
    if start >= 0:
        sections.append((start, part.end))
    return sections


def decoded(file: IO[bytes], part: Part) -> Iterator[bytes]:
    """The content of *part*, in pieces; raises MimeError for an encoding that is broken."""
    decoder = transfer.decoder(part.fields.get("content-transfer-encoding") or "7bit")
    if decoder is None:
        raise MimeError("unknown Content-Transfer-Encoding")
    file.seek(part.start)
    left = part.end - part.start
    try:
        while left > 0:
            data = file.read(min(CHUNK, left))
            if not data:
                break
            left -= len(data)
            yield decoder.feed(data)
        yield decoder.end()
    except ValueError as error:
        raise MimeError("broken Content-Transfer-Encoding") from error


def copy_armor(source: IO[bytes], target: IO[bytes]) -> None:
    """Copy the first armored OpenPGP message of *source*; raises MimeError if there is none."""
    inside = False
    while line := source.readline(CHUNK):
        inside = inside or line.startswith(_BEGIN)
        if inside:
            target.write(line)
        if inside and line.startswith(_END):
            target.seek(0)
            return
    raise MimeError("no OpenPGP message")


# --- writing ----------------------------------------------------------------------------------------

_MESSAGE_ID = re.compile(r"<[!-;=?-~]{1,250}>\Z")


@dataclass(frozen=True)
class Piece:
    """A part to be written: its header lines, and a file with its content."""

    lines: tuple[str, ...]
    content: IO[bytes]


def is_message_id(text: str) -> bool:
    """Whether *text* is one plain message id."""
    return bool(_MESSAGE_ID.match(text))


def begins_with(file: IO[bytes], words: bytes) -> bool:
    """Whether the text in *file* begins with *words* in lower or upper case."""
    file.seek(0)
    return file.read(CHUNK).lstrip()[: len(words)].lower() == words


def _write_lines(target: IO[bytes], lines: Sequence[str]) -> None:
    target.write("".join(f"{line}\r\n" for line in lines).encode("utf-8") + b"\r\n")


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    source.seek(0)
    shutil.copyfileobj(source, target, CHUNK)


def write(target: IO[bytes], lines: Sequence[str], boundary: str, pieces: Sequence[Piece]) -> None:
    """A multipart message of *pieces*, its header *lines* naming the *boundary*; rewound.

    The content is binary as it is (RFC 3030): it will be encrypted, no mail server sees its lines.
    """
    _write_lines(target, lines)
    for piece in pieces:
        target.write(f"--{boundary}\r\n".encode())
        _write_lines(target, (*piece.lines, "Content-Transfer-Encoding: binary"))
        _copy(piece.content, target)
        target.write(b"\r\n")
    target.write(f"--{boundary}--\r\n".encode())
    target.seek(0)


def write_encrypted(
    target: IO[bytes], lines: Sequence[str], boundary: str, armored: IO[bytes]
) -> None:
    """A PGP/MIME message (RFC 3156 section 4) around *armored*; CRLF lines."""
    kind = f'multipart/encrypted; protocol="application/pgp-encrypted"; boundary="{boundary}"'
    _write_lines(target, (*lines, f"Content-Type: {kind}"))
    _write_lines(target, (f"--{boundary}", "Content-Type: application/pgp-encrypted"))
    _write_lines(target, ("Version: 1",))
    _write_lines(target, (f"--{boundary}", "Content-Type: application/octet-stream"))
    armored.seek(0)
    for line in armored:
        target.write(line.rstrip(b"\r\n") + b"\r\n")
    target.write(f"--{boundary}--\r\n".encode())
