# SPDX-License-Identifier: MIT
"""What the relay spends on a message, against the same Postfix without a filter, and with re-injection.

Three ways lead to one sink. Their services are the same but for what is measured, and are made for this only,
on loopback of the lab's host:

    product        the relay's own port: smtpd with the filter as its milter, DKIM signed or verified
    floor          the same smtpd without a filter
    re-injection   the same smtpd, which passes the message on to a second smtpd before it answers; a filter
                   that is a proxy would stand between them

The sink and the sender are outside; the time until the queue is empty counts. DKIM keys are in the filter's
memory and processes run, because one message of each size goes ahead.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import os
import smtplib
import statistics
import socketserver
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import dkim
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from lab.host import Host
from lab.mail import PASSWORD, TIMEOUT, Account, context, without_delay
from lab.messages import encrypted
from lab.network import Namespace, inside
from lab.shell import WaitTimeout, wait_for

from .frame import Row, measurement, paired_row
from .relay import CPU, DOMAIN, Bench, healthy

FAR_DOMAIN = "far.example"
SINK_PORT, SECOND_SMTPD = 2525, 11467
_RELAXED = (b"relaxed", b"relaxed")
SELECTOR = "bench"
USER, RECIPIENT = f"benchfrom@{DOMAIN}", f"benchsink@{DOMAIN}"
WAYS = ("product", "floor", "re-injection")
DRAIN_SECONDS = 60

#: Size in bytes -> messages of one round, with 1 and with 20 a connection. A hundred is what a process of
#: Postfix serves (max_use): every round has the same share of processes that start.
SIZES = {2_000: (100, 100), 50_000: (100, 100), 1_000_000: (20, 20), 20_000_000: (4, 20)}
#: More rounds for messages of up to 1 MB, whose ratios differ by a tenth from one to the next.
TIMES = 3
NAMES = {2_000: "2 kB", 50_000: "50 kB", 1_000_000: "1 MB", 20_000_000: "20 MB"}
A_CONNECTION = (1, 20)
ROWS = 2 * len(SIZES) * len(A_CONNECTION)

#: Added to master.cf. {options} are those of the relay's own service.
SERVICES = {
    "127.0.0.1:{floor}/inet": "127.0.0.1:{floor} inet n - y - 200 smtpd {options} -o smtpd_milters=",
    "127.0.0.1:{second}/inet": "127.0.0.1:{second} inet n - y - 200 smtpd {options} -o smtpd_milters="
    f" -o smtpd_proxy_filter=127.0.0.1:{SECOND_SMTPD}",
    f"127.0.0.1:{SECOND_SMTPD}/inet": f"127.0.0.1:{SECOND_SMTPD} inet n - y - 200 smtpd"
    " -o smtpd_milters= -o smtpd_tls_security_level=none -o smtpd_helo_restrictions="
    " -o smtpd_authorized_xforward_hosts=127.0.0.0/8 -o smtpd_client_connection_count_limit=0"
    " -o smtpd_relay_restrictions=permit_mynetworks,reject -o smtpd_recipient_restrictions=",
    "benchsink/unix": "benchsink unix - - n - 200 smtp"
    " -o smtp_tls_security_level=none -o smtp_tls_policy_maps=",
}


@dataclass(frozen=True)
class Direction:
    """How messages of one direction come to the relay."""

    service: str  # in master.cf
    ports: dict[str, int]  # by way
    login: bool
    recipient: str
    budgets: dict[int, float]  # by size


OUTGOING = Direction(
    "submissions/inet",
    {"product": 465, "floor": 11465, "re-injection": 11466},
    True,
    "x@sink.example",
    {2_000: 1.60, 20_000_000: 1.85},
)
INCOMING = Direction(
    "smtp/inet",
    {"product": 25, "floor": 11025, "re-injection": 11026},
    False,
    RECIPIENT,
    {2_000: 1.55, 50_000: 1.55, 1_000_000: 1.85},
)


class Sink:
    """A mail server that takes everything, and knows only how much that was."""

    def __init__(self, place: Namespace) -> None:
        self.messages = 0
        self._changed = threading.Condition()
        sink = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # Postfix does not say QUIT to all
                    self._serve()

            def _serve(self) -> None:
                replies = {b"DATA": b"354 go on\r\n", b"EHLO": b"250 sink\r\n"}
                self.wfile.write(b"220 sink ESMTP\r\n")
                while line := self.rfile.readline():
                    verb = line[:4].upper()
                    self.wfile.write(replies.get(verb, b"250 ok\r\n"))
                    if verb == b"DATA" and self._taken():
                        sink._count()
                        self.wfile.write(b"250 ok\r\n")

            def _taken(self) -> bool:
                end = b"\r\n"
                while not end.endswith(b"\r\n.\r\n"):  # no pipelining: nothing comes after it
                    data = self.rfile.read1(1 << 20)  # type: ignore[attr-defined]
                    if not data:
                        return False
                    end = (end + data)[-5:]
                return True

        with inside(place):
            self._server = socketserver.ThreadingTCPServer(("127.0.0.1", SINK_PORT), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def _count(self) -> None:
        with self._changed:
            self.messages += 1
            self._changed.notify_all()

    def wait(self, messages: int) -> None:
        """Until so many have come; WaitTimeout if they do not."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.messages >= messages, DRAIN_SECONDS):
                raise WaitTimeout(f"{self.messages} of {messages} messages reached the sink")

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Signer:
    """A domain elsewhere that signs its mail."""

    def __init__(self, bench: Bench) -> None:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        public = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        text = "v=DKIM1; k=rsa; p=" + base64.b64encode(public).decode()
        name = f"{SELECTOR}._domainkey.{FAR_DOMAIN}"
        bench.lab.dns.set(name, "TXT", f'"{text[:200]}" "{text[200:]}"')
        self._pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )

    def sign(self, message: bytes) -> bytes:
        """The message with its DKIM-Signature."""
        selector, domain = SELECTOR.encode(), FAR_DOMAIN.encode()
        return dkim.sign(message, selector, domain, self._pem, canonicalize=_RELAXED) + message


class MailPath:
    """One direction, with the sink and the services that it is compared with; see `path`."""

    def __init__(self, bench: Bench, direction: Direction, sink: Sink) -> None:
        self.host = bench.host
        self.sink = sink
        self.submitted = 0
        self._lock = threading.Lock()
        self.direction = direction
        self.sender = USER if direction.login else f"x@{FAR_DOMAIN}"
        sign = None if direction.login else Signer(bench).sign
        self.letters: dict[int, bytes] = {}
        for size in SIZES:
            text = encrypted(self.sender, direction.recipient, content=content(size))
            self.letters[size] = sign(text) if sign else text

    def send(self, way: str, size: int, messages: int, a_connection: int) -> CPU:
        """Messages by one *way*; the CPU time until they are out of the queue."""
        with CPU(self.host) as used:
            self.submit(way, size, messages, a_connection)
            self.drain()
        return used

    def submit(self, way: str, size: int, messages: int, a_connection: int) -> None:
        """Messages by one *way*; returns when the relay has accepted them."""
        for _ in range(messages // a_connection):
            with self._session(self.direction.ports[way]) as session:
                for _ in range(a_connection):
                    self._message(session, self.letters[size])
        with self._lock:
            self.submitted += messages

    def drain(self) -> None:
        """Wait until all have reached the sink and the queue is empty."""
        self.sink.wait(self.submitted)
        wait_for(lambda: not self._queued(), DRAIN_SECONDS, "the end of the queue")

    def _session(self, port: int) -> smtplib.SMTP:
        with inside(self.host.namespace):
            if self.direction.login:
                session: smtplib.SMTP = smtplib.SMTP_SSL(
                    "127.0.0.1", port, "[127.0.0.1]", context=_context(), timeout=TIMEOUT
                )
            else:
                session = smtplib.SMTP("127.0.0.1", port, f"mx.{FAR_DOMAIN}", TIMEOUT)
                session.starttls(context=_context())
        without_delay(session)
        session.ehlo()
        if self.direction.login:
            session.login(USER, PASSWORD)
        return session

    def _message(self, session: smtplib.SMTP, message: bytes) -> None:
        for command, code in (
            (f"MAIL FROM:<{self.sender}>", 250),
            (f"RCPT TO:<{self.direction.recipient}>", 250),
            ("DATA", 354),
        ):
            _expect(code, session.docmd(command))
        assert session.sock is not None
        session.sock.sendall(message + b".\r\n")
        _expect(250, session.getreply())

    def _queued(self) -> list[str]:
        spool = self.host.root / "var/spool/postfix"
        return [
            name
            for queue in ("maildrop", "incoming", "active", "deferred")
            for _folder, _folders, files in os.walk(spool / queue)
            for name in files
        ]


@contextlib.contextmanager
def path(bench: Bench, direction: Direction) -> Iterator[MailPath]:
    """A direction with its sink and the services of the other ways; they are gone at the end."""
    for address in (USER, RECIPIENT):
        bench.mail.imap(Account(address, PASSWORD)).logout()
    names = _add_services(bench.host, direction)
    sink = Sink(bench.host.namespace)
    try:
        yield MailPath(bench, direction, sink)
    finally:
        sink.close()
        bench.host.exec("postconf", "-M", "-X", *names)
        bench.host.exec("chatmail-relay", "apply", timeout=120)
        healthy(bench.host)


def _add_services(host: Host, direction: Direction) -> list[str]:
    """Add SERVICES and the way to the sink; the names of what was added."""
    line = host.exec("postconf", "-M", direction.service).out
    _head, _, options = line.partition(" smtpd")
    words = {"floor": direction.ports["floor"], "second": direction.ports["re-injection"]}
    made = {
        name.format(**words): text.format(options=options.strip(), **words)
        for name, text in SERVICES.items()
    }
    for name, text in made.items():
        host.exec("postconf", "-M", f"{name}={text}")
    usual = host.exec("postconf", "-h", "transport_maps").out.strip()
    maps = f"inline:{{ {direction.recipient}=benchsink:[127.0.0.1]:{SINK_PORT} }} {usual}"
    host.exec("postconf", f"transport_maps={maps}")
    # not a reload: for a moment, processes with the old settings would still take messages
    host.exec("systemctl", "restart", "postfix.service")
    return list(made)


def content(size: int) -> int:
    """Bytes to encrypt, for a message of *size*: four characters for three of them, and lines."""
    return int((size - 700) * 76 / 78 * 3 / 4)


@functools.cache
def _context():  # type: ignore[no-untyped-def]
    return context()


def _expect(code: int, reply: tuple[int, bytes]) -> None:
    if reply[0] != code:
        raise smtplib.SMTPResponseException(*reply)


def _measure(bench: Bench, direction: Direction) -> list[Row]:
    """All sizes, 1 and 20 messages a connection."""
    rows = []
    with path(bench, direction) as lane:
        for size, counts in SIZES.items():
            for way in WAYS if not bench.short else ():
                lane.send(way, size, 1, 1)
            for a_connection, count in zip(A_CONNECTION, counts, strict=True):
                if bench.short and size * a_connection > 100_000_000:
                    continue
                messages = bench.scaled(count, a_connection)
                name = f"{NAMES[size]}, {a_connection} a connection"
                rows += _cell(bench, lane, name, size, messages, a_connection)
    return rows


def _cell(
    bench: Bench, lane: MailPath, name: str, size: int, messages: int, a_connection: int
) -> list[Row]:
    """The three ways side by side."""
    spent: dict[str, list[float]] = defaultdict(list)
    units: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _round, way in bench.interleaved(WAYS, TIMES if size <= 1_000_000 else 1):
        used = lane.send(way, size, messages, a_connection)
        spent[way].append(1000 * used.seconds / messages)
        for unit, seconds in used.units.items():
            units[way][unit.removesuffix(".service")].append(1000 * seconds / messages)
    detail = {
        way: {unit: statistics.median(each) for unit, each in found.items()}
        for way, found in units.items()
    }
    budget = lane.direction.budgets.get(size)
    floor, unit = spent["floor"], "CPU ms a message"
    return [
        paired_row(
            name,
            unit,
            spent["product"],
            floor,
            budget=budget,
            detail=detail["product"],
            floor_detail=detail["floor"],
        ),
        paired_row(
            f"{name}, re-injection",
            unit,
            spent["re-injection"],
            floor,
            detail=detail["re-injection"],
        ),
    ]


@measurement(ROWS, ROWS - 2)
def outgoing(bench: Bench) -> list[Row]:
    """Submission on 465: TLS, login, filter, DKIM signature; delivered to a sink."""
    return _measure(bench, OUTGOING)


@measurement(ROWS, ROWS - 2)
def incoming(bench: Bench) -> list[Row]:
    """Mail of another relay on 25: TLS, filter, DKIM verified; delivered to a sink."""
    return _measure(bench, INCOMING)
