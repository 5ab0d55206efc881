# SPDX-License-Identifier: MIT
"""Mail and logins without pause, while something happens to a relay: nothing lost, and how long refused."""

from __future__ import annotations

import contextlib
import imaplib
import re
import smtplib
import threading
import time
from collections.abc import Callable
from types import TracebackType

from .mail import Account, Mail
from .messages import encrypted
from .shell import wait_for

PAUSE = 0.05  # seconds between two tries
NO_ANSWER = (OSError, EOFError, smtplib.SMTPException, imaplib.IMAP4.error)


class Refusals:
    """Tries one after another, and the longest time in which none succeeded."""

    def __init__(self) -> None:
        self.tries = self.refused = 0
        self.longest = self.slowest = 0.0  # seconds without success; that one success took
        self.reasons: set[str] = set()
        self._since: float | None = None

    def attempt(self, what: Callable[[], None]) -> bool:
        """Try it; whether it succeeded."""
        begin = time.monotonic()
        self.tries += 1
        try:
            what()
        except NO_ANSWER as error:
            self.refused += 1
            self.reasons.add(f"{type(error).__name__}: {error}")
            self._since = begin if self._since is None else self._since
            self.longest = max(self.longest, time.monotonic() - self._since)
            return False
        end = time.monotonic()
        self.slowest = max(self.slowest, end - begin)
        if self._since is not None:
            self.longest = max(self.longest, end - self._since)
            self._since = None
        return True


class Traffic:
    """`with Traffic(mail) as traffic: upgrade()`; then `traffic.settle()`.

    One thread sends from one account to another, and like a client tries a message again until it is
    accepted; others log in by IMAP and by submission.
    """

    def __init__(self, mail: Mail) -> None:
        self.mail = mail
        self.sender, self.recipient = mail.account(), mail.account()
        self.accepted: set[str] = set()
        self.unsure: set[str] = set()  # sent, but the reply was lost: may come twice
        self.sending, self.imap, self.submission = Refusals(), Refusals(), Refusals()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=target, daemon=True)
            for target in (self._send, self._log_in_by_imap, self._log_in_by_smtp)
        ]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def more(self, messages: int = 10, timeout: float = 30) -> None:
        """Wait until so many more messages were accepted: what happened is over, and mail still flows."""
        wanted = len(self.accepted) + messages
        wait_for(lambda: len(self.accepted) >= wanted, timeout, f"{messages} more messages")

    def settle(self, timeout: float = 90) -> int:
        """Wait until everything that was accepted has arrived, each once; how many that were."""
        wait_for(lambda: self.accepted <= set(self._arrived()), timeout, "all accepted messages")
        arrived = self._arrived()
        assert set(arrived) <= self.accepted | self.unsure
        twice = {name for name in arrived if arrived.count(name) > 1}
        assert twice <= self.unsure, twice
        return len(self.accepted)

    @property
    def longest_refusal(self) -> float:
        """Seconds in which no login succeeded, by IMAP or by submission."""
        return max(self.imap.longest, self.submission.longest)

    def __str__(self) -> str:
        logins = self.imap.tries + self.submission.tries
        return (
            f"{len(self.accepted)} messages, all arrived; {logins} logins, refused for at most "
            f"{self.imap.longest:.2f} s by IMAP, {self.submission.longest:.2f} s by submission; "
            f"no message accepted for at most {self.sending.longest:.2f} s{self._refusals()}"
        )

    def _refusals(self) -> str:
        """What was said to logins that were refused, if any was."""
        return "".join(f"; {item}" for item in sorted(self.imap.reasons | self.submission.reasons))

    def _log_in_by_imap(self) -> None:
        while not self._stop.wait(PAUSE):
            self.imap.attempt(lambda: _end(self.mail.imap(self.recipient).logout))

    def _log_in_by_smtp(self) -> None:
        while not self._stop.wait(PAUSE):
            self.submission.attempt(lambda: _end(self.mail.smtp(self.sender).quit))

    def _send(self) -> None:
        while not self._stop.is_set():
            message = encrypted(self.sender.address, self.recipient.address)
            name = _name(message)
            while not self.sending.attempt(lambda m=message, n=name: self._deliver(m, n)):  # type: ignore[misc]
                if self._stop.wait(PAUSE):
                    return
            self.accepted.add(name)
            self._stop.wait(PAUSE)

    def _deliver(self, message: bytes, name: str) -> None:
        session = self.mail.smtp(self.sender)
        try:
            for command, argument in (("mail", self.sender), ("rcpt", self.recipient)):
                code, text = getattr(session, command)(argument.address)
                if code >= 400:
                    raise smtplib.SMTPResponseException(code, text)
            self.unsure.add(name)
            code, text = session.data(message)
            self.unsure.discard(name)
            if code != 250:
                raise smtplib.SMTPResponseException(code, text)
        finally:
            _end(session.close)

    def _arrived(self) -> list[str]:
        """The messages in the recipient's inbox."""
        session = self.mail.imap(self.recipient)
        try:
            session.select("INBOX", readonly=True)
            _status, data = session.fetch("1:*", "(BODY.PEEK[HEADER.FIELDS (MESSAGE-ID)])")
        finally:
            session.logout()
        return [_name(part[1]) for part in data if isinstance(part, tuple)]


def _name(message: bytes) -> str:
    """Its Message-ID."""
    found = re.search(rb"^message-id: *<([^>]*)>", message, re.IGNORECASE | re.MULTILINE)
    assert found, message
    return found[1].decode()


def _end(goodbye: Callable[[], object]) -> None:
    """What follows a success is none of it."""
    with contextlib.suppress(*NO_ANSWER):
        goodbye()


def works(mail: Mail, timeout: float = 30) -> None:
    """Wait until somebody logs in, sends a message, and it arrives."""
    deadline = time.monotonic() + timeout

    def account() -> Account | None:
        with contextlib.suppress(*NO_ANSWER):
            return mail.account()
        return None

    made = wait_for(account, timeout, "a login")
    assert made is not None
    with mail.smtp(made) as session:
        text = encrypted(made.address, made.address)
        code, said = mail.send(session, made.address, [made.address], text)
        assert code == 250, said
    left = deadline - time.monotonic()
    wait_for(lambda: len(mail.received(made)) == 1, max(left, 5), "the message")
