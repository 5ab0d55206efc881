# SPDX-License-Identifier: MIT
"""The verdicts of a chatmail relay: three handlers of milter sessions, one a socket. No I/O but
questions to the mail store.

Outgoing (submission): login = MAIL FROM = From, an address of this relay and not disabled; not too
much a minute; end-to-end encrypted; then Subject becomes "[...]" and the message is signed.

Incoming (port 25, and HTTPS delivery): the mailbox exists and is not disabled; one From with one
address; end-to-end encrypted if any recipient wants only that; signed by the domain in From. An
envelope sender other than From is replaced by the null sender: a bounce must not go to whoever a
stranger names. A disabled mailbox is refused here; to our own users it is one of the unknown ones,
which Dovecot refuses and Postfix bounces, because a client gives up a message for one refused RCPT.

Sign-only (bounces made by Postfix itself): other relays refuse unsigned mail, so the null sender's
mail from mailer-daemon@DOMAIN is signed. Nothing is ever refused here.

Where Postfix' milter_macro_defaults says `{chatmail_dkim}=NAME`, another milter of that name signs and
verifies: the filter makes no signature and looks at none, and does everything else, so that milter
must come after this one, and must itself refuse mail without a valid signature of the domain in From
(there is exactly one From then, with one address; an address literal is the client's own). The macro
stands in the same file as the list of milters: there is no moment at which nobody verifies.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from chatmaild import metrics
from chatmaild.filtermail import address, dkim, milter, mime, replies
from chatmaild.filtermail.limiter import Limiter
from chatmaild.filtermail.milter import PASS, Verdict
from chatmaild.filtermail.replies import Reply
from chatmaild.users import MailStore

HIDDEN_SUBJECT = b"[...]"
SETUP_SUBJECT = "Autocrypt Setup Message"

ACCEPTED = metrics.Counter(
    "chatmail_mail_accepted", "Messages that passed the filter.", ("direction", "kind")
)
REFUSED = metrics.Counter(
    "chatmail_mail_refused",
    "Messages and recipients that the filter refused, for now or for good.",
    ("direction", "reason"),
)
DKIM = metrics.Counter(
    "chatmail_dkim",
    "Messages signed, and signatures looked for: valid, none valid, key unavailable.",
    ("result",),
)

log = logging.getLogger("filtermail")


def accepted_since(before: Mapping[tuple[str, ...], float]) -> list[str]:
    """Lines for the log: what was accepted since ACCEPTED.numbers() was *before*."""
    return [
        f"{direction.capitalize()}: {kind} accepted ({number - before.get((direction, kind), 0):.0f})"
        for (direction, kind), number in sorted(ACCEPTED.numbers().items())
        if number > before.get((direction, kind), 0)
    ]


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

    def __init__(self, sender: str, macros: Mapping[str, str], incoming: bool) -> None:
        self.sender = sender  # envelope, lower case, "" is the null sender
        self.dkim_elsewhere = bool(macros.get(milter.DKIM))
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


class Handler:
    """Parts of a milter.Handler that the three have in common."""

    direction = ""
    refuses = True
    paced = False  # whether the shell tells refusals no faster than its pace
    refusals = 0  # told so far
    accepted = 0  # messages so far

    def __init__(self, policy: Policy) -> None:
        self._policy = self._next_policy = policy
        self._signer: dkim.Signer | None = None

    def use(self, policy: Policy) -> None:
        """Judge by *policy* from the next message on."""
        self._next_policy = policy

    def connect(self, address: str) -> None:
        pass

    def keys_suffice(self, keys: milter.Keys) -> bool:
        raise NotImplementedError  # asks for none

    def keys(self, keys: milter.Keys) -> Verdict:
        raise NotImplementedError  # asks for none

    def failed(self, error: Exception) -> None:
        # no traceback and no text: both may quote the message
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        where = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else "?"
        log.error("%s: %s at %s", self.direction, type(error).__name__, where)

    def refused(self, reply: Reply) -> None:
        log.info("%s: refused, %s", self.direction, reply.why)
        REFUSED.inc(self.direction.lower(), reply.why)
        self.refusals += 1

    def _signatures(self) -> list[milter.InsertHeader]:
        """The DKIM-Signature fields of the message, none if it is not signed here."""
        if self._signer is None:
            return []
        DKIM.inc("signed")
        return [
            milter.InsertHeader(position, b"DKIM-Signature", value)
            for position, value in enumerate(self._signer.finish(self._policy.clock()))
        ]

    def _accepted(self, kind: str) -> None:
        ACCEPTED.inc(self.direction.lower(), kind)
        self.accepted += 1


# --- outgoing -------------------------------------------------------------------------------------


class OutgoingHandler(Handler):
    direction = "Outgoing"
    actions = milter.ADD_HEADERS | milter.CHANGE_HEADERS
    # a refused recipient would fail the whole message in the client: RCPT gets no verdict
    protocol = milter.NO_CONNECT | milter.NO_REPLY_RCPT

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.abort()

    def abort(self) -> None:
        self._message: _Message | None = None
        self._subjects: list[bytes] = []
        self._signer = None

    def mail(self, sender: str, macros: Mapping[str, str]) -> Reply | None:
        policy = self._policy = self._next_policy
        login = macros.get(milter.LOGIN, "")
        envelope = address.parse_envelope(sender)
        user, separator, domain = envelope.rpartition("@")
        if not login or login.lower() != envelope or not user or domain != policy.domain:
            return replies.NOT_LOGIN
        if policy.mailboxes.is_disabled(envelope):
            return replies.with_address(replies.SENDER_DISABLED, envelope)
        if not policy.limiter.allow(envelope, policy.monotonic()):
            return replies.with_address(replies.RATE_LIMITED, envelope)
        self._message = _Message(envelope, macros, incoming=False)
        return None

    def rcpt(self, recipient: str) -> Reply | None:
        assert self._message is not None
        self._message.recipients.append(address.parse_envelope(recipient))
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
        if self._policy.signing_keys and not message.dkim_elsewhere:
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
            return Verdict(replies.MALFORMED_HEADER)
        if not message.from_address:
            return Verdict(replies.BAD_FROM)
        if message.from_address != message.sender:
            return Verdict(replies.FROM_NOT_SENDER)
        kind = self._accepted_as(message)
        if kind is None:
            return Verdict(replies.NOT_ENCRYPTED)
        self._accepted(kind)
        changes: list[milter.Change] = [
            milter.ChangeHeader(number, b"Subject", b" " + HIDDEN_SUBJECT)
            for number, value in enumerate(self._subjects, 1)
            if value.strip(b" \t\r\n") != HIDDEN_SUBJECT
        ]
        changes += self._signatures()
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


class IncomingHandler(Handler):
    direction = "Incoming"
    paced = True
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

    def mail(self, sender: str, macros: Mapping[str, str]) -> Reply | None:
        self._policy = self._next_policy
        self._message = _Message(address.parse_envelope(sender), macros, incoming=True)
        return None

    def rcpt(self, recipient: str) -> Reply | None:
        assert self._message is not None
        mailboxes = self._policy.mailboxes
        envelope = address.parse_envelope(recipient)
        mailbox = local_mailbox(envelope, self._policy.domain)
        if mailbox is not None and envelope != "postmaster":  # RFC 5321: the host's own, if bare
            if not mailboxes.exists(mailbox):
                return replies.with_address(replies.UNKNOWN_RECIPIENT, envelope)
            if mailboxes.is_disabled(mailbox):
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
        if domain and not domain.startswith("[") and not message.dkim_elsewhere:
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
            return Verdict(replies.MALFORMED_HEADER)
        if not message.from_address:
            return Verdict(replies.BAD_FROM)
        if self._encrypted_only and self._accepted_as(message) is None:
            return Verdict(replies.NOT_ENCRYPTED)
        domain = message.from_address.rpartition("@")[2]
        if domain.startswith("["):
            literal = address.literal_of(domain)
            if literal is None or literal != _client_ip(self._client):
                return Verdict(replies.LITERAL_NOT_CLIENT)
            return self._accept(message)
        if message.dkim_elsewhere:
            return self._accept(message)
        assert self._verifier is not None
        return self._verifier.key_names() or self.keys({})

    def keys_suffice(self, keys: milter.Keys) -> bool:
        assert self._verifier is not None
        known = {name: found for name, found in keys.items() if found is not None}
        return self._verifier.verify(known)

    def keys(self, keys: milter.Keys) -> Verdict:
        message = self._message
        assert message is not None
        if self.keys_suffice(keys):
            DKIM.inc("valid")
            return self._accept(message)
        if None in keys.values():
            DKIM.inc("key unavailable")
            return Verdict(replies.KEY_UNAVAILABLE)
        DKIM.inc("none valid")
        return Verdict(replies.NO_SIGNATURE)

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
        self._accepted(self._accepted_as(message) or "unencrypted mail")
        if message.sender and message.sender != message.from_address:
            return Verdict(changes=(milter.ChangeSender(""),))
        return PASS


def _client_ip(text: str) -> address.IPAddress | None:
    """The address of the SMTP client as the MTA writes it, `IPv6:` before IPv6 or not."""
    return address.parse_ip(text[5:] if text[:5].lower() == "ipv6:" else text)


# --- sign-only ------------------------------------------------------------------------------------


class SignHandler(Handler):
    direction = "Bounce"
    actions = milter.ADD_HEADERS
    protocol = milter.NO_CONNECT | milter.NO_REPLY_MAIL | milter.NO_REPLY_RCPT
    refuses = False

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.abort()

    def abort(self) -> None:
        self._message: _Message | None = None
        self._signer = None

    def mail(self, sender: str, macros: Mapping[str, str]) -> Reply | None:
        self._policy = self._next_policy
        self._message = _Message(address.parse_envelope(sender), macros, incoming=False)
        return None

    def rcpt(self, recipient: str) -> Reply | None:
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
        ours = not message.sender and message.from_address == own
        if ours and self._policy.signing_keys and not message.dkim_elsewhere:
            self._signer = dkim.Signer(self._policy.signing_keys, fields)

    def body(self, data: bytes) -> None:
        if self._signer is not None:
            self._signer.body(data)

    def end_of_message(self) -> Verdict:
        self._accepted("signed mail" if self._signer is not None else "unsigned mail")
        return Verdict(changes=self._signatures())
