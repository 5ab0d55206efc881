# SPDX-License-Identifier: MIT
"""Reading and removing mailboxes beside a running Dovecot, without following anything out of them.

    MAILBOXES_DIR/USER@DOMAIN/      the mailbox: a maildir with its INBOX in cur, new, tmp
        .FOLDER/                    another IMAP folder (Maildir++): cur, new, tmp
        all other files             Dovecot's indexes, maildirsize, and ours (see users.py)
    MAILBOXES_DIR/.removed/         mailboxes that are no longer any, until their files are gone

Everything is opened relative to the descriptor of its parent and never through a symbolic link, so
neither a strange name nor a change in between leads out of the store. Directories are streamed: memory
does not depend on how many mailboxes or messages there are.

A message is removed by unlinking its file, as the maildir format allows to anybody at any time: Dovecot
sees that at its next look at the directory, and sessions in IDLE are told. Its indexes are left to it.
Only `maildirsize`, where it adds up the quota, must go, and is then made anew.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator

MESSAGE_FOLDERS = ("cur", "new", "tmp")
REMOVED = ".removed"  # no "@" in it: never a mailbox

_find_quota_size = re.compile(",S=([0-9]+)").search
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# gone, or no directory but something else: a mailbox removed or a file renamed under our feet
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@contextlib.contextmanager
def open_store(path: str | os.PathLike[str]) -> Iterator[int | None]:
    """A descriptor of the mail store; None if there is none yet."""
    try:
        store = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        yield store
    finally:
        os.close(store)


@contextlib.contextmanager
def open_directory(name: str, parent: int) -> Iterator[int | None]:
    """A descriptor of the directory *name* in *parent*; None if it is gone or is none."""
    try:
        directory = os.open(name, _OPEN, dir_fd=parent)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        yield None
        return
    try:
        yield directory
    finally:
        os.close(directory)


def mailboxes(store: int) -> Iterator[str]:
    """The names of all mailbox directories, in no order, accounts or not."""
    with os.scandir(store) as entries:
        for entry in entries:
            name = entry.name
            if "@" in name and name[0] != "." and entry.is_dir(follow_symlinks=False):
                yield name


def folders(
    mailbox: int, other: Callable[[os.DirEntry[str]], object] | None = None, *, depth: int = 1
) -> Iterator[tuple[str, int]]:
    """All directories of messages of a mailbox: "cur", ".Sent/new", and an open descriptor of each.

    The descriptor is closed when the next one is asked for. *other* is called with each entry of the
    mailbox and of its folders that is not a directory.
    """
    with os.scandir(mailbox) as entries:
        for entry in entries:
            name = entry.name
            if not entry.is_dir(follow_symlinks=False):
                if other:
                    other(entry)
            elif name in MESSAGE_FOLDERS:
                with open_directory(name, mailbox) as directory:
                    if directory is not None:
                        yield name, directory
            elif depth and name[0] == ".":
                with open_directory(name, mailbox) as directory:
                    if directory is not None:
                        for inner, messages in folders(directory, other, depth=depth - 1):
                            yield f"{name}/{inner}", messages


def files(directory: int) -> Iterator[tuple[str, os.stat_result]]:
    """The regular files of a directory that are still there when looked at."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                yield entry.name, status


def is_empty(directory: int) -> bool:
    """Whether nothing is in the directory."""
    with os.scandir(directory) as entries:
        return next(entries, None) is None


def status_of(name: str, directory: int) -> os.stat_result | None:
    """lstat of a regular file in *directory*; None if there is none of that name."""
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def unlink(name: str, directory: int) -> bool:
    """Remove a file; whether it was there (Dovecot renames messages when their flags change)."""
    folder, separator, inner = name.partition("/")
    if separator:
        with open_directory(folder, directory) as opened:
            return opened is not None and unlink(inner, opened)
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return False
    return True


def quota_size(name: str, size: int) -> int:
    """What a message counts in the quota: S= in its name, bytes before compression, else *size*."""
    tag = _find_quota_size(name)
    return int(tag[1]) if tag else size


def forget_quota(mailbox: int) -> None:
    """Let Dovecot count the mailbox anew.

    To be called before the first and after the last removal: if we are killed in between, or a
    delivery makes the file again, its sum is corrected all the same.
    """
    unlink("maildirsize", mailbox)


def remove_mailbox(
    store: int, name: str, still: Callable[[int], bool] = lambda mailbox: True
) -> bool:
    """Remove the mailbox *name* with all its files; whether that was done.

    *still* is asked twice with a descriptor of the mailbox, before and after it has lost its name;
    if the answer is no, as somebody has just logged in, the mailbox is as it was. False also if it is
    being made right now, or is no directory.

    It loses its name in one step (rename), so an account is never half there: killed before, it is
    whole; killed after, the address is free, and `finish_removals` sees to the files. A login in the
    very moment makes the address anew, empty.
    """
    with open_directory(name, store) as mailbox:
        if mailbox is None or not _lock(mailbox) or not still(mailbox):
            return False
        with _removed(store) as removed:
            new = secrets.token_hex(16)
            try:
                os.rename(name, new, src_dir_fd=store, dst_dir_fd=removed)
            except FileNotFoundError:
                return False
            if not os.path.samestat(os.stat(new, dir_fd=removed), os.fstat(mailbox)) or not still(
                mailbox
            ):
                # fails if the address is an account again: then that one counts
                with contextlib.suppress(OSError):
                    os.rename(new, name, src_dir_fd=removed, dst_dir_fd=store)
                    return False
            _remove_tree(new, removed)
    return True


def finish_removals(store: int) -> int:
    """Remove the files of mailboxes whose removal was interrupted; how many there were."""
    done = 0
    with open_directory(REMOVED, store) as removed:
        if removed is not None:
            with os.scandir(removed) as entries:
                for entry in entries:
                    _remove_tree(entry.name, removed)
                    done += 1
    return done


def _lock(mailbox: int) -> bool:
    """Lock out creations of the same address (MailStore.create); False if one is under way."""
    try:
        fcntl.flock(mailbox, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _removed(store: int) -> Iterator[int]:
    """The directory of removed mailboxes, of the store's owner whoever we are."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(REMOVED, 0o700, dir_fd=store)
    directory = os.open(REMOVED, _OPEN, dir_fd=store)
    try:
        owner = os.fstat(store)
        if os.geteuid() == 0 and os.fstat(directory).st_uid != owner.st_uid:
            os.fchown(directory, owner.st_uid, owner.st_gid)
        yield directory
    finally:
        os.close(directory)


def _remove_tree(name: str, parent: int) -> None:
    """Remove *name*, a file or a directory with all that is in it; links are removed, not followed."""
    with open_directory(name, parent) as directory:
        if directory is None:
            unlink(name, parent)
            return
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    _remove_tree(entry.name, directory)
                else:
                    unlink(entry.name, directory)
    # another run may be at it too; what a delivery has just added is removed the next time
    with contextlib.suppress(FileNotFoundError):
        try:
            os.rmdir(name, dir_fd=parent)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
