# SPDX-License-Identifier: MIT
"""A running relay as a tree of files.

What makes it consistent, although nothing stops meanwhile:

* A message is a file that never changes, but is renamed: from new/ to cur/, with its flags, to another
  folder. All folders of a mailbox are looked at again until nothing new is found, so none is missed.
* The list of UIDs (dovecot-uidlist) is read after the messages: it may name some that are not there,
  which Dovecot takes as deleted, and lacks none that is.
* Dovecot's indexes and the notifier's queue are left out: they are made anew.
* All other files of services are replaced whole by their writers; SQLite's is read by SQLite.

The store belongs to a service: it is walked by descriptors, and no link in it is followed.
"""

from __future__ import annotations

import datetime
import errno
import fnmatch
import json
import os
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from chatmaild.config import SELF_SIGNED_CERT, SELF_SIGNED_KEY, Config

from ..accounts import _as as acting_as
from ..accounts import _owner as store_owner
from ..ledger import load_ledger
from ..paths import Paths
from .errors import BackupError

FORMAT = 1
MANIFEST = "manifest.json"
PASSPHRASE = "/etc/chatmail/backup.passphrase"
TOKENS = "/var/lib/chatmail/doveauth/tokens.sqlite"
#: Trees that root alone writes, as they are.
TREES = (
    "/etc/chatmail",
    "/var/lib/chatmail/keys",
    "/var/lib/acme",
    "/var/lib/private/chatmail-echobot",
)
FILES = ("/etc/chatmail-nocreate", "/var/lib/chatmail/format", SELF_SIGNED_CERT, SELF_SIGNED_KEY)
MESSAGE_FOLDERS = ("new", "cur")
#: Files of mailboxes that are made anew, or are of no use to anybody later.
LEFT_OUT = (
    "dovecot.index*",
    "dovecot.list.index*",
    "dovecot.mailbox.log*",
    "maildirsize",
    "*.lock",
    "*.tmp*",
    "*.in",
    "*.out",
)
#: How often the folders of one mailbox are looked at, while things keep moving.
PASSES = 10


@dataclass
class Counts:
    """What a snapshot holds; *new* and *new_bytes* are what the one before had not."""

    mailboxes: int = 0
    messages: int = 0
    new: int = 0
    new_bytes: int = 0
    problems: list[str] = field(default_factory=list)


class Snapshot:
    """Takes one. *previous* is a finished one on the same file system, whose messages are linked to.

    With *link* the messages are linked to those of the store itself: a tree for a short time, to be read by
    another program at leisure.
    """

    def __init__(
        self,
        paths: Paths,
        config: Config,
        target: Path,
        *,
        previous: Path | None = None,
        link: bool = False,
    ) -> None:
        self._paths = paths
        self._config = config
        self._target = target
        self._previous = previous
        self._link = link
        self.counts = Counts()

    def take(self, version: str) -> Counts:
        """Fill the target, a directory that does not exist yet. Raises BackupError, OSError."""
        os.makedirs(self._target, 0o700)
        self._trees()
        self._tokens()
        self._store()
        manifest = {
            "format": FORMAT,
            "version": version,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "mail_domain": self._config.mail_domain,
            "mailboxes_dir": self._config.mailboxes_dir,
            "mailboxes": self.counts.mailboxes,
            "messages": self.counts.messages,
        }
        os.sync()
        # last of all: a tree without it is not complete
        path = self._target / MANIFEST
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        return self.counts

    def _place(self, path: str) -> Path:
        place = self._target / path.lstrip("/")
        os.makedirs(place.parent, 0o700, exist_ok=True)
        return place

    # --- what root alone writes ----------------------------------------------------------------

    def _trees(self) -> None:
        rendered = {str(self._paths.real(path)) for path in load_ledger(self._paths.state).files}
        rendered.add(str(self._paths.real(PASSPHRASE)))
        for name in TREES:
            source = self._paths.real(name)
            for folder, _folders, files in os.walk(source):
                for entry in sorted(files):
                    path = Path(folder) / entry
                    if str(path) not in rendered:
                        self._plain(path, f"{name}/{path.relative_to(source)}")
                # a link to a folder, as acmetool makes them
                for entry in sorted(_folders):
                    path = Path(folder) / entry
                    if path.is_symlink():
                        self._plain(path, f"{name}/{path.relative_to(source)}")
        for name in FILES:
            if os.path.lexists(self._paths.real(name)):
                self._plain(self._paths.real(name), name)

    def _plain(self, source: Path, name: str) -> None:
        try:
            mode = source.lstat().st_mode
            if stat.S_ISLNK(mode) or stat.S_ISREG(mode):
                shutil.copy2(source, self._place(name), follow_symlinks=False)
        except FileNotFoundError:
            pass  # a certificate that was just replaced

    def _tokens(self) -> None:
        source = self._paths.real(TOKENS)
        if not source.exists():
            return
        # with its owner's rights: SQLite leaves files beside it
        with acting_as(store_owner(self._paths)):
            with sqlite3.connect(f"file:{source}?mode=ro", uri=True, timeout=30) as database:
                content = database.serialize()
            database.close()
        place = self._place(TOKENS)
        with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)

    # --- the mail store --------------------------------------------------------------------------

    def _store(self) -> None:
        name = self._config.mailboxes_dir
        previous = self._previous / name.lstrip("/") if self._previous else None
        self.store(self._paths.real(name), self._place(name), previous)

    def store(self, source: Path, target: Path, previous: Path | None) -> None:
        """Copy the mailboxes of the directory *source*, if there is one, to the new directory *target*."""
        target.mkdir(0o700)
        if not source.is_dir():
            return
        with _opened(source) as store:
            for entry in sorted(os.listdir(store)):
                if "@" not in entry or entry.startswith("."):
                    continue
                try:
                    with _opened(entry, store) as mailbox:
                        before = previous / entry if previous else None
                        _Mailbox(self, mailbox, target / entry, before).take()
                except FileNotFoundError:
                    shutil.rmtree(target / entry, ignore_errors=True)  # deleted meanwhile
                except OSError as error:
                    self.counts.problems.append(f"{entry}: {error.strerror}")
                else:
                    self.counts.mailboxes += 1


class _Mailbox:
    """One mailbox on its way into a snapshot."""

    def __init__(
        self, snapshot: Snapshot, source: int, target: Path, previous: Path | None
    ) -> None:
        self._counts = snapshot.counts
        self._link = snapshot._link
        self._source = source
        self._target = target
        self._previous = previous
        self._taken: dict[tuple[str, str], str] = {}  # folder, name without flags -> place in it
        self._before: dict[str, dict[str, Path]] = {}

    def take(self) -> None:
        self._target.mkdir(0o700)
        for _attempt in range(PASSES):
            if not self._messages():
                break
        for folder in self._folders():
            self._others(folder)
        self._counts.messages += len(self._taken)

    def _folders(self) -> list[str]:
        """The inbox, ".", and the other folders of Maildir++, one level deep."""
        names = [
            name
            for name in os.listdir(self._source)
            if name.startswith(".")
            and stat.S_ISDIR(os.stat(name, dir_fd=self._source, follow_symlinks=False).st_mode)
        ]
        return [".", *sorted(names)]

    def _messages(self) -> bool:
        """One look at all folders; whether it found something that was not there before."""
        changed = False
        for folder in self._folders():
            for sub in MESSAGE_FOLDERS:
                os.makedirs(self._target / folder / sub, 0o700, exist_ok=True)
            os.makedirs(self._target / folder / "tmp", 0o700, exist_ok=True)
            for sub in MESSAGE_FOLDERS:
                with _opened_if_there(f"{folder}/{sub}", self._source) as descriptor:
                    for name in os.listdir(descriptor) if descriptor is not None else ():
                        changed |= self._message(folder, sub, name, descriptor)
        return changed

    def _message(self, folder: str, sub: str, name: str, descriptor: int | None) -> bool:
        key = (folder, name.partition(":")[0])
        place = f"{sub}/{name}"
        known = self._taken.get(key)
        if known == place:
            return False
        if known is not None:
            os.rename(self._target / folder / known, self._target / folder / place)
            self._taken[key] = place
            return True
        try:
            if not self._copy_message(folder, key[1], place, name, descriptor):
                return False
        except FileNotFoundError:
            return True  # renamed, and found at the next look, or deleted
        self._taken[key] = place
        return True

    def _copy_message(
        self, folder: str, base: str, place: str, name: str, descriptor: int | None
    ) -> bool:
        info = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        if not stat.S_ISREG(info.st_mode):
            return False
        target = self._target / folder / place
        before = self._earlier(folder).get(base)
        if before is not None and _same(before.lstat(), info) and _linked(before, target):
            return True
        if not self._link or not _linked(name, target, descriptor):
            _copy(name, descriptor, target)
        self._counts.new += 1
        self._counts.new_bytes += info.st_size
        return True

    def _earlier(self, folder: str) -> dict[str, Path]:
        """The messages of the previous snapshot, by their names without flags."""
        if folder not in self._before:
            found: dict[str, Path] = {}
            for sub in MESSAGE_FOLDERS if self._previous else ():
                assert self._previous is not None
                try:
                    entries = list(os.scandir(self._previous / folder / sub))
                except FileNotFoundError:
                    continue
                found |= {entry.name.partition(":")[0]: Path(entry.path) for entry in entries}
            self._before[folder] = found
        return self._before[folder]

    def _others(self, folder: str) -> None:
        """All but messages: the password, the list of UIDs, flags that are files."""
        with _opened_if_there(folder, self._source) as descriptor:
            for name in sorted(os.listdir(descriptor)) if descriptor is not None else ():
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in LEFT_OUT):
                    continue
                try:
                    info = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                    if stat.S_ISREG(info.st_mode):
                        _copy(name, descriptor, self._target / folder / name)
                except FileNotFoundError:
                    if name == "password":
                        raise  # the mailbox is being deleted


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    return one.st_size == other.st_size and one.st_mtime_ns == other.st_mtime_ns


def _linked(source: str | Path, target: Path, parent: int | None = None) -> bool:
    """Whether *target* is now the same file as *source*; some file systems have no links."""
    try:
        os.link(source, target, src_dir_fd=parent, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EXDEV):
            return False
        raise
    return True


def _copy(name: str, descriptor: int | None, target: Path) -> None:
    """Content, permissions and times of a file that is no link."""
    source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=descriptor)
    with open(source, "rb") as reading:
        info = os.fstat(source)
        made = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(made, "wb") as writing:
            shutil.copyfileobj(reading, writing)
            writing.flush()
            os.fchmod(made, stat.S_IMODE(info.st_mode) & 0o777)
            os.utime(made, ns=(info.st_atime_ns, info.st_mtime_ns))


@contextmanager
def _opened(path: str | Path, parent: int | None = None) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _opened_if_there(path: str, parent: int) -> Iterator[int | None]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_manifest(tree: Path) -> dict[str, object]:
    """What a finished snapshot says of itself; raises BackupError."""
    path = tree / MANIFEST
    try:
        data: dict[str, object] = json.loads(path.read_text())
        number = data["format"]
    except FileNotFoundError:
        raise BackupError(f"{tree}: no {MANIFEST}: not a backup, or not a complete one") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BackupError(f"{path}: damaged ({error})") from None
    if not isinstance(number, int) or number > FORMAT:
        raise BackupError(f"{path}: made by a newer chatmail-relay; upgrade the package here")
    return data
