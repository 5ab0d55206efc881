# SPDX-License-Identifier: MIT
"""An endpoint of iroh 1.x (PyPI's binding) that talks over a relay: for test_iroh.py.

iroh_endpoint.py URL              print the endpoint's id, echo what comes, end with standard input
iroh_endpoint.py URL ID SIZE...   send SIZE octets to the endpoint ID; print a line of JSON for each
"""

import asyncio
import json
import sys
import time

import iroh

ALPN = b"chatmail-relay/test"
LIMIT = 10_000_000
SECONDS = 20


async def endpoint(url: str) -> iroh.Endpoint:
    """An endpoint that knows no relay but *url*, and is connected to it."""
    options = iroh.EndpointOptions(
        preset=iroh.preset_minimal(),
        alpns=[ALPN],
        relay_mode=iroh.RelayMode.custom_from_urls([url]),
    )
    made = await iroh.Endpoint.bind(options)
    await asyncio.wait_for(made.online(), SECONDS)
    return made


async def echo(url: str) -> None:
    """Send back whatever comes until standard input ends."""
    server = await endpoint(url)
    print(server.id(), flush=True)

    async def serve() -> None:
        while True:
            incoming = await server.accept_next()
            connection = await (await incoming.accept()).connect()
            for _ in range(len(sys.argv) or 1):
                stream = await connection.accept_bi()
                data = await stream.recv().read_to_end(LIMIT)
                await stream.send().write_all(data)
                await stream.send().finish()

    task = asyncio.create_task(serve())
    await asyncio.to_thread(sys.stdin.read)
    task.cancel()


async def send(url: str, peer: str, sizes: list[int]) -> None:
    """Send, wait for the echo, say how long it took and which way it went."""
    begin = time.monotonic()
    client = await endpoint(url)
    address = iroh.EndpointAddr(iroh.EndpointId.from_string(peer), url, [])
    connection = await asyncio.wait_for(client.connect(address, ALPN), SECONDS)
    print(json.dumps({"connected": time.monotonic() - begin}), flush=True)
    for size in sizes:
        begin = time.monotonic()
        data = b"a" * size
        stream = await connection.open_bi()
        await stream.send().write_all(data)
        await stream.send().finish()
        back = await asyncio.wait_for(stream.recv().read_to_end(LIMIT), SECONDS)
        seconds = time.monotonic() - begin
        paths = [path.is_relay for path in connection.paths()]
        print(
            json.dumps(
                {"size": len(back), "same": back == data, "seconds": seconds, "relayed": paths}
            )
        )
    await client.close()


if len(sys.argv) == 2:
    asyncio.run(echo(sys.argv[1]))
else:
    asyncio.run(send(sys.argv[1], sys.argv[2], [int(size) for size in sys.argv[3:]]))
