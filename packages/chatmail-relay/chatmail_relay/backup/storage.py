# SPDX-License-Identifier: MIT
"""Where backups are kept: a directory of trees, one tar file, or a borg repository.

What is being written is named so, and takes its name when it is complete: whatever ends a backup half-way,
the ones before are there, and the next run clears its remains away.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ..paths import Paths
from .errors import BackupError
from .snapshot import MANIFEST, PASSPHRASE

#: Takes a snapshot into a directory that does not exist, given the one before on the same file system.
Take = Callable[[Path, Path | None], None]

BORG = "borg:"
PREFIX = "chatmail-"  # of our archives in a borg repository
PARTIAL = ".partial"
NAME = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ(\d\d)?")
BORG_WARNING = 1  # exit status; it has done what it was told


class Storage(Protocol):
    """One place for backups."""

    def names(self) -> list[str]:
        """The complete ones, the oldest first."""

    def write(self, take: Take, work: Path) -> str:
        """Make one more, by way of *work* if need be; its name."""

    def prune(self, keep: int) -> list[str]:
        """Delete the oldest ones until *keep* are left; their names."""

    def fetch(self, name: str, target: Path) -> None:
        """Copy one into the directory *target*, which does not exist yet."""


def storage(paths: Paths, target: str) -> Storage:
    """The storage that *target* names."""
    if target.startswith(BORG):
        return Borg(paths, target.removeprefix(BORG))
    path = Path(os.path.abspath(target))
    if path.suffix == ".tar":
        return Tar(path)
    return Directory(path)


def new_name(taken: list[str]) -> str:
    """The time, in UTC, with a number if there is one of this second; they sort by age."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H-%M-%SZ")
    name, number = now, 0
    while name in taken:
        number += 1
        name = f"{now}{number:02}"
    return name


class Directory:
    """A directory with a tree for each backup; what did not change is a hard link, so it costs nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._single = None
        if (path / MANIFEST).exists():  # one of the trees itself
            self.path, self._single = path.parent, path.name

    def names(self) -> list[str]:
        if self._single:
            return [self._single]
        try:
            entries = os.listdir(self.path)
        except FileNotFoundError:
            return []
        return sorted(
            entry
            for entry in entries
            if NAME.fullmatch(entry) and (self.path / entry / MANIFEST).exists()
        )

    def write(self, take: Take, work: Path) -> str:
        names = self.names()
        partial = self.path / PARTIAL
        if self._single or (
            not names and self.path.is_dir() and set(os.listdir(self.path)) - {PARTIAL}
        ):
            raise BackupError(
                f"{self.path}: has other files in it; name a directory for backups alone, or FILE.tar"
            )
        os.makedirs(self.path, 0o700, exist_ok=True)
        if partial.exists():
            shutil.rmtree(partial)
        take(partial, self.path / names[-1] if names else None)
        name = new_name(names)
        os.rename(partial, self.path / name)
        _sync(self.path)
        return name

    def prune(self, keep: int) -> list[str]:
        gone = self.names()[:-keep]
        for name in gone:
            # no longer a complete one from the first moment on
            (self.path / name / MANIFEST).unlink()
            shutil.rmtree(self.path / name)
        return gone

    def fetch(self, name: str, target: Path) -> None:
        shutil.copytree(self.path / name, target, symlinks=True)


class Tar:
    """One tar file, which the next backup replaces."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        return [self.path.name] if self.path.exists() else []

    def write(self, take: Take, work: Path) -> str:
        partial = self.path.with_name(f".{self.path.name}{PARTIAL}")
        take(work, None)
        partial.unlink(missing_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
                archive.add(work, ".", filter=_named_by_name_only)
            file.flush()
            os.fsync(descriptor)
        os.replace(partial, self.path)
        _sync(self.path.parent)
        return self.path.name

    def prune(self, keep: int) -> list[str]:
        return []

    def fetch(self, name: str, target: Path) -> None:
        target.mkdir(mode=0o700)
        try:
            with tarfile.open(self.path) as archive:
                # links of acmetool's lead nowhere else than into its own tree, but are checked all the same
                archive.extractall(target, filter="tar")
        except tarfile.TarError as error:
            raise BackupError(f"{self.path}: {error}") from error


def _named_by_name_only(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Numbers of users mean nothing elsewhere."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry


class Borg:
    """A repository of borg(1), here or elsewhere by ssh: deduplicated, compressed, encrypted."""

    def __init__(self, paths: Paths, repository: str) -> None:
        self.repository, _, self._single = repository.partition("::")
        self._environment = {**os.environ, "LC_ALL": "C.UTF-8", "BORG_EXIT_CODES": "legacy"}
        secret = {"BORG_PASSPHRASE", "BORG_PASSCOMMAND", "BORG_PASSPHRASE_FD"}
        self.passphrase = paths.real(PASSPHRASE)
        self._has_secret = bool(secret & set(os.environ)) or self.passphrase.exists()
        if not secret & set(os.environ) and self.passphrase.exists():
            if self.passphrase.stat().st_mode & 0o077:
                raise BackupError(
                    f"{self.passphrase}: others can read it; run chmod 600 {self.passphrase}"
                )
            self._environment["BORG_PASSCOMMAND"] = f"cat {self.passphrase}"

    def _borg(self, *words: str, cwd: Path | None = None) -> str:
        try:
            done = subprocess.run(
                ["borg", "--log-json", *words],
                env=self._environment,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
        except FileNotFoundError:
            raise BackupError("borg is not installed; run apt install borgbackup") from None
        if done.returncode not in (0, BORG_WARNING):
            raise _BorgError(words[0], done.stderr)
        return done.stdout

    def names(self) -> list[str]:
        try:
            shown = self._borg("list", "--json", self.repository)
        except _BorgError as error:
            if error.is_missing:
                return []
            raise
        found = [entry["name"] for entry in json.loads(shown)["archives"]]
        ours = [name.removeprefix(PREFIX) for name in found if name.startswith(PREFIX)]
        names = [name for name in ours if NAME.fullmatch(name)]
        return [name for name in names if f"{PREFIX}{name}" == (self._single or f"{PREFIX}{name}")]

    def write(self, take: Take, work: Path) -> str:
        names = self._names_or_new()
        take(work, None)
        name = new_name(names)
        # of the links in our tree the inode is that of the message, but the time of change is not
        options = ("--files-cache=mtime,size", "--compression=auto,zstd", "--numeric-ids")
        self._borg("create", *options, f"{self.repository}::{PREFIX}{name}", ".", cwd=work)
        return name

    def _names_or_new(self) -> list[str]:
        try:
            self._borg("info", self.repository)
        except _BorgError as error:
            if not error.is_missing:
                raise
            if not self._has_secret:
                raise BackupError(
                    f"{self.repository}: a new repository needs a passphrase: write one into "
                    f"{self.passphrase} (mode 0600), and down where it outlives this machine"
                ) from None
            self._borg("init", "--encryption=repokey-blake2", self.repository)
        return self.names()

    def prune(self, keep: int) -> list[str]:
        gone = self.names()[:-keep]
        for name in gone:
            self._borg("delete", f"{self.repository}::{PREFIX}{name}")
        if gone:
            self._borg("compact", self.repository)
        return gone

    def fetch(self, name: str, target: Path) -> None:
        target.mkdir(mode=0o700)
        self._borg("extract", "--numeric-ids", f"{self.repository}::{PREFIX}{name}", cwd=target)


class _BorgError(BackupError):
    """What borg said, its own log lines without the frame."""

    def __init__(self, command: str, log: str) -> None:
        said, self.is_missing = [], False
        for line in log.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                said.append(line)
                continue
            if entry.get("levelname") in ("ERROR", "CRITICAL"):
                said.append(str(entry.get("message", "")))
            self.is_missing |= entry.get("msgid") == "Repository.DoesNotExist"
        text = "; ".join(line.strip() for line in said if line.strip()) or "failed"
        super().__init__(f"borg {command}: {text}")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
