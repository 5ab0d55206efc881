# SPDX-License-Identifier: MIT
"""The verdicts of a chatmail relay: three handlers of milter sessions, one a socket. No I/O but
questions to the mail store.

Outgoing (submission): login = MAIL FROM = From, an address of this relay and not disabled; not too
much a minute; end-to-end encrypted; then Subject becomes "[...]" and the message is signed.

Incoming (port 25, and HTTPS delivery): the mailbox exists and is not disabled; one From with one
address; end-to-end encrypted if any recipient wants only that; signed by the domain in From. An
envelope sender other than From is replaced by the null sender: a bounce must not go to whoever a
stranger names.

Sign-only (bounces made by Postfix itself): other relays refuse unsigned mail, so the null sender's
mail from mailer-daemon@DOMAIN is signed. Nothing is ever refused here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from chatmaild.filtermail import address, dkim, milter, mime, replies
from chatmaild.filtermail.limiter import Limiter
from chatmaild.filtermail.milter import PASS, Verdict
from chatmaild.users import MailStore

HIDDEN_SUBJECT = b"[...]"
SETUP_SUBJECT = "Autocrypt Setup Message"

log = logging.getLogger("filtermail")


@dataclass(frozen=True)
class Policy:
    """What the handlers of all sessions share. Addresses and domain in lower case."""

    domain: str
    mailboxes: MailStore
    limiter: Limiter
    signing_keys: Sequence[dkim.SigningKey]
    passthrough_senders: Collection[str] = ()  # user@domain or @domain
    passthrough_recipients: Collection[str] = ()
    clock: Callable[[], float] = time.time  # seconds since the epoch
    monotonic: Callable[[], float] = time.monotonic


def _matches(mail_address: str, patterns: Collection[str]) -> bool:
    """Whether one of *patterns*, `user@domain` or `@domain`, is for *mail_address*."""
    return any(
        mail_address.endswith(pattern) if pattern.startswith("@") else mail_address == pattern
        for pattern in patterns
    )


class _Message:
    """What every handler keeps of a message while it passes."""

    def __init__(self, sender: str, incoming: bool) -> None:
        self.sender = sender  # envelope, lower case, "" is the null sender
        self.recipients: list[str] = []
        self.check = mime.MimeCheck(incoming)
        self.fields: list[dkim.Field] = []  # until the end of the header
        self.from_fields: list[str] = []
        self.from_address = ""  # "" unless there is exactly one From with exactly one address
        self.malformed = False  # has a field that some programs take for the end of the header

    def header(self, name: bytes, value: bytes) -> str:
        """Take a field; returns its name in lower case."""
        self.fields.append((name, value))
        # a blank before the colon: Postfix shows the colon as the value's first octet
        self.malformed |= value.startswith(b":") or name != name.strip()
        lower = name.lower().decode("latin-1")
        text = value.decode("latin-1")
        if lower == "from":
            self.from_fields.append(text)
        self.check.header(lower, text)
        return lower

    def end_of_header(self) -> None:
        self.check.end_of_header()
        if len(self.from_fields) == 1:
            try:
                self.from_address = address.parse_from(self.from_fields[0])
            except address.AddressError:
                pass


class _Handler:
    """Parts of a milter.Handler that the three have in common."""

    direction = ""
    refuses = True

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def connect(self, address: str) -> None:
        pass

    def keys(self, keys: milter.Keys) -> Verdict:
        raise NotImplementedError  # asks for none

    def failed(self, error: Exception) -> None:
        # no traceback and no text: both may quote the message
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        where = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else "?"
        log.error("%s: %s at %s", self.direction, type(error).__name__, where)

    def _log(self, text: str) -> None:
        log.info("%s: %s", self.direction, text)

    def _refuse(self, reply: str, why: str) -> Verdict:
        log.info("%s: refused, %s", self.direction, why)
        return Verdict(reply)


# --- outgoing -------------------------------------------------------------------------------------


class OutgoingHandler(_Handler):
    direction = "Outgoing"
    actions = milter.ADD_HEADERS | milter.CHANGE_HEADERS | milter.DELETE_RECIPIENTS
    # a refused recipient would fail the whole message in the client: RCPT gets no verdict
    protocol = milter.NO_CONNECT | milter.NO_REPLY_RCPT

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.abort()

    def abort(self) -> None:
        self._message: _Message | None = None
        self._subjects: list[bytes] = []
        self._signer: dkim.Signer | None = None
        self._disabled: list[str] = []

    def mail(self, sender: str, login: str) -> str | None:
        policy = self._policy
        envelope = address.parse_envelope(sender)
        user, separator, domain = envelope.rpartition("@")
        if not login or login.lower() != envelope or not user or domain != policy.domain:
            self._log("refused, sender is not the login")
            return replies.NOT_LOGIN
        if policy.mailboxes.is_disabled(envelope):
            self._log("refused, sender is disabled")
            return replies.with_address(replies.SENDER_DISABLED, envelope)
        if not policy.limiter.allow(envelope, policy.monotonic()):
            self._log("refused, too much mail from one sender")
            return replies.with_address(replies.RATE_LIMITED, envelope)
        self._message = _Message(envelope, incoming=False)
        return None

    def rcpt(self, recipient: str) -> str | None:
        assert self._message is not None
        envelope = address.parse_envelope(recipient)
        self._message.recipients.append(envelope)
        mailbox = local_mailbox(envelope, self._policy.domain)
        if mailbox is not None and self._policy.mailboxes.is_disabled(mailbox):
            self._disabled.append(recipient)
        return None

    def header(self, name: bytes, value: bytes) -> None:
        assert self._message is not None
        lower = self._message.header(name, value)
        if lower == "subject":
            self._subjects.append(value)

    def end_of_header(self) -> None:
        message = self._message
        assert message is not None
        message.end_of_header()
        fields = [
            (name, b" " + HIDDEN_SUBJECT if name.lower() == b"subject" else value)
            for name, value in message.fields
        ]
        message.fields = []
        if self._policy.signing_keys:
            self._signer = dkim.Signer(self._policy.signing_keys, fields)

    def body(self, data: bytes) -> None:
        assert self._message is not None
        self._message.check.body(data)
        if self._signer is not None:
            self._signer.body(data)

    def end_of_message(self) -> Verdict:
        message = self._message
        assert message is not None
        message.check.end()
        if message.malformed:
            return self._refuse(replies.MALFORMED_HEADER, "malformed header")
        if not message.from_address:
            return self._refuse(replies.BAD_FROM, "not exactly one From")
        if message.from_address != message.sender:
            return self._refuse(replies.FROM_NOT_SENDER, "From is not the sender")
        kind = self._accepted_as(message)
        if kind is None:
            return self._refuse(replies.NOT_ENCRYPTED, "unencrypted mail")
        self._log(f"{kind} accepted")
        if self._disabled and len(self._disabled) == len(message.recipients):
            return Verdict(discard=True)
        changes: list[milter.Change] = [milter.DeleteRecipient(r) for r in self._disabled]
        changes += [
            milter.ChangeHeader(number, b"Subject", b" " + HIDDEN_SUBJECT)
            for number, value in enumerate(self._subjects, 1)
            if value.strip(b" \t\r\n") != HIDDEN_SUBJECT
        ]
        changes += _signature_fields(self._signer, self._policy.clock())
        return Verdict(changes=changes)

    def _accepted_as(self, message: _Message) -> str | None:
        """What kind of acceptable message this is; None if it is none."""
        policy = self._policy
        if message.check.is_encrypted:
            return "encrypted mail"
        if message.check.is_securejoin:
            return "SecureJoin request"
        if _matches(message.sender, policy.passthrough_senders):
            return "mail of a passthrough sender"
        if (
            message.recipients == [message.from_address]
            and message.check.kind == "multipart/mixed"
            and [value.strip(b" \t\r\n") for value in self._subjects] == [SETUP_SUBJECT.encode()]
        ):
            return "Autocrypt Setup Message to oneself"
        if message.recipients and all(
            _matches(recipient, policy.passthrough_recipients) for recipient in message.recipients
        ):
            return "mail to passthrough recipients"
        return None


def _signature_fields(signer: dkim.Signer | None, now: float) -> list[milter.Change]:
    values = signer.finish(now) if signer is not None else []
    return [
        milter.InsertHeader(position, b"DKIM-Signature", value)
        for position, value in enumerate(values)
    ]


# --- incoming -------------------------------------------------------------------------------------


def local_mailbox(recipient: str, domain: str) -> str | None:
    """The mailbox address that mail for *recipient* would go to, if it is of *domain*; else None.

    `user+extension` is the mailbox of user (Postfix' recipient_delimiter). An address without
    domain counts as local: Postfix may complete it with this relay's.
    """
    local, separator, host = recipient.rpartition("@")
    if not separator:
        local, host = recipient, domain
    if host != domain:
        return None
    user, plus, _ = local.partition("+")
    return f"{user or local}@{domain}"


class IncomingHandler(_Handler):
    direction = "Incoming"
    actions = milter.CHANGE_SENDER
    protocol = milter.NO_REPLY_CONNECT | milter.NO_REPLY_MAIL

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self._client = ""
        self.abort()

    def abort(self) -> None:
        self._message: _Message | None = None
        self._encrypted_only = False  # at least one recipient takes nothing else
        self._automatic = False  # has a meaningful Auto-Submitted
        self._verifier: dkim.Verifier | None = None

    def connect(self, address: str) -> None:
        self._client = address

    def mail(self, sender: str, login: str) -> str | None:
        self._message = _Message(address.parse_envelope(sender), incoming=True)
        return None

    def rcpt(self, recipient: str) -> str | None:
        assert self._message is not None
        mailboxes = self._policy.mailboxes
        envelope = address.parse_envelope(recipient)
        mailbox = local_mailbox(envelope, self._policy.domain)
        if mailbox is not None and envelope != "postmaster":  # RFC 5321: the host's own, if bare
            if not mailboxes.exists(mailbox):
                self._log("refused, unknown recipient")
                return replies.with_address(replies.UNKNOWN_RECIPIENT, envelope)
            if mailboxes.is_disabled(mailbox):
                self._log("refused, recipient is disabled")
                return replies.with_address(replies.RECIPIENT_DISABLED, envelope)
            if mailboxes.requires_encryption(mailbox):
                self._encrypted_only = True
        self._message.recipients.append(envelope)
        return None

    def header(self, name: bytes, value: bytes) -> None:
        assert self._message is not None
        lower = self._message.header(name, value)
        if lower == "auto-submitted":
            self._automatic = value.strip(b" \t\r\n").lower() not in (b"", b"no")

    def end_of_header(self) -> None:
        message = self._message
        assert message is not None
        message.end_of_header()
        fields, message.fields = message.fields, []
        domain = message.from_address.rpartition("@")[2]
        if domain and not domain.startswith("["):
            self._verifier = dkim.Verifier(fields, domain, self._policy.clock())

    def body(self, data: bytes) -> None:
        assert self._message is not None
        self._message.check.body(data)
        if self._verifier is not None:
            self._verifier.body(data)

    def end_of_message(self) -> Verdict | tuple[str, ...]:
        message = self._message
        assert message is not None
        message.check.end()
        if message.malformed:
            return self._refuse(replies.MALFORMED_HEADER, "malformed header")
        if not message.from_address:
            return self._refuse(replies.BAD_FROM, "not exactly one From")
        if self._encrypted_only and self._accepted_as(message) is None:
            return self._refuse(replies.NOT_ENCRYPTED, "unencrypted mail")
        if self._verifier is None:
            literal = address.literal_of(message.from_address.rpartition("@")[2])
            if literal is None or literal != _client_ip(self._client):
                return self._refuse(replies.LITERAL_NOT_CLIENT, "From is another host's literal")
            return self._accept(message)
        names = self._verifier.key_names()
        if not names:
            return self._refuse(replies.NO_SIGNATURE, "no valid DKIM signature")
        return names

    def keys(self, keys: milter.Keys) -> Verdict:
        message, verifier = self._message, self._verifier
        assert message is not None and verifier is not None
        if verifier.verify({name: found for name, found in keys.items() if found is not None}):
            return self._accept(message)
        if None in keys.values():
            return self._refuse(replies.KEY_UNAVAILABLE, "DKIM key unavailable")
        return self._refuse(replies.NO_SIGNATURE, "no valid DKIM signature")

    def _accepted_as(self, message: _Message) -> str | None:
        """What a recipient who wants encrypted mail accepts this message as; None: not at all."""
        if message.check.is_encrypted:
            return "encrypted mail"
        if message.check.is_securejoin:
            return "SecureJoin request"
        if (
            self._automatic
            and message.check.kind == "multipart/report"
            and message.from_address.startswith("mailer-daemon@")
        ):
            return "delivery report"
        return None

    def _accept(self, message: _Message) -> Verdict:
        self._log(f"{self._accepted_as(message) or 'unencrypted mail'} accepted")
        if message.sender and message.sender != message.from_address:
            return Verdict(changes=(milter.ChangeSender(""),))
        return PASS


def _client_ip(text: str) -> address.IPAddress | None:
    """The address of the SMTP client as the MTA writes it, `IPv6:` before IPv6 or not."""
    return address.parse_ip(text[5:] if text[:5].lower() == "ipv6:" else text)


# --- sign-only ------------------------------------------------------------------------------------


class SignHandler(_Handler):
    direction = "Bounce"
    actions = milter.ADD_HEADERS
    protocol = milter.NO_CONNECT | milter.NO_REPLY_MAIL | milter.NO_REPLY_RCPT
    refuses = False

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.abort()

    def abort(self) -> None:
        self._message: _Message | None = None
        self._signer: dkim.Signer | None = None

    def mail(self, sender: str, login: str) -> str | None:
        self._message = _Message(address.parse_envelope(sender), incoming=False)
        return None

    def rcpt(self, recipient: str) -> str | None:
        return None

    def header(self, name: bytes, value: bytes) -> None:
        assert self._message is not None
        self._message.header(name, value)

    def end_of_header(self) -> None:
        message = self._message
        assert message is not None
        message.end_of_header()
        fields, message.fields = message.fields, []
        own = f"mailer-daemon@{self._policy.domain}"
        if not message.sender and message.from_address == own:
            self._signer = dkim.Signer(self._policy.signing_keys, fields)

    def body(self, data: bytes) -> None:
        if self._signer is not None:
            self._signer.body(data)

    def end_of_message(self) -> Verdict:
        self._log("signed" if self._signer is not None else "passed unsigned")
        return Verdict(changes=_signature_fields(self._signer, self._policy.clock()))
