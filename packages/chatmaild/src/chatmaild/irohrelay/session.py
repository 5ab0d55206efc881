# SPDX-License-Identifier: MIT
"""One connection, from its HTTP request over the proof of a key to its end. No I/O.

The shell gives it octets and the time, and a Link to answer by. Whatever a peer does ends its own
connection at worst: `receive` and `tick` raise nothing of its making.
"""

from __future__ import annotations

import os
from http import HTTPStatus
from typing import Protocol

from chatmaild.http1 import BadRequest, Request, RequestReader, Response
from chatmaild.irohrelay import websocket
from chatmaild.irohrelay.dialects import (
    Current,
    Datagrams,
    Dialect,
    Frame,
    Legacy,
    Ping,
    Pong,
    ProtocolError,
)
from chatmaild.irohrelay.hub import Hub
from chatmaild.irohrelay.length import LengthFraming
from chatmaild.irohrelay.websocket import FramingError, WebSocketFraming

PATH = "/relay"
LEGACY_UPGRADE = "iroh derp http"
SUBPROTOCOLS = {"iroh-relay-v2": 2, "iroh-relay-v1": 1}  # the best one first

HANDSHAKE_SECONDS = 10.0  # from the connection to the proof of a key
PING_SECONDS = 15.0  # between a pong and the next ping
PONG_SECONDS = 15.0  # for the pong to come


class Link(Protocol):
    """The way back to the peer."""

    def send(self, data: bytes) -> bool:
        """Queue octets; False, and nothing is sent, if too much is queued already."""

    def close(self) -> None:
        """End the connection once what is queued is sent."""

    def abort(self) -> None:
        """End the connection now."""


class Session:
    """The relay's side of one connection, and the hub's client once its key is proved."""

    def __init__(self, hub: Hub, link: Link, now: float) -> None:
        self.key = b""
        self.dialect: Dialect = Legacy()
        self._hub = hub
        self._link = link
        self._requests: RequestReader | None = RequestReader()
        self._framing: WebSocketFraming | LengthFraming = LengthFraming()
        self._deadline = now + HANDSHAKE_SECONDS  # of the handshake, then of a pong
        self._next_ping = float("inf")
        self._ping = b""  # the payload of the ping that is not answered yet
        self.closed = False

    # what the shell calls

    def receive(self, data: bytes, now: float) -> int:
        """Handle octets of the peer; returns how many frames they completed, of the framing's own too."""
        try:
            if self._requests is not None:
                requests = self._requests
                requests.receive(data)
                request = requests.next()
                if request is None or not self._accept(request):
                    return 0
                self._requests, data = None, requests.take_rest()
            frames = self._framing.receive(data)
            if replies := self._framing.replies:
                self._link.send(replies)
            for frame in frames:
                self._handle(frame, now)
                if self.closed:
                    break
            if self._framing.closed:
                self.close()
            return self._framing.count
        except BadRequest as error:
            self._answer(error.status, str(error))
        except FramingError as error:
            self._link.send(error.farewell)
            self.close()
        except ProtocolError as error:
            if error.farewell is not None:
                self.send(*error.farewell)
            self.close()
        return 0

    def tick(self, now: float) -> None:
        """Look at the clock, every few seconds: end what is dead, ask who is silent."""
        if self.closed:
            return
        if now > self._deadline:
            self.closed = True
            self._link.abort()
        elif now > self._next_ping:
            self._ping = os.urandom(8)
            self._next_ping, self._deadline = float("inf"), now + PONG_SECONDS
            self.send(*self.dialect.ping(self._ping))

    def lost(self) -> None:
        """The connection has ended."""
        self.closed = True
        if self.key:
            self._hub.leave(self)

    # what the hub calls

    def send(self, kind: int, *parts: bytes) -> bool:
        """Send a frame; False if the peer is too slow and the frame was thrown away."""
        return not self.closed and self._link.send(self._framing.wrap(kind, *parts))

    def close(self) -> None:
        """End the connection once what is queued is sent."""
        self.closed = True
        self._link.close()

    # HTTP

    def _accept(self, request: Request) -> bool:
        """Change to one of our protocols; False if the peer wants none and was told so."""
        if request.path != PATH:
            self._answer(HTTPStatus.NOT_FOUND, "there is nothing here")
            return False
        if request.method != "GET":
            self._answer(HTTPStatus.METHOD_NOT_ALLOWED, "use GET", ("Allow", "GET"))
            return False
        upgrade = request.fields.get("upgrade", "").lower()
        if upgrade == LEGACY_UPGRADE:
            self._switch([("Upgrade", LEGACY_UPGRADE)])
            return True
        if upgrade == "websocket":
            return self._upgrade_to_websocket(request)
        self._answer(HTTPStatus.BAD_REQUEST, "this is a relay for iroh", ("Upgrade", "websocket"))
        return False

    def _upgrade_to_websocket(self, request: Request) -> bool:
        if request.fields.get("sec-websocket-version") != websocket.VERSION:
            version = ("Sec-WebSocket-Version", websocket.VERSION)
            self._answer(HTTPStatus.BAD_REQUEST, "unsupported version of WebSocket", version)
            return False
        accept = websocket.accept_key(request.fields.get("sec-websocket-key", ""))
        if accept is None:
            self._answer(HTTPStatus.BAD_REQUEST, "malformed Sec-WebSocket-Key")
            return False
        fields = [("Upgrade", "websocket"), ("Sec-WebSocket-Accept", accept)]
        offered = request.fields.get("sec-websocket-protocol")
        if offered is not None:
            names = {name.strip() for name in offered.split(",")}
            best = next((name for name in SUBPROTOCOLS if name in names), None)
            if best is None:
                self._answer(HTTPStatus.BAD_REQUEST, "no common version of the relay protocol")
                return False
            fields.append(("Sec-WebSocket-Protocol", best))
            self.dialect = Current(SUBPROTOCOLS[best])
        self._framing = WebSocketFraming()
        self._switch(fields)
        return True

    def _switch(self, fields: list[tuple[str, str]]) -> None:
        lines = ["HTTP/1.1 101 Switching Protocols", "Connection: upgrade"]
        lines += [f"{name}: {value}" for name, value in fields]
        self._link.send("\r\n".join([*lines, "", ""]).encode("ascii"))
        greeting = self.dialect.greeting()
        if greeting is not None:
            self.send(*greeting)

    def _answer(self, status: HTTPStatus, reason: str, *fields: tuple[str, str]) -> None:
        headers = [("Content-Type", "text/plain"), *fields]
        body = reason.encode("ascii") + b"\n"
        self._link.send(Response(status, headers, body).render(keep_alive=False))
        self.close()

    # frames

    def _handle(self, frame: Frame, now: float) -> None:
        if not self.key:
            self.key = self.dialect.authenticate(frame)
            self._deadline, self._next_ping = float("inf"), now + PING_SECONDS
            welcome = self.dialect.welcome()
            if welcome is not None:
                self.send(*welcome)
            self._hub.join(self)
            return
        said = self.dialect.read(frame)
        if isinstance(said, Datagrams):
            self._hub.forward(self, said.destination, said.kind, said.contents)
        elif isinstance(said, Ping):
            self.send(*self.dialect.pong(said.payload))
        elif isinstance(said, Pong) and self._ping and said.payload == self._ping:
            self._ping = b""
            self._deadline, self._next_ping = float("inf"), now + PING_SECONDS
