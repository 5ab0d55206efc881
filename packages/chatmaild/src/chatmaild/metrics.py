# SPDX-License-Identifier: MIT
"""Numbers of a service for Prometheus: counters, gauges, histograms, and the socket that tells them.

In a service, at the top of the module that knows what happens:

    CREATED = metrics.Counter("chatmail_accounts_created", "Addresses made at their first login.")
    MAIL = metrics.Counter("chatmail_mail", "Messages judged.", ("direction", "verdict"))
    QUEUE = metrics.Gauge("chatmail_notifier_queue", "Notifications waiting.", read=queue_length)
    DELAY = metrics.Histogram("chatmail_notifier_seconds", "From delivery to the push server's 200.",
                              buckets=(0.1, 0.5, 1, 5, 30, 300))

    CREATED.inc()
    MAIL.inc("incoming", "accepted")        # values of the labels, in the order of their names
    DELAY.observe(seconds)

and where the service starts its servers, with `sockets` from `listen_sockets(..., optional=("metrics",))`
and a unit chatmail-NAME-metrics.socket (ListenStream=/run/chatmail/NAME/metrics.socket) among Sockets=:

    await metrics.start_server(sockets)

Who connects is written everything in OpenMetrics 1.0 text and the connection is closed: nothing is
read, so there is nothing to attack. chatmail-metrics.service (chatmaild.export) collects the sockets of all
services and speaks HTTP. A name is one service's alone, begins with "chatmail_", and has a unit
("_seconds", "_bytes") if it is not a number of things; a counter's "_total" is added here.

Never give a label a value that comes from a peer: no addresses, domains, or anything one could be known
by. A metric holds MAX_SERIES combinations of labels; all further ones are counted as "other". Calls
are safe in threads and take about a microsecond. Own code, as the common library would cost each
service four megabytes.
"""

from __future__ import annotations

import asyncio
import bisect
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

MAX_SERIES = 64  # of one metric
SEND_SECONDS = 10.0  # for a reader to take it all
OTHER = "other"

_lock = threading.Lock()


class Metric:
    """What the kinds have in common: a name, a help text, and numbers by the values of the labels."""

    kind = ""

    def __init__(
        self,
        name: str,
        help: str,
        labels: Sequence[str] = (),
        *,
        registry: list[Metric] | None = None,
    ) -> None:
        self.name = name
        self.help = help
        self.labels = tuple(labels)
        (REGISTRY if registry is None else registry).append(self)

    def samples(self) -> Iterator[str]:
        """The lines of this metric, without newline."""
        raise NotImplementedError

    def _key(
        self, values: tuple[str, ...], known: Mapping[tuple[str, ...], object]
    ) -> tuple[str, ...]:
        """The series that *values* are counted in."""
        if len(values) != len(self.labels):
            raise ValueError(f"{self.name} wants a value for each of its labels {self.labels}")
        if values in known or len(known) < MAX_SERIES:
            return values
        return (OTHER,) * len(values)

    def _line(
        self, suffix: str, values: Sequence[str], number: float, *more: tuple[str, str]
    ) -> str:
        pairs = [*zip(self.labels, values, strict=True), *more]
        inner = ",".join(f'{label}="{_escape(value)}"' for label, value in pairs)
        return (
            f"{self.name}{suffix}{{{inner}}} {number}" if inner else f"{self.name}{suffix} {number}"
        )


class Counter(Metric):
    """A number that only grows while the service runs."""

    kind = "counter"

    def __init__(
        self,
        name: str,
        help: str,
        labels: Sequence[str] = (),
        *,
        registry: list[Metric] | None = None,
    ) -> None:
        super().__init__(name, help, labels, registry=registry)
        self._numbers: dict[tuple[str, ...], float] = {} if self.labels else {(): 0}

    def inc(self, *values: str, by: float = 1) -> None:
        """Add *by*, not negative."""
        with _lock:
            key = self._key(values, self._numbers)
            self._numbers[key] = self._numbers.get(key, 0) + by

    def value(self, *values: str) -> float:
        """The number now, 0 if nothing was counted there."""
        return self._numbers.get(values, 0)

    def numbers(self) -> dict[tuple[str, ...], float]:
        """All numbers now, by the values of the labels."""
        with _lock:
            return dict(self._numbers)

    def samples(self) -> Iterator[str]:
        with _lock:
            numbers = sorted(self._numbers.items())
        for values, number in numbers:
            yield self._line("_total", values, number)


class Gauge(Metric):
    """A number that goes up and down: `set` it, or let *read* say it whenever somebody asks.

    *read* is called in a thread of its own; None, or an OSError, is "not known".
    """

    kind = "gauge"

    def __init__(
        self,
        name: str,
        help: str,
        labels: Sequence[str] = (),
        *,
        read: Callable[[], float | None] | None = None,
        registry: list[Metric] | None = None,
    ) -> None:
        super().__init__(name, help, labels, registry=registry)
        self.read = read
        self._numbers: dict[tuple[str, ...], float] = {}

    def set(self, number: float, *values: str) -> None:
        """This is the number now."""
        with _lock:
            self._numbers[self._key(values, self._numbers)] = number

    def samples(self) -> Iterator[str]:
        with _lock:
            numbers = sorted(self._numbers.items())
        if self.read is not None:
            try:
                number = self.read()
            except OSError:
                number = None
            numbers = [] if number is None else [((), number)]
        for values, number in numbers:
            yield self._line("", values, number)


class Histogram(Metric):
    """How often a number was how large; *buckets* are upper bounds in rising order."""

    kind = "histogram"

    def __init__(
        self,
        name: str,
        help: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float],
        registry: list[Metric] | None = None,
    ) -> None:
        super().__init__(name, help, labels, registry=registry)
        self.buckets = tuple(buckets)
        # for each series: how many fell into each bucket and above all of them, and their sum
        self._numbers: dict[tuple[str, ...], list[float]] = {}
        if not self.labels:
            self._numbers[()] = self._empty()

    def _empty(self) -> list[float]:
        return [0] * (len(self.buckets) + 1) + [0.0]

    def observe(self, number: float, *values: str) -> None:
        """Count one *number*, not negative."""
        with _lock:
            counts = self._numbers.setdefault(self._key(values, self._numbers), self._empty())
            counts[bisect.bisect_left(self.buckets, number)] += 1
            counts[-1] += number

    def samples(self) -> Iterator[str]:
        with _lock:
            numbers = sorted((values, list(counts)) for values, counts in self._numbers.items())
        for values, (*counts, total) in numbers:
            so_far: float = 0
            for bound, count in zip((*self.buckets, float("inf")), counts, strict=True):
                so_far += count
                name = "+Inf" if bound == float("inf") else str(float(bound))
                yield self._line("_bucket", values, so_far, ("le", name))
            yield self._line("_count", values, so_far)
            yield self._line("_sum", values, total)


REGISTRY: list[Metric] = []  # of this process


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def exposition(registry: list[Metric] | None = None) -> str:
    """All metrics as OpenMetrics 1.0 text, with its end mark."""
    lines = []
    for metric in REGISTRY if registry is None else registry:
        lines.append(f"# TYPE {metric.name} {metric.kind}")
        lines.append(f"# HELP {metric.name} {_escape(metric.help)}")
        lines += metric.samples()
    return "\n".join([*lines, "# EOF"]) + "\n"


async def start_server(
    sockets: Mapping[str, socket.socket], registry: list[Metric] | None = None
) -> asyncio.Server | None:
    """Tell the numbers to who connects to the socket `metrics`; None if systemd passed none.

    Needs no further care: the server lives as long as the event loop.
    """
    if "metrics" not in sockets:
        return None

    async def connected(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(SEND_SECONDS):
                text = await asyncio.to_thread(exposition, registry)
                writer.write(text.encode())
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, ConnectionError):
            writer.transport.abort()

    # not start_unix_server: that of Python 3.13 removes systemd's socket when it ends
    return await asyncio.start_server(connected, sock=sockets["metrics"])
