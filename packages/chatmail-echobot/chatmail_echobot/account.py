# SPDX-License-Identifier: MIT
"""Makes the bot's account in the mail store: the one step that needs rights there.

The relay's door for new addresses is not used: it may be closed, want a token or count sources, and
"echo" is too short a name for it. Run as root before each start, with the rights of the mail store's
owner for all that it does there; does nothing if the account is there.
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from chatmaild.users import Blocked, MailStore

OWNER = "_chatmail"  # of the mail store
#: An empty file in the mailbox that says whose it is, for the purge of the package.
MARK = "echobot"
_PASSWORD_MAX = 256  # octets


class AccountError(Exception):
    """The address is somebody else's; the text names it and the remedy."""


def read_password(folder: Path) -> str:
    """The password that the bot has made for itself; the file is its own, a link is not followed."""
    file = os.open(folder / "password", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return os.read(file, _PASSWORD_MAX).decode("ascii")
    finally:
        os.close(file)


def become_owner() -> None:
    """Give up root for the rights of the mail store's owner, for good."""
    owner = pwd.getpwnam(OWNER)
    os.setgroups([])
    os.setresgid(owner.pw_gid, owner.pw_gid, owner.pw_gid)
    os.setresuid(owner.pw_uid, owner.pw_uid, owner.pw_uid)
    os.umask(0o077)


def make_account(store: MailStore, address: str, password: str) -> bool:
    """Make the account; whether it was not there yet. Raises AccountError, OSError, ValueError."""
    import crypt_r  # only who makes accounts needs it

    remedy = (
        f"Give the bot another name by chatmail-relay set echobot_name=NAME, or make this one free by "
        f"chatmail-relay user delete {address}"
    )
    try:
        hashed, made = store.create(address, password)
    except Blocked as error:
        raise AccountError(f"{address} is blocked. {remedy}") from error
    scheme, _, crypted = hashed.partition("}")
    if scheme != "{SHA512-CRYPT" or crypt_r.crypt(password, crypted) != crypted:
        raise AccountError(f"{address} exists with another password. {remedy}")
    (store.mailbox_path(address) / MARK).touch(mode=0o600)
    return made
