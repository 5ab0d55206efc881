# SPDX-License-Identifier: MIT
"""The demo: one relay in the lab that stays up, and a forwarder to it on a loopback address.

Run by tools/demo in the tests' virtual environment: `python -m lab.demo FOLDER ADDRESS`. Writes progress to
FOLDER/log, and FOLDER/ready when the relay is well; ends, leaving nothing, at SIGTERM.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path

from . import Lab
from .host import Host
from .network import Namespace, inside
from .shell import wait_for

DOMAIN = "_alpha.example"
PORTS = (25, 80, 143, 443, 465, 587, 993)
CHUNK = 65536


def connect(namespace: Namespace, port: int) -> socket.socket:
    """A connection to the relay, made inside the lab's network."""
    with inside(namespace):
        return socket.create_connection((namespace.ipv4, port), 10)


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy one direction of a connection until it ends."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
    writer.close()


async def forward(host: Host, address: str, stop: asyncio.Event) -> None:
    """Forward PORTS of *address* to *host* until *stop*."""

    async def serve(port: int) -> asyncio.Server:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                inner = await asyncio.to_thread(connect, host.namespace, port)
            except OSError:
                writer.close()
                return
            there, back = await asyncio.open_connection(sock=inner)
            await asyncio.gather(pump(reader, back), pump(there, writer))

        return await asyncio.start_server(connected, address, port)

    servers = [await serve(port) for port in PORTS]
    await stop.wait()
    for server in servers:
        server.close()


def main(folder: Path, address: str) -> None:
    """Boot, install, forward, wait."""
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:5.1f} s] {text}", flush=True)

    async def run(host: Host) -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        (folder / "ready").write_text("")
        await forward(host, address, stop)

    say("preparing the Debian 13 tree and the packages")
    with Lab("demo") as lab:
        say("booting the container")
        host = lab.host("alpha", 11, names=(DOMAIN,))
        say("apt install chatmail-relay")
        host.install_relay(DOMAIN)
        say("waiting until chatmail-relay status is well")
        wait_for(lambda: host.exec("chatmail-relay", "status", check=False).ok, 60, "status")
        print(host.exec("chatmail-relay", "status").out, flush=True)
        asyncio.run(run(host))


if __name__ == "__main__":
    os.setsid()
    main(Path(sys.argv[1]), sys.argv[2])
