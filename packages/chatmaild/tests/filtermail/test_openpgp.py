# SPDX-License-Identifier: MIT
"""Packet framing: only session keys and then one SEIPD, whatever the lengths look like."""

import time

import pytest

from chatmaild.filtermail import openpgp
from chatmaild.filtermail.openpgp import MAX_SESSION_KEYS, MAX_SMALL_PARTIALS, PacketWalk
from filtermail_samples import (
    LITERAL,
    PKESK,
    SEIPD,
    SKESK,
    encrypted,
    length,
    noise,
    old_packet,
    packet,
    partial_packet,
)

KEY = packet(PKESK, noise(90))


def walk(data, chunk=None, old_format=False):
    packets = PacketWalk(old_format)
    chunk = chunk or max(1, len(data))
    for at in range(0, len(data), chunk):
        if not packets.feed(data[at : at + chunk]):
            return False
    return packets.end()


ACCEPTED = {
    "one session key": KEY + packet(SEIPD, noise(50)),
    "password only": packet(SKESK, noise(40)) + packet(SEIPD, noise(50)),
    "both kinds": KEY + packet(SKESK, noise(40)) + KEY + packet(SEIPD, noise(300)),
    "two-octet length": KEY + packet(SEIPD, noise(5000)),
    "five-octet length": KEY + packet(SEIPD, noise(9000)),
    "long form of a short length": KEY + b"\xd2\xff" + (7).to_bytes(4, "big") + noise(7),
    "partial lengths": KEY + partial_packet(SEIPD, noise(5000)),
    "partial lengths, last one empty": KEY + partial_packet(SEIPD, noise(1024)),
    "big partial lengths": KEY + partial_packet(SEIPD, noise(100_000), power=14),
    "a small partial length later": KEY + b"\xd2\xe9" + noise(512) + b"\xe2" + noise(4) + b"\0",
    "any version": packet(PKESK, b"\x09" + noise(30)) + packet(SEIPD, b"\x07" + noise(30)),
    "as many keys as allowed": packet(PKESK, b"1") * MAX_SESSION_KEYS + packet(SEIPD, noise(9)),
}
REFUSED = {
    "nothing": b"",
    "no session key": packet(SEIPD, noise(50)),
    "session key only": KEY,
    "literal data": packet(LITERAL, b"t\0\0\0\0\0hello"),
    "literal after session key": KEY + packet(LITERAL, b"t\0\0\0\0\0hello"),
    "compressed": KEY + packet(8, noise(50)),
    "SED without integrity": KEY + packet(9, noise(50)),
    "AEAD draft packet": KEY + packet(20, noise(50)),
    "signature": packet(2, noise(50)) + KEY + packet(SEIPD, noise(50)),
    "marker": packet(10, b"PGP") + KEY + packet(SEIPD, noise(50)),
    "padding": KEY + packet(SEIPD, noise(50)) + packet(21, noise(5)),
    "reserved tag 0": packet(0) + KEY + packet(SEIPD, noise(50)),
    "two SEIPD": KEY + packet(SEIPD, noise(50)) + packet(SEIPD, noise(50)),
    "session key after SEIPD": KEY + packet(SEIPD, noise(50)) + KEY,
    "one octet too many": KEY + packet(SEIPD, noise(50)) + b"x",
    "one octet too few": (KEY + packet(SEIPD, noise(50)))[:-1],
    "tag without length": KEY + b"\xd2",
    "half a two-octet length": KEY + b"\xd2\xc0",
    "half a five-octet length": KEY + b"\xd2\xff\0\0",
    "partial length without an end": KEY + b"\xd2\xe9" + noise(512),
    "first partial length too small": KEY + b"\xd2\xe8" + noise(256) + b"\0",
    "partial length of a session key": b"\xc1\xe9" + noise(512) + b"\0" + packet(SEIPD, noise(50)),
    "more session keys than allowed": packet(PKESK) * (MAX_SESSION_KEYS + 1)
    + packet(SEIPD, noise(9)),
    "too many small partial lengths": KEY
    + b"\xd2\xe9"
    + noise(512)
    + b"\xe0x" * (MAX_SMALL_PARTIALS + 1)
    + b"\0",
    "plain text": b"Hello, this is not OpenPGP at all",
    "high bit clear": b"\x41" + KEY[1:] + packet(SEIPD, noise(50)),
    "length over the end": KEY + b"\xd2\xff\xff\xff\xff\xff" + noise(50),
}


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("chunk", [1, 2, 3, 100, None])
def test_encrypted_messages_are_accepted_in_any_pieces(name, chunk):
    assert walk(ACCEPTED[name], chunk)
    assert walk(ACCEPTED[name], chunk, old_format=True)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_anything_else_is_refused_in_any_pieces(name, chunk):
    assert not walk(REFUSED[name], chunk)
    assert not walk(REFUSED[name], chunk, old_format=True)


@pytest.mark.parametrize("chunk", [1, None])
def test_old_format_session_keys_are_accepted_only_where_asked_for(chunk):
    data = old_packet(PKESK, noise(268)) + old_packet(SKESK, noise(30)) + packet(SEIPD, noise(500))
    assert walk(data, chunk, old_format=True)
    assert not walk(data, chunk, old_format=False)


@pytest.mark.parametrize("length_type, octets", [(0, 1), (1, 2), (2, 4)])
def test_each_old_format_length_is_read(length_type, octets):
    old = bytes([0x84 | length_type]) + (60).to_bytes(octets, "big") + noise(60)
    assert walk(old + packet(SEIPD, noise(50)), old_format=True)
    assert walk(old + packet(SEIPD, noise(50)), chunk=1, old_format=True)


def test_an_old_format_indeterminate_length_is_refused():
    assert not walk(b"\x87" + noise(60) + packet(SEIPD, noise(50)), old_format=True)


def test_old_format_cannot_name_other_tags():
    for tag in (0, 2, 8, 9, 11):
        assert not walk(old_packet(tag, noise(9)) + packet(SEIPD, noise(9)), old_format=True)


def test_a_refused_walk_stays_refused():
    packets = PacketWalk()
    assert not packets.feed(b"hello")
    assert not packets.feed(encrypted())
    assert not packets.end()


@pytest.mark.parametrize(
    "bomb",
    [
        KEY + b"\xd2" + b"\xe0x" * 4_000_000,  # partial lengths of one octet
        KEY + b"\xd2\xe9" + noise(512) + b"\xe0x" * 4_000_000,
        b"\xc1\0" * 4_000_000,  # empty session keys
    ],
)
def test_bombs_of_tiny_packets_are_refused_before_they_cost_anything(bomb):
    started = time.process_time()
    assert not walk(bomb)
    assert time.process_time() - started < 0.5


def test_a_walk_that_allowed_literal_data_would_be_noticed(monkeypatch):
    """The tests above can fail: seed the defect they are there for."""
    hidden = KEY + packet(LITERAL, b"t\0\0\0\0\0hello")
    assert not walk(hidden)
    monkeypatch.setattr(openpgp, "SEIPD", LITERAL)
    assert walk(hidden)


def test_lengths_of_the_samples_are_what_they_claim():
    assert [len(length(size)) for size in (0, 191, 192, 8383, 8384)] == [1, 1, 2, 2, 5]
