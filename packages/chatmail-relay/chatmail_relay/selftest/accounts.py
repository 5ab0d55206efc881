# SPDX-License-Identifier: MIT
"""Throw-away accounts: made as a client makes them, used, and removed.

On the relay itself root can do what the public cannot: have a token, make an account while registration is
closed, and delete accounts. On another relay their mail is deleted; the accounts are gone when that relay's
time for idle ones is over, as nobody but its administrator can delete them.
"""

from __future__ import annotations

import contextlib
import imaplib
import secrets
import string
import time
from dataclasses import dataclass

from ..accounts import AccountError, Relay
from . import web
from .net import Imap, Smtp, Target
from .report import TROUBLE, OutOfTime, Wrong, bounded

PREFIX = "ci-"  # what statistics of relays know test accounts by
_LETTERS = string.ascii_lowercase + string.digits
USERNAME, PASSWORD = 9, 22  # characters that clients invent
TOKEN_SECONDS = 900
CLEAN_UP_SECONDS = 60.0
NOT_NOW = "the relay takes no new accounts: see registration, and the limits on new addresses"


@dataclass(frozen=True)
class Account:
    """An address of *target* and its password."""

    target: Target
    address: str
    password: str

    def imap(self, port: int = 993) -> Imap:
        """A session with the inbox selected."""
        session = self.login(port)
        try:
            session.select("INBOX")
        except BaseException:
            session.shutdown()
            raise
        return session

    def login(self, port: int = 993) -> Imap:
        """A session of IMAP."""
        session = Imap(self.target, port)
        try:
            session.login(self.address, self.password)
        except BaseException:
            session.shutdown()
            raise
        return session

    def smtp(self, port: int = 465) -> Smtp:
        """A session of submission."""
        session = Smtp(self.target, port)
        try:
            session.login(self.address, self.password)
        except BaseException:
            session.close()
            raise
        return session


class Accounts:
    """The accounts of one relay; *relay* if it is the one of this machine and we are its root.

    *uses* is for how many accounts a token of ours is good, None for any number.
    """

    def __init__(self, target: Target, relay: Relay | None = None, *, uses: int | None = 2) -> None:
        self.target = target
        self.relay = relay
        self._uses = uses
        self.made: list[Account] = []  # what can be used
        self._addresses: list[str] = []  # what may have come into being
        self._token = ""

    @property
    def leave_something(self) -> bool:
        """Whether there may be something to remove."""
        return bool(self._addresses or self._token)

    @property
    def _registration(self) -> str:
        """What the settings say, if they can be known."""
        return self.relay.config.registration if self.relay is not None else "open"

    def by_login(self) -> str:
        """Make an account as `dcaccount:DOMAIN` does: invent it, and log in. Returns how it went."""
        if self._registration == "closed":
            self.by_root()
            return "registration is closed: made by root for this test"
        if self._registration == "token":
            return self.by_new()
        return self._log_in(*self._invented(), "by its first login")

    def by_new(self) -> str:
        """Make an account as `dcaccount:https://DOMAIN/new` does. Returns how it went."""
        if self._registration == "closed":
            return self._closed()
        token = self.token()
        address, password = web.fresh(self.target, token)
        how = "by /new with a token of this test" if token else "by /new"
        return self._log_in(address, password, how)

    def _invented(self) -> tuple[str, str]:
        """An address and a password as clients invent them."""
        user = "".join(secrets.choice(_LETTERS) for _ in range(USERNAME - len(PREFIX)))
        password = "".join(secrets.choice(_LETTERS) for _ in range(PASSWORD))
        return f"{PREFIX}{user}@{self.target.domain}", password

    def _log_in(self, address: str, password: str, how: str) -> str:
        account = Account(self.target, address, password)
        self._addresses.append(address)
        begin = time.monotonic()
        try:
            account.imap().logout()
        except imaplib.IMAP4.abort:
            raise
        except imaplib.IMAP4.error as error:
            raise Wrong("the first login is refused", NOT_NOW) from error
        self.made.append(account)
        return f"made {how} in {time.monotonic() - begin:.2f} s"

    def by_root(self) -> Account:
        """Make an account whatever the settings say, as root may on its own relay."""
        assert self.relay is not None
        account = Account(self.target, *self._invented())
        self._addresses.append(account.address)
        with self.relay.as_owner():
            self.relay.mail.create(account.address, account.password)
        self.made.append(account)
        return account

    def by_first_login(self) -> Account:
        """An account that does not exist yet: its first login makes it, with a token reserved by root."""
        account = Account(self.target, *self._invented())
        if token := self.token():
            assert self.relay is not None
            with self.relay.as_owner():
                self.relay.tokens.reserve(token, account.address, account.password, time.time())
        self._addresses.append(account.address)
        return account

    def _closed(self) -> str:
        """While registration is closed, /new must say so."""
        try:
            web.fresh(self.target)
        except Wrong as refused:
            self.by_root()
            return f"registration is closed: {refused}"
        raise Wrong("/new offers an account although registration is closed")

    def token(self) -> str:
        """What /new wants to see: a token of our own, or "" if none is needed."""
        if self._registration == "token" and not self._token:
            assert self.relay is not None
            now = time.time()
            with self.relay.as_owner():
                expires = int(now) + TOKEN_SECONDS
                made = self.relay.tokens.create(self._uses, expires, "self-test", now)
            self._token = made.token
        return self._token

    def remove(self) -> str:
        """Remove what was made; returns what became of it.

        Raises Wrong if something stays, and after CLEAN_UP_SECONDS.
        """
        try:
            with bounded(CLEAN_UP_SECONDS):
                return self._remove()
        except OutOfTime:
            text = f"not done after {CLEAN_UP_SECONDS:g} s"
            raise Wrong(text, "see chatmail-relay user list") from None

    def _remove(self) -> str:
        if self.relay is not None:
            return self._delete(self.relay)
        for account in self.made:
            _empty(account)
        number = len(self.made)
        return f"mail of {number} accounts deleted; the accounts expire without a login"

    def _delete(self, relay: Relay) -> str:
        with relay.as_owner():
            if self._token:
                relay.tokens.revoke(self._token)
            there = [address for address in self._addresses if relay.mail.is_taken(address)]
        left = 0
        for address in there:
            try:
                relay.delete(address)
            except (AccountError, OSError):
                left += 1
        if left:
            raise Wrong(f"{left} of {len(there)} accounts are left", "see chatmail-relay user list")
        return f"{len(there)} accounts deleted"


def _empty(account: Account) -> None:
    """Delete all mail of an account."""
    with contextlib.suppress(*TROUBLE):
        session = account.imap()
        try:
            session.store("1:*", "+FLAGS.SILENT", "\\Deleted")
            session.expunge()
        finally:
            session.logout()
