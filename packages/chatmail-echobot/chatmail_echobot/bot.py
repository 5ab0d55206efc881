# SPDX-License-Identifier: MIT
"""Whom the bot answers, and what. No network here: a message comes as a file, answers go to `send`.

It answers two things. A SecureJoin request by its invite link (the legacy protocol, as inviter:
https://securejoin.delta.chat/en/latest/new.html, "Setup Contact protocol"):

    vc-request             cleartext, with the invitation number and the peer's key
        vc-auth-required   to that key
    vc-request-with-auth   encrypted and signed, with the second code
        vc-contact-confirm

and a chat message that is encrypted for it and signed with the key in its own protected Autocrypt header:
text and files go back. It says nothing to mail that a program wrote (Auto-Submitted, RFC 3834, and
reports), to groups, to its own address, and to who sends too much; what it writes is Auto-Submitted.

The sender's address is the relay's word: the filter and DKIM checked it before the message got here.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import IO

from chatmaild.filtermail import address
from chatmaild.filtermail.limiter import Limiter

from chatmail_echobot import autocrypt, mime, openpgp
from chatmail_echobot.state import NAME, Identity

# what a peer may send: so many at once, so many a minute
BURST, PER_MINUTE = 20, 30
MAX_PEERS = 10_000  # whose rate is remembered

HELP = (
    "I am an echo bot: I send back the text and the files that you send me, so you can see that "
    "everything works. I keep nothing of it."
)
# parts by which clients talk to each other
_MACHINES = ("status-update.json", "location.kml", "message.kml")
# fields of messages that change something and say nothing, and of groups
_SILENT = (
    "chat-delete",
    "chat-edit",
    "chat-group-id",
    "chat-webrtc-accepted",
    "chat-webrtc-room",
    "list-id",
)


class Ignored(Exception):
    """No answer to this message; the text says why, without naming anybody."""


@dataclass(frozen=True)
class Peer:
    """Who gets an answer."""

    address: str
    cert: bytes


Send = Callable[[str, IO[bytes]], None]


class Bot:
    """handle() one message after the other. *send* submits a file to an address."""

    def __init__(
        self, identity: Identity, send: Send, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._me = identity
        self._send = send
        self._clock = clock
        self._limiter = Limiter(PER_MINUTE, BURST, MAX_PEERS)

    def handle(self, message: IO[bytes]) -> str:
        """Answer *message*, a file; what was done, for the log.

        Raises Ignored for what gets no answer, and what *send* raises; nothing else, whatever is in
        the message.
        """
        try:
            return self._handle(message)
        except mime.MimeError as error:
            raise Ignored(f"unreadable message, {error}") from error
        except openpgp.OpenPGPError as error:
            raise Ignored(f"unreadable message, {error}") from error

    def _handle(self, message: IO[bytes]) -> str:
        outer = mime.read_fields(message)
        sender = _sender(outer)
        if sender == self._me.address:
            raise Ignored("own message")
        if _is_automatic(outer):
            raise Ignored("automatic message")
        if not self._limiter.allow(sender, self._clock()):
            raise Ignored("too many messages of one sender")
        if outer.content_type.kind == "multipart/encrypted":
            return self._encrypted(sender, message)
        if outer.get("secure-join") == "vc-request":
            return self._join(sender, outer)
        raise Ignored("unencrypted message")

    def _join(self, sender: str, fields: mime.Fields) -> str:
        """Step 2 of SecureJoin as the inviter."""
        if not _same(fields.get("secure-join-invitenumber"), self._me.invite_number):
            raise Ignored("SecureJoin with an unknown invitation")
        cert = autocrypt.parse(fields.get("autocrypt"), sender)
        if cert is None:
            raise Ignored("SecureJoin without a key")
        self._answer_step(Peer(sender, cert), fields, "vc-auth-required")
        return "SecureJoin request answered"

    def _encrypted(self, sender: str, message: IO[bytes]) -> str:
        with openpgp.temporary() as armored:
            mime.copy_armor(message, armored)
            # first for the key in it, then for the signature by that key
            with openpgp.decrypt(armored, self._me.key) as plain:
                inner = mime.read_fields(plain)
            if _sender(inner) != sender:
                raise Ignored("From outside and inside differ")
            step = inner.get("secure-join")
            if not step:
                _check_is_chat(inner)
            cert = autocrypt.parse(inner.get("autocrypt"), sender)
            if cert is None:
                raise Ignored("encrypted message without a key")
            armored.seek(0)
            plain = openpgp.decrypt(armored, self._me.key, cert)
        peer = Peer(sender, cert)
        with plain:
            if step:
                return self._confirm(peer, inner, step)
            mime.read_fields(plain)
            return self._echo(peer, inner, plain)

    def _confirm(self, peer: Peer, inner: mime.Fields, step: str) -> str:
        """Step 6 of SecureJoin as the inviter."""
        if step != "vc-request-with-auth":
            raise Ignored("unexpected SecureJoin step")
        if not _same(inner.get("secure-join-auth"), self._me.auth):
            raise Ignored("SecureJoin with a wrong code")
        if inner.get("secure-join-fingerprint").upper() != openpgp.fingerprint(peer.cert):
            raise Ignored("SecureJoin with another fingerprint")
        self._answer_step(peer, inner, "vc-contact-confirm")
        return "SecureJoin confirmed"

    def _answer_step(self, peer: Peer, asked: mime.Fields, step: str) -> None:
        lines = [
            f"Secure-Join: {step}",
            f"Secure-Join-Fingerprint: {openpgp.fingerprint(self._me.cert)}",
            # the peer checks that we saw its very key
            autocrypt.field(peer.address, peer.cert, gossip=True),
        ]
        with _file_of(f"Secure-Join: {step}") as body:
            self._answer(peer, asked, lines, [mime.Piece(mime.PLAIN, body)])

    def _echo(self, peer: Peer, inner: mime.Fields, plain: IO[bytes]) -> str:
        """Send back the text and the files.

        A client sends a large file in a message of its own, after the text: both come back alike.
        """
        found = mime.parts(plain, inner)
        texts = [part for part in found if part.is_text][:1]
        files = [part for part in found if part.is_file and not _is_for_machines(part)]
        with contextlib.ExitStack() as stack:
            pieces: list[mime.Piece] = []
            for part in texts + files:
                content = stack.enter_context(openpgp.temporary())
                for data in mime.decoded(plain, part):
                    content.write(data)
                if not content.tell():
                    continue
                pieces.append(mime.Piece(part.lines, content))
                if part.is_text and mime.begins_with(content, b"/help"):
                    pieces = [mime.Piece(mime.PLAIN, stack.enter_context(_file_of(HELP)))]
                    break
            if not pieces:
                raise Ignored("nothing to echo")
            timer = inner.get("ephemeral-timer")
            # an answer without it would switch it off
            lines = [f"Ephemeral-Timer: {timer}"] if re.fullmatch("[0-9]{1,9}", timer) else []
            self._answer(peer, inner, lines, pieces)
        return "message echoed"

    def _answer(
        self, peer: Peer, asked: mime.Fields, lines: list[str], pieces: list[mime.Piece]
    ) -> None:
        """Write, encrypt and send."""
        message_id = f"<{secrets.token_hex(16)}@localhost>"
        boundary = secrets.token_hex(16)
        answered = asked.get("message-id")
        inner = [
            f'From: "{NAME}" <{self._me.address}>',
            f"To: <{peer.address}>",
            f"Date: {formatdate()}",
            f"Message-ID: {message_id}",
            *([f"In-Reply-To: {answered}"] if mime.is_message_id(answered) else []),
            f"Subject: Message from {NAME}",
            "Chat-Version: 1.0",
            "Auto-Submitted: auto-replied",
            autocrypt.field(self._me.address, self._me.cert),
            *lines,
            "MIME-Version: 1.0",
            f'Content-Type: multipart/mixed; boundary="{boundary}"; protected-headers="v1"',
        ]
        with openpgp.temporary() as plain:
            mime.write(plain, inner, boundary, pieces)
            with openpgp.encrypt(plain, self._me.key, peer.cert) as armored:
                with openpgp.temporary() as message:
                    outer = [
                        f"From: <{self._me.address}>",
                        'To: "hidden-recipients": ;',
                        f"Date: {formatdate()}",
                        f"Message-ID: {message_id}",
                        "Subject: [...]",
                        "MIME-Version: 1.0",
                    ]
                    mime.write_encrypted(message, outer, boundary, armored)
                    self._send(peer.address, message)


def _sender(fields: mime.Fields) -> str:
    """The one address in From; raises Ignored if there is no such."""
    values = fields.all("from")
    if len(values) != 1:
        raise Ignored("not exactly one From")
    try:
        # the display name of an inner From may be anything
        _name, bracket, spec = values[0].rpartition("<")
        return address.parse_address(spec.rstrip(" \t>") if bracket else values[0])
    except address.AddressError as error:
        raise Ignored("no address in From") from error


def _is_automatic(fields: mime.Fields) -> bool:
    """Whether a program wrote this (RFC 3834 section 5)."""
    return fields.get("auto-submitted").partition(";")[0].strip().lower() not in ("", "no")


def _check_is_chat(inner: mime.Fields) -> None:
    """Raise Ignored unless this is what a person wrote to the bot alone."""
    if _is_automatic(inner):
        raise Ignored("automatic message")
    if not inner.get("chat-version"):
        raise Ignored("not of a chat")
    if inner.content_type.kind == "multipart/report":
        raise Ignored("report")
    if inner.disposition == "reaction" or any(inner.get(name) for name in _SILENT):
        raise Ignored("nothing to echo")
    if inner.get("chat-content") not in ("", "sticker"):
        raise Ignored("nothing to echo")


def _is_for_machines(part: mime.Part) -> bool:
    shown = part.fields.get("content-disposition") + part.fields.get("content-type")
    return any(name in shown for name in _MACHINES)


def _file_of(text: str) -> IO[bytes]:
    file = openpgp.temporary()
    file.write(text.encode())
    return file


def _same(given: str, wanted: str) -> bool:
    return secrets.compare_digest(given.encode(), wanted.encode())
