# SPDX-License-Identifier: MIT
"""chatmail-expire: deletes old mail and idle accounts, and keeps mailboxes from getting full.

    a message older than delete_mails_after                     any folder, read or not
    a message above LARGE bytes older than delete_large_after   those a client has seen (cur)
    the oldest messages above TRIM_TO of max_mailbox_size       but none younger than PROTECTED
    an account without login for delete_inactive_users_after    with everything

Age is that of the file, as IMAP shows it (INTERNALDATE); the day of the last login counts whole. An
address with an open IMAP session is in use, however long ago its login. One that the admin has blocked
(empty password, DISABLED) loses its mail but stays: it must not be given away. A mailbox that is no
account (what an interrupted creation or a session of a removed account leaves) goes when it is empty
and idle.

It may be killed at any point, and several may run at once: each step is one removal that is right by
itself, whatever became of the others. One pass, one stat a message; memory does not depend on the size
of the store. With --mailbox, run by Dovecot when a mailbox fills up, only the quota counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
import logging
import os
import sys
import syslog
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from chatmaild.config import DEFAULT_PATH, Config, ConfigError, read_config
from chatmaild.maildir import (
    files,
    finish_removals,
    folders,
    forget_quota,
    is_empty,
    mailboxes,
    open_directory,
    open_store,
    quota_size,
    remove_mailbox,
    status_of,
    unlink,
)
from chatmaild.progress import Progress
from chatmaild.users import DAY, MailStore

LARGE = 200_000  # bytes on disk
TRIM_TO = 0.70  # of max_mailbox_size; Dovecot calls at 75 %, clients warn at 80 %
PROTECTED = DAY  # seconds a message is safe from trimming
ROUND = 10_000  # candidates for trimming at a time: bounds the memory
WHO_SECONDS = 60  # for Dovecot to say who is connected

_RECOUNTS = 3

log = logging.getLogger("expire")


@dataclass
class Summary:
    """What a run has found and deleted, or would delete."""

    dry_run: bool = False
    mailboxes: int = 0
    removed_mailboxes: int = 0
    messages: int = 0  # of the mailboxes that stay
    removed_messages: int = 0
    removed_bytes: int = 0  # on disk, of these messages
    removed_by: dict[str, int] = field(default_factory=lambda: {"age": 0, "large": 0, "quota": 0})
    errors: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{'Would remove' if self.dry_run else 'Removed'} {self.removed_mailboxes} out of "
            f"{self.mailboxes} mailboxes and {self.removed_messages} out of {self.messages} "
            f"messages in existing mailboxes in {self.seconds:.2f} seconds"
        )


class _Message(NamedTuple):
    """A message; the order of these is the order of trimming."""

    time: float  # seconds since 1970
    path: str  # in the mailbox
    size: int  # bytes on disk
    quota: int  # bytes as the quota counts


class Expiry:
    """One run: *now* is in seconds since 1970, *tick* is called after each mailbox.

    *connected* tells who has a session; it is asked once, and only if an account is idle; if it raises
    OSError, idle accounts stay. With *dry_run* nothing is changed. `summary` says what was done.
    """

    def __init__(
        self,
        config: Config,
        now: float,
        *,
        dry_run: bool = False,
        connected: Callable[[], frozenset[str]] = frozenset,
        tick: Callable[[Summary], None] = lambda summary: None,
    ) -> None:
        self.now = now
        self.dry_run = dry_run
        self.connected = connected
        self._sessions: frozenset[str] | None = None
        self._failure: OSError | None = None
        self.tick = tick
        self.summary = Summary(dry_run)
        self.old = now - config.delete_mails_after * DAY
        self.large_old = now - config.delete_large_after * DAY
        # the day of the last login is known, not its hour
        self.idle = now - (config.delete_inactive_users_after + 1) * DAY
        self.limit = int(config.max_mailbox_size * TRIM_TO)

    def run(self, store: int) -> None:
        """Visit every mailbox; where that fails, it is logged and counted, and the others go on."""
        if not self.dry_run:
            try:
                finish_removals(store)
            except OSError as error:
                self._failed("an interrupted removal", error)
        for name in mailboxes(store):
            try:
                self._visit(store, name)
            except OSError as error:
                self._failed(_shown(name), error)
            self.tick(self.summary)

    def _failed(self, what: str, error: OSError) -> None:
        self.summary.errors += 1
        log.error("%s: %s", what, error)

    def trim_mailbox(self, mailbox: int) -> None:
        """Trim one mailbox to TRIM_TO of its quota, oldest messages first."""
        self.summary.mailboxes += 1
        used = 0
        for message in _messages(mailbox):
            self.summary.messages += 1
            used += message.quota
        if used > self.limit:
            self._trim(mailbox, used)

    def _visit(self, store: int, name: str) -> None:
        with open_directory(name, store) as mailbox:
            if mailbox is None:
                return
            self.summary.mailboxes += 1
            if not self._is_idle(mailbox) or self._is_connected(name, mailbox):
                removed = self._expire(mailbox)
                if removed:
                    log.info("%s: %d message(s)", _shown(name), removed)
                return
        if self.dry_run or remove_mailbox(store, name, self._is_idle):
            self.summary.removed_mailboxes += 1
            log.info("%s: idle", _shown(name))

    def _is_idle(self, mailbox: int) -> bool:
        """Whether a mailbox is to be removed: an idle account, or an idle remainder that is none."""
        if _exists("DISABLED", mailbox):
            return False
        password = status_of("password", mailbox)
        if password is not None:
            return password.st_size > 0 and password.st_mtime <= self.idle
        if _exists("password", mailbox) or os.fstat(mailbox).st_mtime > self.idle:
            return False
        return all(is_empty(directory) for _folder, directory in folders(mailbox))

    def _is_connected(self, name: str, mailbox: int) -> bool:
        """Whether somebody is logged in since long; that counts as a login of today."""
        if name not in self._who():
            return False
        if not self.dry_run and status_of("password", mailbox):
            today = self.now - self.now % DAY
            os.utime("password", (today, today), dir_fd=mailbox, follow_symlinks=False)
        return True

    def _who(self) -> frozenset[str]:
        """The addresses with a session; asks once, and fails as often as it is called."""
        if self._failure:
            raise self._failure
        if self._sessions is None:
            try:
                self._sessions = self.connected()
            except OSError as error:
                self._failure = error
                raise
        return self._sessions

    def _expire(self, mailbox: int) -> int:
        """Delete what is too old, trim the rest if it is too much; how many messages that were."""
        summary, old, large_old = self.summary, self.old, self.large_old
        seen = removed = used = 0
        for folder, directory in folders(mailbox):
            is_cur, counts = folder.endswith("cur"), not folder.endswith("tmp")
            for name, status in files(directory):
                seen += 1
                mtime = status.st_mtime
                if mtime < old:
                    reason = "age"
                elif mtime < large_old and is_cur and status.st_size > LARGE:
                    reason = "large"
                else:
                    if counts:
                        used += quota_size(name, status.st_size)
                    continue
                if not removed:
                    self._forget_quota(mailbox)
                removed += self._remove(name, directory, status.st_size, reason)
        summary.messages += seen
        if removed:
            self._forget_quota(mailbox)
        if used > self.limit:
            removed += self._trim(mailbox, used)
        return removed

    def _trim(self, mailbox: int, used: int) -> int:
        """Delete the oldest of *used* bytes, as the quota counts; how many messages that were.

        A message that is gone when its turn comes counts as gone, so that nothing younger goes in
        its place; as it may only have been renamed, the mailbox is then counted again.
        """
        self._forget_quota(mailbox)
        removed = 0
        for _ in range(_RECOUNTS):
            missing = False
            for message in self._oldest(mailbox):
                if used <= self.limit:
                    break
                used -= message.quota
                if self._remove(message.path, mailbox, message.size, "quota"):
                    removed += 1
                else:
                    missing = True
            if not missing:
                break
            used = sum(message.quota for message in _messages(mailbox))
        self._forget_quota(mailbox)
        return removed

    def _oldest(self, mailbox: int) -> Iterator[_Message]:
        """The messages that may be trimmed, oldest first: a pass over the mailbox for each ROUND."""
        last = _Message(float("-inf"), "", 0, 0)
        young = self.now - PROTECTED
        while True:
            batch = heapq.nsmallest(
                ROUND, (item for item in _messages(mailbox) if item.time < young and item > last)
            )
            yield from batch
            if len(batch) < ROUND:
                return
            last = batch[-1]

    def _remove(self, name: str, directory: int, size: int, reason: str) -> bool:
        if not self.dry_run and not unlink(name, directory):
            return False
        self.summary.removed_messages += 1
        self.summary.removed_bytes += size
        self.summary.removed_by[reason] += 1
        return True

    def _forget_quota(self, mailbox: int) -> None:
        if not self.dry_run:
            forget_quota(mailbox)


def _messages(mailbox: int) -> Iterator[_Message]:
    """All messages that count in the quota."""
    for folder, directory in folders(mailbox):
        if not folder.endswith("tmp"):
            for name, status in files(directory):
                size = status.st_size
                yield _Message(status.st_mtime, f"{folder}/{name}", size, quota_size(name, size))


def _exists(name: str, directory: int) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def connected_users() -> frozenset[str]:
    """Who has a session at Dovecot now; raises OSError if it cannot be asked."""
    import subprocess  # seldom needed

    try:
        done = subprocess.run(
            ["doveadm", "-f", "tab", "who"], capture_output=True, text=True, timeout=WHO_SECONDS
        )
    except FileNotFoundError:
        return frozenset()  # no Dovecot, no sessions
    except subprocess.TimeoutExpired as error:
        raise OSError(str(error)) from error
    if done.returncode:
        raise OSError(f"cannot tell who is logged in: {done.stderr.strip()}")
    return frozenset(line.partition("\t")[0] for line in done.stdout.splitlines()[1:])


def _shown(name: str) -> str:
    """*name* fit for a terminal: the name of a file may hold any byte."""
    return name if name.isprintable() else ascii(name)


def expire(config: Config, options: argparse.Namespace, progress: Progress) -> Summary:
    """Do what the *options* of the command say; raises ValueError for what is no mailbox."""
    begin = time.monotonic()

    def tick(summary: Summary) -> None:
        progress.show(
            f"{summary.mailboxes:,} mailboxes, {summary.messages:,} messages; to remove: "
            f"{summary.removed_mailboxes:,} and {summary.removed_messages:,}"
        )

    now = time.time() + options.days * DAY
    expiry = Expiry(config, now, dry_run=options.dry_run, connected=connected_users, tick=tick)
    with open_store(config.mailboxes_dir) as store:
        if options.mailbox is None:
            if store is not None:
                expiry.run(store)
        else:
            name = MailStore(config.mailboxes_dir).mailbox_path(options.mailbox).name
            with open_directory(name, -1 if store is None else store) as mailbox:
                if mailbox is None:
                    raise ValueError(f"no mailbox: {options.mailbox!r}")
                expiry.trim_mailbox(mailbox)
    expiry.summary.seconds = time.monotonic() - begin
    return expiry.summary


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description="Delete old mail and idle accounts, as the settings say."
    )
    parser.add_argument("-n", "--dry-run", action="store_true", help="only say what would go")
    parser.add_argument(
        "--days", type=int, default=0, metavar="N", help="with --dry-run: what would go in N days"
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="name the mailboxes that lose something"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--mailbox", metavar="ADDRESS", help="only trim this mailbox to its quota")
    parser.add_argument(
        "--syslog", action="store_true", help="log the result of --mailbox (for Dovecot)"
    )
    parser.add_argument("--config", default=DEFAULT_PATH, metavar="FILE", help="other settings")
    return parser


def main(arguments: list[str], prog: str = "expire") -> int:
    """Run the command; 0 well, 1 something could not be deleted, 2 wrong usage, 78 settings."""
    parser = _parser(prog)
    options = parser.parse_args(arguments)
    if options.days and not options.dry_run:
        parser.error("--days needs --dry-run")
    progress = Progress()
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING,
        format=f"{progress.clear}%(message)s",
    )
    try:
        summary = expire(read_config(options.config), options, progress)
    except ConfigError as error:
        log.error("%s", error)
        return 78  # EX_CONFIG, sysexits(3)
    except (OSError, ValueError) as error:
        log.error("%s: %s", prog, error)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        progress.end()
    if options.syslog:
        # counted by mtail; no address, it would tell when somebody was written to
        syslog.openlog("chatmail-expire", 0, syslog.LOG_MAIL)
        syslog.syslog(f"quota-expire: removed {summary.removed_messages} message(s)")
    elif options.json:
        print(json.dumps(dataclasses.asdict(summary), indent=1))
    else:
        print(summary)
    return 1 if summary.errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
