# SPDX-License-Identifier: MIT
"""The service: `python3 -Im chatmaild.transport [CHATMAIL.INI]`, with two listening sockets from systemd.

`send` is for smtp(8), `mxdeliv` for nginx. The first that connects starts it, and when there was nothing
to do for IDLE_SECONDS it ends, so a relay without contact to others does not pay for it. SIGTERM lets
what is under way finish, for GRACE seconds; what is cut off then goes, or comes, by SMTP.

The event loop tells systemd that it is alive (WatchdogSec=); smtp(8) of a process that hangs would wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from chatmaild import metrics
from chatmaild.activation import ActivationError, listen_sockets, notify, setup_logging
from chatmaild.config import DEFAULT_PATH, Config, ConfigError, read_config
from chatmaild.transport import receiving, sending
from chatmaild.transport.limits import Limits
from chatmaild.transport.link import Contexts
from chatmaild.transport.locate import Locator

BACKLOG = 1024
IDLE_SECONDS = 600.0
GRACE = 10.0
TICK_SECONDS = 5.0
IF_INET6 = Path("/proc/self/net/if_inet6")  # absent where the kernel has no IPv6

log = logging.getLogger("transport")


class Service:
    """Both directions."""

    def __init__(self, config: Config) -> None:
        self.client = sending.Client(
            Locator(ipv6=not config.disable_ipv6 and IF_INET6.exists()),
            Contexts(),
        )
        self.sending = sending.Server(self.client, config.mail_domain)
        self.receiving = receiving.Server(config.max_message_size, Limits())
        metrics.Gauge(
            "chatmail_https_peers",
            "Relays known to take HTTPS.",
            read=lambda: self.client.peers.known,
        )

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        return bool(self.sending.sessions or self.receiving.requests or self.client.busy)

    async def run(self, sockets: dict[str, socket.socket]) -> None:
        """Serve until SIGTERM, SIGINT, or until there is nothing to do."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        servers = [
            await asyncio.start_server(connected, sock=sockets[name], backlog=BACKLOG)
            for name, connected in (
                ("send", self.sending.connected),
                ("mxdeliv", self.receiving.connected),
            )
        ]
        await metrics.start_server(sockets)
        notify("READY=1")
        log.info("ready, entering serving loop")
        last_busy = loop.time()
        while not stop.is_set() and loop.time() - last_busy < IDLE_SECONDS:
            notify("WATCHDOG=1")
            if self.busy:
                last_busy = loop.time()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await stop.wait()
        notify("STOPPING=1")
        for server in servers:  # who connects from now on waits for the next process
            server.close()
        deadline = loop.time() + GRACE
        while self.busy and loop.time() < deadline:
            await asyncio.sleep(0.05)
        self.client.close()


def main(arguments: list[str]) -> int:
    """Run the service with the settings of a file."""
    setup_logging()
    os.environ.pop("WATCHDOG_USEC", None)
    try:
        config = read_config(Path(arguments[0]) if arguments else DEFAULT_PATH)
        sockets = listen_sockets("send", "mxdeliv", optional=("metrics",))
    except (ConfigError, ActivationError) as error:
        log.critical("%s", error)
        return 78  # EX_CONFIG, sysexits(3)

    async def serve() -> None:
        await Service(config).run(sockets)

    asyncio.run(serve())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
