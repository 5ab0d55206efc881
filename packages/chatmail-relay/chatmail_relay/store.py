# SPDX-License-Identifier: MIT
"""Commands of chatmaild that work on the mail store: they run as its owner, not as root."""

import importlib
import os
import pwd
from pathlib import Path

from .paths import Paths

#: What belongs to the owner of the mail store.
FOLDERS = ("mail", "doveauth", "metadata")
OWNER = "_chatmail"
COMMANDS = {
    "expire": "delete old mail and idle accounts now, or say what would go",
    "fsreport": "report what the mailboxes hold and how many accounts are in use",
}


def run(command: str, arguments: list[str]) -> int:
    """Run one of COMMANDS with its own options; returns its exit status."""
    if os.geteuid() == 0:
        owner = pwd.getpwnam(OWNER)
        os.setgroups([])
        os.setgid(owner.pw_gid)
        os.setuid(owner.pw_uid)
    module = importlib.import_module(f"chatmaild.{command}")
    return int(module.main(arguments, f"chatmail-relay {command}"))


def adopt(paths: Paths) -> int:
    """Give the mail store to its owner where it is somebody else's; the number of files.

    It came with a volume or a backup of a machine on which the owner has another number. Only the first level
    is looked at to find out. Nothing of the relay may be running.
    """
    if os.geteuid() != 0 or paths.root != Path("/"):
        return 0
    owner = pwd.getpwnam(OWNER)
    count = 0
    for folder in FOLDERS:
        top = paths.real(f"/var/lib/chatmail/{folder}")
        if not top.is_dir():
            continue
        with os.scandir(top) as entries:
            uids = {entry.stat(follow_symlinks=False).st_uid for entry in entries}
        if uids <= {owner.pw_uid}:
            continue
        # by descriptors: a link that was put there leads nowhere
        for _path, folders, files, descriptor in os.fwalk(top):
            for name in (*folders, *files):
                os.chown(name, owner.pw_uid, owner.pw_gid, dir_fd=descriptor, follow_symlinks=False)
                count += 1
    return count
