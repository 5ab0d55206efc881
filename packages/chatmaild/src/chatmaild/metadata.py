# SPDX-License-Identifier: MIT
"""chatmail-metadata: the dictionaries behind IMAP METADATA (RFC 5464) and Dovecot's last_login.

Keys as Dovecot 2.4 writes them, NAME being what a client asked for:

    priv/<GUID>/devicetoken                                              /private/devicetoken of INBOX
    shared/<GUID>/vendor/vendor.dovecot/pvt/server/vendor/deltachat/NAME  /shared/vendor/deltachat/NAME
    shared/last-login/USER                                               a login, value: unix time

Setting a device token adds it: every device of a user has one. A token is forgotten when it was not
set again for TOKEN_DAYS. They are kept in the mailbox, `metadata.json`: {"devicetoken": {token: unix
time}}; the list of tokens that old relays wrote is read as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chatmaild import metrics
from chatmaild.activation import listen_sockets, notify, setup_logging
from chatmaild.config import DEFAULT_PATH, Config, ConfigError, read_config
from chatmaild.dictproxy import Refused, start_server
from chatmaild.users import MailStore

TOKEN_DAYS = 90
MAX_TOKENS = 32  # of one user; the ones set longest ago give way
MAX_FILE = 1 << 20  # bytes of a metadata.json we are ready to read
MAX_SMTP_RECIPIENTS = 1000  # Postfix' smtpd_recipient_limit

_FUTURE = 60  # seconds a clock may have been wrong
_TOKEN = re.compile(r"[!-~]{1,4096}\Z")
_SERVER_KEY = re.compile(
    r"shared/[^/]+/vendor/vendor\.dovecot/pvt/server/vendor/deltachat/([a-z]+)\Z"
)
_TOKEN_KEY = re.compile(r"priv/[^/]+/devicetoken\Z")
_LOGIN_KEY = re.compile(r"shared/last-login/(.+)\Z")

log = logging.getLogger("metadata")

LOGINS = metrics.Counter("chatmail_logins", "Logins at IMAP.")


class Tokens:
    """The device tokens of all users, each user's in a file of its mailbox."""

    def __init__(self, store: MailStore, now: Callable[[], float] = time.time) -> None:
        self.store = store
        self.now = now

    def get(self, user: str) -> list[str]:
        """The valid tokens of *user* in the order they were first set; [] for an unknown user."""
        try:
            return list(self._valid(self._read(self._path(user))))
        except ValueError:
            return []

    def add(self, user: str, token: str) -> None:
        """Note that a device of *user* has *token* now; raises Refused for what cannot be one."""
        if not _TOKEN.match(token):
            raise Refused("device token is not 1 to 4096 printable characters")
        try:
            known = self.store.exists(user)
            path = self._path(user)
        except ValueError:
            known = False
        if not known:
            raise Refused("device token of an unknown user")
        data = self._read(path)
        tokens = self._valid(data)
        tokens[token] = int(self.now())
        while len(tokens) > MAX_TOKENS:
            del tokens[min(tokens, key=lambda item: tokens[item])]
        _write(path, {**data, "devicetoken": tokens})

    def _path(self, user: str) -> Path:
        return self.store.mailbox_path(user) / "metadata.json"

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            with open(path, "rb") as file:
                data = json.loads(file.read(MAX_FILE))
        except FileNotFoundError:
            return {}
        except ValueError:
            log.warning("a damaged metadata.json starts anew")
            return {}
        return data if isinstance(data, dict) else {}

    def _valid(self, data: dict[str, Any]) -> dict[str, int]:
        now = int(self.now())
        tokens = data.get("devicetoken", {})
        if isinstance(tokens, list):  # relays before 2025 wrote no times
            tokens = {token: now for token in tokens}
        if not isinstance(tokens, dict):
            return {}
        return {
            token: int(when)
            for token, when in tokens.items()
            if isinstance(when, (int, float))
            and _TOKEN.match(str(token))
            and now - TOKEN_DAYS * 86400 <= when <= now + _FUTURE
        }


class Metadata:
    """The dictionary of socket `metadata`."""

    def __init__(self, config: Config, tokens: Tokens) -> None:
        self.tokens = tokens
        self.server = {"maxsmtprecipients": str(MAX_SMTP_RECIPIENTS)}
        if config.iroh_relay_url:
            self.server["irohrelay"] = config.iroh_relay_url

    def lookup(self, key: str, user: str) -> str | None:
        """The value of a key; None for one that is not set or that we do not have."""
        server_key = _SERVER_KEY.match(key)
        if server_key:
            return self.server.get(server_key[1])
        if _TOKEN_KEY.match(key):
            return " ".join(self.tokens.get(user)) or None
        return None

    def commit(self, user: str, changes: list[tuple[str, str | None]]) -> None:
        """Set device tokens; everything else is refused, before anything is set."""
        for key, value in changes:
            if not _TOKEN_KEY.match(key) or value is None:
                raise Refused("only a device token can be set")
        for _key, value in changes:
            self.tokens.add(user, value or "")


class LastLogin:
    """The dictionary of socket `lastlogin`: the day of the last login, as times of `password`."""

    def __init__(self, store: MailStore) -> None:
        self.store = store

    def lookup(self, key: str, user: str) -> str | None:
        """Dovecot never asks."""
        return None

    def commit(self, user: str, changes: list[tuple[str, str | None]]) -> None:
        """Note logins; an address that vanished in between is no error."""
        for key, value in changes:
            match = _LOGIN_KEY.match(key)
            if not match or value is None or not re.match(r"[0-9]{1,11}\Z", value):
                raise Refused("not a last login")
            with contextlib.suppress(FileNotFoundError):
                try:
                    self.store.set_last_login(match[1], int(value))
                    LOGINS.inc()
                except ValueError as error:
                    raise Refused("not a last login") from error


def _write(path: Path, data: dict[str, Any]) -> None:
    temporary = path.with_name("metadata.json.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(data, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


async def serve(config: Config) -> None:
    """Serve both sockets until cancelled."""
    sockets = listen_sockets("metadata", "lastlogin", optional=("metrics",))
    await metrics.start_server(sockets)
    store = MailStore(config.mailboxes_dir)
    metadata = await start_server(Metadata(config, Tokens(store)), sockets["metadata"])
    logins = await start_server(LastLogin(store), sockets["lastlogin"])
    notify("READY=1")
    async with metadata, logins:
        await asyncio.gather(metadata.serve_forever(), logins.serve_forever())


def main(arguments: list[str]) -> int:
    """Run the service; *arguments* is the path of the settings file, or nothing."""
    setup_logging()
    os.umask(0o077)
    try:
        config = read_config(arguments[0] if arguments else DEFAULT_PATH)
    except ConfigError as error:
        log.critical("%s", error)
        return 78  # EX_CONFIG, sysexits(3)
    asyncio.run(serve(config))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
