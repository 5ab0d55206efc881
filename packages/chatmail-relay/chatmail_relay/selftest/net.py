# SPDX-License-Identifier: MIT
"""Connections to a relay, made as a client makes them, but for certificates: those are judged by tls."""

from __future__ import annotations

import contextlib
import imaplib
import ipaddress
import smtplib
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from http import client as http_client

import dns.exception
import dns.resolver

from .report import Wrong

STEP_SECONDS = 15.0  # for one answer of a server; a refused login takes Dovecot two
HELO = "[127.0.0.1]"  # what Delta Chat says
LOOPBACK = ("127.0.0.1",)
OWN_RESOLVER = "127.0.0.1"  # the relay's unbound
BODY_MAX = 1 << 20  # octets of a web page

IMAP_PORTS = (993, 143, 443)
SUBMISSION_PORTS = (465, 587, 443)


@dataclass(frozen=True)
class Target:
    """A relay: *domain* follows the "@", *host* is who is asked, at *addresses*."""

    domain: str
    host: str
    addresses: tuple[str, ...]

    @property
    def is_exempt(self) -> bool:
        """Clients and relays take its certificate without an authority: "_" names and addresses."""
        return self.host.startswith("_") or is_ip(self.host)


def is_ip(text: str) -> bool:
    """Whether *text* is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def host_of(domain: str) -> str:
    """The host of a mail domain: an address without brackets, or the name itself."""
    literal = domain.removeprefix("[").removesuffix("]")
    return literal if is_ip(literal) else domain


def mail_domain(text: str) -> str:
    """What follows the "@" for the relay that somebody calls *text*."""
    host = host_of(text.lower().rstrip("."))
    return f"[{host}]" if is_ip(host) else host


def resolve(name: str, own: bool) -> tuple[str, ...]:
    """The addresses of *name*, IPv4 first; *own* asks the relay's resolver. Raises Wrong."""
    if is_ip(name):
        return (name,)
    try:
        found = _ask_unbound(name) if own else _ask_system(name)
    except (OSError, dns.exception.DNSException) as error:
        raise Wrong(f"{name} has no address: {error}") from error
    if not found:
        raise Wrong(f"{name} has no address")
    return found


def _ask_unbound(name: str) -> tuple[str, ...]:
    resolver = dns.resolver.Resolver(configure=False)
    resolver.nameservers = [OWN_RESOLVER]
    resolver.lifetime = STEP_SECONDS
    found: list[str] = []
    for kind in ("A", "AAAA"):
        try:
            found += [item.to_text() for item in resolver.resolve(name, kind, search=False)]
        except (dns.resolver.NoAnswer, dns.resolver.NXDOMAIN):
            pass
    return tuple(found)


def _ask_system(name: str) -> tuple[str, ...]:
    answers = socket.getaddrinfo(name, 443, type=socket.SOCK_STREAM)
    found = dict.fromkeys(str(answer[4][0]) for answer in answers)
    return tuple(sorted(found, key=lambda item: ":" in item))


def dial(addresses: Sequence[str], port: int) -> socket.socket:
    """A connection to the first address that takes one; raises OSError of the last one."""
    for number, item in enumerate(addresses, 1):
        try:
            return socket.create_connection((item, port), STEP_SECONDS)
        except OSError:
            if number == len(addresses):
                raise
    raise OSError("no address to connect to")


def context(*alpn: str) -> ssl.SSLContext:
    """A context that takes any certificate: what is wrong with it is a finding of its own."""
    made = ssl.create_default_context()
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    if alpn:
        made.set_alpn_protocols(list(alpn))
    return made


def secure(target: Target, port: int, *alpn: str) -> ssl.SSLSocket:
    """A TLS connection."""
    plain = dial(target.addresses, port)
    try:
        return context(*alpn).wrap_socket(plain, server_hostname=target.host)
    except BaseException:
        plain.close()
        raise


class Imap(imaplib.IMAP4):
    """IMAP on 993, on 143 with STARTTLS, or on 443 by ALPN; not logged in."""

    def __init__(self, target: Target, port: int) -> None:
        self._target = target
        super().__init__(target.host, port, STEP_SECONDS)
        if port == 143:
            self.offered_before_tls = self.capabilities
            self.starttls(context())

    def _create_socket(self, timeout: float | None) -> socket.socket:
        if self.port == 143:
            return dial(self._target.addresses, self.port)
        return secure(self._target, self.port, *(["imap"] if self.port == 443 else []))


class Smtp(smtplib.SMTP):
    """SMTP on 465, on 25 or 587 with STARTTLS, or on 443 by ALPN; greeted, not logged in."""

    def __init__(self, target: Target, port: int) -> None:
        self._target = target
        # no host: smtplib would connect at once, and close nothing if the greeting is wrong
        super().__init__(local_hostname=HELO, timeout=STEP_SECONDS)
        self.features_before_tls: dict[str, str] = {}
        try:
            code, text = self.connect(target.host, port)
            if code != 220:
                raise smtplib.SMTPConnectError(code, text)
            self.ehlo_or_helo_if_needed()
            if port in (25, 587):
                self.features_before_tls = dict(self.esmtp_features)
                self._host = target.host
                self.starttls(context=context())
                self.ehlo_or_helo_if_needed()
        except BaseException:
            self.close()
            raise

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        if port in (25, 587):
            return dial(self._target.addresses, port)
        return secure(self._target, port, *(["smtp"] if port == 443 else []))


@dataclass(frozen=True)
class Answer:
    """What a web server said; *kind* is its Content-Type without parameters."""

    status: int
    kind: str
    body: bytes
    location: str


def http(target: Target, path: str, *, method: str = "GET", port: int = 443) -> Answer:
    """One request, of the name of *target*; redirects are not followed."""
    with contextlib.closing(http_connection(target, port)) as connection:
        return ask(connection, target, path, method)


def ask(connection: http_client.HTTPConnection, target: Target, path: str, method: str) -> Answer:
    """One of several requests on a *connection*, which must end after an error; raises Wrong, OSError."""
    try:
        connection.request(method, path, headers={"Host": _authority(target.host)})
        response = connection.getresponse()
        body = response.read(BODY_MAX)
    except http_client.HTTPException as error:
        raise Wrong(f"{path.partition('?')[0]}: {type(error).__name__}") from error
    kind = (response.getheader("Content-Type") or "").partition(";")[0].strip().lower()
    return Answer(response.status, kind, body, response.getheader("Location") or "")


def http_connection(target: Target, port: int) -> http_client.HTTPConnection:
    """A connection to the web server, with TLS unless on port 80."""
    made = http_client.HTTPConnection(target.host, port, timeout=STEP_SECONDS)
    if port == 80:
        made.sock = dial(target.addresses, port)
    else:
        made.sock = secure(target, port, "http/1.1")
    return made


def _authority(host: str) -> str:
    return f"[{host}]" if ":" in host else host
