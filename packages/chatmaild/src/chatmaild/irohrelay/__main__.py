# SPDX-License-Identifier: MIT
"""The relay as a service: `python3 -Im chatmaild.irohrelay`, one listening socket from systemd.

What one client may have, whatever it does:

    memory   MAX_MESSAGE octets not yet understood, QUEUE octets not yet sent here and SEND_BUFFER in the
             kernel; what a slow reader has no room for is thrown away, as datagrams may be
    rate     RATE octets a second, each frame counted FRAME_COST more; then it is not read any further
    time     session.HANDSHAKE_SECONDS to prove a key, session.PONG_SECONDS to answer a ping,
             CLOSE_SECONDS to take the last octets

and all of them MAX_CONNECTIONS. nginx allows one address a share of these. When nobody has been
connected for IDLE_SECONDS the process ends, and costs nothing until systemd starts it for the next one.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys

from chatmaild.activation import ActivationError, listen_sockets, notify, setup_logging
from chatmaild.irohrelay.bucket import Bucket
from chatmaild.irohrelay.hub import Hub
from chatmaild.irohrelay.session import Session

MAX_CONNECTIONS = 512
QUEUE = 128 << 10  # octets
SEND_BUFFER = 64 << 10  # octets; the kernel doubles it for its own needs
RECEIVE_SIZE = 64 << 10  # octets handled at once
RATE = 2 << 20  # octets a second
BURST = 2 << 20
FRAME_COST = 256  # octets
SWEEP_SECONDS = 5.0
CLOSE_SECONDS = 5.0
IDLE_SECONDS = 60.0

BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

log = logging.getLogger("irohrelay")


class Server:
    """All connections of the process."""

    def __init__(self, listening: socket.socket) -> None:
        self.hub = Hub()
        self.connections: set[Connection] = set()
        self.served = 0
        self.buffer = memoryview(bytearray(RECEIVE_SIZE))  # for all: it is emptied at once
        self._listening = listening
        self._opening: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._last_busy = self._loop.time()

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT, or until there is nothing to do."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, stop.set)
        self._loop.add_reader(self._listening, self._accept)
        notify("READY=1")
        while not stop.is_set() and not self._sweep():
            try:
                async with asyncio.timeout(SWEEP_SECONDS):
                    await stop.wait()
            except TimeoutError:
                pass
        notify("STOPPING=1")
        # who connects from now on waits for the next process
        self._loop.remove_reader(self._listening)
        log.info(
            "%d connections, %d frames passed on, %d dropped",
            self.served,
            self.hub.passed,
            self.hub.dropped,
        )
        for connection in list(self.connections):
            connection.abort()

    def _accept(self) -> None:
        try:
            accepted, _ = self._listening.accept()
        except (BlockingIOError, ConnectionError):
            return  # the peer has gone
        except OSError as error:  # no descriptors: the others may end
            log.warning("accept: %s", error.strerror)
            self._loop.remove_reader(self._listening)
            self._loop.call_later(1.0, self._loop.add_reader, self._listening, self._accept)
            return
        accepted.setblocking(False)
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        task = self._loop.create_task(self._open(accepted))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, accepted: socket.socket) -> None:
        await self._loop.connect_accepted_socket(lambda: Connection(self), accepted)

    def _sweep(self) -> bool:
        """Let every session see the time; whether nobody has been here for long."""
        now = self._loop.time()
        for connection in list(self.connections):
            connection.session.tick(now)
        if self.connections or self._opening:
            self._last_busy = now
        return now - self._last_busy > IDLE_SECONDS


class Connection(asyncio.BufferedProtocol):
    """The link of one session."""

    session: Session

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._bucket = Bucket(RATE, BURST, self._loop.time())
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if len(self._server.connections) >= MAX_CONNECTIONS:
            transport.write(BUSY)
            transport.close()
            return
        self._transport = transport
        self.session = Session(self._server.hub, self, self._loop.time())
        self._server.connections.add(self)
        self._server.served += 1

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._server.buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._transport is None or self.session.closed:
            return
        now = self._loop.time()
        try:
            frames = self.session.receive(bytes(self._server.buffer[:nbytes]), now)
        except Exception as error:  # a bug: this connection only, and nothing of its contents
            log.error("connection ended by %s", type(error).__name__)
            self._transport.abort()
            return
        wait = self._bucket.spend(nbytes + FRAME_COST * frames, now)
        if wait and not self._transport.is_closing():
            self._transport.pause_reading()
            self._timer = self._loop.call_later(wait, self._resume)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport = None
            self._server.connections.discard(self)
            self.session.lost()

    # session.Link

    def send(self, data: bytes) -> bool:
        transport = self._transport
        if transport is None or transport.is_closing():
            return False
        if transport.get_write_buffer_size() + len(data) > QUEUE:
            return False
        transport.write(data)
        return True

    def close(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            if self._timer is not None:
                self._timer.cancel()
            self._transport.close()
            self._timer = self._loop.call_later(CLOSE_SECONDS, self.abort)

    def abort(self) -> None:
        """End the connection now."""
        if self._transport is not None:
            self._transport.abort()

    def _resume(self) -> None:
        self._timer = None
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()


def main(arguments: list[str]) -> int:
    """Run the service; it has no settings, and *arguments* are ignored."""
    setup_logging()
    try:
        listening = listen_sockets("iroh-relay")["iroh-relay"]
    except ActivationError as error:
        log.critical("%s", error)
        return 1

    async def serve() -> None:
        await Server(listening).run()

    asyncio.run(serve())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
