# SPDX-License-Identifier: MIT
"""Which messages count as end-to-end encrypted: MIME structure (RFC 2045, 2046, 3156), streaming.

    multipart/encrypted             nothing but blank lines before, between and after the parts;
                                    inbound, before them, the sentence Thunderbird writes there
        application/pgp-encrypted   "Version: 1"
        application/octet-stream    one armored, encrypted OpenPGP message (armor.py)

or the one cleartext message that clients need to meet (SecureJoin step 1): a `Secure-Join` header
with vc-request or vg-request, and a multipart with exactly one text/plain part that repeats it.

Where mail programs disagree how to read a message (two Content-Type fields, text that looks like a
delimiter, encodings that RFC 2045 forbids), it is refused: this check must see what they all see.
Memory: at most MAX_SMALL octets and one incomplete line, whatever the size of the message.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Protocol

from chatmaild.filtermail import armor, transfer

MAX_CONTENT_TYPE = 2000  # octets of one Content-Type field
MAX_BOUNDARY = 200  # RFC 2046 allows 70
MAX_PADDING = 80  # blanks after a delimiter
MAX_PREAMBLE = 200  # of the sentence, with blanks behind it
MAX_DASHES = 64  # looked at one by one in search of a delimiter
MAX_SMALL = 16384  # octets of what is kept: a part's header, a part with a fixed text

_BLANK = b" \t\r\n"
_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_TYPE = re.compile(rf"[ \t\r\n]*({_TOKEN}/{_TOKEN})[ \t\r\n]*(?:;|\Z)")
_PARAMETER = re.compile(
    rf"[ \t\r\n]*(?:({_TOKEN})=(?:\"((?:[^\"\\\r\n]|\\[^\r\n])*)\"|({_TOKEN}))[ \t\r\n]*)?(?:;|\Z)"
)
_BOUNDARY = re.compile(r"[ !#-\[\]-~]*[!#-\[\]-~]\Z")
# no blank before the colon: some programs do not see such a field
_FIELD = re.compile(r"([!-9;-~]+):((?:[^\r\n]|\r\n[ \t])*)\r\n")
_HEADER_TEXT = re.compile(r"[\t\r\n -\x7f]*\Z")
_SENTENCE = re.compile(rb"This is an OpenPGP/MIME encrypted message \(RFC \d{4} and \d{4}\)\Z")
_SECUREJOIN = ("vc-request", "vg-request")


class MimeError(ValueError):
    """Not the MIME this filter accepts."""


class ContentType(NamedTuple):
    kind: str  # "type/subtype", lower case
    parameters: dict[str, str]  # names in lower case


def parse_content_type(value: str) -> ContentType:
    """Parse the value of a Content-Type field (RFC 2045 section 5.1), without comments.

    Raises MimeError for anything ambiguous: syntax, a repeated parameter, a boundary in pieces
    (RFC 2231).
    """
    if len(value) > MAX_CONTENT_TYPE or not value.isascii() or "\0" in value:
        raise MimeError("Content-Type too long or not ASCII")
    match = _TYPE.match(value)
    if not match:
        raise MimeError("Content-Type syntax")
    kind = match[1].lower()
    parameters: dict[str, str] = {}
    position = match.end()
    while position < len(value):
        match = _PARAMETER.match(value, position)
        if not match:
            raise MimeError("Content-Type parameter syntax")
        position = match.end()
        if match[1] is None:
            continue
        name = match[1].lower()
        if name in parameters or name.startswith("boundary*"):
            raise MimeError("Content-Type parameter repeated or in pieces")
        quoted = match[2]
        if name == "boundary" and quoted is not None and "\\" in quoted:
            raise MimeError("boundary with a backslash: programs undo it or not")
        parameters[name] = match[3] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
    return ContentType(kind, parameters)


def _delimiter(content_type: ContentType) -> bytes:
    boundary = content_type.parameters.get("boundary", "")
    if len(boundary) > MAX_BOUNDARY or not _BOUNDARY.match(boundary):
        raise MimeError("boundary")
    delimiter = b"--" + boundary.encode("ascii")
    for line in (armor.BEGIN, armor.END):  # else the armor could end the part it stands in
        if line.startswith(delimiter) or delimiter.startswith(line):
            raise MimeError("boundary looks like armor")
    return delimiter


def _find(data: bytes, line: bytes) -> int:
    """As data.find(line), for LF and "--...": base64 has no "-", and one octet is found 30 times as fast."""
    dash = 0
    for _ in range(MAX_DASHES):
        dash = data.find(b"-", dash + 1)
        if dash < 0 or data.startswith(line, dash - 1):
            return max(dash - 1, -1)
    return data.find(line, dash)


class _Sink(Protocol):
    def feed(self, data: bytes) -> bool: ...

    def end(self) -> bool: ...


class _FixedText:
    """A part that must be one of a few short texts, blanks around it aside."""

    def __init__(self, texts: tuple[bytes, ...], fold_case: bool) -> None:
        self._texts = texts
        self._fold_case = fold_case
        self._data = b""

    def feed(self, data: bytes) -> bool:
        self._data += data
        return len(self._data) <= MAX_SMALL

    def end(self) -> bool:
        text = self._data.strip(_BLANK)
        return (text.lower() if self._fold_case else text) in self._texts


_PREAMBLE, _PART_HEADER, _PART_BODY, _EPILOGUE, _REFUSED = range(5)


class MimeCheck:
    """header() for every field, end_of_header(), body() for the octets in any pieces, end().

    Never raises. Then `is_encrypted` and `is_securejoin` tell; `kind` is the top content type
    ("" if there is not exactly one, or not readable) after end_of_header().
    """

    def __init__(self, incoming: bool) -> None:
        self._incoming = incoming
        self._content_types: list[str] = []
        self._encodings: list[str] = []
        self._securejoins: list[str] = []
        self.kind = ""
        self.is_encrypted = False
        self.is_securejoin = False
        self._pgp = False
        self._state = _REFUSED
        self._delimiter = b""
        self._line_start = True  # the next octet starts a line
        self._held = b""  # a line that may be a delimiter
        self._header = b""  # of the present part; before the first one, the sentence
        self._part = 0  # number of the present part, the first is 1
        self._decoder: transfer.Decoder = transfer.Identity()
        self._sink: _Sink | None = None

    def header(self, name: str, value: str) -> None:
        """One field of the message header: *name* in lower case, *value* as it stands."""
        if name == "content-type":
            self._content_types.append(value)
        elif name == "content-transfer-encoding":
            self._encodings.append(value)
        elif name == "secure-join":
            self._securejoins.append(value.strip(" \t\r\n"))

    def end_of_header(self) -> None:
        if len(self._content_types) != 1:
            return
        try:
            content_type = parse_content_type(self._content_types[0])
        except MimeError:
            return
        self.kind = content_type.kind
        # a multipart is never encoded itself (RFC 2045 section 6.4)
        if any(
            not isinstance(transfer.decoder(encoding), transfer.Identity)
            for encoding in self._encodings
        ):
            return
        protocol = content_type.parameters.get("protocol", "application/pgp-encrypted")
        self._pgp = self.kind == "multipart/encrypted"
        if self._pgp:
            if protocol.lower() != "application/pgp-encrypted":
                return
        elif not (
            self.kind.startswith("multipart/")
            and len(self._securejoins) == 1
            and self._securejoins[0] in _SECUREJOIN
        ):
            return
        try:
            self._delimiter = _delimiter(content_type)
        except MimeError:
            return
        self._state = _PREAMBLE

    def body(self, data: bytes) -> None:
        """The next octets of the body; lines end with CRLF."""
        if self._state == _REFUSED or not data:
            return
        # the hot path: base64 has no "-", so there is no delimiter
        if not self._held and b"-" not in data:
            self._line_start = data[-1] == 0x0A
            self._data(data)
            return
        data = self._held + data
        self._held = b""
        while data and self._state != _REFUSED:
            data = self._split(data)

    def end(self) -> None:
        """The message is complete."""
        if self._held and self._state != _REFUSED:  # a last line without CRLF
            held, self._held = self._held, b""
            self._split(held + b"\r\n")
        complete = self._state == _EPILOGUE and not self._held
        self.is_encrypted = complete and self._pgp
        self.is_securejoin = complete and not self._pgp
        self._refuse()

    def _refuse(self) -> None:
        self._state = _REFUSED
        self._held = self._header = b""
        self._sink = None

    def _split(self, data: bytes) -> bytes:
        """Handle *data* up to and with the first delimiter line; what follows is returned."""
        delimiter = self._delimiter
        if self._line_start and data.startswith(delimiter):
            at = 0
        else:
            at = _find(data, b"\n" + delimiter) + 1 or -1
        if at < 0:
            last = data.rfind(b"\n") + 1
            if (last or self._line_start) and delimiter.startswith(data[last:]):
                self._held = data[last:]
                data = data[:last]
            if data:
                self._line_start = data[-1] == 0x0A
                self._data(data)
            return b""
        if at:
            self._data(data[:at])
        end = data.find(b"\r\n", at)
        if (len(data) - 1 if end < 0 else end) - at > len(delimiter) + MAX_PADDING:
            self._refuse()
            return b""
        if end < 0:
            self._held = data[at:]
            self._line_start = True
            return b""
        rest = data[at + len(delimiter) : end]
        closing = rest.startswith(b"--")
        if rest[2 if closing else 0 :].strip(b" \t"):
            self._refuse()  # some programs see a delimiter here, some do not
            return b""
        self._line_start = True
        self._boundary(closing)
        return data[end + 2 :]

    def _data(self, data: bytes) -> None:
        """*data* stands between two delimiter lines."""
        if self._state == _PART_BODY:
            assert self._sink is not None
            try:
                accepted = self._sink.feed(self._decoder.feed(data))
            except ValueError:
                accepted = False
            if not accepted:
                self._refuse()
        elif self._state == _PART_HEADER:
            self._header += data
            end = self._header.find(b"\r\n\r\n")
            if end < 0:
                if len(self._header) > MAX_SMALL + 1:  # 1: half of the CRLF that is missing
                    self._refuse()
                return
            header, rest = self._header[: end + 2], self._header[end + 4 :]
            self._header = b""
            if len(header) > MAX_SMALL or not self._start_part(header):
                self._refuse()
            elif rest:
                self._state = _PART_BODY
                self._data(rest)
            else:
                self._state = _PART_BODY
        elif self._state == _PREAMBLE and self._incoming and self._pgp:
            self._header = (self._header + data).lstrip(_BLANK)
            if len(self._header) > MAX_PREAMBLE:
                self._refuse()
        elif self._state in (_PREAMBLE, _EPILOGUE) and data.strip(_BLANK):
            self._refuse()

    def _start_part(self, header: bytes) -> bool:
        """Choose decoder and check for a part with *header*; False if it has no place here."""
        text = header.decode("latin-1")
        if not _HEADER_TEXT.match(text):
            return False
        content_type: ContentType | None = None
        decoder: transfer.Decoder | None = None
        position = 0
        while position < len(text):
            match = _FIELD.match(text, position)
            if not match:
                return False
            position = match.end()
            name = match[1].lower()
            if name == "content-type":
                if content_type is not None:
                    return False
                try:
                    content_type = parse_content_type(match[2])
                except MimeError:
                    return False
            elif name == "content-transfer-encoding":
                if decoder is not None:
                    return False
                decoder = transfer.decoder(match[2])
                if decoder is None:
                    return False
        if content_type is None:
            return False
        self._decoder = decoder or transfer.Identity()
        if not self._pgp:
            wanted = "text/plain"
            self._sink = _FixedText(
                tuple(f"secure-join: {step}".encode() for step in _SECUREJOIN), fold_case=True
            )
        elif self._part == 1:
            wanted = "application/pgp-encrypted"
            self._sink = _FixedText((b"Version: 1",), fold_case=False)
        else:
            wanted = "application/octet-stream"
            self._sink = armor.ArmorCheck(self._incoming)
        return content_type.kind == wanted

    def _boundary(self, closing: bool) -> None:
        """A delimiter line was read."""
        if self._state == _PART_BODY:
            assert self._sink is not None
            try:
                complete = self._sink.feed(self._decoder.end()) and self._sink.end()
            except ValueError:
                complete = False
            if not complete or closing != (self._part == (2 if self._pgp else 1)):
                self._refuse()
                return
        elif self._state != _PREAMBLE or closing:
            self._refuse()
            return
        elif self._header and not _SENTENCE.match(self._header.rstrip(_BLANK)):
            self._refuse()
            return
        self._sink = None
        self._header = b""
        self._part += 1
        self._state = _EPILOGUE if closing else _PART_HEADER
