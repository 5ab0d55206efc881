# SPDX-License-Identifier: MIT
"""chatmail-doveauth: makes accounts, for Dovecot at the first login and for the web page.

Dovecot checks passwords itself (auth.lua reads the password file); it asks this service only when an
address has no password file. Socket `create`, one request a line, several a connection, UTF-8, at
most MAX_LINE bytes:

    C<TAB>ADDRESS<TAB>PASSWORD<TAB>IP   ->  O<TAB>HASH      the account exists now, with this hash
                                            N<TAB>REASON    refused by policy
                                            F<TAB>REASON    failed for now

IP is the client's; what comes without one counts as one source (see sources).

Whether the password fits the hash is for Dovecot to find out: of two concurrent first logins with
different passwords one wins, and the other gets its hash. Socket `new` is HTTP/1.1 (see newemail).

Every refusal is one warning in the log; it names lengths and limits, never who asked.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from chatmaild import metrics, newemail
from chatmaild.activation import listen_sockets, notify, setup_logging
from chatmaild.config import DEFAULT_PATH, Config, ConfigError, read_config
from chatmaild.sources import SourceLimiter
from chatmaild.tokens import PATH as TOKENS
from chatmaild.tokens import Invalid, TokenStore
from chatmaild.users import Blocked, MailStore, check_password

MAX_LINE = 1024  # bytes, newline included
MAX_CONNECTIONS = 256  # Dovecot's auth-worker processes: 100 at most
BACKLOG = 1024  # as in the socket units; asyncio would make it 100, and the 101st is refused
MAX_REQUESTS_IN_DISK = 8  # threads that hash and wait for the disk
IDLE_SECONDS = 30.0

NOCREATE = Path("/etc/chatmail-nocreate")
PROC = Path("/proc")
COUNT_SECONDS = 600.0  # between two counts of all mailboxes

_MEGABYTE = 1024 * 1024
_USERNAME = re.compile(r"[a-z0-9_-][a-z0-9._-]*\Z")

# Nobody may claim these: certificate authorities mail domain validation to some of them (CA/Browser
# Forum BR 3.2.2.4.4), people report abuse to others (RFC 2142), and bounces come from one.
RESERVED = frozenset(
    "abuse admin administrator hostmaster mailer-daemon noc postmaster root security webmaster".split()
)

log = logging.getLogger("doveauth")


CREATED = metrics.Counter("chatmail_accounts_created", "Addresses made at their first login.")
REFUSED = metrics.Counter("chatmail_accounts_refused", "Addresses not made.", ("reason",))
ACCOUNTS = metrics.Gauge("chatmail_mailboxes", "Mailboxes, counted every ten minutes.")


class Refused(Exception):
    """The relay's policy forbids this account; the text is fit for the log and for a client.

    *reason* is the short form for statistics.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Policy:
    """Who may have a new account: the rules of the settings and the limits of the machine."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def check(self, address: str, password: str) -> None:
        """Raise Refused, with the first reason, if this account must not be made now."""
        self.check_open()
        config = self.config
        if len(password) < config.password_min_length:
            raise Refused(
                "password",
                f"Password needs to be at least {config.password_min_length} characters long",
            )
        if any(ord(char) < 32 or ord(char) == 127 for char in password):
            raise Refused("password", "Password contains control characters")
        try:
            check_password(password)
        except ValueError as error:
            raise Refused("password", f"Password is {error}") from error
        user, separator, domain = address.partition("@")
        if not separator or "@" in domain or domain != config.mail_domain:
            raise Refused("address", "user is not a proper e-mail address of this relay")
        low, high = config.username_min_length, config.username_max_length
        if not low <= len(user) <= high:
            raise Refused("address", f"localpart has to be between {low} and {high} chars long")
        if not _USERNAME.match(user):
            raise Refused("address", "localpart contains invalid characters")
        if user in RESERVED or user == config.echobot_name:
            raise Refused("address", "localpart is reserved")
        self.check_machine()

    def check_open(self) -> None:
        """Raise Refused if the admin has closed the relay for new accounts."""
        if NOCREATE.exists():
            raise Refused("closed", f"blocked account creation because {str(NOCREATE)!r} exists.")
        if self.config.registration == "closed":
            raise Refused("closed", "blocked account creation because registration is closed")

    def check_machine(self) -> None:
        """Raise Refused if the machine is too busy or too full; what cannot be read is no limit."""
        config = self.config
        load = _readable(lambda: float((PROC / "loadavg").read_text().split()[0]))
        if load is not None and load > config.max_load_1m:
            raise Refused("load", f"registration rejected: load avg {load} > {config.max_load_1m}")
        memory = _readable(_available_memory)
        if memory is not None and memory < config.min_available_memory:
            raise Refused(
                "memory",
                "registration rejected: available memory "
                f"{_megabytes(memory)} < {_megabytes(config.min_available_memory)}",
            )
        disk = _readable(lambda: _free_disk(config.mailboxes_dir))
        if disk is not None and disk < config.min_free_disk_space:
            raise Refused(
                "disk",
                "registration rejected: free disk "
                f"{_megabytes(disk)} < {_megabytes(config.min_free_disk_space)}",
            )


def _megabytes(size: float) -> str:
    return f"{int(size) // _MEGABYTE}MB"


def _available_memory() -> float:
    fields = dict(line.split(":", 1) for line in (PROC / "meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _free_disk(path: str) -> float:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def _readable(read: Callable[[], float]) -> float | None:
    try:
        return read()
    except (OSError, ValueError, LookupError):
        return None


class Creator:
    """Answers one request line of the creation protocol; safe to call from several threads."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.policy = Policy(config)
        self.store = MailStore(config.mailboxes_dir)
        self.tokens = TokenStore(TOKENS, self.store.is_taken)
        self.sources = SourceLimiter(config.max_new_addresses_per_hour)
        self._locks = [threading.Lock() for _ in range(4 * MAX_REQUESTS_IN_DISK)]

    def answer(self, line: bytes) -> bytes:
        """The reply to *line*, both without newline; never raises. Blocks for the disk."""
        try:
            command, address, password, *rest = line.decode("utf-8").split("\t")
            (ip,) = rest or [""]
        except ValueError:
            return b"N\tmalformed request"
        if command != "C":
            return b"N\tunknown command"
        try:
            return b"O\t" + self._get_or_create(address, password, ip).encode("ascii")
        except Refused as error:
            REFUSED.inc(error.reason)
            log.warning("%s", error)
            return f"N\t{error}".encode()
        except Blocked:
            REFUSED.inc("blocked")
            log.warning("password file is empty, the address is blocked")
            return b"N\tblocked"
        except ValueError:
            return b"N\tmalformed request"
        except OSError as error:
            REFUSED.inc("failure")
            log.error("cannot create an account: %s", error)
            return f"F\t{error.strerror}".encode()
        except Exception:
            log.exception("cannot create an account")
            return b"F\tinternal error"

    def _get_or_create(self, address: str, password: str, ip: str) -> str:
        # one at a time for one address: limits and tokens count accounts, not logins
        with self._locks[hash(address) % len(self._locks)]:
            hashed = self._read_hash(address)
            return self._create(address, password, ip) if hashed is None else hashed

    def _read_hash(self, address: str) -> str | None:
        if not address.endswith(f"@{self.config.mail_domain}"):
            return None
        return self.store.read_hash(address)

    def _create(self, address: str, password: str, ip: str) -> str:
        self.policy.check(address, password)
        if not self.sources.take(ip, time.monotonic()):
            raise Refused(
                "source",
                "registration rejected: more than "
                f"{self.config.max_new_addresses_per_hour} new addresses an hour from one source",
            )
        made = False
        try:
            by_token = self.config.registration == "token"
            if by_token:
                self._claim(address, password)
            hashed, made = self.store.create(address, password)
            if by_token:
                self.tokens.confirm(address)
        finally:
            if not made:
                self.sources.give_back(ip)
        if made:
            CREATED.inc()
            log.info("Created address")  # counted by mtail
        return hashed

    def _claim(self, address: str, password: str) -> None:
        try:
            self.tokens.claim(address, password, time.time())
        except Invalid as error:
            raise Refused("token", f"registration rejected: {error}") from error


class CreateServer:
    """The asyncio shell of the socket `create`."""

    def __init__(self, creator: Creator) -> None:
        self.creator = creator
        self.connections = 0
        # threads, not the event loop: a full disk queue must not keep the web page waiting
        self.executor = ThreadPoolExecutor(MAX_REQUESTS_IN_DISK, thread_name_prefix="create")

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        self.connections += 1
        try:
            if self.connections > MAX_CONNECTIONS:
                writer.write(b"F\ttoo many connections\n")
                return
            await self._serve(reader, writer)
        except (TimeoutError, ConnectionError):
            pass
        finally:
            self.connections -= 1
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while True:
            async with asyncio.timeout(IDLE_SECONDS):
                try:
                    line = await reader.readuntil(b"\n")
                except asyncio.IncompleteReadError:
                    return
                except asyncio.LimitOverrunError:
                    line = b""
            if not line or len(line) > MAX_LINE:
                writer.write(b"N\trequest too long\n")
                return
            reply = await loop.run_in_executor(self.executor, self.creator.answer, line[:-1])
            async with asyncio.timeout(IDLE_SECONDS):
                writer.write(reply + b"\n")
                await writer.drain()


async def count_accounts(store: MailStore) -> None:
    """Keep the gauge of mailboxes up to date, until cancelled."""
    while True:
        try:
            ACCOUNTS.set(await asyncio.to_thread(store.count))
        except FileNotFoundError:
            ACCOUNTS.set(0)  # nobody has been here yet
        except OSError:
            pass
        await asyncio.sleep(COUNT_SECONDS)


async def serve(config: Config) -> None:
    """Serve both sockets until cancelled."""
    sockets = listen_sockets("create", "new", optional=("metrics",))
    await metrics.start_server(sockets)
    creator = Creator(config)
    web = newemail.Server(newemail.NewEmail(config, creator.policy, creator.store, creator.tokens))
    create = await asyncio.start_server(
        CreateServer(creator).connected, sock=sockets["create"], limit=MAX_LINE, backlog=BACKLOG
    )
    new = await asyncio.start_server(
        web.connected, sock=sockets["new"], limit=newemail.READ_SIZE, backlog=BACKLOG
    )
    notify("READY=1")
    async with create, new:
        await asyncio.gather(
            create.serve_forever(), new.serve_forever(), count_accounts(creator.store)
        )


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
