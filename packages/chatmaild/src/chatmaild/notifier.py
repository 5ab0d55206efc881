# SPDX-License-Identifier: MIT
"""Wakes devices: tells the notification server the tokens of users who got a message.

Dovecot writes one JSON line for every delivery to the socket `events` (`deliveries` reads them), `Notifier`
puts the tokens of the recipient into the durable queue (pushqueue) and POSTs each as it is, as the body
of a request. The server answers 200 for "done" and 410 for "this token is gone"; after anything else,
or nothing within REQUEST_SECONDS, it is asked again later.

There are two lanes, for first tries and for others, each with its own number of requests at a time, so
a server that fails for some tokens does not delay the rest: and when a lane is full, who has waited
longest for an answer, and longer than PATIENCE, gives way and is tried again later.

What is promised: a notification that was queued is sent at least once, whatever dies; deliveries never
wait for any of this; memory does not depend on how much is queued. A copy that a user sent themself
wakes nobody. Neither tokens nor addresses are ever logged.

The HTTP library takes 5 MB and is imported at the first notification.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from chatmaild import metrics
from chatmaild.activation import keep
from chatmaild.devicetokens import DeviceTokens, is_token
from chatmaild.pushqueue import Notification, Queue

if TYPE_CHECKING:
    import httpcore

MAX_LINE = 1 << 17  # bytes; Postfix' header_size_limit is 102400, and the From field is in the line
MAX_CONNECTIONS = 16  # Dovecot's stats process holds one
KEPT = "delivery"  # name of a connection that systemd holds for us
READ_SIZE = 1 << 16

FIRST_REQUESTS = 48  # at a time
LATER_REQUESTS = 16
REQUEST_SECONDS = 60.0
PATIENCE = 5.0  # seconds
KEEP_ALIVE_SECONDS = 60.0
KEEP_ALIVE = 8  # idle connections
MAX_ANSWER = 65536  # bytes of an answer we are ready to read
MAX_WAIT = 60.0  # seconds; the clock that says when something is due may be set anew
PAUSE = 5.0  # seconds after an error of the disk
LOG_SECONDS = 60.0  # between two lines of the same kind

MAX_FILE = 8192  # characters of one notification of another relay

log = logging.getLogger("metadata")

DELIVERIES = metrics.Counter(
    "chatmail_notifier_deliveries", "Deliveries Dovecot told of, own copies left out."
)
QUEUE = metrics.Gauge("chatmail_notifier_queue", "Notifications waiting.")
REQUESTS = metrics.Counter(
    "chatmail_notifier_requests", "Requests to the notification server.", ("result",)
)
SECONDS = metrics.Histogram(
    "chatmail_notifier_seconds",
    "From the delivery to the notification server's 200.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 600, 6000),
)
DROPPED = metrics.Counter(
    "chatmail_notifier_dropped", "Notifications given up, or never queued.", ("reason",)
)
MERGED = metrics.Counter(
    "chatmail_notifier_merged", "Deliveries that a waiting notification stands for as well."
)

T = TypeVar("T")


# --- events of Dovecot ------------------------------------------------------------------------------


class EventReader:
    """Bytes in, users out: those who got a message of somebody else.

    Whatever comes, it stays in step: a line that is no delivery is passed over, as is one over
    MAX_LINE. Memory is bounded by MAX_LINE plus one chunk, cost is linear in the bytes received.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def receive(self, data: bytes) -> Iterator[str]:
        """The users of the lines that are complete with *data*."""
        first, *rest = data.split(b"\n")
        self._add(first)
        for part in rest:
            line = b"".join(self._parts)
            too_long = self._size > MAX_LINE
            self._parts, self._size = [], 0
            user = None if too_long else recipient(line)
            if user is not None:
                yield user
            self._add(part)

    def _add(self, part: bytes) -> None:
        self._size += len(part)
        if self._size <= MAX_LINE:
            self._parts.append(part)
        else:
            self._parts.clear()


def recipient(line: bytes) -> str | None:
    """The user that one event is about; None for other events, own copies, and nonsense.

    The sender is who the message says it is from, which filtermail has verified; the envelope's
    sender counts where it says nothing. A stranger who puts the user's address into their name keeps
    their own message from waking somebody, no more.
    """
    try:
        event = json.loads(line)
        fields = event["fields"]
        if event["event"] != "mail_delivery_finished" or "error" in fields:
            return None
        user, sender = fields["user"], fields.get("message_from") or fields.get("mail_from") or ""
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    if not isinstance(user, str) or not isinstance(sender, str) or not user:
        return None
    sender = sender.strip().lower()
    return None if sender == user or f"<{user}>" in sender else user


# --- the server -------------------------------------------------------------------------------------


class Failure(Exception):
    """The server did not answer; the first word is for statistics, the rest for the log."""


class Server(Protocol):
    """Who is told of tokens."""

    async def post(self, token: str) -> int:
        """The HTTP status of the answer; raises Failure."""


class NotificationServer:
    """The notification server at *url*, reached through the HTTP proxy *proxy* if that is given.

    Connections are kept for the next requests, redirections are not followed, nothing of the
    environment counts.
    """

    def __init__(self, url: str, proxy: str = "") -> None:
        self._url = url
        self._proxy = proxy
        self._pool: httpcore.AsyncConnectionPool | None = None

    async def post(self, token: str) -> int:
        """The HTTP status; raises Failure."""
        import httpcore

        pool = self._pool = self._pool or self._connections()
        try:
            try:
                return await self._request(pool, token)
            except (httpcore.RemoteProtocolError, httpcore.ReadError, httpcore.WriteError):
                # most likely a kept connection that the server has just closed
                return await self._request(pool, token)
        except (httpcore.TimeoutException, httpcore.NetworkError) as error:
            raise Failure("unreachable", f"{type(error).__name__}: {error}") from error
        except (httpcore.ProtocolError, httpcore.ProxyError) as error:
            raise Failure("protocol", f"{type(error).__name__}: {error}") from error

    async def _request(self, pool: httpcore.AsyncConnectionPool, token: str) -> int:
        headers = [("Content-Type", "application/octet-stream"), ("User-Agent", "chatmail-relay")]
        limits = {"connect": REQUEST_SECONDS, "read": REQUEST_SECONDS, "write": REQUEST_SECONDS}
        async with pool.stream(
            "POST",
            self._url,
            headers=headers,
            content=token.encode(),
            extensions={"timeout": limits},
        ) as response:
            size = 0
            # the connection can be kept when the answer was read to its end
            async for part in response.aiter_stream():
                size += len(part)
                if size > MAX_ANSWER:
                    break
            return int(response.status)

    def _connections(self) -> httpcore.AsyncConnectionPool:
        import ssl

        import httpcore

        return httpcore.AsyncConnectionPool(
            # certificates as Debian's own programs trust them; read one by one when needed
            ssl_context=ssl.create_default_context(),
            proxy=httpcore.Proxy(self._proxy) if self._proxy else None,
            max_connections=FIRST_REQUESTS + LATER_REQUESTS,
            max_keepalive_connections=KEEP_ALIVE,
            keepalive_expiry=KEEP_ALIVE_SECONDS,
        )


# --- the shell --------------------------------------------------------------------------------------


class _Flight(NamedTuple):
    started: float  # of the event loop's clock
    limit: asyncio.Timeout


@dataclass
class _Lane:
    """Requests of one kind that are under way."""

    again: bool
    slots: int
    flights: dict[int, _Flight] = field(default_factory=dict)


class Notifier:
    """Queue, tokens and server put together; `serve` does the work until it is cancelled."""

    def __init__(
        self,
        tokens: DeviceTokens,
        server: Server,
        queue: Queue,
        *,
        slots: tuple[int, int] = (FIRST_REQUESTS, LATER_REQUESTS),
        patience: float = PATIENCE,
        request_seconds: float = REQUEST_SECONDS,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._tokens = tokens
        self._server = server
        self._queue = queue
        self._lanes = (_Lane(False, slots[0]), _Lane(True, slots[1]))
        self._patience = patience
        self._request_seconds = request_seconds
        self._now = now
        # one thread: the queue is not for more, and notifications stay in order
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="queue")
        self._counted = (0, 0, 0)
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections = 0
        self._quiet_until: dict[str, float] = {}

    # -- what Dovecot says ---------------------------------------------------------------------

    async def connected(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bool = False
    ) -> None:
        """Take the events of one connection, to its end.

        Dovecot loses an event when it finds a connection closed, so systemd holds it while we do not.
        """
        self._connections += 1
        try:
            if self._connections > MAX_CONNECTIONS:
                self._warn("connections", "events: more than %d connections", MAX_CONNECTIONS)
                return
            if not kept:
                keep(writer.get_extra_info("socket").fileno(), KEPT)
            events = EventReader()
            while data := await reader.read(READ_SIZE):
                await self.deliveries(list(events.receive(data)))
        except ConnectionError:
            pass
        finally:
            self._connections -= 1
            writer.close()

    async def deliveries(self, users: list[str]) -> None:
        """Queue a notification for each token of each of *users*; on disk when this returns."""
        if not users:
            return
        DELIVERIES.inc(by=len(users))
        try:
            await self._in_thread(self._enqueue, users)
        except OSError as error:
            DROPPED.inc("disk", by=len(users))
            self._warn("disk", "notifications are lost, the queue cannot be written: %s", error)
        else:
            self._wake.set()

    def _enqueue(self, users: list[str]) -> None:
        wanted = []
        for user in dict.fromkeys(users):
            try:
                wanted += [(user, token) for token in self._tokens.get(user)]
            except OSError as error:
                DROPPED.inc("disk")
                log.warning("device tokens cannot be read: %s", error.strerror)
        self._queue.put(wanted)

    # -- what is done about it -------------------------------------------------------------------

    async def serve(self, legacy: Path | None = None) -> None:
        """Send what is queued, until cancelled; first read what an old relay left in *legacy*."""
        try:
            await self._until_it_works(self._queue.open)
            if legacy is not None:
                await self._until_it_works(lambda: import_files(self._queue, legacy))
            while True:
                self._wake.clear()
                delays = [await self._fill(lane) for lane in self._lanes]
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(delays)):
                        await self._wake.wait()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await asyncio.get_running_loop().run_in_executor(self._disk, self._queue.close)
            self._disk.shutdown()

    async def _until_it_works(self, work: Callable[[], T]) -> T:
        while True:
            try:
                return await self._in_thread(work)
            except OSError as error:
                self._warn("disk", "the queue of notifications cannot be used: %s", error)
                await asyncio.sleep(PAUSE)

    async def _fill(self, lane: _Lane) -> float:
        """Start what is due and has a slot; in how many seconds to look again, if nothing happens."""
        loop = asyncio.get_running_loop()
        try:
            free = lane.slots - len(lane.flights)
            if free:
                for item in await self._in_thread(self._queue.take, lane.again, free):
                    self._start(lane, item)
            due = await self._in_thread(self._queue.due, lane.again)
        except OSError as error:
            self._warn("disk", "the queue of notifications cannot be used: %s", error)
            return PAUSE
        wait = MAX_WAIT if due is None else min(max(due - self._now(), 0), MAX_WAIT)
        if wait or len(lane.flights) < lane.slots:
            return wait
        oldest = next(iter(lane.flights.values()))
        left = oldest.started + self._patience - loop.time()
        if left <= 0:
            with contextlib.suppress(RuntimeError):  # it has its answer already
                oldest.limit.reschedule(loop.time())
            return MAX_WAIT  # its end wakes us
        return left

    def _start(self, lane: _Lane, item: Notification) -> None:
        loop = asyncio.get_running_loop()
        limit = asyncio.timeout(self._request_seconds)
        lane.flights[item.number] = _Flight(loop.time(), limit)
        self.start(self._try(lane, item, limit))

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Do *work* beside all else; it is cancelled when `serve` is."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _try(self, lane: _Lane, item: Notification, limit: asyncio.Timeout) -> None:
        """One request, and what follows from its answer."""
        try:
            result = await self._ask(item.token, limit)
            REQUESTS.inc(result)
            await self._until_it_works(lambda: self._settle(item, result))
            if result == "200":
                SECONDS.observe(max(self._now() - item.since, 0))
        finally:
            del lane.flights[item.number]
            self._wake.set()

    async def _ask(self, token: str, limit: asyncio.Timeout) -> str:
        """The status as text, or why there is none."""
        try:
            async with limit:
                result, said = str(await self._server.post(token)), ""
        except TimeoutError:
            result, said = "timeout", "no answer"
        except Failure as error:
            result, said = str(error.args[0]), str(error.args[1])
        except Exception as error:  # a defect of the library is no reason to stop
            result, said = "error", f"{type(error).__name__}: {error}"
        if result not in ("200", "410"):
            self._warn("request", "Notification request failed, will try again: %s", said or result)
        return result

    def _settle(self, item: Notification, result: str) -> None:
        if result == "410":
            try:
                self._tokens.remove(item.user, item.token)
            except OSError as error:  # the next message finds out again
                log.warning("a device token cannot be removed: %s", error.strerror)
        if result in ("200", "410"):
            self._queue.done(item)
        else:
            self._queue.failed(item)

    # -- helpers ---------------------------------------------------------------------------------

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._disk, work, *arguments)
        finally:
            self._count()

    def _count(self) -> None:
        queue = self._queue
        QUEUE.set(queue.length)
        now = (queue.expired, queue.overflown, queue.merged)
        expired, overflown, merged = (a - b for a, b in zip(now, self._counted, strict=True))
        self._counted = now
        MERGED.inc(by=merged)
        DROPPED.inc("deadline", by=expired)
        DROPPED.inc("full", by=overflown)
        if expired:
            self._warn("deadline", "notification exceeded deadline, %d given up", expired)
        if overflown:
            self._warn("full", "too many notifications wait, %d oldest given up", overflown)

    def _warn(self, kind: str, text: str, *arguments: object) -> None:
        """Log at most one line of a kind in LOG_SECONDS."""
        now = time.monotonic()
        if now >= self._quiet_until.get(kind, 0):
            self._quiet_until[kind] = now + LOG_SECONDS
            log.warning(text, *arguments)


def import_files(queue: Queue, folder: Path) -> int:
    """Move notifications into *queue* that another chatmail relay left in *folder*; how many.

    One file each, lines: address, unix time of the message, token. What is none is removed.
    """
    count = 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            user, since, token = _read_file(Path(entry.path))
            if token:
                queue.put([(user, token)], since)
                count += 1
            with contextlib.suppress(OSError):
                os.unlink(entry.path)
    with contextlib.suppress(OSError):
        folder.rmdir()
    if count:
        log.info("%d notifications of another relay are in the queue", count)
    return count


def _read_file(path: Path) -> tuple[str, float, str]:
    with contextlib.suppress(OSError, ValueError):
        with open(path, encoding="ascii") as file:
            user, start, token = file.read(MAX_FILE).split("\n")[:3]
        if path.suffix != ".tmp" and user and is_token(token):
            return user, float(int(start.partition(".")[0])), token
    return "", 0.0, ""


async def start_server(
    notifier: Notifier, sock: socket.socket, kept: Iterable[socket.socket] = ()
) -> asyncio.Server:
    """Take Dovecot's events on a listening unix socket, and on connections kept from before."""
    for connection in kept:
        reader, writer = await asyncio.open_connection(sock=connection, limit=READ_SIZE)
        notifier.start(notifier.connected(reader, writer, kept=True))
    return await asyncio.start_server(notifier.connected, sock=sock, limit=READ_SIZE)
