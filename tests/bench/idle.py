# SPDX-License-Identifier: MIT
"""Idling IMAP clients, and deliveries timed as wanted; runs on the relay itself, prints JSON.

usage: idle.py latency|race|hold [options]; only Python's own library, because a relay has no other.

A client logs in over TLS on port 993, selects its inbox and idles. A message is delivered to Dovecot's LMTP
socket, as Postfix does; its notification is the untagged EXISTS with the number of messages that makes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import ssl
import statistics
import sys
import time
from pathlib import Path

LMTP_SOCKET = "/var/spool/postfix/private/dovecot-lmtp"
LMTP_CONNECTIONS = 24  # Dovecot takes 64
REPLY_SECONDS = 60  # for any answer that must come
# An EXISTS that has not come by then is lost: a hibernated session would never hear of it, an awake one when
# Dovecot looks at the folders by itself, after 30 seconds. On a busy machine one may be seconds late.
LOST_SECONDS = 25
LATE_SECONDS = 3  # counted, and no loss
PROGRESS = 5000  # notifications
PASSWORD = "a-password-of-22-chars"
BODY = b"y" * 500


def tls() -> ssl.SSLContext:
    """A context that takes the relay's self-signed certificate."""
    made = ssl.create_default_context()
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    return made


class Deliveries:
    """A few LMTP connections that all clients share."""

    def __init__(self, domain: str) -> None:
        self.sender = f"bench@{domain}"
        self._free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
            asyncio.Queue()
        )

    async def open(self, count: int) -> None:
        """Connect *count* times."""
        for _ in range(count):
            reader, writer = await asyncio.open_unix_connection(LMTP_SOCKET)
            await self._reply(reader, b"220")
            writer.write(b"LHLO bench\r\n")
            await self._reply(reader, b"250")
            self._free.put_nowait((reader, writer))

    async def deliver(self, recipient: str) -> float:
        """Deliver one message; the perf_counter() at which Dovecot said that it has it."""
        reader, writer = await self._free.get()
        try:
            for line, code in (
                (f"MAIL FROM:<{self.sender}>", b"250"),
                (f"RCPT TO:<{recipient}>", b"250"),
                ("DATA", b"354"),
            ):
                writer.write(line.encode() + b"\r\n")
                await self._reply(reader, code)
            head = f"From: <{self.sender}>\r\nTo: <{recipient}>\r\nSubject: [...]\r\n"
            writer.write(head.encode() + b"\r\n" + BODY + b"\r\n.\r\n")
            await self._reply(reader, b"250")
            return time.perf_counter()
        finally:
            self._free.put_nowait((reader, writer))

    @staticmethod
    async def _reply(reader: asyncio.StreamReader, code: bytes) -> None:
        while True:
            line = await asyncio.wait_for(reader.readline(), REPLY_SECONDS)
            if line[:3] != code:
                raise RuntimeError(f"LMTP: {line!r} in place of {code!r}")
            if line[3:4] != b"-":
                return


class Client:
    """One IMAP session that idles."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.messages = 0

    async def login(self, context: ssl.SSLContext, host: str) -> None:
        """Log in, select the inbox, idle."""
        self.reader, self.writer = await asyncio.open_connection(host, 993, ssl=context)
        await self.line()
        await self.command(f"LOGIN {self.address} {PASSWORD}")
        await self.command("SELECT INBOX")
        self.writer.write(b"i IDLE\r\n")
        while not (await self.line()).startswith(b"+"):
            pass

    async def command(self, text: str) -> None:
        """Say something, and wait until it is answered with OK."""
        self.writer.write(b"a " + text.encode() + b"\r\n")
        while True:
            line = await self.line()
            if line.startswith(b"a "):
                if not line.startswith(b"a OK"):
                    raise RuntimeError(f"{self.address}: {line!r}")
                return

    async def line(self) -> bytes:
        """The next line; notes how many messages there are."""
        line = await asyncio.wait_for(self.reader.readline(), REPLY_SECONDS)
        if not line:
            raise RuntimeError(f"{self.address}: the server has ended the session")
        self._note(line)
        return line

    def _note(self, line: bytes) -> None:
        words = line.split()
        if len(words) == 3 and words[2] == b"EXISTS":
            self.messages = int(words[1])

    async def told(self, messages: int, seconds: float) -> float | None:
        """Wait until there are so many *messages*; the perf_counter() of that, or None."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.messages < messages:
                    line = await self.reader.readline()
                    if not line:
                        raise RuntimeError(f"{self.address}: the server has ended the session")
                    self._note(line)
                return time.perf_counter()
        return None


async def sessions(args: argparse.Namespace, addresses: list[str]) -> list[Client]:
    """Log clients in, a few at a time."""
    context, gate = tls(), asyncio.Semaphore(args.at_a_time)

    async def one(address: str) -> Client:
        async with gate:
            client = Client(address)
            await client.login(context, args.host)
            return client

    return list(await asyncio.gather(*map(one, addresses)))


def addresses(args: argparse.Namespace) -> list[str]:
    """One address a client, or one for all of them; nine letters, as new ones must have."""
    return [
        f"{args.prefix}{0 if args.one_user else n:05d}@{args.domain}" for n in range(args.clients)
    ]


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and the like, in milliseconds."""
    if not seconds:
        return {}
    ordered = sorted(1000 * value for value in seconds)
    return {
        "median ms": round(statistics.median(ordered), 2),
        "p95 ms": round(ordered[int(len(ordered) * 0.95)], 2),
        "max ms": round(ordered[-1], 2),
    }


async def latency(args: argparse.Namespace) -> dict[str, object]:
    """Rounds of one message to every client in turn; the time from the reply of LMTP to EXISTS."""
    deliveries = Deliveries(args.domain)
    await deliveries.open(1)
    clients = await sessions(args, addresses(args))
    waited, lost = [], 0
    for _ in range(args.rounds):
        for client in clients[:1] if args.one_user else clients:
            group = clients if args.one_user else [client]
            wanted = [(each, each.messages + 1) for each in group]
            told = [asyncio.create_task(each.told(n, args.lost_after)) for each, n in wanted]
            stored = await deliveries.deliver(client.address)
            for moment in await asyncio.gather(*told):
                if moment is None:
                    lost += 1
                else:
                    waited.append(max(moment - stored, 0))
        await asyncio.sleep(args.pause)
    return {"notifications": len(waited) + lost, "lost": lost, **spread(waited)}


async def race(args: argparse.Namespace) -> dict[str, object]:
    """Deliver between args.after and args.until seconds after a client has heard of the message before."""
    deliveries = Deliveries(args.domain)
    await deliveries.open(LMTP_CONNECTIONS)
    clients = await sessions(args, addresses(args))
    waited: list[float] = []
    lost: list[float] = []
    begin = time.perf_counter()

    async def one(client: Client, choose: random.Random) -> None:
        heard = time.perf_counter() + choose.uniform(0, 1)
        for _ in range(args.rounds):
            delay = choose.uniform(args.after, args.until)
            await asyncio.sleep(max(heard + delay - time.perf_counter(), 0))
            told = asyncio.create_task(client.told(client.messages + 1, args.lost_after))
            stored = await deliveries.deliver(client.address)
            moment = await told
            if moment is None:
                lost.append(round(delay, 4))
                # as nobody was told, the session sleeps on: another message wakes it
                await deliveries.deliver(client.address)
                moment = await client.told(client.messages + 2, REPLY_SECONDS)
                if moment is None:
                    raise RuntimeError(f"{client.address} is not told any more")
            else:
                waited.append(max(moment - stored, 0))
            heard = moment
            if (len(waited) + len(lost)) % PROGRESS == 0:
                print(f"{len(waited)} told, {len(lost)} lost", file=sys.stderr, flush=True)

    await asyncio.gather(*(one(client, random.Random(n)) for n, client in enumerate(clients)))
    return {
        "notifications": len(waited) + len(lost),
        "lost": len(lost),
        "lost at": sorted(lost)[:10],
        f"later than {LATE_SECONDS} s": sum(seconds > LATE_SECONDS for seconds in waited),
        **spread(waited),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def memory() -> dict[str, float]:
    """Proportional set size in MiB of the front's and Dovecot's processes, by program."""
    found: dict[str, float] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            group = (folder / "cgroup").read_text()
            if "dovecot.service" not in group and "chatmail-front.service" not in group:
                continue
            name = (folder / "comm").read_text().strip()
            for line in (folder / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    found[name] = found.get(name, 0) + int(line.split()[1]) / 1024
        except OSError:
            continue  # it has ended meanwhile
    return {name: round(size, 1) for name, size in sorted(found.items(), key=lambda i: -i[1])}


def hibernated() -> int:
    """How many inotify instances imap-hibernate holds: one for each session."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "comm").read_text() == "imap-hibernate\n":
                links = (os.readlink(link) for link in (folder / "fd").iterdir())
                count += sum("inotify" in link for link in links)
    return count


async def hold(args: argparse.Namespace) -> dict[str, object]:
    """Keep sessions idle, and tell what they cost; then one message to a few of them."""
    if args.create:
        create(args)
    before = memory()
    begin = time.perf_counter()
    clients = await sessions(args, addresses(args))
    seconds = time.perf_counter() - begin
    result: dict[str, object] = {
        "sessions": len(clients),
        "logins a second": round(len(clients) / seconds, 1),
        "MiB before": round(sum(before.values()), 1),
        "MiB before, by program": before,
    }
    for wait in args.wait:
        # what the server says meanwhile must be read
        readers = [asyncio.create_task(client.told(1 << 60, wait)) for client in clients]
        await asyncio.gather(*readers)
        now = memory()
        grown = sum(now.values()) - sum(before.values())
        result[f"after {wait} s"] = {
            "hibernated": hibernated(),
            "KiB a session": round(grown * 1024 / len(clients), 1),
            "KiB a session, all processes": round(sum(now.values()) * 1024 / len(clients), 1),
            "MiB": now,
        }
    deliveries = Deliveries(args.domain)
    await deliveries.open(1)
    waited, lost = [], 0
    for client in random.Random(1).sample(clients, min(100, len(clients))):
        told = asyncio.create_task(client.told(client.messages + 1, 10))
        stored = await deliveries.deliver(client.address)
        moment = await told
        if moment is None:
            lost += 1
        else:
            waited.append(max(moment - stored, 0))
    result["one message to 100 of them"] = {"lost": lost, **spread(waited)}
    return result


def create(args: argparse.Namespace) -> None:
    """Make the mailboxes, with the password of one that exists: a login for each would take minutes."""
    folder = Path("/var/lib/chatmail/mail") / args.domain
    model = next(path for path in folder.glob("*/password") if path.stat().st_size)
    owner = model.stat()
    for address in addresses(args):
        place = folder / address
        if place.exists():
            continue
        place.mkdir(mode=0o700)
        (place / "password").write_bytes(model.read_bytes())
        (place / "password").chmod(owner.st_mode & 0o777)
        for path in (place, place / "password"):
            os.chown(path, owner.st_uid, owner.st_gid)


def main() -> None:
    """Do as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["latency", "race", "hold"])
    parser.add_argument("--domain", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument(
        "--prefix", default="idle", help="four letters that the addresses begin with"
    )
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--one-user", action="store_true", help="all clients are one user's")
    parser.add_argument("--at-a-time", type=int, default=10, help="logins")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0, help="seconds between rounds")
    parser.add_argument("--after", type=float, default=0.97, help="earliest delivery of a race")
    parser.add_argument("--until", type=float, default=1.03, help="latest delivery of a race")
    parser.add_argument("--lost-after", type=float, default=LOST_SECONDS)
    parser.add_argument(
        "--wait", type=float, nargs="*", default=[], help="looks at memory, seconds"
    )
    parser.add_argument("--create", action="store_true", help="make the mailboxes first")
    args = parser.parse_args()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    function = {"latency": latency, "race": race, "hold": hold}[args.what]
    json.dump(asyncio.run(function(args)), sys.stdout)
    print()


if __name__ == "__main__":
    main()
