# SPDX-License-Identifier: MIT
"""The mail store: one directory an address, and the files in it that make it an account.

    MAILBOXES_DIR/USER@DOMAIN/          0700, also the maildir (cur, new, tmp)
        password                        "{SHA512-CRYPT}$6$...", no newline; its mtime is the day of
                                        the last login
        enforceE2EEincoming             empty flag: this address takes encrypted mail only
        DISABLED                        empty flag, a block: no login, no sending, no receiving
        password.new                    what a creation was writing when it was killed


An address is an account if and only if `password` has a non-empty first line. An *empty* password
file is a block of old: nobody can log in, and the address is never given away again. The flag is a
block that can be undone, as the password stays.

`MailStore.create` promises: whatever dies in between (kill -9, power), an address is afterwards
either no account or a complete one; concurrent creations, from any number of processes, make one
account and all get its hash. It never replaces a password file. The order of its steps carries
this: the flag is on disk before the password has its name, and the password gets its name by
link(2), which does not overwrite.

Imported by every service that asks about addresses: nothing heavy may be imported here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

DAY = 86400  # seconds
PASSWORD_MAX_BYTES = 511  # crypt(3): CRYPT_MAX_PASSPHRASE_SIZE of libxcrypt, with its NUL

_NAME_MAX = 255  # bytes of one file name, limits.h
_CONTROL = re.compile("[\0-\x1f\x7f]")
_HASH_MAX = 1024  # bytes of a password file we are ready to read
_CREATE_TRIES = 5


class Blocked(Exception):
    """The address has an empty password file: it must not be used, and not be created."""


def check_password(password: str) -> None:
    """Raise ValueError for a password that `hash_password` would refuse."""
    if len(password.encode("utf-8")) > PASSWORD_MAX_BYTES:
        raise ValueError(f"longer than {PASSWORD_MAX_BYTES} bytes")
    if "\0" in password:
        raise ValueError("contains a NUL")


def hash_password(password: str) -> str:
    """*password* as Dovecot's `{SHA512-CRYPT}` with a fresh salt and the default 5000 rounds.

    Takes about a millisecond. Raises ValueError for a password that crypt(3) cannot hash: longer
    than PASSWORD_MAX_BYTES in UTF-8, or with a NUL.
    """
    import crypt_r  # only who creates accounts needs it

    check_password(password)
    hashed = crypt_r.crypt(password, crypt_r.mksalt(crypt_r.METHOD_SHA512))
    if not hashed or not hashed.startswith("$6$"):  # crypt(3) reports errors as "*0"
        raise ValueError("password cannot be hashed")
    return "{SHA512-CRYPT}" + str(hashed)


class MailStore:
    """All mailboxes of one relay, the directory `mailboxes_dir` of the settings."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._prefix = f"{self.path}/"

    def mailbox_path(self, address: str) -> Path:
        """The directory of *address*, whether it exists or not.

        Raises ValueError for what can never be an account: anything but one "@" with something on
        both sides, a "/", a control character, a leading dot, a name too long for a file. Letters
        are taken as they are: the caller lower-cases (Dovecot does).
        """
        return Path(self._folder(address))

    def _folder(self, address: str) -> str:
        """mailbox_path() as a string: the filter asks three times a recipient, and a Path costs."""
        local, _, domain = address.partition("@")
        if not local or not domain or "@" in domain or local.startswith(".") or "/" in address:
            raise ValueError(f"not an address: {address!r}")
        if _CONTROL.search(address):
            raise ValueError(f"not an address: {address!r}")
        if len(address.encode("utf-8")) > _NAME_MAX:  # also raises ValueError for lone surrogates
            raise ValueError(f"address longer than {_NAME_MAX} bytes")
        return self._prefix + address

    def read_hash(self, address: str) -> str | None:
        """The password hash of an account; None if there is no such account.

        Raises Blocked, ValueError (see mailbox_path), and OSError if the file cannot be read.
        """
        hashed = _read_first_line(f"{self._folder(address)}/password")
        if hashed == "":
            raise Blocked(address)
        return hashed

    def exists(self, address: str) -> bool:
        """Whether *address* is an account, and not blocked; False for any nonsense.

        Raises OSError if that cannot be known now.
        """
        try:
            return self.read_hash(address) is not None
        except (Blocked, ValueError):
            return False

    def is_taken(self, address: str) -> bool:
        """Whether *address* is an account or was one that is blocked for ever (empty password)."""
        try:
            return self.read_hash(address) is not None
        except Blocked:
            return True

    def requires_encryption(self, address: str) -> bool:
        """Whether *address* takes encrypted mail only (flag enforceE2EEincoming)."""
        return self._has_flag(address, "enforceE2EEincoming")

    def is_disabled(self, address: str) -> bool:
        """Whether *address* is blocked: no login, no sending, no receiving (flag DISABLED)."""
        return self._has_flag(address, "DISABLED")

    def _has_flag(self, address: str, flag: str) -> bool:
        try:
            os.stat(f"{self._folder(address)}/{flag}")
        except (ValueError, FileNotFoundError, NotADirectoryError):
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        """All accounts, in no order: without half-made ones and other directories, without those
        blocked for ever, and without those that cannot be read now."""
        for address in self.taken():
            with contextlib.suppress(OSError):
                if self.exists(address):
                    yield address

    def taken(self) -> Iterator[str]:
        """All addresses that nobody else can get: accounts, those blocked for ever, and those that
        cannot be read now."""
        try:
            entries = os.scandir(self.path)
        except FileNotFoundError:
            return
        with entries:
            for entry in entries:
                try:
                    if "@" in entry.name and self.is_taken(entry.name):
                        yield entry.name
                except ValueError:
                    pass
                except OSError:
                    yield entry.name

    def count(self) -> int:
        """How many mailboxes there are: accounts, blocked and half-made ones. Reads names only."""
        return sum("@" in name for name in os.listdir(self.path))

    def create(self, address: str, password: str) -> tuple[str, bool]:
        """Make the account, unless it exists: its hash, and whether this call has made it.

        Blocks for the disk (three fsync) and for a concurrent creation of the same address. Raises
        Blocked, ValueError (see mailbox_path, hash_password) and OSError; then nothing was made
        that counts as an account.
        """
        check_password(password)
        mailbox = self.mailbox_path(address)
        for _ in range(_CREATE_TRIES):
            # not found: the expiry removed the mailbox; exists: the admin has just blocked it
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                self._make_directory(mailbox)
                with _locked_directory(mailbox) as directory:
                    if directory is None:
                        continue
                    hashed = self.read_hash(address)
                    if hashed is not None:
                        return hashed, False
                    hashed = hash_password(password)
                    _write_account(directory, hashed)
                    return hashed, True
        raise OSError(errno.EAGAIN, "mailbox changes under our feet", str(mailbox))

    def _make_directory(self, mailbox: Path) -> None:
        try:
            mailbox.mkdir(mode=0o700)
        except FileExistsError:
            return
        except FileNotFoundError:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            return self._make_directory(mailbox)
        _fsync_path(self.path)

    def block(self, address: str) -> bool:
        """Set the flag DISABLED of an account; False if it was set. It takes effect at once, except
        for sessions that are open and passwords that Dovecot has cached.

        Raises FileNotFoundError if there is no such mailbox, ValueError for nonsense.
        """
        mailbox = self.mailbox_path(address)
        try:
            file = os.open(
                mailbox / "DISABLED", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
            )
        except FileExistsError:
            return False
        os.close(file)
        _fsync_path(mailbox)
        return True

    def unblock(self, address: str) -> bool:
        """Remove the flag DISABLED; False if it was not set. Raises ValueError for nonsense."""
        mailbox = self.mailbox_path(address)
        try:
            os.unlink(mailbox / "DISABLED")
        except FileNotFoundError:
            return False
        _fsync_path(mailbox)
        return True

    def last_login(self, address: str) -> int:
        """The day of the last login, or of the creation: its begin in seconds since 1970, UTC.

        Raises FileNotFoundError for an unknown address, ValueError for nonsense.
        """
        when = int(os.stat(self.mailbox_path(address) / "password").st_mtime)
        return when - when % DAY

    def set_last_login(self, address: str, when: int) -> bool:
        """Note the day of a login, *when* in seconds since 1970, as mtime and atime of the password.

        Truncated to the UTC day, so that the store does not tell at what time people are active.
        Returns whether something changed. Raises FileNotFoundError for an unknown address, ValueError
        for nonsense.
        """
        password = self.mailbox_path(address) / "password"
        day = when - when % DAY
        status = os.stat(password)
        if status.st_mtime_ns == day * 10**9 and status.st_atime_ns == day * 10**9:
            return False
        try:
            os.utime(password, (day, day))
        except OverflowError as error:
            raise ValueError(f"not a time: {when}") from error
        return True


def _read_first_line(path: str) -> str | None:
    """The first line without its newline, "" for an empty file, None for none."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        line = os.read(file, _HASH_MAX).partition(b"\n")[0]
    finally:
        os.close(file)
    return line.decode("ascii", "replace").strip()


@contextlib.contextmanager
def _locked_directory(path: Path) -> Iterator[int | None]:
    """A descriptor of the directory, locked against other creators; None if it was removed since.

    The kernel drops the lock of a dead process, and no lock file stays behind.
    """
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield directory if _is_at(directory, path) else None
    finally:
        os.close(directory)


def _is_at(directory: int, path: Path) -> bool:
    """Whether *path* still names the open *directory*: it may be removed, or renamed to be."""
    try:
        now = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(directory), now)


def _write_account(directory: int, hashed: str) -> None:
    """Write flag and password into the locked *directory*, in the order that makes a kill harmless."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink("password.new", dir_fd=directory)
    new = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
    os.close(os.open("enforceE2EEincoming", new, 0o600, dir_fd=directory))
    file = os.open("password.new", new | os.O_EXCL, 0o600, dir_fd=directory)
    try:
        data = hashed.encode("ascii")
        if os.write(file, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file)
    finally:
        os.close(file)
    os.fsync(directory)  # the flag has to reach the disk before the password's name
    os.link("password.new", "password", src_dir_fd=directory, dst_dir_fd=directory)
    os.unlink("password.new", dir_fd=directory)
    os.fsync(directory)


def _fsync_path(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
