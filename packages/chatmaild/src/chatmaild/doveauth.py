# SPDX-License-Identifier: MIT
"""chatmail-doveauth: makes accounts, for Dovecot at the first login and for the web page.

Dovecot checks passwords itself (auth.lua reads the password file); it asks this service only when an
address has no password file. Socket `create`, one request a line, several a connection, UTF-8, at
most MAX_LINE bytes:

    C<TAB>ADDRESS<TAB>PASSWORD      ->  O<TAB>HASH      the account exists now, with this hash
                                        N<TAB>REASON    refused by policy
                                        F<TAB>REASON    failed for now

Whether the password fits the hash is for Dovecot to find out: of two concurrent first logins with
different passwords one wins, and the other gets its hash. Socket `new` is HTTP/1.1 (see newemail).

Every refusal is one warning in the log; it names lengths and limits, never a password.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from chatmaild import newemail
from chatmaild.activation import listen_sockets, notify, setup_logging
from chatmaild.config import DEFAULT_PATH, Config, ConfigError, read_config
from chatmaild.users import Blocked, MailStore, check_password

MAX_LINE = 1024  # bytes, newline included
MAX_CONNECTIONS = 256  # Dovecot's auth-worker processes: 100 at most
MAX_REQUESTS_IN_DISK = 8  # threads that hash and wait for the disk
IDLE_SECONDS = 30.0

NOCREATE = Path("/etc/chatmail-nocreate")
PROC = Path("/proc")

_MEGABYTE = 1024 * 1024
_USERNAME = re.compile(r"[a-z0-9_-][a-z0-9._-]*\Z")

# Nobody may claim these: certificate authorities mail domain validation to some of them (CA/Browser
# Forum BR 3.2.2.4.4), people report abuse to others (RFC 2142), and bounces come from one.
RESERVED = frozenset(
    "abuse admin administrator hostmaster mailer-daemon noc postmaster root security webmaster".split()
)

log = logging.getLogger("doveauth")


class Refused(Exception):
    """The relay's policy forbids this account; the text is fit for the log and for a client."""


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
                f"Password needs to be at least {config.password_min_length} characters long"
            )
        if any(ord(char) < 32 or ord(char) == 127 for char in password):
            raise Refused("Password contains control characters")
        try:
            check_password(password)
        except ValueError as error:
            raise Refused(f"Password is {error}") from error
        user, separator, domain = address.partition("@")
        if not separator or "@" in domain or domain != config.mail_domain:
            raise Refused("user is not a proper e-mail address of this relay")
        low, high = config.username_min_length, config.username_max_length
        if not low <= len(user) <= high:
            raise Refused(f"localpart has to be between {low} and {high} chars long")
        if not _USERNAME.match(user):
            raise Refused("localpart contains invalid characters")
        if user in RESERVED:
            raise Refused("localpart is reserved")
        self.check_machine()

    def check_open(self) -> None:
        """Raise Refused if the admin has closed the relay for new accounts."""
        if NOCREATE.exists():
            raise Refused(f"blocked account creation because {str(NOCREATE)!r} exists.")

    def check_machine(self) -> None:
        """Raise Refused if the machine is too busy or too full; what cannot be read is no limit."""
        config = self.config
        load = _readable(lambda: float((PROC / "loadavg").read_text().split()[0]))
        if load is not None and load > config.max_load_1m:
            raise Refused(f"registration rejected: load avg {load} > {config.max_load_1m}")
        memory = _readable(_available_memory)
        if memory is not None and memory < config.min_available_memory:
            raise Refused(
                "registration rejected: available memory "
                f"{_megabytes(memory)} < {_megabytes(config.min_available_memory)}"
            )
        disk = _readable(lambda: _free_disk(config.mailboxes_dir))
        if disk is not None and disk < config.min_free_disk_space:
            raise Refused(
                "registration rejected: free disk "
                f"{_megabytes(disk)} < {_megabytes(config.min_free_disk_space)}"
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
        self.policy = Policy(config)
        self.store = MailStore(config.mailboxes_dir)

    def answer(self, line: bytes) -> bytes:
        """The reply to *line*, both without newline; never raises. Blocks for the disk."""
        try:
            command, address, password = line.decode("utf-8").split("\t")
        except ValueError:
            return b"N\tmalformed request"
        if command != "C":
            return b"N\tunknown command"
        try:
            return b"O\t" + self._get_or_create(address, password).encode("ascii")
        except Refused as error:
            log.warning("%s", error)
            return f"N\t{error}".encode()
        except Blocked:
            log.warning("password is empty for: %s", address)
            return b"N\tblocked"
        except ValueError:
            return b"N\tmalformed request"
        except OSError as error:
            log.error("cannot create an account: %s", error)
            return f"F\t{error.strerror}".encode()
        except Exception:
            log.exception("cannot create an account")
            return b"F\tinternal error"

    def _get_or_create(self, address: str, password: str) -> str:
        hashed = None
        if address.endswith(f"@{self.policy.config.mail_domain}"):
            hashed = self.store.read_hash(address)
        if hashed is None:
            self.policy.check(address, password)
            hashed, made = self.store.create(address, password)
            if made:
                log.info("Created address: %s", address)  # counted by mtail
        return hashed


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


async def serve(config: Config) -> None:
    """Serve both sockets until cancelled."""
    sockets = listen_sockets("create", "new")
    creator = Creator(config)
    web = newemail.Server(newemail.NewEmail(config, creator.policy, creator.store))
    create = await asyncio.start_unix_server(
        CreateServer(creator).connected, sock=sockets["create"], limit=MAX_LINE
    )
    new = await asyncio.start_unix_server(
        web.connected, sock=sockets["new"], limit=newemail.READ_SIZE
    )
    notify("READY=1")
    async with create, new:
        await asyncio.gather(create.serve_forever(), new.serve_forever())


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
