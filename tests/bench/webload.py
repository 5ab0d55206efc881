# SPDX-License-Identifier: MIT
"""POST /new at the socket of chatmail-doveauth, as nginx does; runs on the relay itself.

usage: webload.py REQUESTS; prints the seconds it took

Only Python's own library, because a relay has no other.
"""

from __future__ import annotations

import asyncio
import sys
import time

SOCKET = "/run/chatmail/doveauth/new.socket"
CONNECTIONS = 16
REQUEST = "POST /new HTTP/1.1\r\nHost: relay\r\nX-Real-IP: 192.0.2.{}\r\nContent-Length: 0\r\n\r\n"


async def ask(number: int, requests: int) -> None:
    """One connection, one request after the other."""
    reader, writer = await asyncio.open_unix_connection(SOCKET)
    request = REQUEST.format(number + 1).encode()
    for _ in range(requests):
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(head.decode())
        (length,) = (
            int(line.partition(b":")[2])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        )
        await reader.readexactly(length)
    writer.close()


async def main(requests: int) -> None:
    """All connections at the same time."""
    begin = time.perf_counter()
    shares = [requests // CONNECTIONS + (n < requests % CONNECTIONS) for n in range(CONNECTIONS)]
    await asyncio.gather(*(ask(number, share) for number, share in enumerate(shares)))
    print(time.perf_counter() - begin)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
