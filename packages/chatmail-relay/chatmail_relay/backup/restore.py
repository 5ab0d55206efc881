# SPDX-License-Identifier: MIT
"""Make this machine the relay of a backup.

In this order, so that whatever ends it half-way leaves a relay that can run:

1. everything is copied to a place of root's and looked at; any error ends here, and nothing has changed;
2. the daemons stop;
3. the mail store changes places with the copy, in one step of the kernel;
4. settings, keys and certificates are installed as one transaction;
5. the configuration is rendered, and the daemons start.

A run that ended between 3 and 5 is done again from the start. What was there before is kept beside.

Clients go on where they were: UIDVALIDITY stays. But they have seen UIDs that were given after the backup,
and look at higher ones alone: each folder goes on with UIDs above all that can have been given meanwhile.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pwd
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chatmaild.config import read_settings

from .. import stateformat
from ..apply import apply, lock
from ..component import load_components
from ..paths import Paths
from ..store import OWNER
from ..transaction import Change, Transaction, differs, write_file
from .errors import BackupError
from .snapshot import FILES, TOKENS, TREES, read_manifest
from .storage import Storage, new_name

#: UIDs a folder skips: more than messages come into one between a backup and its restoration. There are
#: 2^32 of them (RFC 3501 2.3.1.1).
UIDS_AHEAD = 1_000_000
MAX_UID = 2**32 - 1
UID_LIST = "dovecot-uidlist"
STAGING = "/var/lib/chatmail/restore.partial"
REPLACED = "/var/lib/chatmail/replaced-"  # and the time
ECHOBOT = "/var/lib/private/chatmail-echobot"
ACME = "/var/lib/acme"
#: Stopped meanwhile, besides the units of the components: what may write to the store or to keys.
ALSO_STOPPED = ("chatmail-expire.service", "chatmail-fsreport.service")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl(2), renameat2(2)


@dataclass(frozen=True)
class Restored:
    """What was done; *kept* is where the mail store before is, if there was one."""

    name: str
    mail_domain: str
    mailboxes: int
    messages: int
    kept: str


def mark(paths: Paths) -> Path:
    """A file that is there while a restoration is between its steps."""
    return paths.state / "restoring"


def restore(
    paths: Paths, source: Storage, name: str, version: str, *, replace: bool = False
) -> Restored:
    """Restore the backup *name* of *source*. Raises BackupError, StateError, and what apply raises."""
    staging = paths.real(STAGING)
    if staging.exists() and mark(paths).exists():
        os.rename(staging, _aside(paths))  # perhaps with the mail store that was in force
    elif staging.exists():
        shutil.rmtree(staging)
    os.makedirs(staging.parent, 0o755, exist_ok=True)
    source.fetch(name, staging)
    manifest = read_manifest(staging)
    stateformat.check(Paths(staging), version)
    ini = staging / "etc/chatmail/chatmail.ini"
    config, _warnings = read_settings(ini)
    store = paths.real(config.mailboxes_dir)
    if _accounts(store) and not replace and not mark(paths).exists():
        shutil.rmtree(staging)
        raise BackupError(
            f"{store}: there are mailboxes already; --replace moves them aside and restores"
        )
    copy = staging / config.mailboxes_dir.lstrip("/")
    copy.mkdir(0o700, parents=True, exist_ok=True)
    os.makedirs(store.parent, 0o755, exist_ok=True)
    if copy.stat().st_dev != store.parent.stat().st_dev:
        copy = _moved_beside(copy, store)
    for path in copy.rglob(UID_LIST):
        skip_uids(path)
    give(copy, paths)
    mark(paths).parent.mkdir(0o700, exist_ok=True)
    write_file(Change(mark(paths), b"", 0o600))
    if paths.is_live:
        _stop(paths)
    kept = _swap(copy, store, _aside(paths))
    with lock(paths):
        Transaction(paths.state).recover()
        changes = [change for change in _small_files(paths, staging) if differs(change)]
        Transaction(paths.state).run(changes)
        _links(paths, staging)
    shutil.rmtree(staging)
    apply(paths, version, restart_all=True)
    mark(paths).unlink()
    return Restored(
        name,
        config.mail_domain,
        int(str(manifest["mailboxes"])),
        int(str(manifest["messages"])),
        kept,
    )


def _accounts(store: Path) -> bool:
    """Whether somebody has a mailbox there."""
    try:
        return any("@" in name for name in os.listdir(store))
    except FileNotFoundError:
        return False


def _aside(paths: Paths) -> Path:
    """A name that nothing has, for what was there before."""
    parent = paths.real(REPLACED).parent
    prefix = Path(REPLACED).name
    taken = [name.removeprefix(prefix) for name in os.listdir(parent)]
    return parent / f"{prefix}{new_name(taken)}"


def _moved_beside(copy: Path, store: Path) -> Path:
    """The copy on the file system of the mail store, which is not that of /var/lib/chatmail."""
    beside = store.with_name(f".{store.name}.restored")
    if os.path.lexists(beside):
        shutil.rmtree(beside)
    shutil.move(copy, beside)
    return beside


def skip_uids(path: Path) -> None:
    """Let a folder go on with UIDs that no client has seen (Dovecot's dovecot-uidlist, version 3)."""
    info = path.stat()
    lines = path.read_bytes().split(b"\n")
    head = re.fullmatch(rb"(3 .*\bN)(\d+)(.*)", lines[0])
    if head is None:
        path.unlink()  # nothing in it to go on with: Dovecot makes a new one
        return
    # what follows the last line end was being written
    records = [line for line in lines[1:-1] if re.match(rb"\d+ ", line)]
    following = max([int(line.split()[0]) + 1 for line in records], default=1)
    following = min(max(following, int(head[2])) + UIDS_AHEAD, MAX_UID - UIDS_AHEAD)
    head_line = head[1] + str(following).encode() + head[3]
    path.write_bytes(b"\n".join([head_line, *records, b""]))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def give(top: Path, paths: Paths) -> None:
    """Give the copy, which nobody else can reach yet, to the owner of the mail store."""
    if os.geteuid() != 0 or paths.root != Path("/"):
        return
    owner = pwd.getpwnam(OWNER)
    for folder, folders, files, descriptor in os.fwalk(top, topdown=False):
        for name in (*folders, *files):
            os.chown(name, owner.pw_uid, owner.pw_gid, dir_fd=descriptor, follow_symlinks=False)
        os.chown(folder, owner.pw_uid, owner.pw_gid)


def _stop(paths: Paths) -> None:
    """Stop what reads or writes the store, connections and timers included."""
    units = [unit for item in load_components(paths.components) for unit in item.units]
    services = [unit for unit in units if not unit.startswith(("unbound.", "nginx."))]
    sockets = [f"{unit.rpartition('.')[0]}.service" for unit in units if unit.endswith(".socket")]
    triggers = [
        "chatmail-doveauth*.socket",
        "chatmail-metadata*.socket",
        "chatmail-filtermail*.socket",
    ]
    words = ["systemctl", "stop", *triggers, *services, *sockets, *ALSO_STOPPED]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    if done.returncode and "not loaded" not in done.stderr:
        raise BackupError(f"the daemons do not stop: {done.stderr.strip()}; nothing was changed")


def _swap(copy: Path, store: Path, aside: Path) -> str:
    """Put *copy* in the place of *store*; where the one before is now, "" if it was empty or none."""
    if not store.exists():
        os.rename(copy, store)
        return ""
    exchange(copy, store)
    if not any(copy.iterdir()):
        copy.rmdir()
        return ""
    shutil.move(copy, aside)
    return str(aside)


def exchange(one: Path, other: Path) -> None:
    """Let two names change places, in one step where the file system can."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, bytes(one), _AT_FDCWD, bytes(other), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        if number in (errno.EINVAL, errno.ENOSYS):  # a file system without it, such as NFS
            aside = other.with_name(f"{other.name}.before")
            os.rename(other, aside)
            os.rename(one, other)
            os.rename(aside, one)
            return
        raise OSError(number, os.strerror(number), str(other))


def _small_files(paths: Paths, staging: Path) -> Iterator[Change]:
    """Settings, keys and certificates as changes; of acmetool's files only those that are not there."""
    tokens_owner = (0, 0)
    if os.geteuid() == 0 and paths.root == Path("/"):
        owner = pwd.getpwnam(OWNER)
        tokens_owner = (owner.pw_uid, owner.pw_gid)
    for name in (*TREES, *FILES, TOKENS):
        top = staging / name.lstrip("/")
        files = [top] if top.is_file() else sorted(top.rglob("*"))
        for path in files:
            if path.is_symlink() or not path.is_file():
                continue
            dest = paths.real(f"/{path.relative_to(staging)}")
            if name == ACME and os.path.lexists(dest):
                continue
            mode = stat.S_IMODE(path.stat().st_mode)
            uid, gid = tokens_owner if name == TOKENS else (0, 0)
            if name == ECHOBOT and dest.parent.exists():
                uid, gid = dest.parent.stat().st_uid, dest.parent.stat().st_gid
            yield Change(dest, path.read_bytes(), mode, uid, gid)


def _links(paths: Paths, staging: Path) -> None:
    """acmetool's links, such as from live/NAME to the certificate."""
    for path in sorted((staging / ACME.lstrip("/")).rglob("*")):
        dest = paths.real(f"/{path.relative_to(staging)}")
        if path.is_symlink() and not os.path.lexists(dest):
            os.makedirs(dest.parent, 0o755, exist_ok=True)
            os.symlink(os.readlink(path), dest)
