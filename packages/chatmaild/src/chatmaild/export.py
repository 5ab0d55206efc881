# SPDX-License-Identifier: MIT
"""chatmail-metrics: all numbers of the relay at http://127.0.0.1:3905/metrics, for Prometheus.

Collects, whenever somebody asks: the sockets /run/chatmail/*/metrics.socket of our services (see
metrics), Dovecot's own statistics, text files that timers leave in FILES, and what systemd's control
groups know of each unit. Started by its socket and gone after IDLE_SECONDS without a question, so a
relay that nobody watches does not pay for it.

A source that does not answer within SOURCE_SECONDS is left out and its chatmail_up is 0.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from http import HTTPStatus
from pathlib import Path

from chatmaild import metrics
from chatmaild.activation import ActivationError, listen_sockets, notify, setup_logging
from chatmaild.http1 import BadRequest, RequestReader, Response
from chatmaild.openmetrics import merge

RUN = Path("/run/chatmail")
DOVECOT = Path("/run/dovecot/metrics")
FILES = Path("/var/lib/chatmail/report")  # where chatmail-fsreport.service writes
UNITS = Path("/sys/fs/cgroup/system.slice")
UNIT_NAMES = re.compile(
    r"(chatmail-[a-z-]+|coturn|dovecot|nginx|opendkim|postfix|unbound)\.service\Z"
)

MAX_CONNECTIONS = 16
MAX_TEXT = 1 << 20  # bytes of one source
SOURCE_SECONDS = 5.0
REQUEST_SECONDS = 10.0
IDLE_SECONDS = 150.0  # more than two of the usual scrape intervals
READ_SIZE = 4096

CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_DOVECOT_REQUEST = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

log = logging.getLogger("metrics")


async def _read(path: Path, request: bytes = b"") -> str:
    """What a unix socket says after *request* until it closes; raises OSError or TimeoutError."""
    async with asyncio.timeout(SOURCE_SECONDS):
        reader, writer = await asyncio.open_unix_connection(str(path))
        try:
            writer.write(request)
            data = bytearray()
            while len(data) < MAX_TEXT and (some := await reader.read(1 << 16)):
                data += some
        finally:
            writer.close()
    return data.decode("utf-8", "replace")


async def collect() -> str:
    """The whole exposition."""
    sources: dict[str, tuple[Path, bytes, str]] = {
        path.parent.name: (path, b"", "chatmail_") for path in sorted(RUN.glob("*/metrics.socket"))
    }
    if DOVECOT.exists():
        sources["dovecot"] = (DOVECOT, _DOVECOT_REQUEST, "dovecot_")
    answers = await asyncio.gather(
        *(_read(path, request) for path, request, _ in sources.values()), return_exceptions=True
    )
    registry: list[metrics.Metric] = []
    up = metrics.Gauge(
        "chatmail_up", "Whether a service told its numbers.", ("service",), registry=registry
    )
    texts = []
    for (name, (_, _, prefix)), answer in zip(sources.items(), answers, strict=True):
        up.set(int(isinstance(answer, str)), name)
        if isinstance(answer, str):
            texts.append((prefix, answer))
        elif not isinstance(answer, OSError):  # TimeoutError is one
            raise answer
    _read_units(registry)
    texts += [("chatmail_", text) for text in _read_files()]
    return merge([("chatmail_", metrics.exposition(registry)), *texts])


def _read_files() -> list[str]:
    texts = []
    for path in sorted(FILES.glob("*.prom")):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                texts.append(file.read(MAX_TEXT))
        except OSError as error:
            log.warning("%s: %s", path, error.strerror)
    return texts


def _read_units(registry: list[metrics.Metric]) -> None:
    """Memory and processor time of each unit, from cgroup v2 (cgroups(7)), where they are counted."""
    memory = metrics.Gauge(
        "chatmail_unit_memory_bytes", "Memory of a unit.", ("unit",), registry=registry
    )
    cpu = metrics.Counter(
        "chatmail_unit_cpu_seconds", "Processor time of a unit.", ("unit",), registry=registry
    )
    for folder in sorted(UNITS.glob("*.service")):
        if not UNIT_NAMES.match(folder.name):
            continue
        unit = folder.name.removesuffix(".service")
        try:
            memory.set(int((folder / "memory.current").read_text()), unit)
        except (OSError, ValueError):
            pass
        try:
            usage = re.search(
                r"^usage_usec (\d+)$", (folder / "cpu.stat").read_text(), re.MULTILINE
            )
            if usage:
                cpu.inc(unit, by=int(usage[1]) / 1e6)
        except OSError:
            pass


class Server:
    """One request a connection; `last` is when somebody was there."""

    def __init__(self) -> None:
        self.connections = 0
        self.last = asyncio.get_running_loop().time()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        self.connections += 1
        try:
            if self.connections <= MAX_CONNECTIONS:
                async with asyncio.timeout(REQUEST_SECONDS):
                    await _serve(reader, writer)
        except (TimeoutError, ConnectionError):
            pass
        finally:
            self.connections -= 1
            self.last = asyncio.get_running_loop().time()
            writer.close()


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    requests = RequestReader()
    request = None
    try:
        while request is None:
            data = await reader.read(READ_SIZE)
            if not data:
                return
            requests.receive(data)
            request = requests.next()
    except BadRequest as error:
        writer.write(_plain(error.status).render(keep_alive=False))
        return
    if request.path != "/metrics":
        response = _plain(HTTPStatus.NOT_FOUND)
    elif request.method not in ("GET", "HEAD"):
        response = _plain(HTTPStatus.METHOD_NOT_ALLOWED)
        response.headers.append(("Allow", "GET, HEAD"))
    else:
        text = await collect()
        headers = [("Content-Type", CONTENT_TYPE), ("Cache-Control", "no-store")]
        response = Response(HTTPStatus.OK, headers, text.encode())
    writer.write(response.render(keep_alive=False, with_body=request.method != "HEAD"))
    await writer.drain()


def _plain(status: HTTPStatus) -> Response:
    return Response(status, [("Content-Type", "text/plain")], f"{status.phrase}\n".encode())


async def serve() -> None:
    """Serve until nobody has asked for a while."""
    sockets = listen_sockets("http")
    shell = Server()
    loop = asyncio.get_running_loop()
    server = await asyncio.start_server(shell.connected, sock=sockets["http"])
    notify("READY=1")
    async with server:
        while shell.connections or loop.time() < shell.last + IDLE_SECONDS:
            await asyncio.sleep(max(1.0, shell.last + IDLE_SECONDS - loop.time()))


def main(arguments: list[str]) -> int:
    """Run the service; it has no settings."""
    setup_logging()
    try:
        asyncio.run(serve())
    except ActivationError as error:
        log.critical("%s", error)
        return 78  # EX_CONFIG, sysexits(3)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
