# SPDX-License-Identifier: MIT
"""Does each port answer, at each address, with TLS and the protocol that it should?"""

from __future__ import annotations

import datetime
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from . import tls
from .net import STEP_SECONDS, Imap, Smtp, Target, secure
from .report import Report, Wrong

PORTS = (25, 80, 143, 443, 465, 587, 993)
CLOSED = "open it in the firewall and at the provider; behind NAT see --address"


def check(report: Report, target: Target) -> bool:
    """All ports of *target*; returns whether IMAP and submission can be tried."""
    _reachable(report, target)
    seen: dict[int, bytes] = {}
    web = report.check(
        "TLS on 443", "see systemctl status chatmail-front", _look(target, 443, seen)
    )
    if web:
        report.check("certificate", "", lambda: _certificate(target, seen[443]))
    usable = {443: web}
    for port in (993, 143, 465, 587, 25):
        usable[port] = report.check(
            f"TLS on {port}", "see chatmail-relay status", _look(target, port, seen)
        )
    for word, greeting in (("imap", b"* OK"), ("smtp", b"220")):
        report.check(
            f"ALPN {word} on 443",
            "see systemctl status chatmail-front",
            _alpn(target, word, greeting),
        )
    return usable[993] and usable[465]


def _reachable(report: Report, target: Target) -> None:
    """One finding an address: which ports take connections there."""

    def probe(item: tuple[str, int]) -> str:
        try:
            socket.create_connection(item, STEP_SECONDS).close()
        except OSError as error:
            return (
                "no answer" if isinstance(error, TimeoutError) else (error.strerror or str(error))
            )
        return ""

    everything = [(address, port) for address in target.addresses for port in PORTS]
    with ThreadPoolExecutor(len(everything)) as pool:
        trouble = dict(zip(everything, pool.map(probe, everything), strict=True))
    for address in target.addresses:

        def said(address: str = address) -> str:
            closed = [f"{p}: {trouble[address, p]}" for p in PORTS if trouble[address, p]]
            if closed:
                raise Wrong("; ".join(closed))
            return " ".join(map(str, PORTS))

        report.check(f"ports at {address}", CLOSED, said)


def _look(target: Target, port: int, seen: dict[int, bytes]) -> Callable[[], str]:
    """TLS on one port, and what must not be said before it; the certificate goes into *seen*."""

    def look() -> str:
        if port == 443:
            with secure(target, port, "http/1.1") as connection:
                return _remember(port, connection, seen)
        if port in (993, 143):
            imap = Imap(target, port)
            try:
                if port == 143 and "LOGINDISABLED" not in imap.offered_before_tls:
                    # Dovecot takes connections of its own host for secured
                    if imap.sock.getsockname()[0] != imap.sock.getpeername()[0]:
                        raise Wrong("takes a login before STARTTLS")
                return _remember(port, imap.sock, seen)
            finally:
                imap.shutdown()
        smtp = Smtp(target, port)
        try:
            if "auth" in smtp.features_before_tls:
                raise Wrong("takes a login before STARTTLS")
            assert smtp.sock is not None
            return _remember(port, smtp.sock, seen)
        finally:
            smtp.close()

    return look


def _remember(port: int, connection: socket.socket, seen: dict[int, bytes]) -> str:
    assert isinstance(connection, ssl.SSLSocket)
    der = seen[port] = tls.peer(connection)
    if 443 in seen and seen[443] != der:
        raise Wrong(
            f"another certificate ({tls.fingerprint(der)}) than on 443 ({tls.fingerprint(seen[443])})",
            "restart the daemon that holds the old one",
        )
    return f"{connection.version()}"


def _certificate(target: Target, der: bytes) -> str:
    now = datetime.datetime.now(datetime.timezone.utc)
    return f"{tls.judge(der, target.host, now)}, {tls.vouched(target)}"


def _alpn(target: Target, word: str, greeting: bytes) -> Callable[[], str]:
    def look() -> str:
        with secure(target, 443, word) as connection:
            if connection.selected_alpn_protocol() != word:
                raise Wrong("the server does not choose it")
            said = connection.recv(512)
        if not said.startswith(greeting):
            raise Wrong(f"the greeting is not {greeting.decode()!r}")
        return "answers"

    return look
