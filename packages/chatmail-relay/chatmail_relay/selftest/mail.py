# SPDX-License-Identifier: MIT
"""Mail: what is refused, what clients are told, and how long a message takes to one that waits for it."""

from __future__ import annotations

import contextlib
import email
import re
import select
import time
from collections.abc import Iterable, Iterator
from typing import Any

from . import message
from .accounts import Account
from .net import IMAP_PORTS, STEP_SECONDS, SUBMISSION_PORTS, Imap, Smtp, Target
from .report import TROUBLE, Wrong, describe

CAPABILITIES = ("IDLE", "METADATA", "QUOTA", "XCHATMAIL", "XDELTAPUSH")
VENDOR = "/shared/vendor/deltachat/"
KEYS = ("maxsmtprecipients", "irohrelay", "turn", "appversions")
ENCRYPTION_NEEDED = (523, "Encryption Needed: Invalid Unencrypted Mail")  # clients know it by this
NOT_SIGNED = (550, 554)  # replies to mail that nobody signed
STRANGER = "self-test@example.org"  # of a domain that sends no mail, so that nobody can sign for it
TRACES = ("Received", "DKIM-Signature", "Authentication-Results")
DELIVERY_SECONDS = 30.0
LOOK_BACK_SECONDS = 5.0  # how often the sender's mailbox is looked into
TLS_RECORD = 1 << 14  # octets at most; one that is read in part would be nothing for select(2), too
FEDERATION_SECONDS = 90.0  # two greetings, DNS and DKIM of a relay never met before

_EXISTS = re.compile(rb"\* ([1-9]\d*) EXISTS")
_DIAGNOSTIC = re.compile(rb"^Diagnostic-Code: *(.*(?:\r?\n[ \t].*)*)", re.M | re.I)


def logins(account: Account) -> str:
    """Log in on every port that takes a login; raises Wrong naming those that do not."""
    trouble = []
    for kind, ports, connect in (
        ("IMAP", IMAP_PORTS, account.imap),
        ("submission", SUBMISSION_PORTS, account.smtp),
    ):
        for port in ports:
            try:
                _close(connect(port))
            except TROUBLE as error:
                trouble.append(f"{kind} on {port}: {describe(error)}")
    if trouble:
        raise Wrong("; ".join(trouble))
    return "IMAP and submission, on all six ports"


def _close(session: Imap | Smtp) -> None:
    if isinstance(session, Imap):
        session.logout()
    else:
        session.quit()


# --- what clients are told --------------------------------------------------------------------------


def metadata(account: Account) -> dict[str, str]:
    """What the relay tells clients, by the last word of its key; what it does not tell is left out."""
    session = account.imap()
    try:
        # imaplib knows those from before the login only
        offered = set((session.capability()[1][0] or b"").decode("ascii", "replace").split())
        missing = [word for word in CAPABILITIES if word not in offered]
        if missing:
            raise Wrong(f"IMAP does not offer {', '.join(missing)}")
        keys = " ".join(VENDOR + key for key in KEYS)
        kind, _data = session.xatom("GETMETADATA", '""', f"({keys})")
        if kind != "OK":
            raise Wrong(f"GETMETADATA is answered with {kind}")
        return values(session.response("METADATA")[1])
    finally:
        session.logout()


def values(parts: Iterable[Any]) -> dict[str, str]:
    """The values in an answer to GETMETADATA (RFC 5464), as imaplib gives it: bytes, and pairs that end in
    a literal. NIL is left out."""
    answer = b""
    for part in parts:
        if isinstance(part, tuple):
            head, literal = part
            answer += (
                head[: head.rindex(b"{")] + b'"' + re.sub(rb'(["\\])', rb"\\\1", literal) + b'"'
            )
        elif part:
            answer += part
    pattern = rb'(\w+) "((?:[^"\\]|\\.)*)"'
    return {
        match[1].decode(): re.sub(rb"\\(.)", rb"\1", match[2]).decode("utf-8", "replace")
        for match in re.finditer(re.escape(VENDOR.encode()) + pattern, answer, re.DOTALL)
    }


# --- what is refused --------------------------------------------------------------------------------


def cleartext_submitted(sender: Account, recipient: str) -> str:
    """Submission refuses what is not encrypted, in the words that clients know."""
    with contextlib.closing(sender.smtp()) as session:
        text = message.cleartext(sender.address, recipient)
        return _exactly(send(session, sender.address, recipient, text))


def cleartext_received(target: Target, recipient: str) -> str:
    """Port 25 refuses what is not encrypted."""
    with contextlib.closing(Smtp(target, 25)) as session:
        text = message.cleartext(STRANGER, recipient)
        return _exactly(send(session, STRANGER, recipient, text))


def _exactly(reply: tuple[int, str]) -> str:
    said = f"{reply[0]} {reply[1]}"
    if reply[0] == 250:
        raise Wrong("is taken")
    if reply != ENCRYPTION_NEEDED:
        raise Wrong(f"is refused in other words: {said}")
    return said


def unsigned_received(target: Target, recipient: str) -> str:
    """Port 25 refuses encrypted mail that its domain has not signed."""
    with contextlib.closing(Smtp(target, 25)) as session:
        _name, text = message.encrypted(STRANGER, recipient)
        code, said = send(session, STRANGER, recipient, text)
    if code == 250:
        raise Wrong("is taken: everybody can write as anybody")
    if code not in NOT_SIGNED:
        raise Wrong(f"is answered with {code} {said}")
    return f"{code} {said}"


def send(session: Smtp, sender: str, recipient: str, text: bytes) -> tuple[int, str]:
    """One message; the reply that decided: to MAIL, RCPT or the end of DATA."""
    code, said = session.mail(sender)
    if code == 250:
        code, said = session.rcpt(recipient)
    if code == 250:
        code, said = session.data(text)
    return code, " ".join(said.decode("utf-8", "replace").split())


# --- delivery ---------------------------------------------------------------------------------------


def deliver(sender: Account, recipient: Account, seconds: float) -> tuple[float, bytes]:
    """Send a message to a client that waits with IDLE.

    Seconds from the server's 250 to the notification, and the message as it was stored. Raises Wrong.
    """
    name, text = message.encrypted(sender.address, recipient.address)
    inbox = recipient.imap()
    try:
        waiting = Idle(inbox)
        with contextlib.closing(sender.smtp()) as session:
            code, said = send(session, sender.address, recipient.address, text)
        accepted = time.monotonic()
        if code != 250:
            raise Wrong(f"the message is refused: {code} {said}")
        while (left := accepted + seconds - time.monotonic()) > 0:
            noticed = waiting.for_mail(min(left, LOOK_BACK_SECONDS))
            took = time.monotonic() - accepted
            noticed |= waiting.end()
            for stored in _messages(inbox) if noticed else ():
                if name.encode() in stored:
                    return took, stored
            if not noticed:
                _look_back(sender)
            waiting = Idle(inbox)
        raise Wrong(f"not there after {seconds:.0f} s")
    finally:
        inbox.shutdown()


class Idle:
    """The command IDLE (RFC 2177), which imaplib does not know; call for_mail once, then end.

    Reads by itself: what waits in imaplib's buffer would be nothing for select(2).
    """

    def __init__(self, session: Imap) -> None:
        self.session = session
        self.exists = 0  # messages in the mailbox, if that was told
        self._received = b""
        self.tag = session._new_tag()
        session.send(self.tag + b" IDLE\r\n")
        while not (line := self._answer()).startswith(b"+"):
            if line.startswith(self.tag):
                raise Wrong("IDLE is refused")

    def for_mail(self, seconds: float) -> bool:
        """Wait until there is mail, *seconds* at most; returns whether there is."""
        end = time.monotonic() + seconds
        while line := self._line(end):
            if self._notice(line):
                return True
        return False

    def end(self) -> bool:
        """End the command; returns whether that told of mail."""
        self.session.send(b"DONE\r\n")
        found = False
        while not (line := self._answer()).startswith(self.tag):
            found |= self._notice(line)
        return found

    def _notice(self, line: bytes) -> bool:
        told = _EXISTS.match(line)
        if told:
            self.exists = int(told[1])
        return bool(told)

    def _answer(self) -> bytes:
        """A line that the server owes us."""
        line = self._line(time.monotonic() + STEP_SECONDS)
        if not line:
            raise TimeoutError("no answer to IDLE")
        return line

    def _line(self, end: float) -> bytes:
        """The next line, with its end; nothing if it is not there at *end*, of the monotonic clock."""
        while b"\n" not in self._received:
            left = max(end - time.monotonic(), 0)
            if not select.select([self.session.sock], [], [], left)[0]:
                return b""
            data = self.session.sock.recv(TLS_RECORD)
            if not data:
                raise Wrong("the server ended the session during IDLE")
            self._received += data
        line, newline, self._received = self._received.partition(b"\n")
        return line + newline


def _messages(session: Imap) -> Iterator[bytes]:
    """All messages of the mailbox, the newest first."""
    session.noop()
    found = session.search(None, "ALL")[1][0] or b""
    for number in reversed(found.split()):
        for part in session.fetch(number.decode(), "(BODY.PEEK[])")[1]:
            if isinstance(part, tuple):
                yield part[1]


def _look_back(sender: Account) -> None:
    """Raises Wrong with what a report in the sender's mailbox says (RFC 3464), without addresses."""
    session = sender.imap()
    try:
        for stored in _messages(session):
            said = _DIAGNOSTIC.search(stored)
            if said:
                text = " ".join(said[1].decode("utf-8", "replace").split())
                raise Wrong("it came back: " + re.sub(r"<[^>]*>", "<...>", text))
    finally:
        session.shutdown()


def traces(stored: bytes) -> str:
    """What a stored message tells of its way; raises Wrong if it does."""
    header = email.message_from_bytes(stored)
    found = [name for name in TRACES if name in header]
    if found:
        raise Wrong(f"a message keeps {', '.join(found)}")
    if header["Subject"] != "[...]":
        raise Wrong("the subject of a message is not hidden")
    return "no way, no subject"
