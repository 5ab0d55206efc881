# SPDX-License-Identifier: MIT
"""Changes a set of files as one: all of them or none, whatever happens in between.

Promises, for every moment at which the machine or the process may die:

* a journal on disk says what is under way, so that `recover` puts every file back or finishes;
* new contents are written beside their destinations before the first of them is touched, and old
  ones are kept as hard links, so that a full disk cannot stop half-way nor hinder the way back;
* recovery may itself die and be run again.

Life of the journal: absent -> "staging" -> "installing" -> "committed" -> absent. Only
"installing" is rolled back; "committed" is finished.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

STAGED = ".chatmail-new"
SAVED = ".chatmail-old"


class TransactionError(Exception):
    """A file could not be written; everything is as it was before."""


@dataclass(frozen=True)
class Change:
    """The wanted state of one file: *content* None means that it must not exist.

    *age*: seconds that its time of modification lies back.
    """

    dest: Path
    content: bytes | None
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    age: float = 0

    @property
    def staged(self) -> Path:
        """Where the new content waits; a dot file, which no include pattern matches."""
        return self.dest.with_name(f".{self.dest.name}{STAGED}")

    @property
    def saved(self) -> Path:
        """Where the old file is kept until the commit."""
        return self.dest.with_name(f".{self.dest.name}{SAVED}")


def differs(change: Change) -> bool:
    """Whether the file on disk is not yet as *change* wants it."""
    try:
        info = os.lstat(change.dest)
    except (FileNotFoundError, NotADirectoryError):
        return change.content is not None
    if stat.S_ISDIR(info.st_mode):
        raise TransactionError(f"{change.dest}: is a directory; move it away")
    return (
        change.content is None
        or not stat.S_ISREG(info.st_mode)
        or stat.S_IMODE(info.st_mode) != change.mode
        or info.st_size != len(change.content)
        or change.dest.read_bytes() != change.content
    )


class Transaction:
    """One set of changes with its journal in *folder* (0700, made when needed)."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.journal = folder / "journal.json"

    def run(self, changes: list[Change], verify: Callable[[], None] = lambda: None) -> None:
        """Make all *changes*, call *verify*, commit; on any exception put everything back.

        OSErrors become TransactionError with the path; what *verify* raises passes through.
        """
        made_dirs = [str(path) for path in _missing_dirs(change.dest.parent for change in changes)]
        entries = [
            {"dest": str(change.dest), "existed": os.path.lexists(change.dest)}
            for change in changes
        ]
        try:
            self._write_journal("staging", entries, made_dirs)
            for path in made_dirs:
                os.makedirs(path, 0o755, exist_ok=True)
            for change in changes:
                if change.content is not None:
                    _stage(change)
            self._write_journal("installing", entries, made_dirs)
            for change in changes:
                _install(change)
            verify()
            self._write_journal("committed", entries, made_dirs)
        except OSError as error:
            self.recover()
            raise TransactionError(
                f"{error.filename or self.folder}: {error.strerror}; nothing was changed"
            ) from error
        except BaseException:
            self.recover()
            raise
        self.recover()

    def recover(self) -> str | None:
        """Finish or undo what a dead process left; the state found, or None if there was none."""
        try:
            data = json.loads(self.journal.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        state = str(data["state"])
        for entry in reversed(data["entries"]):
            change = Change(Path(entry["dest"]), None)
            if state == "installing":
                if os.path.lexists(change.saved):
                    os.replace(change.saved, change.dest)
                elif not entry["existed"]:
                    change.dest.unlink(missing_ok=True)
            change.saved.unlink(missing_ok=True)
            change.staged.unlink(missing_ok=True)
        for path in {str(Path(entry["dest"]).parent) for entry in data["entries"]}:
            _sync_dir(path)
        if state != "committed":
            for path in reversed(data["made_dirs"]):
                try:
                    os.rmdir(path)
                except OSError:
                    pass  # not empty: somebody else uses it by now
        self.journal.unlink()
        _sync_dir(self.folder)
        return state

    def _write_journal(
        self, state: str, entries: list[dict[str, object]], made_dirs: list[str]
    ) -> None:
        os.makedirs(self.folder, 0o700, exist_ok=True)
        data = {"state": state, "entries": entries, "made_dirs": made_dirs}
        change = Change(self.journal, json.dumps(data, indent=1).encode(), 0o600)
        _write(change.staged, change)
        os.replace(change.staged, self.journal)
        _sync_dir(self.folder)


def write_file(change: Change) -> None:
    """Write one file atomically and durably, with no journal."""
    _stage(change)
    os.replace(change.staged, change.dest)
    _sync_dir(change.dest.parent)


def _missing_dirs(parents: Iterable[Path]) -> list[Path]:
    """The directories that must be made, outermost first."""
    missing: set[Path] = set()
    for parent in parents:
        while not parent.exists():
            missing.add(parent)
            parent = parent.parent
    return sorted(missing)


def _stage(change: Change) -> None:
    change.staged.unlink(missing_ok=True)
    _write(change.staged, change)


def _write(path: Path, change: Change) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "wb") as file:
        file.write(change.content or b"")
        if os.geteuid() == 0:
            os.fchown(descriptor, change.uid, change.gid)
        os.fchmod(descriptor, change.mode)
        file.flush()
        if change.age:
            os.utime(descriptor, (time.time() - change.age,) * 2)
        os.fsync(descriptor)


def _install(change: Change) -> None:
    change.saved.unlink(missing_ok=True)
    if os.path.lexists(change.dest):
        os.link(change.dest, change.saved, follow_symlinks=False)
    _sync_dir(change.dest.parent)  # the way back must be on disk first
    if change.content is None:
        change.dest.unlink(missing_ok=True)
    else:
        os.replace(change.staged, change.dest)
    _sync_dir(change.dest.parent)


def _sync_dir(path: str | Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
