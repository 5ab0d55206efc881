# SPDX-License-Identifier: MIT
"""The milter protocol, version 6 (Postfix' MILTER_README, libmilter's mfdef.h). Sans-IO.

Bytes in, bytes out: `Session.feed` takes what arrived and returns what to send. Everything that
affects the state of a session lives here; what a message means is the business of a `Handler`.

    NEGOTIATE --O--> IDLE --M--> ENVELOPE --L--> HEADER --N--> BODY --E--> IDLE
                      ^                                              |
                      |   A (abort), a refused M, K                  +-- WAITING for DKIM keys

M is good in every state but NEGOTIATE, and always starts afresh. A packet that is too long,
malformed or out of order ends the session (`closed`); Postfix then lets the message wait (its
milter_default_action). A message beyond the bounds below is refused, if the handler ever refuses.

Cost: O(n) in the octets of complete packets. Memory: one incomplete packet (MAX_PACKET), what the
handler keeps, and the answers to one feed(). While `wanted` is not None, feed nothing more:
whatever arrives is only kept, up to MAX_PACKET.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from chatmaild.filtermail import replies
from chatmaild.filtermail.dkim import KeyRecord
from chatmaild.filtermail.replies import Reply

VERSION = 6

MAX_PACKET = 1 << 20  # octets; Postfix' header_size_limit is 102400, its body pieces are 65535
MAX_HEADERS = 1000  # fields of one message
MAX_HEADER_BYTES = 1 << 18  # names and values of one message together
MAX_RECIPIENTS = 1000  # Postfix' smtpd_recipient_limit
MAX_STRINGS = 200  # in one packet: macros, ESMTP parameters

# what the filter does (SMFIF_*)
ADD_HEADERS = 0x01
CHANGE_HEADERS = 0x10
CHANGE_SENDER = 0x40
SET_MACROS = 0x100

# what the MTA leaves out, or does not wait for (SMFIP_*)
NO_CONNECT = 0x01
NO_HELO = 0x02
NO_REPLY_HEADER = 0x80
NO_UNKNOWN = 0x100
NO_DATA = 0x200
NO_REPLY_CONNECT = 0x1000
NO_REPLY_MAIL = 0x4000
NO_REPLY_RCPT = 0x8000
NO_REPLY_END_OF_HEADER = 0x40000
NO_REPLY_BODY = 0x80000
LEADING_SPACE = 0x100000  # header values with the blank after the colon: DKIM needs it

PROTOCOL = (
    NO_HELO
    | NO_UNKNOWN
    | NO_DATA
    | NO_REPLY_HEADER
    | NO_REPLY_END_OF_HEADER
    | NO_REPLY_BODY
    | LEADING_SPACE
)

# macros wanted at each stage (SMFIM_*): two with MAIL, else none; Postfix sends less then
LOGIN = "{auth_authen}"
DKIM = "{chatmail_dkim}"  # who signs and verifies; main.cf sets it (milter_macro_defaults)
_MACRO_STAGES = ((2, f"{LOGIN} {DKIM}".encode()), (3, b""), (5, b""), (6, b""))

_R = TypeVar("_R")

_U32 = struct.Struct(">I")
_NEGOTIATION = struct.Struct(">III")

_CONTINUE = _U32.pack(1) + b"c"


class ProtocolError(Exception):
    """The peer does not speak the protocol; the session cannot go on."""


@dataclass(frozen=True)
class ChangeHeader:
    """Replace the value of the *number*-th field (from 1) called *name*."""

    number: int
    name: bytes
    value: bytes


@dataclass(frozen=True)
class InsertHeader:
    """Insert a field before the *position*-th (from 0)."""

    position: int
    name: bytes
    value: bytes


@dataclass(frozen=True)
class ChangeSender:
    sender: str


Change = ChangeHeader | InsertHeader | ChangeSender


@dataclass(frozen=True)
class Verdict:
    """What happens to a message: refused with *reply*, else changed and passed on."""

    reply: Reply | None = None
    changes: Sequence[Change] = field(default=())


PASS = Verdict()

Keys = Mapping[str, Sequence[KeyRecord] | None]


class Handler(Protocol):
    """Judges the messages of one session. Order of calls: as in the state diagram above.

    Strings are latin-1 decoded octets, one character an octet.
    """

    actions: int  # SMFIF_* it needs
    protocol: int  # SMFIP_* beyond PROTOCOL
    refuses: bool  # False: whatever happens, the message passes

    def connect(self, address: str) -> None:
        """The IP address of the client, "" if there is none. Only without NO_CONNECT."""

    def mail(self, sender: str, macros: Mapping[str, str]) -> Reply | None:
        """Start of a message: MAIL's address with its brackets; a reply refuses it.

        *macros* are what the MTA says of it: LOGIN, DKIM.
        """

    def rcpt(self, recipient: str) -> Reply | None:
        """A recipient with its brackets; a reply refuses this one (only without NO_REPLY_RCPT)."""

    def header(self, name: bytes, value: bytes) -> None: ...

    def end_of_header(self) -> None: ...

    def body(self, data: bytes) -> None: ...

    def end_of_message(self) -> Verdict | tuple[str, ...]:
        """The verdict, or the domain names of the DKIM keys it depends on."""

    def keys_suffice(self, keys: Keys) -> bool:
        """Whether the message passes with these keys, so that newer ones need not be asked for."""

    def keys(self, keys: Keys) -> Verdict:
        """The verdict with the keys asked for; None: the DNS could not say."""

    def abort(self) -> None:
        """Forget the message, finished or not."""

    def refused(self, reply: Reply) -> None:
        """The MTA is told *reply*, which one of these methods gave or this module."""

    def failed(self, error: Exception) -> None:
        """*error* was raised by one of these methods: a bug, worth a line in the log."""


_NEGOTIATE, _IDLE, _ENVELOPE, _HEADER, _BODY, _WAITING, _CLOSED = range(7)


def _packet(command: bytes, data: bytes = b"") -> bytes:
    return _U32.pack(len(data) + 1) + command + data


def encode_reply(reply: Reply) -> bytes:
    """SMFIR_REPLYCODE; the MTA reads the text as a printf format, so "%" is doubled."""
    return _packet(b"y", reply.replace("%", "%%").encode("ascii", "replace") + b"\0")


def encode_change(change: Change) -> bytes:
    match change:
        case ChangeHeader(number, name, value):
            return _packet(b"m", _U32.pack(number) + name + b"\0" + value + b"\0")
        case InsertHeader(position, name, value):
            return _packet(b"i", _U32.pack(position) + name + b"\0" + value + b"\0")
        case ChangeSender(sender):
            return _packet(b"e", b"<" + sender.encode("latin-1") + b">\0")


class Session:
    """One connection of the MTA."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._state = _NEGOTIATE
        self._buffer = bytearray()  # an incomplete packet; while waiting, whatever arrived
        self._need = 0  # octets the buffer must hold before it is worth another look
        self._protocol = 0  # negotiated SMFIP_*
        self._macros: dict[str, str] = {}  # of the next MAIL
        self._headers = self._header_bytes = self._recipients = 0
        self._refusal: Reply | None = (
            None  # said at the next opportunity; nothing is judged any more
        )
        self._failed = False  # the handler raised an exception on this message
        self.wanted: tuple[str, ...] | None = None  # domain names of DKIM keys: call answer()

    @property
    def closed(self) -> bool:
        """The session is over: send what there is and close the connection."""
        return self._state == _CLOSED

    @property
    def in_message(self) -> bool:
        """Between MAIL and the end of its message."""
        return self._state in (_ENVELOPE, _HEADER, _BODY, _WAITING)

    def feed(self, data: bytes) -> bytes:
        """Handle *data*; returns the octets to send. Does nothing once closed."""
        if self._state == _CLOSED:
            return b""
        if self._state == _WAITING:
            if len(self._buffer) + len(data) > MAX_PACKET:
                self._close()
            else:
                self._buffer += data
            return b""
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._need:
                return b""
            data = bytes(self._buffer)
            self._buffer = bytearray()
        out: list[bytes] = []
        try:
            self._packets(data, out)
        except ProtocolError:
            self._close()
        return b"".join(out)

    def keys_suffice(self, keys: Keys) -> bool:
        """Whether the message that waits passes with these keys; nothing is decided yet."""
        return bool(self._call(self._handler.keys_suffice, keys))

    def answer(self, keys: Keys) -> bytes:
        """The keys that `wanted` asked for; returns the octets to send."""
        if self._state != _WAITING:
            return b""
        self.wanted = None
        out = self._finish(self._call(self._handler.keys, keys))
        return out + self.feed(b"")  # what came in the meantime

    def _close(self) -> None:
        if self._state != _CLOSED:
            self._abort()
            self._state = _CLOSED
            self._buffer = bytearray()
            self.wanted = None

    def _packets(self, data: bytes, out: list[bytes]) -> None:
        position = 0
        self._need = _U32.size
        while len(data) - position >= _U32.size:
            (length,) = _U32.unpack_from(data, position)
            if not 1 <= length <= MAX_PACKET:
                raise ProtocolError("packet length")
            end = position + 4 + length
            if end > len(data):
                self._need = end - position
                break
            if data[position + 4] == 0x44 and length > 1 and data[position + 5] != 0x4D:
                # Postfix sends some before every header field; only those of MAIL say something here
                self._require(self._state != _NEGOTIATE)
                position = end
                continue
            answer = self._command(data[position + 4], data[position + 5 : end])
            if answer:
                out.append(answer)
            position = end
            if self._state == _WAITING:
                self._need = 0
                break
            if self._state == _CLOSED:
                return
        if position < len(data):
            self._buffer = bytearray(memoryview(data)[position:])

    def _command(self, command: int, data: bytes) -> bytes:
        # in the order of how often they come
        if command == 0x42:  # B: body
            self._require(self._state == _BODY)
            if not self._refusal:
                self._call(self._handler.body, data)
            return self._continue(NO_REPLY_BODY)
        if command == 0x4C:  # L: header field
            return self._header(data)
        if command == 0x44:  # D: macros
            self._define(data)
            return b""
        if command == 0x52:  # R: RCPT
            return self._rcpt(data)
        if command == 0x4E:  # N: end of header
            self._require(self._state in (_ENVELOPE, _HEADER))
            self._state = _BODY
            if not self._refusal:
                self._call(self._handler.end_of_header)
            return self._continue(NO_REPLY_END_OF_HEADER)
        if command == 0x4D:  # M: MAIL
            return self._mail(data)
        if command == 0x45:  # E: end of message
            return self._end_of_message(data)
        if command == 0x41:  # A: abort
            self._require(self._state != _NEGOTIATE)
            self._abort()
            return b""
        if command == 0x51:  # Q: quit
            self._close()
            return b""
        if command == 0x4F:  # O: negotiation
            return self._negotiate(data)
        self._require(self._state != _NEGOTIATE)
        if command == 0x43:  # C: connect
            self._connect(data)
            return self._continue(NO_REPLY_CONNECT)
        if command == 0x4B:  # K: quit, but a new SMTP client follows on this connection
            self._abort()
            return b""
        if command in (0x48, 0x54, 0x55):  # H, T, U: HELO, DATA, unknown command
            return _CONTINUE
        raise ProtocolError("unknown command")

    @staticmethod
    def _require(condition: bool) -> None:
        if not condition:
            raise ProtocolError("out of order")

    @staticmethod
    def _strings(data: bytes) -> list[bytes]:
        """The NUL-terminated strings that *data* consists of."""
        if not data.endswith(b"\0"):
            raise ProtocolError("string without end")
        strings = data[:-1].split(b"\0", MAX_STRINGS)
        if len(strings) > MAX_STRINGS:
            raise ProtocolError("too many strings")
        return strings

    def _call(self, method: Callable[..., _R], *arguments: object) -> _R | None:
        """Call a method of the handler; an exception refuses this message and no other."""
        if self._failed:
            return None
        try:
            return method(*arguments)
        except Exception as error:
            self._failed = True
            self._refusal = replies.TEMPORARY_FAILURE
            self._handler.failed(error)
            return None

    def _continue(self, no_reply: int) -> bytes:
        return b"" if self._protocol & no_reply else _CONTINUE

    def _negotiate(self, data: bytes) -> bytes:
        self._require(self._state == _NEGOTIATE and len(data) >= _NEGOTIATION.size)
        version, actions, protocol = _NEGOTIATION.unpack_from(data)
        if version < VERSION or self._handler.actions & ~actions or not protocol & LEADING_SPACE:
            raise ProtocolError("the MTA cannot do what this filter needs")
        self._protocol = (PROTOCOL | self._handler.protocol) & protocol
        self._state = _IDLE
        macros = b""
        if actions & SET_MACROS:
            macros = b"".join(_U32.pack(stage) + names + b"\0" for stage, names in _MACRO_STAGES)
        accepted = self._handler.actions | actions & SET_MACROS
        return _packet(b"O", _NEGOTIATION.pack(VERSION, accepted, self._protocol) + macros)

    def _connect(self, data: bytes) -> None:
        """SMFIC_CONNECT: host name, NUL, family, and for IP: port, address, NUL."""
        _, separator, rest = data.partition(b"\0")
        if not separator or not rest:
            raise ProtocolError("connect")
        address = ""
        if rest[:1] in (b"4", b"6"):
            if len(rest) < 4 or not rest.endswith(b"\0"):
                raise ProtocolError("connect")
            address = rest[3:-1].decode("latin-1")
        self._call(self._handler.connect, address)

    def _define(self, data: bytes) -> None:
        """SMFIC_MACRO of MAIL: the command that follows, then names and values in turn."""
        self._require(self._state != _NEGOTIATE and len(data) >= 1)
        strings = [string.decode("latin-1") for string in self._strings(data[1:] or b"\0")]
        self._macros = dict(zip(strings[0::2], strings[1::2], strict=False))

    def _mail(self, data: bytes) -> bytes:
        self._require(self._state not in (_NEGOTIATE, _WAITING))
        sender = self._strings(data)[0].decode("latin-1")
        self._abort()
        self._state = _ENVELOPE
        macros, self._macros = self._macros, {}
        reply = self._call(self._handler.mail, sender, macros) or self._refusal
        if self._protocol & NO_REPLY_MAIL:
            self._refusal = reply
            return b""
        if reply and self._handler.refuses:
            self._abort()
            return self._refuse(reply)
        return _CONTINUE

    def _rcpt(self, data: bytes) -> bytes:
        self._require(self._state == _ENVELOPE)
        recipient = self._strings(data)[0].decode("latin-1")
        reply = self._refusal
        if not reply:
            if self._recipients >= MAX_RECIPIENTS:
                reply = replies.TOO_MANY_RECIPIENTS
            else:
                reply = self._call(self._handler.rcpt, recipient) or self._refusal
        if not reply:
            self._recipients += 1
        if self._protocol & NO_REPLY_RCPT:
            self._refusal = reply
            return b""
        return self._refuse(reply) if reply and self._handler.refuses else _CONTINUE

    def _header(self, data: bytes) -> bytes:
        self._require(self._state in (_ENVELOPE, _HEADER))
        self._state = _HEADER
        strings = self._strings(data)
        if len(strings) != 2:
            raise ProtocolError("header")
        self._headers += 1
        self._header_bytes += len(data)
        if self._headers > MAX_HEADERS or self._header_bytes > MAX_HEADER_BYTES:
            self._refusal = self._refusal or replies.HEADER_TOO_LARGE
        if not self._refusal:
            self._call(self._handler.header, strings[0], strings[1])
        return self._continue(NO_REPLY_HEADER)

    def _end_of_message(self, data: bytes) -> bytes:
        self._require(self._state == _BODY)
        if data and not self._refusal:
            self._call(self._handler.body, data)
        verdict: Verdict | tuple[str, ...] | None = None
        if not self._refusal:
            verdict = self._call(self._handler.end_of_message)
        if isinstance(verdict, tuple):
            self.wanted = verdict
            self._state = _WAITING
            return b""
        return self._finish(verdict)

    def _finish(self, verdict: Verdict | None) -> bytes:
        """Say what happens to the message, and be ready for the next; None: `_refusal` holds."""
        if verdict is None:
            verdict = Verdict(self._refusal or replies.TEMPORARY_FAILURE)
        self._abort()
        if verdict.reply and not self._handler.refuses:
            return _CONTINUE
        if verdict.reply:
            return self._refuse(verdict.reply)
        return b"".join(map(encode_change, verdict.changes)) + _CONTINUE

    def _refuse(self, reply: Reply) -> bytes:
        self._handler.refused(reply)
        return encode_reply(reply)

    def _abort(self) -> None:
        if self.in_message:
            self._failed = False
            self._call(self._handler.abort)
        self._state = _IDLE
        self._headers = self._header_bytes = self._recipients = 0
        self._refusal = None
        self._failed = False
