# SPDX-License-Identifier: MIT
"""What is around the service: a peer's web server, our smtpd(8), names in the DNS."""

import asyncio
import datetime
import ipaddress
import socket
import ssl
import threading

import h11
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from chatmaild.transport.locate import Host, NoHost

SECONDS = 10


class EventLoop:
    """An event loop in a thread."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def run(self, coroutine):
        """The result of a coroutine."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(SECONDS)

    def serve(self, connected, path=None):
        """Serve on loopback or a unix socket; the port."""
        listening = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
        listening.bind(str(path) if path else ("127.0.0.1", 0))

        async def start():
            await asyncio.start_server(connected, sock=listening)

        self.run(start())
        return None if path else listening.getsockname()[1]

    def close(self):
        async def cancel():
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.run(cancel())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(SECONDS)
        self.loop.close()


class Authority:
    """A certificate authority, and server contexts."""

    def __init__(self, folder):
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lab")])
        root = self._certificate(self._name, self._key, ca=True)
        self.ca_path = folder / "ca.pem"
        self.ca_path.write_bytes(root.public_bytes(serialization.Encoding.PEM))

    def context(self, name, trusted=True, newest=ssl.TLSVersion.TLSv1_3):
        """A server's context with a certificate for *name*, of this authority or self-signed."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
        certificate = self._certificate(subject, key, trusted=trusted, san=name)
        path = self._folder / f"{name}-{trusted}.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if newest < ssl.TLSVersion.TLSv1_2:
            context.minimum_version = newest
        context.maximum_version = newest
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.load_cert_chain(path)
        return context

    def _certificate(self, subject, key, ca=False, trusted=True, san=""):
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name if ca or trusted else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
        )
        if san:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([x509.DNSName(san)]), critical=False
            )
        return builder.sign(self._key if ca or trusted else key, hashes.SHA256())


def response(status, text=b"", extra=()):
    """A whole HTTP answer."""
    head = [f"HTTP/1.1 {status} x", f"Content-Length: {len(text)}", *extra]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + text


TAKES = response(405, b"Method Not Allowed")
ACCEPTED = response(200, b"250 OK")


def obliging(request, body):
    """What a relay answers."""
    return TAKES if request.method == b"GET" else ACCEPTED


class Peer:
    """A web server with TLS; *answer(request, body)* gives the octets to send, None to close at once.

    *early*: it answers when it has read the head. *once*: it closes after each answer, without saying so.
    """

    def __init__(
        self,
        authority,
        answer=obliging,
        *,
        name="mx.beta.example",
        early=False,
        once=False,
        **context,
    ):
        self.answer, self.early, self.once = answer, early, once
        self.requests = []  # (method, [header, ...], body)
        self.connections = 0
        self.got_request = threading.Event()
        self._context = authority.context(name, **context)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._open = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        # a close alone leaves it open as long as accept() waits
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.close_connections()

    def close_connections(self):
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _accept(self):
        while True:
            try:
                plain, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

    def _serve(self, plain):
        plain.settimeout(SECONDS)
        self._open.add(plain)
        try:
            connection = self._context.wrap_socket(plain, server_side=True)
            self._open.add(connection)
            self.connections += 1
            with connection:
                self._converse(connection)
        except (OSError, h11.ProtocolError):
            pass

    def _converse(self, connection):
        http = h11.Connection(h11.SERVER)
        while True:
            request, body = None, b""
            while True:
                event = http.next_event()
                if event is h11.NEED_DATA:
                    data = connection.recv(65536)
                    http.receive_data(data)
                    if not data and request is None:
                        return
                elif isinstance(event, h11.Request):
                    request = event
                    self.got_request.set()
                    if self.early:
                        break
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    break
                else:
                    return
            headers = [f"{n.decode()}: {v.decode()}" for n, v in request.headers]
            self.requests.append((request.method.decode(), headers, body))
            data = self.answer(request, body)
            if data is None:
                return
            connection.sendall(data)
            if self.once or self.early:
                return
            http = h11.Connection(h11.SERVER)


class FixedLocator:
    """Every domain has one host, 127.0.0.1, unless *no* says why there is none."""

    def __init__(self, host="mx.beta.example", addresses=("127.0.0.1",), no=""):
        self._host, self._addresses, self._no = host, addresses, no
        self.asked = 0

    async def hosts(self, domain):
        self.asked += 1
        if self._no:
            raise NoHost(self._no)
        return [Host(self._host, not domain.startswith("_"))]

    async def addresses(self, host):
        return [str(ipaddress.ip_address(item)) for item in self._addresses]


class Smtpd:
    """Our smtpd(8): *replies* by command, "." for the end of DATA; unknown commands get 250."""

    def __init__(self):
        self.replies = {}
        self.commands = []
        self.messages = []  # what came after DATA, whole ones only
        self.cut = threading.Event()  # a message ended without its dot
        self.hold = None  # an Event: the end of DATA is answered when it is set
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = self._listening.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._listening.close()

    def _accept(self):
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        connection.settimeout(SECONDS)
        try:
            with connection, connection.makefile("rb") as stream:
                self.commands.append(stream.readline().rstrip(b"\r\n").decode())
                self._say(connection, "220 smtpd", "connect")
                while line := stream.readline():
                    command = line.rstrip(b"\r\n").decode()
                    self.commands.append(command)
                    verb = command.split(" ")[0]
                    if verb == "QUIT":
                        return
                    self._say(connection, "354 go" if verb == "DATA" else "250 ok", verb)
                    if verb == "DATA" and "DATA" not in self.replies:
                        self._data(connection, stream)
        except OSError:
            self.cut.set()

    def _data(self, connection, stream):
        lines = []
        while (line := stream.readline()) != b".\r\n":
            if not line:
                self.cut.set()
                raise ConnectionResetError
            lines.append(line)
        self.messages.append(b"".join(lines))
        if self.hold:
            self.hold.wait(SECONDS)
        self._say(connection, "250 queued", ".")

    def _say(self, connection, usual, key):
        reply = self.replies.get(key, usual)
        if callable(reply):
            reply = reply()
        connection.sendall(reply.encode() + b"\r\n")
