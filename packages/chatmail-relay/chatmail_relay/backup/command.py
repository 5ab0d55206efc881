# SPDX-License-Identifier: MIT
"""The commands `backup` and `restore`."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatmaild.config import read_settings

from ..apply import NotConfigured, is_configured
from ..paths import Paths
from ..version import VERSION
from .errors import BackupError
from .restore import restore
from .snapshot import Counts, Snapshot
from .storage import Storage, storage

TARGET = "DIRECTORY, FILE.tar, or borg:REPOSITORY"


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `backup` and `restore` to the command line's parser."""
    help = "save settings, keys and mailboxes, while the relay runs"
    made = commands.add_parser("backup", help=help, description=help, parents=[common])
    made.set_defaults(run=_backup)
    made.add_argument("target", help=TARGET)
    made.add_argument(
        "--keep", type=_number, metavar="N", help="afterwards delete the oldest ones but N"
    )
    help = "make this machine the relay of a backup"
    back = commands.add_parser("restore", help=help, description=help, parents=[common])
    back.set_defaults(run=_restore)
    back.add_argument("source", help=TARGET)
    back.add_argument("--snapshot", metavar="NAME", help="not the newest one, but this one")
    back.add_argument("--list", action="store_true", help="only list the backups there")
    back.add_argument(
        "--replace", action="store_true", help="also if there are mailboxes, which are moved aside"
    )


def _number(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 100000:
        raise argparse.ArgumentTypeError("a number from 1 on")
    return int(text)


@contextlib.contextmanager
def _alone(paths: Paths) -> Iterator[None]:
    """One backup or restoration at a time; a second one is refused."""
    os.makedirs(paths.state, 0o700, exist_ok=True)
    with open(paths.state / "backup.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackupError("another backup or restoration is running") from None
        yield


def _backup(paths: Paths, options: argparse.Namespace) -> int:
    if not is_configured(paths):
        raise NotConfigured
    config = read_settings(paths.ini)[0]
    place = storage(paths, options.target)
    # where nobody but root writes, mostly on the file system of the mail store: messages are linked there
    work = paths.real("/var/lib/chatmail/backup.partial")
    counts = Counts()

    def take(target: Path, previous: Path | None) -> None:
        snapshot = Snapshot(paths, config, target, previous=previous, link=target == work)
        nonlocal counts
        counts = snapshot.take(VERSION)

    with _alone(paths):
        _clear(work)
        try:
            name = place.write(take, work)
        finally:
            _clear(work)
        gone = place.prune(options.keep) if options.keep else []
    data = {
        "name": name,
        "mailboxes": counts.mailboxes,
        "messages": counts.messages,
        "new": counts.new,
        "new_bytes": counts.new_bytes,
        "removed": gone,
        "problems": counts.problems,
    }
    for problem in counts.problems:
        print(f"chatmail-relay: not in the backup: {problem}", file=sys.stderr)
    if options.json:
        print(json.dumps(data, indent=1, sort_keys=True))
    else:
        print(
            f"chatmail-relay: {name}: {counts.mailboxes} mailboxes, {counts.messages} messages, "
            f"{counts.new} of them new ({counts.new_bytes / 2**20:.1f} MB)"
        )
    return 1 if counts.problems else 0


def _clear(work: Path) -> None:
    if work.exists():
        shutil.rmtree(work)


def _newest(place: Storage, wanted: str | None, source: str) -> str:
    names = place.names()
    if not names:
        raise BackupError(f"{source}: no backup there")
    if wanted is None:
        return names[-1]
    if wanted not in names:
        raise BackupError(f"{source}: no backup {wanted}; there are: {', '.join(names)}")
    return wanted


def _restore(paths: Paths, options: argparse.Namespace) -> int:
    place = storage(paths, options.source)
    if options.list:
        names = place.names()
        if options.json:
            print(json.dumps(names))
        else:
            print("\n".join(names) or "chatmail-relay: no backup there")
        return 0 if names else 1
    with _alone(paths):
        name = _newest(place, options.snapshot, options.source)
        done = restore(paths, place, name, VERSION, replace=options.replace)
    if options.json:
        print(json.dumps(vars(done), indent=1, sort_keys=True))
    else:
        print(
            f"chatmail-relay: {done.mail_domain} is restored from {name}: {done.mailboxes} mailboxes, "
            f"{done.messages} messages"
        )
        if done.kept:
            print(f"chatmail-relay: the mail store before is in {done.kept}; delete it yourself")
    return 0
