# SPDX-License-Identifier: MIT
"""Invitations: tokens that let somebody have a new address while `registration = token`.

A token is made by the administrator, may be used a number of times and may expire. `/new?token=`
*reserves* an address and password with it, for RESERVED_SECONDS; the first login with that pair
*claims* the address, and only then a use is counted. So a code that was scanned and never used costs
nothing, and of many scans of a code for one use the first login wins.

Exactly one use is counted for each account, whatever dies in between: `claim` counts and marks the
reservation in one transaction, a repeated login finds the mark and counts no more, and `confirm`
removes it when the account is there. A mark that stays although no account came gives its use back.

One SQLite file, written by chatmail-doveauth and by `chatmail-relay token`. It holds the tokens as they
are, so that they can be printed again, and of the passwords a hash; both are as private as the mail
store. Each call is a transaction of its own on a connection of its own: any thread may call.
Every method raises OSError if the file cannot be used now.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import sqlite3
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

PATH = Path("/var/lib/chatmail/doveauth/tokens.sqlite")
RESERVED_SECONDS = 3600
MAX_RESERVED = 1000  # addresses of one token that wait for their first login
BUSY_SECONDS = 3.0  # how long to wait for another writer; auth.lua waits five

_GRACE_SECONDS = 60  # a claimed address is surely created, or not, after that
_CHARACTERS = string.ascii_lowercase + string.digits
_LENGTH = 20  # 103 bits

_SCHEMA = """
CREATE TABLE IF NOT EXISTS token (
    token TEXT PRIMARY KEY,
    note TEXT NOT NULL,
    max_uses INTEGER,           -- NULL: any number
    used INTEGER NOT NULL DEFAULT 0,
    created INTEGER NOT NULL,   -- seconds since 1970, as all times
    expires INTEGER             -- NULL: never
) STRICT;
CREATE TABLE IF NOT EXISTS reserved (
    address TEXT PRIMARY KEY,
    password BLOB NOT NULL,     -- SHA-256
    token TEXT NOT NULL REFERENCES token,
    until INTEGER NOT NULL,
    counted INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX IF NOT EXISTS reserved_token ON reserved (token);
CREATE INDEX IF NOT EXISTS reserved_until ON reserved (until);
"""


class Invalid(Exception):
    """The token, or the address and password, give no right to an account; the text says why."""


class Token(NamedTuple):
    """One invitation; times in seconds since 1970, None for no limit."""

    token: str
    note: str
    max_uses: int | None
    used: int
    created: int
    expires: int | None

    def state(self, now: float) -> str:
        """ "valid", "expired" or "used up"."""
        if self.expires is not None and self.expires <= now:
            return "expired"
        if self.max_uses is not None and self.used >= self.max_uses:
            return "used up"
        return "valid"


class TokenStore:
    """The file of tokens; *is_taken* says whether an address came into being (MailStore)."""

    def __init__(self, path: str | os.PathLike[str], is_taken: Callable[[str], bool]) -> None:
        self._path = os.fspath(path)
        self._is_taken = is_taken

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A connection inside a transaction that is committed, and on disk, at the end."""
        try:
            with contextlib.closing(
                sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level=None)
            ) as connection:
                if not connection.execute("PRAGMA user_version").fetchone()[0]:
                    connection.executescript(
                        f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version=1; COMMIT"
                    )
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}", self._path) from error

    def create(self, max_uses: int | None, expires: int | None, note: str, now: float) -> Token:
        """Make a token."""
        text = "".join(secrets.choice(_CHARACTERS) for _ in range(_LENGTH))
        token = Token(text, note, max_uses, 0, int(now), expires)
        with self._transaction() as connection:
            connection.execute("INSERT INTO token VALUES (?, ?, ?, ?, ?, ?)", token)
        return token

    def tokens(self, now: float) -> list[Token]:
        """All tokens, the oldest first."""
        with self._transaction() as connection:
            self._forget(connection, now)
            rows = connection.execute("SELECT * FROM token ORDER BY created, rowid").fetchall()
        return [Token(*row) for row in rows]

    def revoke(self, token: str) -> bool:
        """Remove a token and the addresses it has reserved; False if there is no such token."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM reserved WHERE token = ?", (token,))
            done = connection.execute("DELETE FROM token WHERE token = ?", (token,))
            return done.rowcount == 1

    def check(self, token: str, now: float) -> None:
        """Raise Invalid unless *token* may reserve an address now."""
        with self._transaction() as connection:
            self._check(connection, token, now)

    def _check(self, connection: sqlite3.Connection, token: str, now: float) -> None:
        row = connection.execute("SELECT * FROM token WHERE token = ?", (token,)).fetchone()
        if row is None:
            raise Invalid("this invitation is not valid")
        state = Token(*row).state(now)
        if state == "expired":
            raise Invalid("this invitation has expired")
        if state == "used up":
            raise Invalid("this invitation has been used up")

    def reserve(self, token: str, address: str, password: str, now: float) -> None:
        """Let *address* be created with *password*, within RESERVED_SECONDS; raises Invalid."""
        with self._transaction() as connection:
            self._forget(connection, now)
            self._check(connection, token, now)
            waiting = connection.execute(
                "SELECT count(*) FROM reserved WHERE token = ?", (token,)
            ).fetchone()[0]
            if waiting >= MAX_RESERVED:
                raise Invalid("this invitation is used by too many at once, try again in an hour")
            connection.execute(
                "INSERT OR REPLACE INTO reserved VALUES (?, ?, ?, ?, 0)",
                (address, _hash(password), token, int(now) + RESERVED_SECONDS),
            )

    def claim(self, address: str, password: str, now: float) -> None:
        """Count a use for the account that is to be made now; raises Invalid.

        Repeating it is free until `confirm`.
        """
        with self._transaction() as connection:
            row = connection.execute(
                "SELECT password, token, counted FROM reserved WHERE address = ? AND until > ?",
                (address, int(now)),
            ).fetchone()
            if row is None:
                raise Invalid("no invitation has reserved this address")
            hashed, token, counted = row
            if not secrets.compare_digest(hashed, _hash(password)):
                raise Invalid("the address is reserved with another password")
            if counted:
                return
            done = connection.execute(
                "UPDATE token SET used = used + 1"
                " WHERE token = ? AND (max_uses IS NULL OR used < max_uses)",
                (token,),
            )
            if not done.rowcount:
                raise Invalid("this invitation has been used up")
            connection.execute("UPDATE reserved SET counted = 1 WHERE address = ?", (address,))

    def confirm(self, address: str) -> None:
        """The account exists now."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM reserved WHERE address = ?", (address,))

    def _forget(self, connection: sqlite3.Connection, now: float) -> None:
        """Remove what was reserved too long ago; counted uses without an account are given back."""
        connection.execute("DELETE FROM reserved WHERE until <= ? AND NOT counted", (int(now),))
        late = connection.execute(
            "SELECT address, token FROM reserved WHERE until <= ?", (int(now) - _GRACE_SECONDS,)
        ).fetchall()
        for address, token in late:
            if not self._is_taken(address):
                connection.execute("UPDATE token SET used = used - 1 WHERE token = ?", (token,))
            connection.execute("DELETE FROM reserved WHERE address = ?", (address,))


def _hash(password: str) -> bytes:
    return hashlib.sha256(password.encode("utf-8", "surrogatepass")).digest()
