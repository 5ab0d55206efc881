# SPDX-License-Identifier: MIT
"""Addresses by the million, and logins to some of them; runs on the relay itself beside idle.py.

usage: logins.py create DOMAIN PREFIX FIRST COUNT MODEL    mailboxes with the password of the address MODEL
       logins.py login DOMAIN PREFIX FIRST COUNT           log in and out, AT_A_TIME; prints the seconds
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from pathlib import Path

import idle  # type: ignore[import-not-found]

STORE = Path("/var/lib/chatmail/mail")
AT_A_TIME = 10
LENGTH = 9  # characters of a new address


def address(domain: str, prefix: str, number: int) -> str:
    """The one of a *number*."""
    return f"{prefix}{number:0{LENGTH - len(prefix)}d}@{domain}"


def create(domain: str, addresses: list[str], model: str) -> None:
    """Make the mailboxes, as their owner does: a login for each would take minutes."""
    file = STORE / domain / model / "password"
    password, owner = file.read_bytes(), file.stat()
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    os.umask(0o077)
    for name in addresses:
        place = f"{STORE}/{domain}/{name}"
        os.mkdir(place)
        with open(f"{place}/password", "wb") as new:
            new.write(password)


async def login(addresses: list[str]) -> float:
    """Log in and out by IMAP with TLS; how long all of them took."""
    context, gate = idle.tls(), asyncio.Semaphore(AT_A_TIME)

    async def one(name: str) -> None:
        async with gate:
            client = idle.Client(name)
            client.reader, client.writer = await asyncio.open_connection(
                "127.0.0.1", 993, ssl=context
            )
            await client.line()
            await client.command(f"LOGIN {name} {idle.PASSWORD}")
            await client.command("LOGOUT")
            client.writer.close()
            with contextlib.suppress(OSError):
                await client.writer.wait_closed()

    begin = time.perf_counter()
    await asyncio.gather(*map(one, addresses))
    return time.perf_counter() - begin


def main(what: str, domain: str, prefix: str, first: str, count: str, *model: str) -> None:
    """Do as the command line says."""
    numbers = range(int(first), int(first) + int(count))
    addresses = [address(domain, prefix, number) for number in numbers]
    if what == "create":
        create(domain, addresses, *model)
    else:
        print(asyncio.run(login(addresses)))


if __name__ == "__main__":
    main(*sys.argv[1:])
