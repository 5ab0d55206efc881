# SPDX-License-Identifier: MIT
"""Both directions of the service on real sockets: an event loop in a thread, peers and Postfix in others."""

import contextlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from transport_peers import Authority, EventLoop, FixedLocator, Peer, Smtpd  # noqa: E402

from chatmaild.transport import sending  # noqa: E402
from chatmaild.transport.link import Contexts  # noqa: E402
from chatmaild.transport.peers import Peers  # noqa: E402


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    """A certificate authority, and a certificate for mx.beta.example."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def loop():
    running = EventLoop()
    yield running
    running.close()


@pytest.fixture
def smtpd():
    running = Smtpd()
    yield running
    running.close()


@pytest.fixture
def start_peer(authority):
    """Start a relay of the domain beta.example; arguments are Peer's."""
    started = []

    def start(*args, **kw):
        started.append(Peer(authority, *args, **kw))
        return started[-1]

    yield start
    for peer in started:
        with contextlib.suppress(OSError):
            peer.close()


@pytest.fixture
def start_sender(loop, authority):
    """The SMTP side of sending: its port; mail for any domain goes to *peer*."""
    clients = []

    def start(peer, clock=None, **names):
        peers = Peers(clock=clock) if clock else Peers()
        contexts = Contexts(str(authority.ca_path))
        client = sending.Client(FixedLocator(**names), contexts, peers, peer.port)
        clients.append(client)
        server = sending.Server(client, "alpha.example")
        port = loop.serve(server.connected)
        return port, client

    yield start
    for client in clients:
        loop.run(_closed(client))


async def _closed(client):
    client.close()
