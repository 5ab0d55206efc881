# SPDX-License-Identifier: MIT
"""Other mail servers of the test internet: whatever a peer may do right or wrong, told byte by byte.

A peer has an address of its own and listens there on port 25, and if asked to on 443 for HTTPS delivery. It
remembers what it takes, and takes everything but what its manners forbid. It sends nothing.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .inet import Internet, Pair
from .network import Namespace, inside
from .shell import WaitTimeout

IDLE_SECONDS = 600  # for a connection whose other side says nothing
BACKLOG = 256


@dataclass(frozen=True)
class Letter:
    """One message as it came over the wire, and by which way."""

    sender: str
    recipients: tuple[str, ...]
    data: bytes  # HTTPS: the request's head and body
    way: str  # "SMTP" or "HTTPS"
    client: str  # the address it came from
    helo: str
    tls: str | None  # the version
    name: str | None  # which server the client asked for by SNI


@dataclass
class Manners:
    """How a peer behaves; a test may change it while the peer runs."""

    #: Verb -> reply in place of the usual one. "" is the greeting, "." the end of the data.
    says: dict[str, str] = field(default_factory=dict)
    #: Verb that is never answered, as long as `answering` is clear; "" is the greeting.
    silent_at: str | None = None
    answering: threading.Event = field(default_factory=threading.Event)


class Peer:
    """A mail server at 10.77.0.*number* and fd77::*number*; without a *pair* it has no TLS."""

    def __init__(
        self,
        internet: Internet,
        name: str,
        number: int,
        pair: Pair | None = None,
        *,
        https: bool = False,
        manners: Manners | None = None,
    ) -> None:
        self.manners = manners or Manners()
        self.letters: list[Letter] = []
        self.heard: list[tuple[str, bool]] = []  # every SMTP command, and whether TLS hid it
        self.connected: list[float] = []  # when, by the monotonic clock
        self._internet = internet
        self._changed = threading.Condition()
        self.place: Namespace = internet.lab.place(name, number)
        self.context = _server_context(pair) if pair else None
        self._servers = [self._listen(25, _Smtp)]
        if https:
            self._servers.append(self._listen(443, _Https))

    @property
    def addresses(self) -> dict[str, str]:
        """Its addresses, by the type of their records."""
        return {"A": self.place.ipv4, "AAAA": self.place.ipv6}

    def publish(self, name: str, *kinds: str) -> None:
        """Point *name* to this peer; by both protocols, or by those of *kinds*."""
        wanted = kinds or tuple(self.addresses)
        records = {(name, kind): [self.addresses[kind]] for kind in wanted}
        self._internet.edit(records)

    def take(self, letter: Letter) -> None:
        """Remember a message."""
        with self._changed:
            self.letters.append(letter)
            self._changed.notify_all()

    def hear(self, line: str, hidden: bool) -> None:
        """Remember a command."""
        with self._changed:
            self.heard.append((line, hidden))
            self._changed.notify_all()

    def see(self) -> None:
        """Remember a connection."""
        with self._changed:
            self.connected.append(time.monotonic())
            self._changed.notify_all()

    def wait(self, condition: Callable[[], object], seconds: float = 20, what: str = "") -> None:
        """Until *condition* about what is remembered here is true; WaitTimeout if it never is."""
        with self._changed:
            if not self._changed.wait_for(lambda: bool(condition()), seconds):
                raise WaitTimeout(f"{what or 'peer'}: {self.letters} {self.heard[-20:]}")

    def letter(self, mark: bytes, seconds: float = 20) -> Letter:
        """The message that has *mark* in it, as soon as it is here."""
        found: list[Letter] = []

        def look() -> bool:
            found[:] = [letter for letter in self.letters if mark in letter.data]
            return bool(found)

        self.wait(look, seconds, f"a letter with {mark!r}")
        return found[0]

    def close(self) -> None:
        """End it."""
        self.manners.answering.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._internet.lab.network.detach(self.place)

    def _listen(self, port: int, handler: type[_Handler]) -> _Server:
        with inside(self.place):
            server = _Server(("::", port), handler)
        server.peer = self
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server


class _Server(socketserver.ThreadingTCPServer):
    """For both protocols of the internet."""

    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = BACKLOG
    peer: Peer

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that left


class _Handler(socketserver.BaseRequestHandler):
    server: _Server
    request: socket.socket

    def setup(self) -> None:
        self.peer = self.server.peer
        self.manners = self.peer.manners
        self.request.settimeout(IDLE_SECONDS)
        self.client = str(self.client_address[0]).removeprefix("::ffff:")
        self.tls: ssl.SSLSocket | None = None
        self._attach(self.request)

    def _attach(self, connection: socket.socket) -> None:
        self.file = connection.makefile("rwb")

    def start_tls(self) -> None:
        assert self.peer.context is not None
        self.tls = self.peer.context.wrap_socket(self.request, server_side=True)
        self._attach(self.tls)

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.file.close()
        if self.tls is not None:
            self.tls.close()

    def take(self, sender: str, recipients: list[str], data: bytes, way: str, helo: str) -> None:
        """Remember a message, and how it came."""
        tls, name = None, None
        if self.tls is not None:
            tls, name = self.tls.version(), getattr(self.tls, "lab_name", None)
        letter = Letter(sender, tuple(recipients), data, way, self.client, helo, tls, name)
        self.peer.take(letter)


class _Smtp(_Handler):
    """RFC 5321, as far as a sender needs it."""

    def handle(self) -> None:
        self.peer.see()
        self.say("", "220 peer ESMTP")
        helo, sender = "", ""
        recipients: list[str] = []
        while line := self.file.readline():
            text = line.decode("latin-1").rstrip("\r\n")
            verb, _, argument = text.partition(" ")
            verb = verb.upper()
            self.peer.hear(text, self.tls is not None)
            if verb in ("EHLO", "HELO"):
                helo, offers = argument, ["peer", "PIPELINING", "8BITMIME"]
                if self.peer.context is not None and self.tls is None:
                    offers.append("STARTTLS")
                lines = [f"250-{offer}" for offer in offers[:-1]] + [f"250 {offers[-1]}"]
                self.say(verb, "\r\n".join(lines))
            elif verb == "STARTTLS" and self.peer.context is not None:
                if self.say(verb, "220 go ahead"):
                    self.start_tls()
            elif verb == "MAIL":
                sender, recipients = _path(argument), []
                self.say(verb, "250 ok")
            elif verb == "RCPT":
                if self.say(verb, "250 ok"):
                    recipients.append(_path(argument))
            elif verb == "DATA":
                if recipients and self.say(verb, "354 go ahead"):
                    data = self._data()
                    if self.say(".", "250 taken"):
                        self.take(sender, recipients, data, "SMTP", helo)
                elif not recipients:
                    self.say("", "554 no valid recipients")
            elif verb == "QUIT":
                self.say(verb, "221 bye")
                return
            else:
                self.say(verb, "250 ok" if verb in ("RSET", "NOOP") else "502 no")

    def say(self, verb: str, usual: str) -> bool:
        """Answer *verb*; whether the answer is the usual one."""
        manners = self.manners
        if manners.silent_at == verb:
            self.file.flush()
            manners.answering.wait()
        reply = manners.says.get(verb, usual)
        self.file.write(f"{reply}\r\n".encode())
        self.file.flush()
        return reply == usual

    def _data(self) -> bytes:
        lines = []
        while (line := self.file.readline()) not in (b".\r\n", b""):
            lines.append(line[1:] if line.startswith(b"..") else line)
        return b"".join(lines)


class _Https(_Handler):
    """The receiving end of HTTPS delivery: every request gets a connection of its own."""

    def handle(self) -> None:
        self.start_tls()
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = self.file.readline()
            if not line:
                return
            head += line
        fields: dict[str, list[str]] = {}
        for item in head.decode("latin-1").split("\r\n")[1:]:
            name, _, value = item.partition(":")
            fields.setdefault(name.lower(), []).append(value.strip())
        if not head.startswith(b"POST /mxdeliv "):
            return self._answer("405 Method Not Allowed", "")
        body = self.file.read(int(fields["content-length"][0]))
        sender = fields.get("x-mail-from", [""])[0]
        self.take(sender, fields.get("x-mail-to", []), head + body, "HTTPS", "")
        return self._answer("200 OK", "250 OK")

    def _answer(self, status: str, text: str) -> None:
        head = f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len(text)}\r\n\r\n"
        self.file.write((head + text).encode())
        self.file.flush()


def _path(argument: str) -> str:
    return argument.partition("<")[2].partition(">")[0]


def _server_context(pair: Pair) -> ssl.SSLContext:
    """A server's side of TLS, which notes the name that a client asks for."""

    def note(connection: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> None:
        connection.lab_name = name  # type: ignore[attr-defined]

    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.sni_callback = note  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        chain = Path(folder) / "chain.pem"
        chain.write_text(pair.chain + pair.key)
        made.load_cert_chain(chain)
    return made
