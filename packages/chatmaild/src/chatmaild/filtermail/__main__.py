# SPDX-License-Identifier: MIT
"""The filter as a service: `python3 -Im chatmaild.filtermail [CHATMAIL.INI]`, three milter sockets.

The thin asyncio shell around milter.Session: it moves octets, fetches DKIM keys, limits how many
sessions there are and how long they may be silent. One process, one thread. It uses the loop's readers and
writers, not its transports, whose tasks and callbacks were a tenth of the time of a connection.

SIGHUP reads the settings and keys again: sessions go on, and each judges its next message by them;
what cannot be read is logged and changes nothing. SIGTERM ends idle sessions at once and the others
after their message, which has GRACE seconds. Postfix answers the next command of such a session with
421 and closes it (milter_default_action = shutdown); nothing was accepted that is not queued. Who
connects meanwhile waits in the sockets' queues, which are systemd's, for the next process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TypeVar

from chatmaild import metrics
from chatmaild.activation import ActivationError, listen_sockets, notify, setup_logging
from chatmaild.config import DEFAULT_PATH, Config, ConfigError, read_config
from chatmaild.filtermail import dkim, milter, policy
from chatmaild.filtermail.keys import Keys, KeyStore
from chatmaild.filtermail.limiter import Limiter
from chatmaild.filtermail.pace import Pace
from chatmaild.users import MailStore

_Handler = policy.OutgoingHandler | policy.IncomingHandler | policy.SignHandler

HANDLERS: dict[str, type[_Handler]] = {
    "outgoing": policy.OutgoingHandler,
    "incoming": policy.IncomingHandler,
    "sign": policy.SignHandler,
}

RECEIVE_SIZE = 1 << 17  # octets; two body packets: recv(2) of more makes the allocator mmap
IDLE_TIMEOUT = 3600  # seconds; Postfix keeps a session as long as its SMTP client
SWEEP_INTERVAL = 60  # seconds
#: Seconds between lines of the log about what was accepted. One a message took a tenth of the filter's time.
LOG_INTERVAL = 1.0
GRACE = 5.0  # seconds for messages under way when the service stops
BACKLOG = 512
ACCEPT_RETRY = 1.0  # seconds after accept(2) failed
#: Refusals a second of mail from other relays: each took 10 to 15 ms of all processes together. The wait is
#: less than Postfix' milter_command_timeout.
REFUSALS_PER_SECOND, REFUSALS_AT_ONCE, LONGEST_WAIT = 10, 20, 20.0
SPARE_FILES = 256  # descriptors for DNS, listeners, the log

_T = TypeVar("_T")

log = logging.getLogger("filtermail")


class BadSettings(Exception):
    """The settings or keys cannot be used; the message says what to do."""


class Server:
    """All sessions of the process."""

    def __init__(
        self, load: Callable[[], tuple[policy.Policy, int]], keys: KeyStore | None = None
    ) -> None:
        """*load* gives the policy and how many sessions there may be, or raises BadSettings."""
        self._load = load
        self.policy, self.max_sessions = load()
        self.keys = keys or KeyStore()
        self.sessions: set[_Connection] = set()
        self.pace = Pace(REFUSALS_PER_SECOND, REFUSALS_AT_ONCE, LONGEST_WAIT)
        self.stopping = False
        self._idle = asyncio.Event()
        self._told: dict[tuple[str, ...], float] = {}  # accepted messages that the log knows of
        self._telling: asyncio.TimerHandle | None = None
        # one for all: what recv(2) puts there is consumed before the next recv(2)
        self.buffer = memoryview(bytearray(RECEIVE_SIZE))

    async def run(self, sockets: dict[str, socket.socket]) -> None:
        """Serve until SIGTERM or SIGINT, then finish what is under way."""
        loop = self.loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        for name, handler in HANDLERS.items():
            sockets[name].listen(BACKLOG)
            sockets[name].setblocking(False)
            self._listen(sockets[name], handler)
        await metrics.start_server(sockets)
        sweeper = asyncio.create_task(self._sweep())
        notify("READY=1")
        log.info("ready, up to %d sessions, entering serving loop", self.max_sessions)
        await stop.wait()
        notify("STOPPING=1")
        self.stopping = True
        sweeper.cancel()
        for name in HANDLERS:
            loop.remove_reader(sockets[name])
            sockets[name].close()
        for session in list(self.sessions):
            session.stop()
        try:
            async with asyncio.timeout(GRACE):
                while self.sessions:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            log.warning("stopped with %d messages under way", len(self.sessions))
            for session in list(self.sessions):
                session.abort()
        self._tell_accepted()

    def accepted(self) -> None:
        """A message was accepted; the log tells of it soon."""
        if self._telling is None:
            loop = asyncio.get_running_loop()
            self._telling = loop.call_later(LOG_INTERVAL, self._tell_accepted)

    def _tell_accepted(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        for line in policy.accepted_since(self._told):
            log.info("%s", line)
        self._told = policy.ACCEPTED.numbers()

    def _reload(self) -> None:
        if self.stopping:
            return
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            self.policy, self.max_sessions = self._load()
        except BadSettings as error:
            log.error("nothing changed: %s", error)
        else:
            for session in self.sessions:
                session.handler.use(self.policy)
            log.info("reloaded, up to %d sessions", self.max_sessions)
        notify("READY=1")

    def _listen(self, listening: socket.socket, handler: type[_Handler]) -> None:
        if not self.stopping:
            self.loop.add_reader(listening, self._accept, listening, handler)

    def _accept(self, listening: socket.socket, handler: type[_Handler]) -> None:
        try:
            connected, _address = listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:  # no descriptors or no memory: who waits is served when there is
            log.error("accept: %s", error.strerror)
            self.loop.remove_reader(listening)
            self.loop.call_later(ACCEPT_RETRY, self._listen, listening, handler)
            return
        if len(self.sessions) >= self.max_sessions:
            log.warning("too many sessions")
            connected.close()
            return
        connected.setblocking(False)
        session = _Connection(self, handler(self.policy), connected)
        self.sessions.add(session)
        session.readable()  # the MTA does not wait before it says the first word

    def ended(self, session: _Connection) -> None:
        self.sessions.discard(session)
        self._idle.set()

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_INTERVAL)
            for session in list(self.sessions):
                if session.last_heard < loop.time() - IDLE_TIMEOUT:
                    session.abort()


class _Connection:
    """One session of the MTA. Reads when it can handle what comes, and never while something is unsent."""

    def __init__(self, server: Server, handler: _Handler, connected: socket.socket) -> None:
        self._server = server
        self.handler = handler
        self._session = milter.Session(handler)
        self._socket: socket.socket | None = connected
        self._reading = False
        self._unsent = b""
        self._closing = False  # once all is sent
        self._lookup: asyncio.Task[None] | None = None
        self._delayed: asyncio.TimerHandle | None = None  # a refusal that waits for its turn
        self._loop = server.loop
        self.last_heard = self._loop.time()
        self._update_reading()

    def stop(self) -> None:
        """End the session now, or after the message that is under way."""
        if not self._session.in_message:
            self._close()

    def abort(self) -> None:
        """End the session now."""
        connected, self._socket = self._socket, None
        if connected is None:
            return
        if self._lookup is not None:
            self._lookup.cancel()
        if self._delayed is not None:
            self._delayed.cancel()
        if self._reading:
            self._loop.remove_reader(connected)
        if self._unsent:
            self._loop.remove_writer(connected)
        connected.close()
        self._server.ended(self)

    def _close(self) -> None:
        """End the session when what there is to say has been sent."""
        self._closing = True
        if self._unsent:
            self._update_reading()
        else:
            self.abort()

    def readable(self) -> None:
        """Read what there is, and answer."""
        assert self._socket is not None
        try:
            octets = self._socket.recv_into(self._server.buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # reset by the peer
            self.abort()
            return
        if not octets:
            self._close()
            return
        self.last_heard = self._loop.time()
        self._send(self._session.feed, bytes(self._server.buffer[:octets]))

    def _write(self, data: bytes) -> None:
        """Send *data*, what the peer does not take yet later."""
        if self._socket is None:
            return
        if self._unsent:
            self._unsent += data
            return
        try:
            sent = self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:  # the peer has gone
            self.abort()
            return
        if sent < len(data):
            self._unsent = data[sent:]
            self._loop.add_writer(self._socket, self._writable)

    def _writable(self) -> None:
        assert self._socket is not None
        self._loop.remove_writer(self._socket)
        data, self._unsent = self._unsent, b""
        self._write(data)
        if self._closing and not self._unsent:
            self.abort()
        else:
            self._update_reading()

    def _send(self, step: Callable[[_T], bytes], argument: _T) -> None:
        """Do a *step* of the session, and say what it says, a refusal perhaps later."""
        if self._socket is None:
            return
        refusals, accepted = self.handler.refusals, self.handler.accepted
        try:
            out = step(argument)
        except Exception as error:  # a bug in the protocol code itself: this session only
            log.error("session ended by %s", type(error).__name__)
            self.abort()
            return
        if self.handler.accepted > accepted:
            self._server.accepted()
        if self.handler.paced and self.handler.refusals > refusals and not self._server.stopping:
            wait = self._server.pace.wait(self._loop.time())
            if wait > 0:
                self._delayed = self._loop.call_later(wait, self._say, out)
                self._update_reading()
                return
        self._say(out)

    def _say(self, out: bytes) -> None:
        """Send *out*, and see what comes next."""
        self._delayed = None
        if out:
            self._write(out)
        if self._socket is None:
            return
        if self._session.closed or (self._server.stopping and not self._session.in_message):
            self._close()
            return
        wanted = self._session.wanted
        if wanted is not None:
            store = self._server.keys
            known = store.cached(wanted)
            lookup = store.get_all
            if known is not None:
                # a peer's key may be a new one: ask again before its mail is refused for good
                if not store.may_refresh(wanted) or self._session.keys_suffice(known):
                    self._send(self._session.answer, known)
                    return
                lookup = store.refresh
            self._lookup = self._loop.create_task(self._fetch(lookup, wanted))
        self._update_reading()

    async def _fetch(
        self,
        lookup: Callable[[tuple[str, ...]], Coroutine[None, None, dict[str, Keys | None]]],
        names: tuple[str, ...],
    ) -> None:
        keys: dict[str, Keys | None]
        try:
            keys = await lookup(names)
        except Exception as error:  # a bug: the sender tries again later
            log.error("DKIM key lookup: %s", type(error).__name__)
            keys = dict.fromkeys(names)
        self._lookup = None
        self._send(self._session.answer, keys)

    def _update_reading(self) -> None:
        """Read only what can be handled at once: that is what bounds the memory of a session."""
        connected = self._socket
        if connected is None:
            return
        waits = self._session.wanted is not None or self._delayed is not None
        wanted = not (waits or self._unsent or self._closing)
        if wanted != self._reading:
            self._reading = wanted
            if wanted:
                self._loop.add_reader(connected, self.readable)
            else:
                self._loop.remove_reader(connected)


def load_keys(directory: Path, config: Config) -> list[dkim.SigningKey]:
    """The signing keys in a credentials directory; raises DkimError or OSError with what to do.

    dkim_rsa.pem has selector dkim_selector, dkim_ed25519.pem (only if dkim_ed25519 is set)
    dkim_selector-ed25519. None for an address in place of a domain: there is no DNS to publish them in,
    and other relays take such mail by where it comes from.
    """
    if config.is_ip_relay:
        return []
    wanted = [("dkim_rsa.pem", config.dkim_selector)]
    if config.dkim_ed25519:
        wanted.append(("dkim_ed25519.pem", f"{config.dkim_selector}-ed25519"))
    keys = []
    for name, selector in wanted:
        path = directory / name
        try:
            keys.append(dkim.SigningKey(path.read_bytes(), config.mail_domain, selector))
        except FileNotFoundError:
            raise dkim.DkimError(
                f"{path} is missing: without a DKIM key nobody accepts our mail. "
                "Run: chatmail-relay apply"
            ) from None
        except dkim.DkimError as error:
            raise dkim.DkimError(f"{path}: {error}") from None
    return keys


def session_limit(config: Config) -> int:
    """Sessions at a time: one for each SMTP session on 25, 465 and 587, and some for bounces."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 3 * config.max_smtp_connections + 200
    if soft != resource.RLIM_INFINITY and soft < wanted + SPARE_FILES:
        most = wanted + SPARE_FILES if hard == resource.RLIM_INFINITY else hard
        soft = min(wanted + SPARE_FILES, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        wanted = min(wanted, max(1, soft - SPARE_FILES))
    return wanted


def main(arguments: list[str]) -> int:
    setup_logging()
    path = Path(arguments[0]) if arguments else DEFAULT_PATH
    limiter = Limiter(1, 1)  # one for all policies: a reload must not give everybody a fresh start

    def load() -> tuple[policy.Policy, int]:
        try:
            config = read_config(path)
            credentials = os.environ.get("CREDENTIALS_DIRECTORY")
            if not credentials:
                raise BadSettings("CREDENTIALS_DIRECTORY is not set: start me by my systemd unit")
            keys = load_keys(Path(credentials), config)
        except (ConfigError, dkim.DkimError, OSError) as error:
            raise BadSettings(str(error)) from None
        limiter.set_rate(config.max_user_send_per_minute, config.max_user_send_burst_size)
        shared = policy.Policy(
            domain=config.mail_domain.lower(),
            mailboxes=MailStore(config.mailboxes_dir),
            limiter=limiter,
            signing_keys=keys,
            passthrough_senders=config.passthrough_senders,
            passthrough_recipients=config.passthrough_recipients,
        )
        return shared, session_limit(config)

    try:
        server = Server(load)
        sockets = listen_sockets(*HANDLERS, optional=("metrics",))
    except (BadSettings, ActivationError) as error:
        log.error("%s", error)
        return 1
    asyncio.run(server.run(sockets))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
