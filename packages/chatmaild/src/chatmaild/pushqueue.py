# SPDX-License-Identifier: MIT
"""The queue of notifications that have not reached the notification server: which, and when again.

A row is one token of one user. What the server gets is the token and nothing else, so one notification
wakes the device for all messages that came before it was sent:

* a message for a token that waits for its first try changes nothing;
* a message for a token that waits for another try, or that is being sent right now, makes it a new
  notification, due at once;
* the end of a try only counts for the notification that was tried (`number`), not for its successor.

A try that failed is repeated 8, 64, 512 and 4096 seconds later; then, or DEADLINE after its last message,
a notification is dropped. The oldest are dropped when there are more than *max_length*, or when the
file would exceed *max_bytes*.

One SQLite file, in its WAL mode with synchronous=NORMAL: after kill -9 everything is there that a call
of `put` has returned for, after a power failure at most the last seconds are missing, and the disk is
waited for once in about a hundred notifications. Memory does not grow with the queue. All calls must
come from one thread; they block for the disk and raise OSError if the file cannot be used.

The module sqlite3 takes 1.3 MB: it is imported when there is something to store.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import sqlite3

RETRY_SECONDS = (8, 64, 512, 4096)  # after the first, second, ... try
DEADLINE = 5 * 3600  # seconds
MAX_LENGTH = 100_000
MAX_BYTES = 256 << 20  # a token has 4096 characters at most, real ones have some 600

_FUTURE = 60  # seconds a clock may have been wrong
_PAGE = 4096  # bytes, SQLite's page
_DROP_SHARE = 10  # one of so many goes when the file is full

_SCHEMA = """
CREATE TABLE IF NOT EXISTS queue (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    key BLOB NOT NULL UNIQUE,   -- of user and token
    user TEXT NOT NULL,
    token TEXT NOT NULL,
    since REAL NOT NULL,        -- its last message, seconds since 1970
    tries INTEGER NOT NULL,     -- made so far
    due REAL NOT NULL           -- of the next one
) STRICT;
CREATE INDEX IF NOT EXISTS first ON queue (due) WHERE tries = 0;
CREATE INDEX IF NOT EXISTS later ON queue (due) WHERE tries > 0;
"""
log = logging.getLogger("metadata")

_LANES = {False: "tries = 0", True: "tries > 0"}


class Notification(NamedTuple):
    """One row that is being tried."""

    number: int
    user: str
    token: str
    since: float
    tries: int


class Queue:
    """The queue in the file *path*, which need not exist."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        now: Callable[[], float] = time.time,
        *,
        max_length: int = MAX_LENGTH,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.length = 0  # may be read by other threads
        self.expired = 0  # dropped after the last try or the deadline
        self.overflown = 0  # dropped because there were too many
        self.merged = 0  # messages that needed no notification of their own
        self._path = Path(path)
        self._now = now
        self._max_length = max_length
        self._max_bytes = max_bytes
        self._flying: set[int] = set()  # numbers that were taken
        self._database: sqlite3.Connection | None = None

    def open(self) -> None:
        """Look at what an earlier process left."""
        if self._path.exists():
            self._connect()

    def put(self, wanted: Iterable[tuple[str, str]], since: float | None = None) -> None:
        """Note that there is a message for each (user, token), that came at *since* or now."""
        items = list(wanted)
        if not items:
            return
        database = self._connect()
        when = self._now() if since is None else min(since, self._now())
        try:
            with self._transaction(database):
                self._put(database, items, when)
        except OSError as error:
            if error.errno != errno.ENOSPC or not self.length:
                raise
            self._drop_oldest(max(1, self.length // _DROP_SHARE))
            with self._transaction(database):
                self._put(database, items, when)
        if self.length > self._max_length:
            self._drop_oldest(self.length - self._max_length)

    def _put(self, database: sqlite3.Connection, items: list[tuple[str, str]], when: float) -> None:
        for user, token in items:
            key = hashlib.blake2b(f"{user}\0{token}".encode(), digest_size=16).digest()
            found = database.execute("SELECT number, tries FROM queue WHERE key = ?", (key,))
            number, tries = found.fetchone() or (None, None)
            if tries == 0 and number not in self._flying:
                database.execute(
                    "UPDATE queue SET since = max(since, ?) WHERE number = ?", (when, number)
                )
                self.merged += 1
            else:
                database.execute(
                    "REPLACE INTO queue (key, user, token, since, tries, due)"
                    " VALUES (?, ?, ?, ?, 0, ?)",
                    (key, user, token, when, self._now()),
                )
                self.length += number is None

    def take(self, again: bool, count: int) -> list[Notification]:
        """Up to *count* notifications that are due, for their first try or for one *again*.

        The caller says `done` or `failed` of each; until then they are not given out again.
        """
        taken: list[Notification] = []
        while self.length and len(taken) < count:
            database = self._connect()
            now = self._now()
            with self._transaction(database):
                rows = database.execute(
                    "SELECT number, user, token, since, tries FROM queue"
                    f" WHERE {_LANES[again]} AND due <= ? ORDER BY due LIMIT ?",
                    (now, count - len(taken) + len(self._flying)),
                )
                waiting = [Notification(*row) for row in rows if row[0] not in self._flying]
                late = [item.number for item in waiting if item.since < now - DEADLINE]
                self._delete(database, late)
            self.expired += len(late)
            good = [item for item in waiting if item.since >= now - DEADLINE]
            good = good[: count - len(taken)]
            self._flying.update(item.number for item in good)
            taken += good
            if not late:
                break
        return taken

    def due(self, again: bool) -> float | None:
        """When the next notification is due, of those not taken; None if there is none."""
        if not self.length:
            return None
        database = self._connect()
        with self._transaction(database):
            rows = database.execute(
                f"SELECT number, due FROM queue WHERE {_LANES[again]} ORDER BY due LIMIT ?",
                (len(self._flying) + 1,),
            ).fetchall()
        return next((due for number, due in rows if number not in self._flying), None)

    def done(self, item: Notification) -> None:
        """*item* has reached the server, or never will."""
        database = self._connect()
        with self._transaction(database):
            self._delete(database, [item.number])
        self._flying.discard(item.number)

    def failed(self, item: Notification) -> bool:
        """The try of *item* failed. False if it was the last one, or the next would be too late."""
        due = self._now() + (RETRY_SECONDS[item.tries] if item.tries < len(RETRY_SECONDS) else 0)
        last = item.tries >= len(RETRY_SECONDS) or due > item.since + DEADLINE
        database = self._connect()
        before = self.length
        with self._transaction(database):
            if last:
                self._delete(database, [item.number])
            else:
                database.execute(
                    "UPDATE queue SET tries = tries + 1, due = ? WHERE number = ?",
                    (due, item.number),
                )
        self._flying.discard(item.number)
        self.expired += before - self.length
        return not last

    def close(self) -> None:
        """Close the file; what was taken counts as not tried."""
        if self._database is not None:
            self._database.close()
            self._database = None
        self._flying.clear()

    # -- the database ------------------------------------------------------------------------------

    def _connect(self) -> sqlite3.Connection:
        import sqlite3

        if self._database is None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                try:
                    self._database = self._open_file()
                except sqlite3.DatabaseError as error:
                    if not _is_damage(error):
                        raise
                    self._set_aside(error)
                    self._database = self._open_file()
            except sqlite3.Error as error:
                raise _os_error(error, self._path) from error
            (self.length,) = self._database.execute("SELECT count(*) FROM queue").fetchone()
        return self._database

    def _open_file(self) -> sqlite3.Connection:
        import sqlite3

        database = sqlite3.connect(self._path, timeout=5, isolation_level=None)
        try:
            for pragma in (
                f"page_size = {_PAGE}",
                "auto_vacuum = FULL",
                "locking_mode = EXCLUSIVE",
                "journal_mode = WAL",
                "synchronous = NORMAL",
                "cache_size = -512",
                "journal_size_limit = 4194304",
                f"max_page_count = {self._max_bytes // _PAGE}",
            ):
                database.execute(f"PRAGMA {pragma}").fetchall()
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            database.executescript(_SCHEMA)
            # written by a clock that went ahead
            now = self._now()
            database.execute(
                "UPDATE queue SET since = ?, due = ? WHERE since > ?", (now, now, now + _FUTURE)
            )
        except BaseException:
            database.close()
            raise
        return database

    def _set_aside(self, error: Exception) -> None:
        damaged = f"{self._path}.damaged"
        log.error("%s: %s; set aside as %s, what waited is lost", self._path, error, damaged)
        os.replace(self._path, damaged)
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self._path}{suffix}")

    @contextlib.contextmanager
    def _transaction(self, database: sqlite3.Connection) -> Iterator[None]:
        """Commit at the end; an error takes everything back and is an OSError."""
        import sqlite3

        before = self.length, self.merged
        try:
            database.execute("BEGIN IMMEDIATE")
            yield
            database.execute("COMMIT")
        except sqlite3.Error as error:
            self.length, self.merged = before
            with contextlib.suppress(sqlite3.Error):
                if database.in_transaction:
                    database.execute("ROLLBACK")
            if _is_damage(error):
                self.close()
                self.length = 0
                self._set_aside(error)
            raise _os_error(error, self._path) from error

    def _delete(self, database: sqlite3.Connection, numbers: list[int]) -> None:
        gone = database.executemany(
            "DELETE FROM queue WHERE number = ?", [(number,) for number in numbers]
        )
        self.length -= max(gone.rowcount, 0)

    def _drop_oldest(self, count: int) -> None:
        database = self._connect()
        with self._transaction(database):
            gone = database.execute(
                "DELETE FROM queue WHERE number IN (SELECT number FROM queue ORDER BY number LIMIT ?)",
                (count,),
            )
            self.length -= gone.rowcount
        self.overflown += gone.rowcount


def _is_damage(error: sqlite3.Error) -> bool:
    """Whether the file is no database any more, other than one that cannot be used just now."""
    import sqlite3

    return type(error) is sqlite3.DatabaseError


def _os_error(error: sqlite3.Error, path: Path) -> OSError:
    import sqlite3

    full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path))
