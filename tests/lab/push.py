# SPDX-License-Identifier: MIT
"""The lab's notification server: an HTTPS server at the name that relays ask by default.

Its certificate is of an authority of its own, which a relay trusts after `trust`.
"""

from __future__ import annotations

import contextlib
import datetime
import http.server
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from .host import Host
from .lab import Lab
from .network import inside

NAME = "notifications.delta.chat"
AUTHORITY = "/usr/local/share/ca-certificates/lab-push.crt"
NUMBER = 45  # last one of its address


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class PushServer:
    """Remembers the body of every request; answers 200, or what `answers` has for it."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.answers: dict[str, int] = {}
        self.tokens: list[str] = []  # of all requests to /notify, in order of arrival
        self.answering = threading.Event()  # while it is clear, requests wait
        self.answering.set()
        self._changed = threading.Condition()
        self._lab = lab
        self._namespace = lab.network.attach("push", NUMBER)
        self.certificate = _make_certificate(folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "push.pem")
        with inside(self._namespace):
            self._server = _Server((self._namespace.ipv4, 443), self._handler())
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        lab.dns.set(NAME, "A", self._namespace.ipv4)

    def trust(self, relay: Host, trusted: bool = True) -> None:
        """Make the programs of *relay* trust this server, or not any more."""
        if trusted:
            relay.write(AUTHORITY, self.certificate)
        else:
            relay.exec("rm", AUTHORITY)
        relay.exec("update-ca-certificates", "--fresh")
        relay.exec("systemctl", "restart", "chatmail-metadata.service")

    def wait_for(self, condition: Callable[[list[str]], bool], seconds: float = 20) -> list[str]:
        """All tokens so far, as soon as *condition* is true of them; AssertionError if it never is."""
        with self._changed:
            came = self._changed.wait_for(lambda: condition(self.tokens), seconds)
            assert came, f"requests: {self.tokens}"
            return list(self.tokens)

    def close(self) -> None:
        """End it; its name is not found any more."""
        self.answering.set()
        self._lab.dns.set(NAME, "A")
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._lab.network.detach(self._namespace)

    def _seen(self, token: str) -> int:
        with self._changed:
            self.tokens.append(token)
            self._changed.notify_all()
        self.answering.wait()
        return self.answers.get(token, 200)

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        seen = self._seen

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    super().handle()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(seen(body.decode()) if self.path == "/notify" else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *words: Any) -> None:
                pass

        return Handler


def _make_certificate(folder: Path) -> str:
    """Certificate and key as push.pem in *folder*; returns the certificate, its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "lab push server")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=10))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate = made.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "push.pem").write_bytes(certificate + private)
    return certificate.decode()
