# SPDX-License-Identifier: MIT
"""Raw SMTP and IMAP for tests: what a client that is not Delta Chat would do."""

from __future__ import annotations

import imaplib
import re
import secrets
import smtplib
import socket
import ssl
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .lab import Lab

TIMEOUT = 30  # seconds
for _command in ("GETMETADATA", "SETMETADATA"):
    imaplib.Commands.setdefault(_command, ("AUTH", "SELECTED"))
PASSWORD = "a-password-of-22-chars"


def context(*alpn: str) -> ssl.SSLContext:
    """A TLS context that takes the relay's self-signed certificate."""
    made = ssl.create_default_context()
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    if alpn:
        made.set_alpn_protocols(list(alpn))
    return made


class ImapOver443(imaplib.IMAP4):
    """IMAP behind ALPN on port 443."""

    def _create_socket(self, timeout: float | None = None) -> socket.socket:
        plain = socket.create_connection((self.host, self.port), timeout)
        return context("imap").wrap_socket(plain, server_hostname=self.host)


class SmtpOver443(smtplib.SMTP):
    """SMTP behind ALPN on port 443."""

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        plain = socket.create_connection((host, port), timeout)
        return context("smtp").wrap_socket(plain, server_hostname=host)


def without_delay(session: smtplib.SMTP) -> None:
    """Send what is to be sent at once, as Delta Chat does.

    Else the kernel keeps the second TLS record of a message back until the first one is acknowledged, which
    the other side delays by 40 ms (Nagle, RFC 896; RFC 1122 section 4.2.3.2).
    """
    assert session.sock is not None
    session.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Idle:
    """A session that waits with IDLE (RFC 2177), which imaplib does not know."""

    def __init__(self, session: imaplib.IMAP4) -> None:
        self._session = session
        session.select("INBOX")
        session.send(b"i1 IDLE\r\n")
        while not session.readline().startswith(b"+"):
            pass

    def notified(self) -> float:
        """Wait for one more message; when its notification was there, by the monotonic clock."""
        while not re.match(rb"\* [1-9]\d* EXISTS", line := self._session.readline()):
            assert line, "the server ended the session"
        return time.monotonic()

    def close(self) -> None:
        """End the session."""
        self._session.shutdown()


@dataclass(frozen=True)
class Account:
    """An address and its password."""

    address: str
    password: str


class Mail:
    """Connections from the lab's client to one relay."""

    def __init__(self, lab: Lab, host: str, domain: str) -> None:
        self.lab = lab
        self.host = host
        self.domain = domain

    def new_address(self) -> Account:
        """An address that does not exist yet."""
        return Account(f"{secrets.token_hex(5)[:9]}@{self.domain}", PASSWORD)

    def account(self) -> Account:
        """A new account, made by its first login."""
        made = self.new_address()
        self.imap(made).logout()
        return made

    def imap(self, account: Account, port: int = 993) -> imaplib.IMAP4:
        """A logged-in IMAP session on port 993, 143 (STARTTLS) or 443 (ALPN)."""
        with self.lab.at_client():
            if port == 993:
                session: imaplib.IMAP4 = imaplib.IMAP4_SSL(
                    self.host, port, ssl_context=context(), timeout=TIMEOUT
                )
            elif port == 443:
                session = ImapOver443(self.host, port, TIMEOUT)
            else:
                session = imaplib.IMAP4(self.host, port, TIMEOUT)
                session.starttls(context())
        session.login(account.address, account.password)
        return session

    def smtp(self, account: Account | None, port: int = 465) -> smtplib.SMTP:
        """An SMTP session on 465, 587, 443 or 25; logged in if there is an *account*."""
        with self.lab.at_client():
            name = "[127.0.0.1]"
            if port == 465:
                session: smtplib.SMTP = smtplib.SMTP_SSL(
                    self.host, port, name, context=context(), timeout=TIMEOUT
                )
            elif port == 443:
                session = SmtpOver443(self.host, port, name, TIMEOUT)
            else:
                session = smtplib.SMTP(self.host, port, name, TIMEOUT)
                session.starttls(context=context())
        without_delay(session)
        session.ehlo()
        if account is not None:
            session.login(account.address, account.password)
        return session

    def metadata(self, account: Account, key: str, mailbox: str = '""') -> str | None:
        """An annotation (RFC 5464) as *account* sees it, None for NIL."""
        session = self.imap(account)
        try:
            session.select("INBOX", readonly=True)
            status, said = session._simple_command("GETMETADATA", mailbox, f"({key})")
            assert status == "OK", said
            _status, data = session._untagged_response("OK", [None], "METADATA")
        finally:
            session.logout()
        for item in data:
            if isinstance(item, tuple):  # a literal
                return item[1].decode()
            found = re.search(r' (?:"(.*)"|NIL)\)\Z', (item or b"").decode())
            if found:
                return found[1]
        return None

    def set_token(self, account: Account, token: str) -> None:
        """What a device does at each login: tell its token for notifications."""
        session = self.imap(account)
        try:
            session.select("INBOX")
            words = ("SETMETADATA", "INBOX", f'(/private/devicetoken "{token}")')
            status, said = session._simple_command(*words)
            assert status == "OK", said
        finally:
            session.logout()

    def send(
        self,
        session: smtplib.SMTP,
        sender: str,
        recipients: Iterable[str],
        message: bytes,
    ) -> tuple[int, str]:
        """One message; the reply that decided: of MAIL, RCPT or the end of DATA."""
        code, text = session.mail(sender)
        if code != 250:
            return _reply(session, code, text)
        for recipient in recipients:
            code, text = session.rcpt(recipient)
            if code not in (250, 251):
                return _reply(session, code, text)
        code, text = session.data(message)
        return code, text.decode()

    def received(self, account: Account) -> list[bytes]:
        """All messages in the inbox of an account, whole."""
        session = self.imap(account)
        try:
            session.select("INBOX", readonly=True)
            _status, data = session.search(None, "ALL")
            numbers = data[0].split()
            return [_body(session.fetch(n.decode(), "(BODY.PEEK[])")[1]) for n in numbers]
        finally:
            session.logout()


def _body(answer: Sequence[bytes | tuple[bytes, bytes] | None]) -> bytes:
    """The literal of a FETCH answer."""
    (literal,) = (part[1] for part in answer if isinstance(part, tuple))
    return literal


def _reply(session: smtplib.SMTP, code: int, text: bytes) -> tuple[int, str]:
    session.rset()
    return code, text.decode()
