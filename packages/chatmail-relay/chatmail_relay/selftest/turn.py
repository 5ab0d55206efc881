# SPDX-License-Identifier: MIT
"""Calls: an allocation at the TURN server, with the credentials that the relay gives clients."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass

from .net import resolve
from .report import Wrong
from .stun import Client, TurnError

FIRST_WAIT = 0.5  # seconds until a request is repeated; twice as long each time (RFC 8489 6.2.1)
REQUESTS = 5
DATAGRAM_MAX = 2048
HALF_DAY = 43200  # seconds; a client that has less left asks for new credentials


@dataclass(frozen=True)
class Credentials:
    """The value of METADATA's `turn`: HOST:PORT:UNIXTIME:PASSWORD; *expires* is the name, too."""

    host: str
    port: int
    expires: int
    password: str

    @classmethod
    def parse(cls, text: str) -> Credentials:
        """Raises Wrong for what clients cannot read."""
        try:
            place, expires, password = text.rsplit(":", 2)
            host, port = place.rsplit(":", 1)
            return cls(host.strip("[]"), int(port), int(expires), password)
        except ValueError:
            raise Wrong("METADATA's turn is not HOST:PORT:UNIXTIME:PASSWORD") from None


def allocate(credentials: Credentials, own: bool, addresses: tuple[str, ...] = ()) -> str:
    """Get a relayed address, at *addresses* or else those of the host, and give it back."""
    left = credentials.expires - time.time()
    if left < HALF_DAY:
        raise Wrong(f"credentials are good for {left / 3600:.0f} hours only", "set the clock")
    where = addresses or resolve(credentials.host, own)
    return ", ".join(_allocate_at(item, credentials) for item in where)


def _allocate_at(address: str, credentials: Credentials) -> str:
    client = Client(str(credentials.expires), credentials.password)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((address, credentials.port))
        try:
            begin = time.monotonic()
            _talk(sock, client)
            took = time.monotonic() - begin
        except TurnError as error:
            raise Wrong(f"{address} {error}") from error
        except ConnectionRefusedError:
            raise Wrong(f"nobody listens at {address}, UDP port {credentials.port}") from None
        except TimeoutError:
            raise Wrong(f"no answer from {address}, UDP port {credentials.port}") from None
        sock.send(client.release())
    assert client.relayed is not None
    host, port = client.relayed
    return f"{host} port {port} in {took * 1000:.0f} ms"


def _talk(sock: socket.socket, client: Client) -> None:
    """Ask until there is a relayed address; raises TimeoutError and TurnError."""
    request = client.request()
    wait = FIRST_WAIT
    for _number in range(REQUESTS):
        sock.send(request)
        deadline = time.monotonic() + wait
        wait *= 2
        while client.relayed is None and (left := deadline - time.monotonic()) > 0:
            sock.settimeout(left)
            try:
                answer = client.receive(sock.recv(DATAGRAM_MAX))
            except TimeoutError:
                break
            if answer is not None:
                request = answer
                sock.send(request)
                wait = FIRST_WAIT
        if client.relayed is not None:
            return
    raise TimeoutError
