# SPDX-License-Identifier: MIT
"""Clients of the relay, written from the specification and not from the relay's own code."""

import os
import struct
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chatmaild.irohrelay.blake3 import derive_key

CONTEXT = b"iroh-relay handshake v1 challenge signature"
LEGACY = ("legacy", "legacy websocket")
CURRENT = ("iroh-relay-v1", "iroh-relay-v2")
WEBSOCKET = ("legacy websocket", *CURRENT)
ALL = (*LEGACY, *CURRENT)


class Closed(Exception):
    """The relay has ended the connection."""


class Wire:
    """A connection to the relay before and after its HTTP request."""

    def __init__(self, sock):
        self.sock = sock
        self.data = b""

    def read(self, count):
        while len(self.data) < count:
            try:
                more = self.sock.recv(1 << 16)
            except ConnectionError:
                more = b""
            if not more:
                raise Closed
            self.data += more
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def read_head(self):
        """Status and header fields of a response."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.read(1)
        first, *lines = head.decode().split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines if line)
        return int(first.split(" ")[1]), {name.lower(): value for name, value in fields.items()}

    def wait_closed(self):
        """Wait until the relay ends the connection; what it said before."""
        said = b""
        try:
            while True:
                said += self.read(1)
        except Closed:
            return said

    def request(self, **fields):
        """Ask for /relay with these header fields, "_" for "-"."""
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
        self.sock.sendall("\r\n".join(["GET /relay HTTP/1.1", "Host: a", *lines, "", ""]).encode())
        return self.read_head()


def masked(first, payload, mask=None):
    """A WebSocket frame of a client; *first* is its first octet."""
    mask = os.urandom(4) if mask is None else mask
    length = len(payload)
    if length < 126:
        head = struct.pack(">BB", first, 0x80 | length)
    elif length < 65536:
        head = struct.pack(">BBH", first, 0x80 | 126, length)
    else:
        head = struct.pack(">BBQ", first, 0x80 | 127, length)
    repeated = (mask * (length // 4 + 1))[:length]
    number = int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")
    return head + mask + number.to_bytes(length, "big")


class Client(Wire):
    """A client of one KIND, connected and proved unless *prove* is false."""

    def __init__(self, sock, kind, secret=None, prove=True):
        super().__init__(sock)
        self.kind = kind
        self.secret = secret or Ed25519PrivateKey.generate()
        self.key = self.secret.public_key().public_bytes_raw()
        if kind == "legacy":
            status, _ = self.request(Upgrade="iroh derp http", Connection="upgrade")
        else:
            more = {"Sec_WebSocket_Protocol": kind} if kind in CURRENT else {}
            status, fields = self.request(
                Upgrade="websocket",
                Connection="upgrade",
                Sec_WebSocket_Version="13",
                Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZQ==",
                **more,
            )
            # the key and its answer of RFC 6455, section 1.3
            assert fields["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
            assert fields.get("sec-websocket-protocol") == more.get("Sec_WebSocket_Protocol")
        assert status == 101
        if prove:
            self.prove()

    def prove(self, damage=0):
        """Prove the key; *damage* is xored into the last octet of the signature."""

        def sign(message):
            signature = self.secret.sign(message)
            return signature[:-1] + bytes((signature[-1] ^ damage,))

        if self.kind in LEGACY:
            self.send(2, "RELAY\U0001f511".encode() + self.key + sign(b"\3") + b"\3")
            if not damage:
                self.sync()
        else:
            kind, challenge = self.receive()
            assert (kind, len(challenge)) == (0, 16)
            self.send(1, self.key + b"\x40" + sign(derive_key(CONTEXT, challenge)))
            if not damage:
                assert self.receive() == (2, b"")

    def frame(self, kind, payload):
        """The octets of a frame."""
        if self.kind == "legacy":
            return struct.pack(">BI", kind, len(payload)) + payload
        return masked(0x82, bytes((kind,)) + payload)

    def send(self, kind, payload):
        self.sock.sendall(self.frame(kind, payload))

    def send_to(self, key, contents):
        """Send one datagram to another client."""
        self.send(4, key + (b"" if self.kind in LEGACY else b"\0") + contents)

    def receive(self):
        """The next frame, as type and payload, past WebSocket's own pongs; raises Closed."""
        if self.kind == "legacy":
            kind, length = struct.unpack(">BI", self.read(5))
            return kind, self.read(length)
        opcode, payload = self.receive_websocket()
        while opcode == 10:
            opcode, payload = self.receive_websocket()
        if opcode == 8:
            raise Closed(payload)
        assert opcode == 2
        return payload[0], payload[1:]

    def receive_websocket(self):
        """The next WebSocket frame, as opcode and payload."""
        first, length = self.read(2)
        assert first & 0xF0 == 0x80 and length < 128  # whole, and not masked
        if length == 126:
            (length,) = struct.unpack(">H", self.read(2))
        elif length == 127:
            (length,) = struct.unpack(">Q", self.read(8))
        return first & 15, self.read(length)

    def receive_from(self, key):
        """The contents of the next datagram, which must be of *key*."""
        kind, payload = self.receive()
        assert kind == (5 if self.kind in LEGACY else 6) and payload[:32] == key
        return payload[32:] if self.kind in LEGACY else payload[33:]

    def sync(self):
        """Wait until the relay has handled all that was sent; what else comes before is an error."""
        ping, pong = (12, 13) if self.kind in LEGACY else (9, 10)
        self.send(ping, b"sync sync"[:8])
        assert self.receive() == (pong, b"sync sync"[:8])

    def close(self):
        self.sock.close()


class Relay:
    """The running service."""

    def __init__(self, service):
        self.service = service
        self.process = service.process
        self.clients = []

    def wire(self):
        """A connection that has said nothing yet."""
        self.clients.append(Wire(self.service.connect("iroh-relay")))
        return self.clients[-1]

    def client(self, kind, secret=None, prove=True):
        """A connected client."""
        self.clients.append(Client(self.service.connect("iroh-relay"), kind, secret, prove))
        return self.clients[-1]

    def close_clients(self):
        while self.clients:
            self.clients.pop().sock.close()

    @property
    def memory(self):
        """Octets of anonymous memory of the process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    @property
    def descriptors(self):
        """How many the process has."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))
