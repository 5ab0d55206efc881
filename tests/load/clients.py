# SPDX-License-Identifier: MIT
"""Clients by the thousand, for the load tests; prints JSON. Only Python's own library, beside idle.py.

usage: clients.py create|storm|smtp|loris|flood|steady [options]

Runs on the relay itself, or at the lab's client. On the relay clients have addresses 10.78.0.N, which the
tests give to lo: some limits are for one address, and Postfix has none for those of loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import random
import resource
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import idle

ENCRYPTED = base64.b64encode(bytes([0xC1, 3]) + b"abc" + bytes([0xD2, 40]) + bytes(40)).decode()
# Seconds between two tries to connect, more or less: who has failed waits longer. Less would measure
# how many TLS handshakes in vain keep Dovecot from starting.
PAUSE = 2
LOST_SECONDS = 30
SOURCES = "10.78.0"  # the first three numbers of the addresses of clients on the relay
TLS_PORTS = (465, 993, 443)
ALPN = {443: ["h2"]}
PORTS = (25, 465, 587, 143, 993, 443, 80)

#: What a slow client says, a byte at a time: nothing of it is ever complete.
SLOW = {
    80: b"GET / HTTP/1.1\r\nX-A: " + b"b" * 10000,
    443: b"GET / HTTP/1.1\r\nX-A: " + b"b" * 10000,
}


def message(sender: str, recipient: str) -> bytes:
    """PGP/MIME, as the filter wants it."""
    return (
        f"From: <{sender}>\r\nTo: <{recipient}>\r\nSubject: [...]\r\n"
        f"Message-ID: <{time.monotonic_ns()}.{random.random()}@load>\r\nMIME-Version: 1.0\r\n"
        'Content-Type: multipart/encrypted; protocol="application/pgp-encrypted"; boundary="b"\r\n'
        "\r\n--b\r\nContent-Type: application/pgp-encrypted\r\n\r\nVersion: 1\r\n\r\n"
        "--b\r\nContent-Type: application/octet-stream\r\n\r\n"
        f"-----BEGIN PGP MESSAGE-----\r\n\r\n{ENCRYPTED}\r\n-----END PGP MESSAGE-----\r\n\r\n--b--\r\n"
    ).encode()


class Refused(Exception):
    """The relay said no; the reply."""


class Smtp:
    """One SMTP session."""

    def __init__(self, host: str, port: int, source: str | None = None) -> None:
        self.host, self.port = host, port
        self.source = None if source is None else (source, 0)

    async def connect(self) -> None:
        """Connect, with TLS; says EHLO."""
        context = idle.tls() if self.port != 25 else None
        self.reader, self.writer = await asyncio.open_connection(
            self.host, self.port, ssl=context, local_addr=self.source
        )
        await self.reply(220)
        await self.say("EHLO [127.0.0.1]", 250)
        if self.port == 25:
            await self.say("STARTTLS", 220)
            await self.writer.start_tls(idle.tls())
            await self.say("EHLO [127.0.0.1]", 250)

    async def login(self, address: str) -> None:
        """AUTH PLAIN."""
        text = f"\0{address}\0{idle.PASSWORD}".encode()
        await self.say(f"AUTH PLAIN {base64.b64encode(text).decode()}", 235)

    async def send(self, sender: str, recipient: str, content: bytes) -> None:
        """One message."""
        await self.say(f"MAIL FROM:<{sender}>", 250)
        await self.say(f"RCPT TO:<{recipient}>", 250)
        await self.say("DATA", 354)
        self.writer.write(content + b".\r\n")
        await self.reply(250)

    async def say(self, line: str, code: int) -> None:
        """A command, and the reply that it must get; raises Refused."""
        self.writer.write(line.encode() + b"\r\n")
        await self.reply(code)

    async def reply(self, code: int) -> None:
        """A reply; raises Refused if it is another one."""
        while True:
            line = await asyncio.wait_for(self.reader.readline(), idle.REPLY_SECONDS)
            if line[:3] != str(code).encode():
                raise Refused(line.decode(errors="replace").strip() or "end of the session")
            if line[3:4] != b"-":
                return

    def close(self) -> None:
        """Without a word."""
        with contextlib.suppress(AttributeError):
            self.writer.close()


def source(number: int, each: int) -> str:
    """The loopback address of a client when *each* address has so many."""
    return f"{SOURCES}.{1 + number // each}"


async def create(args: argparse.Namespace) -> dict[str, object]:
    """Mailboxes for all clients."""
    idle.create(args)
    return {"mailboxes": args.clients}


async def storm(args: argparse.Namespace) -> dict[str, object]:
    """All idle, Dovecot restarts, all come back at once; how long until the last one idles again."""
    idle.create(args)
    clients = await idle.sessions(args, idle.addresses(args))
    context = idle.tls()
    refused: list[str] = []
    tries = 0
    took: list[float] = []

    async def come_back(client: idle.Client) -> None:
        nonlocal tries
        with contextlib.suppress(OSError):
            while await client.reader.readline():
                pass
        client.writer.close()
        while True:
            tries += 1
            try:
                await client.login(context, args.host)
            except RuntimeError as error:
                # a server that has gone, or is not there yet, refuses nobody; a reply does
                if "ended the session" not in str(error):
                    refused.append(str(error))
            except (TimeoutError, OSError):
                pass
            else:
                took.append(time.perf_counter() - begin)
                return
            client.writer.close()
            await asyncio.sleep(PAUSE * random.uniform(0.5, 1.5))

    tasks = [asyncio.create_task(come_back(client)) for client in clients]
    while args.asleep and idle.hibernated() < len(clients):
        await asyncio.sleep(1)
    begin = time.perf_counter()
    restart = await asyncio.create_subprocess_exec("systemctl", "restart", "dovecot")
    await restart.wait()
    down = time.perf_counter() - begin
    await asyncio.wait_for(asyncio.gather(*tasks), 300)
    return {
        "sessions": len(took),
        "restart s": round(down, 2),
        "first s": round(min(took), 2),
        "half s": round(sorted(took)[len(took) // 2], 2),
        "last s": round(max(took), 2),
        "tries": tries,
        "refused": len(refused),
        "replies": Counter(text.partition(": ")[2] for text in refused).most_common(3),
    }


def smtpd_memory() -> tuple[int, float]:
    """smtpd processes, and their PSS in KiB."""
    script = (
        "for p in $(pgrep -x smtpd); do sed -n 's/^Pss: *\\([0-9]*\\).*/\\1/p' "
        "/proc/$p/smaps_rollup; done 2>/dev/null"
    )
    sizes = subprocess.run(["sh", "-c", script], capture_output=True, text=True).stdout.split()
    return len(sizes), sum(map(int, sizes))


async def smtp(args: argparse.Namespace) -> dict[str, object]:
    """args.clients sessions logged in at the same time, then a message from each."""
    idle.create(args)
    addresses = idle.addresses(args)
    sessions = [Smtp(args.host, 465, source(n, args.each)) for n in range(args.clients)]
    gate = asyncio.Semaphore(args.at_a_time)
    errors: list[str] = []

    async def guarded(what: Awaitable[None]) -> None:
        async with gate:
            try:
                await what
            except (TimeoutError, Refused, OSError) as error:
                errors.append(f"{type(error).__name__}: {error}")

    async def enter(session: Smtp, address: str) -> None:
        await session.connect()
        await session.login(address)

    begin = time.perf_counter()
    pairs = list(zip(sessions, addresses, strict=True))
    await asyncio.gather(*(guarded(enter(session, address)) for session, address in pairs))
    connected = time.perf_counter()
    count, size = smtpd_memory()
    sending = time.perf_counter()
    await asyncio.gather(*(guarded(s.send(a, a, message(a, a))) for s, a in pairs if not errors))
    done = time.perf_counter()
    for session in sessions:
        session.close()
    return {
        "sessions": args.clients,
        "logins a second": round(args.clients / (connected - begin), 1),
        "smtpd processes": count,
        "KiB a smtpd": round(size / max(count, 1)),
        "messages a second": round(args.clients / (done - sending), 1),
        "errors": len(errors),
        "replies": Counter(errors).most_common(3),
    }


async def ordinary(args: argparse.Namespace, address: str) -> dict[str, float]:
    """What one user does, with its seconds: send a message, log in and read it, look at the web site."""
    seconds = {}
    client = idle.Client(address)
    begin = time.perf_counter()
    await client.login(idle.tls(), args.host)
    seconds["IMAP login"] = time.perf_counter() - begin
    begin = time.perf_counter()
    session = Smtp(args.host, 465)
    await session.connect()
    await session.login(address)
    wanted = client.messages + 1
    await session.send(address, address, message(address, address))
    seconds["submission"] = time.perf_counter() - begin
    if await client.told(wanted, LOST_SECONDS) is None:
        raise RuntimeError(f"{address}: a message was lost")
    seconds["to EXISTS"] = time.perf_counter() - begin
    session.close()
    client.writer.close()
    for port in args.web:
        begin = time.perf_counter()
        context = idle.tls() if port == 443 else None
        reader, writer = await asyncio.open_connection(args.host, port, ssl=context)
        writer.write(f"GET / HTTP/1.1\r\nHost: {args.domain}\r\nConnection: close\r\n\r\n".encode())
        line = await asyncio.wait_for(reader.readline(), idle.REPLY_SECONDS)
        if line.split()[1:2] not in ([b"200"], [b"301"]):
            raise RuntimeError(f"port {port}: {line!r}")
        writer.close()
        seconds[f"web {port}"] = time.perf_counter() - begin
    begin = time.perf_counter()
    incoming = Smtp(args.host, 25)
    await incoming.connect()
    incoming.close()
    seconds["EHLO on 25"] = time.perf_counter() - begin
    return seconds


async def loris(args: argparse.Namespace) -> dict[str, object]:
    """args.clients slow connections on every port, each from *each* to an address; ordinary use meanwhile."""
    args.web = [80, 443]
    address = idle.addresses(args)[0]
    idle.create(args)
    open_now: Counter[int] = Counter()
    most: Counter[int] = Counter()
    stop = asyncio.Event()

    async def slow(port: int, number: int) -> None:
        """Connect, say a byte a second, and come again when that ends."""
        while not stop.is_set():
            writer = None
            with contextlib.suppress(OSError, asyncio.TimeoutError, ssl.SSLError):
                context = idle.tls() if port in TLS_PORTS else None
                async with asyncio.timeout(60):
                    reader, writer = await asyncio.open_connection(
                        args.host, port, ssl=context, local_addr=(source(number, args.each), 0)
                    )
                open_now[port] += 1
                most[port] = max(most[port], open_now[port])
                try:
                    text = SLOW.get(port, b"a" * 10000)
                    closed = asyncio.create_task(reader.read())
                    for byte in text:
                        writer.write(bytes([byte]))
                        if (await asyncio.wait([closed], timeout=1))[0] or stop.is_set():
                            break
                    closed.cancel()
                finally:
                    open_now[port] -= 1
            if writer is not None:
                writer.close()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stop.wait(), 1)

    async def rounds(count: int) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for _ in range(count):
            for what, seconds in (await ordinary(args, address)).items():
                found.setdefault(what, []).append(seconds)
        return found

    await rounds(2)  # everything is there
    quiet = await rounds(args.rounds)
    tasks = [asyncio.create_task(slow(p, n)) for p in PORTS for n in range(args.clients)]
    await asyncio.sleep(args.settle)
    busy = await rounds(args.rounds)
    held = dict(open_now)
    stop.set()
    await asyncio.wait(tasks, timeout=10)
    return {
        "slow connections held": held,
        "most": dict(most),
        "quiet": {what: idle.spread(seconds) for what, seconds in quiet.items()},
        "meanwhile": {what: idle.spread(seconds) for what, seconds in busy.items()},
    }


async def flood(args: argparse.Namespace) -> dict[str, object]:
    """Submissions timed in turn without and with a flood of junk on 25, several times."""
    idle.create(args)
    address = idle.addresses(args)[0]
    refused: Counter[str] = Counter()
    stop = asyncio.Event()

    async def junk(number: int) -> None:
        """Cleartext for somebody who exists, and mail for somebody who does not, again and again."""
        while not stop.is_set():
            session = Smtp(args.host, 25, source(number, args.each) if args.each else None)
            try:
                await session.connect()
                for _ in range(5):
                    text = b"From: <a@junk.example>\r\nSubject: win\r\n\r\n" + b"money\r\n" * 300
                    await session.send("a@junk.example", address, text)
            except Refused as error:
                refused[str(error)[:40]] += 1
            except (TimeoutError, OSError, ssl.SSLError) as error:
                refused[type(error).__name__] += 1
            session.close()

    async def submissions() -> list[float]:
        found = []
        for _ in range(args.rounds):
            begin = time.perf_counter()
            session = Smtp(args.host, 465)
            await session.connect()
            await session.login(address)
            await session.send(address, address, message(address, address))
            found.append(time.perf_counter() - begin)
            session.close()
            await asyncio.sleep(args.pause)
        return found

    await submissions()
    quiet: list[float] = []
    busy: list[float] = []
    for _ in range(args.turns):
        quiet += await submissions()
        stop.clear()
        tasks = [asyncio.create_task(junk(n)) for n in range(args.clients)]
        await asyncio.sleep(args.settle)
        busy += await submissions()
        stop.set()
        await asyncio.gather(*tasks)
    return {
        "quiet": idle.spread(quiet),
        "flood": idle.spread(busy),
        "submissions": len(quiet),
        "junk": refused.most_common(4),
    }


async def steady(args: argparse.Namespace) -> dict[str, object]:
    """Idle sessions, and args.rate messages a second to them for args.seconds, by a few senders."""
    clients = await idle.sessions(args, idle.addresses(args))
    readers = [asyncio.create_task(client.told(1 << 60, args.nap)) for client in clients]
    await asyncio.gather(*readers)
    print("hibernated", file=sys.stderr, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    waited: list[float] = []
    errors: list[str] = []
    lost = 0
    busy: set[int] = set()
    due: asyncio.Queue[float] = asyncio.Queue()

    async def sender(number: int) -> None:
        nonlocal lost
        address, session, sent = clients[number].address, None, 0
        while True:
            moment = await due.get()
            if moment < 0:
                if session is not None:
                    session.close()
                return
            which = random.choice(
                [n for n in random.sample(range(len(clients)), 50) if n not in busy]
            )
            busy.add(which)
            client = clients[which]
            try:
                if session is None:
                    session, sent = Smtp(args.host, 465), 0
                    await session.connect()
                    await session.login(address)
                wanted = client.messages + 1
                told = asyncio.create_task(client.told(wanted, LOST_SECONDS))
                await session.send(address, client.address, message(address, client.address))
                sent += 1
                arrived(told, which, time.perf_counter())
            except (TimeoutError, Refused, OSError) as error:
                errors.append(f"{type(error).__name__}: {error}")
                busy.discard(which)
                session = None
            if session is not None and sent >= args.each:
                session.close()
                session = None

    arrivals: set[asyncio.Task[float | None]] = set()

    def arrived(told: asyncio.Task[float | None], which: int, accepted: float) -> None:
        def note(task: asyncio.Task[float | None]) -> None:
            nonlocal lost
            arrivals.discard(task)
            busy.discard(which)
            moment = None if task.cancelled() else task.result()
            if moment is None:
                lost += 1
            else:
                waited.append(max(moment - accepted, 0))

        arrivals.add(told)
        told.add_done_callback(note)

    senders = [asyncio.create_task(sender(n)) for n in range(args.senders)]
    begin = time.perf_counter()
    behind = 0.0
    for number in range(int(args.rate * args.seconds)):
        moment = begin + number / args.rate
        await asyncio.sleep(max(moment - time.perf_counter(), 0))
        behind = max(behind, due.qsize() / args.rate)
        due.put_nowait(moment)
    for _ in senders:
        due.put_nowait(-1)
    await asyncio.gather(*senders)
    seconds = time.perf_counter() - begin
    while arrivals:
        await asyncio.wait(set(arrivals), timeout=LOST_SECONDS)
        await asyncio.sleep(0)
    return {
        "sessions": len(clients),
        "messages": len(waited),
        "a second": round(len(waited) / seconds, 1),
        "most that waited to be sent, s": round(behind, 1),
        "lost": lost,
        "errors": len(errors),
        "replies": Counter(errors).most_common(3),
        **idle.spread(waited),
    }


def main() -> None:
    """Do as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    functions: dict[str, Callable[[argparse.Namespace], Awaitable[dict[str, object]]]] = {
        function.__name__: function for function in (create, storm, smtp, loris, flood, steady)
    }
    parser.add_argument("what", choices=list(functions))
    parser.add_argument("--domain", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--prefix", default="load")
    parser.add_argument("--one-user", action="store_true")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--at-a-time", type=int, default=30, help="logins")
    parser.add_argument("--each", type=int, default=100, help="connections an address, or messages")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--pause", type=float, default=0.05)
    parser.add_argument("--settle", type=float, default=5, help="seconds")
    parser.add_argument("--rate", type=float, default=20, help="messages a second")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--senders", type=int, default=8)
    parser.add_argument("--asleep", action="store_true", help="a storm of who hibernates")
    parser.add_argument("--nap", type=float, default=90, help="seconds until all hibernate")
    args = parser.parse_args()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    json.dump(asyncio.run(functions[args.what](args)), sys.stdout)  # type: ignore[arg-type]
    print()


if __name__ == "__main__":
    main()
