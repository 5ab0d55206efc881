# SPDX-License-Identifier: MIT
"""Commands of chatmaild that work on the mail store: they run as its owner, not as root."""

import importlib
import os
import pwd

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
