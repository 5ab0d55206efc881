# SPDX-License-Identifier: MIT
"""The bot with real keys, and a peer that writes what clients write."""

from __future__ import annotations

import io
from dataclasses import dataclass

import pytest
from chatmail_echobot import autocrypt, mime, openpgp, state
from chatmail_echobot.bot import Bot

BOT = "echo@chat.example"
ALICE = "alice1234@chat.example"


@dataclass(frozen=True)
class Peer:
    """Somebody with a key."""

    address: str
    key: bytes
    cert: bytes

    @classmethod
    def make(cls, address: str) -> Peer:
        key = openpgp.generate(f"<{address}>")
        return cls(address, key, openpgp.extract_cert(key))

    def encrypted(self, me, inner: bytes, *, outer: str = "", signer: bytes | None = None):
        """*inner* signed and encrypted for the bot, as a PGP/MIME file."""
        message = io.BytesIO()
        with openpgp.temporary() as plain:
            plain.write(inner)
            plain.seek(0)
            with openpgp.encrypt(plain, signer or self.key, me.cert) as armored:
                lines = [f"From: <{self.address}>", *filter(None, [outer]), "Subject: [...]"]
                mime.write_encrypted(message, lines, "b", armored)
        message.seek(0)
        return message

    def chat(self, *lines: str, body: bytes = b"", kind: str = "text/plain; charset=utf-8"):
        """A chat message of this peer, not yet encrypted; *lines* are further header fields."""
        head = [
            f'From: "Älice, <3" <{self.address}>',
            "Message-ID: <1@localhost>",
            "Chat-Version: 1.0",
            autocrypt.field(self.address, self.cert),
            *lines,
            f"Content-Type: {kind}",
        ]
        return "\r\n".join(head).encode() + b"\r\n\r\n" + body


@dataclass(frozen=True)
class Answer:
    """What the bot sent, decrypted, with its signature checked."""

    recipient: str
    outer: mime.Fields
    inner: mime.Fields
    parts: list[tuple[mime.Fields, bytes]]


class Outbox:
    """Takes what the bot sends to one peer."""

    def __init__(self, me: state.Identity, peer: Peer) -> None:
        self._me, self._peer = me, peer
        self.answers: list[Answer] = []

    def __call__(self, recipient, message):
        message.seek(0)
        outer = mime.read_fields(message)
        with openpgp.temporary() as armored:
            mime.copy_armor(message, armored)
            with openpgp.decrypt(armored, self._peer.key, self._me.cert) as plain:
                inner = mime.read_fields(plain)
                parts = [
                    (part.fields, b"".join(mime.decoded(plain, part)))
                    for part in mime.parts(plain, inner)
                ]
        self.answers.append(Answer(recipient, outer, inner, parts))


@pytest.fixture(scope="session")
def me(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    state.make(folder, BOT)
    return state.load(folder, BOT)


@pytest.fixture(scope="session")
def alice():
    return Peer.make(ALICE)


@pytest.fixture(scope="session")
def mallory():
    return Peer.make("mallory12@chat.example")


@pytest.fixture
def outbox(me, alice):
    return Outbox(me, alice)


@pytest.fixture
def bot(me, outbox):
    return Bot(me, outbox)
