# SPDX-License-Identifier: MIT
"""The commands `user` and `token`: accounts of the relay, and invitations to it.

Whatever is done in the mail store or in the tokens' file is done with the rights of its owner, not
as root: what lies there belongs to a service, and a link in it must lead root nowhere.
"""

import argparse
import contextlib
import datetime
import json
import os
import pwd
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from chatmaild import maildir
from chatmaild.config import Config, read_settings
from chatmaild.invite import invite, new_url
from chatmaild.tokens import PATH as TOKENS
from chatmaild.tokens import Token, TokenStore
from chatmaild.users import MailStore

from . import systemd
from .apply import NotConfigured, is_configured
from .paths import Paths
from .store import OWNER

DOVECOT = "/etc/chatmail/dovecot/dovecot.conf"
DOVECOT_UNIT = "dovecot.service"
DOVEADM_SECONDS = 60
UNITS = {"h": 3600, "d": 86400, "w": 7 * 86400}  # seconds


class AccountError(Exception):
    """What was asked for cannot be done; the text is for the administrator."""


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `user` and `token` to the command line's parser."""

    def group(name: str, help: str) -> Callable[..., argparse.ArgumentParser]:
        parser = commands.add_parser(name, help=help, description=help)
        actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

        def action(name: str, run: Any, help: str, *, address: bool = False) -> Any:
            sub = actions.add_parser(name, help=help, description=help, parents=[common])
            sub.set_defaults(run=run)
            if address:
                sub.add_argument("address", type=str.lower)
            return sub

        return action

    user = group("user", "list, block and delete accounts")
    user("list", _user_list, "list all accounts")
    user("info", _user_info, "tell about one account", address=True)
    user("block", _user_block, "end its sessions, refuse login and mail", address=True)
    user("unblock", _user_unblock, "undo a block", address=True)
    delete = user("delete", _user_delete, "delete the account and all its mail", address=True)
    delete.add_argument("--yes", action="store_true", help="do not ask for the address again")

    token = group("token", "invitations, for registration = token")
    create = token("create", _token_create, "make an invitation")
    create.add_argument(
        "--uses", type=_uses, default=1, metavar="N", help='accounts, or "unlimited"; default 1'
    )
    create.add_argument(
        "--expires",
        type=_seconds,
        default="7d",
        metavar="TIME",
        help='such as 12h, 7d, 4w, or "never"; default 7d',
    )
    create.add_argument("--note", default="", help="what you want to know it by")
    token("list", _token_list, "list invitations and how often they were used")
    revoke = token("revoke", _token_revoke, "make an invitation void")
    revoke.add_argument("token")


def _uses(text: str) -> int | None:
    if text == "unlimited":
        return None
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError('a number from 1, or "unlimited"')
    return int(text)


def _seconds(text: str) -> int | None:
    if text == "never":
        return None
    match = re.fullmatch("([1-9][0-9]{0,3})([hdw])", text)
    if not match:
        raise argparse.ArgumentTypeError('a time such as 12h, 7d or 4w, or "never"')
    return int(match[1]) * UNITS[match[2]]


# --- with whose rights ------------------------------------------------------------------------------


@contextlib.contextmanager
def _as(owner: pwd.struct_passwd | None) -> Iterator[None]:
    """Inside, files are read and written with the rights of *owner*, and privately."""
    umask = os.umask(0o077)
    groups = os.getgroups()
    if owner is not None:
        os.setgroups([])
        os.setegid(owner.pw_gid)
        os.seteuid(owner.pw_uid)
    try:
        yield
    finally:
        if owner is not None:
            os.seteuid(0)
            os.setegid(0)
            os.setgroups(groups)
        os.umask(umask)


def _owner(paths: Paths) -> pwd.struct_passwd | None:
    """Whose the mail store and the tokens are; None for who runs this, below another root.

    By name, not by what a stat() says: the store's owner may have put a link to a place of root's there.
    """
    if os.geteuid() != 0 or paths.root != Path("/"):
        return None
    try:
        return pwd.getpwnam(OWNER)
    except KeyError:
        raise AccountError(f"no user {OWNER}; run systemd-sysusers") from None


class Relay:
    """The accounts of the configured relay; raises NotConfigured."""

    def __init__(self, paths: Paths) -> None:
        if not is_configured(paths):
            raise NotConfigured
        self.config: Config = read_settings(paths.ini)[0]
        self.live = paths.is_live
        self.mail = MailStore(paths.real(self.config.mailboxes_dir))
        self.tokens = TokenStore(paths.real(str(TOKENS)), self.mail.is_taken)
        self.owner = _owner(paths)

    def as_owner(self) -> contextlib.AbstractContextManager[None]:
        """With the rights of the owner of the mail store and of the tokens."""
        return _as(self.owner)

    def end_sessions(self, address: str) -> None:
        """Forget the cached password and end open IMAP sessions of *address*.

        Postfix does not know its sessions by login: there the filter refuses each further message.
        Raises AccountError if Dovecot cannot be told.
        """
        state = systemd.properties([DOVECOT_UNIT], "ActiveState") if self.live else {}
        if state.get(DOVECOT_UNIT, {}).get("ActiveState") != "active":
            return  # no sessions
        for words in (["auth", "cache", "flush", address], ["kick", address]):
            command = ["doveadm", "-c", DOVECOT, *words]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=DOVEADM_SECONDS
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise AccountError(f"open sessions of {address} go on: {error}") from None
            if done.returncode:
                raise AccountError(
                    f"open sessions of {address} go on: doveadm {words[0]}: "
                    f"{done.stderr.strip() or f'status {done.returncode}'}; see systemctl status dovecot"
                )

    def known(self, address: str) -> str:
        """*address*, completed by the domain; raises AccountError if there is no such mailbox."""
        if "@" not in address:
            address = f"{address}@{self.config.mail_domain}"
        try:
            if self.mail.is_taken(address):
                return address
        except ValueError:
            pass
        raise AccountError(f"{address}: no such address")

    def usage(self, address: str) -> tuple[int, int]:
        """Messages of *address*, and the bytes they count in its quota."""
        messages = size = 0
        with maildir.open_store(self.mail.mailbox_path(address)) as mailbox:
            for name, folder in maildir.folders(mailbox) if mailbox is not None else ():
                if name.rpartition("/")[2] != "tmp":
                    for file, status in maildir.files(folder):
                        messages += 1
                        size += maildir.quota_size(file, status.st_size)
        return messages, size

    def delete(self, address: str) -> None:
        """End the sessions of *address* and remove it with its mail; raises AccountError, OSError."""
        with self.as_owner():
            self.mail.block(address)  # no login between the end of its sessions and its removal
        self.end_sessions(address)
        with self.as_owner():
            self._remove(address)

    def _remove(self, address: str) -> None:
        """Remove the mailbox with all that is in it; raises AccountError if it is in use."""
        with maildir.open_store(self.mail.path) as store:
            if store is None or not maildir.remove_mailbox(store, address):
                raise AccountError(f"{address} is being changed; try again")

    def describe(self, address: str) -> dict[str, Any]:
        """What `user list` shows. One mailbox that cannot be read does not hide the others."""
        try:
            blocked = not self.mail.exists(address) or self.mail.is_disabled(address)
            state = "blocked" if blocked else "active"
            day = _day(self.mail.last_login(address))
        except OSError:
            state, day = "unreadable", ""
        return {"address": address, "state": state, "last_login": day}


def _day(when: float) -> str:
    return datetime.datetime.fromtimestamp(when, datetime.timezone.utc).date().isoformat()


def _print(options: argparse.Namespace, data: object, lines: list[str]) -> int:
    if options.json:
        print(json.dumps(data, indent=1, sort_keys=True))
    else:
        for line in lines:
            print(line)
    return 0


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]


# --- user -------------------------------------------------------------------------------------------


def _user_list(paths: Paths, options: argparse.Namespace) -> int:
    relay = Relay(paths)
    with relay.as_owner():
        users = [relay.describe(address) for address in sorted(relay.mail.taken())]
    rows = [(user["address"], user["state"], user["last_login"]) for user in users]
    return _print(options, users, _table(("ADDRESS", "STATE", "LAST LOGIN"), rows))


def _user_info(paths: Paths, options: argparse.Namespace) -> int:
    relay = Relay(paths)
    with relay.as_owner():
        address = relay.known(options.address)
        messages, size = relay.usage(address)
        data = relay.describe(address) | {
            "encrypted_only": relay.mail.requires_encryption(address),
            "has_password": relay.mail.exists(address),
            "messages": messages,
            "bytes": size,
            "max_bytes": relay.config.max_mailbox_size,
        }
    state = (
        data["state"] if data["has_password"] else "blocked for ever, its password file is empty"
    )
    return _print(
        options,
        data,
        [
            f"address:      {address}",
            f"state:        {state}",
            f"last login:   {data['last_login']}",
            f"mail taken:   {'encrypted only' if data['encrypted_only'] else 'all'}",
            f"messages:     {messages}",
            f"storage:      {size / 2**20:.1f} MB of {relay.config.max_mailbox_size // 2**20} MB",
        ],
    )


def _user_block(paths: Paths, options: argparse.Namespace) -> int:
    relay = Relay(paths)
    with relay.as_owner():
        address = relay.known(options.address)
        relay.mail.block(address)
    relay.end_sessions(address)  # also if it was blocked: a session may have slipped in
    return _print(options, {"blocked": address}, [f"chatmail-relay: {address} is blocked"])


def _user_unblock(paths: Paths, options: argparse.Namespace) -> int:
    relay = Relay(paths)
    with relay.as_owner():
        address = relay.known(options.address)
        if not relay.mail.exists(address):
            raise AccountError(
                f"{address} is blocked by an empty password file, its password is lost; "
                "chatmail-relay user delete makes the address free"
            )
        relay.mail.unblock(address)
    return _print(options, {"unblocked": address}, [f"chatmail-relay: {address} is not blocked"])


def _user_delete(paths: Paths, options: argparse.Namespace) -> int:
    relay = Relay(paths)
    with relay.as_owner():
        address = relay.known(options.address)
    if not options.yes:
        print(f"This deletes {address} and all its mail.", file=sys.stderr)
        print("Type the address to go on: ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() != address:
            raise AccountError("not the same address; nothing was deleted")
    relay.delete(address)
    return _print(options, {"deleted": address}, [f"chatmail-relay: {address} is deleted"])


# --- token ------------------------------------------------------------------------------------------


def _describe_token(config: Config, token: Token, now: float) -> dict[str, Any]:
    return {
        "token": token.token,
        "state": token.state(now),
        "uses": token.used,
        "max_uses": token.max_uses,
        "created": _day(token.created),
        "expires": None if token.expires is None else _minute(token.expires),
        "note": token.note,
        "code": invite(config, token.token),
        "url": new_url(config, token.token),
        "page": f"https://{config.mail_host}/invite?token={token.token}",
    }


def _minute(when: float) -> str:
    moment = datetime.datetime.fromtimestamp(when, datetime.timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%MZ")


def _token_create(paths: Paths, options: argparse.Namespace) -> int:
    relay = Relay(paths)
    now = time.time()
    expires = None if options.expires is None else int(now) + options.expires
    note = "".join(char if char.isprintable() else " " for char in options.note)
    with relay.as_owner():
        token = relay.tokens.create(options.uses, expires, note, now)
    if relay.config.registration != "token":
        print(
            f"chatmail-relay: warning: registration is {relay.config.registration}, so nobody needs "
            "or can use a token. Run chatmail-relay set registration=token and chatmail-relay apply",
            file=sys.stderr,
        )
    data = _describe_token(relay.config, token, now)
    code = f"dcaccount:{data['url']}"
    if relay.config.is_ip_relay and relay.config.tls == "self":
        # clients refuse the certificate there; the page gives a code that accepts it
        return _print(options, data, [data["token"], data["page"]])
    return _print(options, data, [data["token"], code, data["page"]])


def _token_list(paths: Paths, options: argparse.Namespace) -> int:
    relay = Relay(paths)
    now = time.time()
    with relay.as_owner():
        tokens = [_describe_token(relay.config, t, now) for t in relay.tokens.tokens(now)]
    rows = [
        (
            item["token"],
            item["state"],
            f"{item['uses']} of {item['max_uses'] or 'unlimited'}",
            item["expires"] or "never",
            item["note"],
        )
        for item in tokens
    ]
    return _print(options, tokens, _table(("TOKEN", "STATE", "USES", "EXPIRES", "NOTE"), rows))


def _token_revoke(paths: Paths, options: argparse.Namespace) -> int:
    relay = Relay(paths)
    with relay.as_owner():
        if not relay.tokens.revoke(options.token):
            raise AccountError(f"{options.token}: no such token")
    return _print(
        options, {"revoked": options.token}, [f"chatmail-relay: {options.token} is void now"]
    )
