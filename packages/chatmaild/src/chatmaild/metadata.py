# SPDX-License-Identifier: MIT
"""chatmail-metadata: IMAP METADATA (RFC 5464), Dovecot's last_login, and notifications.

Keys as Dovecot 2.4 writes them, NAME being what a client asked for:

    priv/<GUID>/devicetoken                                              /private/devicetoken of INBOX
    shared/<GUID>/vendor/vendor.dovecot/pvt/server/vendor/deltachat/NAME  /shared/vendor/deltachat/NAME
    shared/last-login/USER                                               a login, value: unix time

Setting a device token adds it: every device of a user has one (devicetokens). Of the server's keys we
have `turn` (credentials for calls), `irohrelay`, `maxsmtprecipients` and `appversions`. The socket
`events` is notifier's.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from chatmaild import metrics, notifier
from chatmaild.activation import listen_sockets, notify, setup_logging
from chatmaild.appversions import AppVersions
from chatmaild.config import DEFAULT_PATH, TURN_PORT, Config, ConfigError, read_config
from chatmaild.devicetokens import DeviceTokens, InvalidToken
from chatmaild.dictproxy import Refused, start_server
from chatmaild.pushqueue import Queue
from chatmaild.users import MailStore

MAX_SMTP_RECIPIENTS = 1000  # Postfix' smtpd_recipient_limit
TURN_SECONDS = 5 * 86400  # clients ask again when less than 12 hours are left
TURN_CREDENTIAL = "turn_secret"
QUEUE = Path("/var/lib/chatmail/metadata/queue.sqlite")
LEGACY_QUEUE = "pending_notifications"  # of other relays, among the mailboxes
THREADS = 4  # that wait for the disk

_SERVER_KEY = re.compile(
    r"shared/[^/]+/vendor/vendor\.dovecot/pvt/server/vendor/deltachat/([a-z]+)\Z"
)
_TOKEN_KEY = re.compile(r"priv/[^/]+/devicetoken\Z")
_LOGIN_KEY = re.compile(r"shared/last-login/(.+)\Z")

log = logging.getLogger("metadata")

LOGINS = metrics.Counter("chatmail_logins", "Logins at IMAP.")


class Turn:
    """Credentials for the TURN server *host*, as the TURN REST API's draft has them.

    The name is the unix time until which it is good, bare, because clients read it as such. The
    secret is coturn's; nothing is stored, coturn computes the same.
    """

    def __init__(self, host: str, secret: bytes, now: Callable[[], float] = time.time) -> None:
        self.host = host
        self.secret = secret
        self.now = now

    def value(self) -> str | None:
        """HOST:PORT:NAME:PASSWORD, None without a secret."""
        if not self.secret:
            return None
        name = str(int(self.now()) + TURN_SECONDS)
        digest = hmac.digest(self.secret, name.encode(), "sha1")
        return f"{self.host}:{TURN_PORT}:{name}:{base64.b64encode(digest).decode()}"


def turn_secret() -> bytes:
    """The secret that systemd passed (LoadCredential=), b"" if there is none."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        return b""
    try:
        return (Path(directory) / TURN_CREDENTIAL).read_bytes().strip()
    except FileNotFoundError:
        return b""


class Metadata:
    """The dictionary of socket `metadata`; *turn* and *versions* are asked anew each time."""

    def __init__(
        self,
        config: Config,
        tokens: DeviceTokens,
        turn: Callable[[], str | None] = lambda: None,
        versions: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.tokens = tokens
        self.server: dict[str, Callable[[], str | None]] = {
            "appversions": versions,
            "irohrelay": lambda: config.iroh_relay_url or None,
            "maxsmtprecipients": lambda: str(MAX_SMTP_RECIPIENTS),
            "turn": turn,
        }

    def lookup(self, key: str, user: str) -> str | None:
        """The value of a key; None for one that is not set or that we do not have."""
        server_key = _SERVER_KEY.match(key)
        if server_key:
            return self.server.get(server_key[1], lambda: None)()
        if _TOKEN_KEY.match(key):
            return " ".join(self.tokens.get(user)) or None
        return None

    def commit(self, user: str, changes: list[tuple[str, str | None]]) -> None:
        """Set device tokens; everything else is refused, before anything is set."""
        for key, value in changes:
            if not _TOKEN_KEY.match(key) or value is None:
                raise Refused("only a device token can be set")
        for _key, value in changes:
            try:
                self.tokens.add(user, value or "")
            except InvalidToken as error:
                raise Refused(str(error)) from error


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


async def serve(config: Config) -> None:
    """Serve all sockets until cancelled."""
    sockets = listen_sockets(
        "metadata", "lastlogin", "events", optional=("metrics",), kept=notifier.KEPT
    )
    await metrics.start_server(sockets)
    store = MailStore(config.mailboxes_dir)
    tokens = DeviceTokens(store)
    dictionary = Metadata(
        config, tokens, Turn(config.mail_host, turn_secret()).value, AppVersions().value
    )
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="dict")
    servers = [
        await start_server(dictionary, sockets["metadata"], threads),
        await start_server(LastLogin(store), sockets["lastlogin"], threads),
    ]
    work = [server.serve_forever() for server in servers]
    if config.notification_url:
        server = notifier.NotificationServer(config.notification_url, config.notification_proxy)
        push = notifier.Notifier(tokens, server, Queue(QUEUE))
        kept = [sockets[name] for name in sockets if name.startswith(notifier.KEPT)]
        events = await notifier.start_server(push, sockets["events"], kept)
        work += [events.serve_forever(), push.serve(store.path / LEGACY_QUEUE)]
    notify("READY=1")
    await asyncio.gather(*work)


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
