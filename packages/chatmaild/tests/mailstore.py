# SPDX-License-Identifier: MIT
"""Mailboxes on disk with messages of any age and size, as Dovecot leaves them."""

import itertools
import os
import time
from pathlib import Path

from chatmaild.users import DAY, MailStore

NOW = int(time.time())
_numbers = itertools.count()


class Box:
    """One mailbox; ages are in days."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def message(self, age: float, folder: str = "cur", size: int = 100, tag: int | None = None):
        """A file of *size* bytes on disk that counts *tag* bytes in the quota; its path."""
        directory = self.path / folder
        directory.mkdir(parents=True, exist_ok=True)
        name = f"{NOW}.M{next(_numbers)}P1.host,S={tag or size},W={tag or size}"
        path = directory / (name + (":2,S" if directory.name == "cur" else ""))
        path.write_bytes(b"")
        os.truncate(path, size)
        set_age(path, age)
        return path

    def left(self) -> int:
        """How many messages there are."""
        return sum(1 for item in self.path.rglob("*.host,*"))


def set_age(path: Path, days: float) -> None:
    """Make a file that many days old."""
    os.utime(path, (NOW - days * DAY, NOW - days * DAY), follow_symlinks=False)


def make_box(store: MailStore, address: str, login_age: float = 0) -> Box:
    """A mailbox with password, flag, INBOX and Dovecot's files."""
    path = store.path / address
    for name in ("cur", "new", "tmp"):
        (path / name).mkdir(parents=True)
    (path / "password").write_text("{SHA512-CRYPT}$6$x")
    (path / "enforceE2EEincoming").touch()
    (path / "maildirsize").write_text("500S\n1 1\n")
    (path / "dovecot.index.log").write_text("x" * 50)
    set_age(path / "password", login_age)
    return Box(path)
