# SPDX-License-Identifier: MIT
"""Who is connected, and who has to hear of whom. No I/O, constant time for each datagram."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from chatmaild.irohrelay.dialects import Dialect, Frame

MAX_SAME_KEY = 4  # connections of one key; only the last one hears anything
MAX_REMEMBERED = 128  # keys a client sent to, that are told when it goes


class Client(Protocol):
    """A connection that proved its key."""

    key: bytes
    dialect: Dialect

    def send(self, kind: int, *parts: bytes) -> bool:
        """Send a frame; False if the client is too slow and the frame was thrown away."""

    def close(self) -> None:
        """End the connection."""


@dataclass
class _Entry:
    """All connections of one key, the active one last."""

    clients: list[Client] = field(default_factory=list)
    sent_to: dict[bytes, None] = field(default_factory=dict)  # in the order of the first time


class Hub:
    """The clients of all generations; each hears only its own."""

    def __init__(self) -> None:
        self._generations: dict[str, dict[bytes, _Entry]] = {}
        self.passed = 0  # frames of datagrams
        self.dropped = 0  # for nobody, or for somebody too slow

    def __len__(self) -> int:
        return sum(map(len, self._generations.values()))

    def join(self, client: Client) -> None:
        """A client proved its key: from now on it is the one that this key's datagrams go to."""
        entry = self._entries(client).setdefault(client.key, _Entry())
        if entry.clients:
            before = entry.clients[-1]
            if before.dialect.keeps_replaced:
                _tell(before, before.dialect.replaced(False))
            else:
                entry.clients.remove(before)
                before.close()
        entry.clients.append(client)
        if len(entry.clients) > MAX_SAME_KEY:
            entry.clients.pop(0).close()

    def leave(self, client: Client) -> None:
        """The connection has ended; nothing happens if the hub closed it itself."""
        entries = self._entries(client)
        entry = entries.get(client.key)
        if entry is None or client not in entry.clients:
            return
        was_active = entry.clients[-1] is client
        entry.clients.remove(client)
        if entry.clients:
            if was_active:
                _tell(entry.clients[-1], entry.clients[-1].dialect.replaced(True))
            return
        del entries[client.key]
        for key in entry.sent_to:
            if key in entries:
                peer = entries[key].clients[-1]
                _tell(peer, peer.dialect.gone(client.key))

    def forward(self, client: Client, destination: bytes, kind: int, contents: bytes) -> None:
        """Pass datagrams of *client* on to the one connected as *destination*, if there is one."""
        entries = self._entries(client)
        entry = entries.get(destination)
        if entry is None:
            self.dropped += 1
            _tell(client, client.dialect.unreachable(destination))
        elif entry.clients[-1].send(kind, client.key, contents):
            self.passed += 1
            self._remember(entries[client.key].sent_to, destination)
        else:
            self.dropped += 1

    def _entries(self, client: Client) -> dict[bytes, _Entry]:
        return self._generations.setdefault(client.dialect.generation, {})

    def _remember(self, sent_to: dict[bytes, None], destination: bytes) -> None:
        if destination not in sent_to:
            if len(sent_to) >= MAX_REMEMBERED:
                del sent_to[next(iter(sent_to))]
            sent_to[destination] = None


def _tell(client: Client, frame: Frame | None) -> None:
    if frame is not None:
        client.send(*frame)
