# SPDX-License-Identifier: MIT
"""The TURN client of the self-test, and a server of a few lines: what it takes, and what it does not."""

import hashlib
import hmac
import ipaddress
import struct

import pytest
from chatmail_relay.selftest import stun
from hypothesis import given
from hypothesis import strategies as st

NAME, PASSWORD, REALM, NONCE = "1999999999", "secret", b"chat.example", b"nonce1"
V4, V6 = ("192.0.2.7", 50000), ("2001:db8::7", 50001)


def attribute(kind, value):
    return struct.pack("!HH", kind, len(value)) + value + bytes(-len(value) % 4)


def message(kind, transaction, *attributes, key=None):
    body = b"".join(attribute(*item) for item in attributes)
    if key is not None:
        head = stun.HEADER.pack(kind, len(body) + 24, stun.MAGIC, transaction) + body
        return head + attribute(stun.INTEGRITY, hmac.new(key, head, hashlib.sha1).digest())
    return stun.HEADER.pack(kind, len(body), stun.MAGIC, transaction) + body


def xored(address, transaction):
    host, port = address
    packed = ipaddress.ip_address(host).packed
    mask = struct.pack("!I", stun.MAGIC) + transaction
    hidden = bytes(a ^ b for a, b in zip(packed, mask, strict=False))
    family = 1 if len(packed) == 4 else 2
    return struct.pack("!BBH", 0, family, port ^ stun.MAGIC >> 16) + hidden


class Server:
    """Answers Allocate as RFC 8656 says; *relayed* is what it gives."""

    def __init__(self, password=PASSWORD, relayed=V4, stale=0):
        self.key = hashlib.md5(b":".join((NAME.encode(), REALM, password.encode()))).digest()
        self.relayed, self.stale, self.asked = relayed, stale, []

    def answer(self, request):
        kind, _length, _cookie, transaction = stun.HEADER.unpack_from(request)
        found = stun.attributes(request)
        self.asked.append(found)
        error = kind | stun.ERROR
        challenge = ((stun.REALM, REALM), (stun.NONCE, NONCE + b"%d" % self.stale))
        if stun.INTEGRITY not in found:
            return message(
                error, transaction, (stun.ERROR_CODE, b"\0\0\4\1Unauthorized"), *challenge
            )
        at, code = found[stun.INTEGRITY]
        if code != hmac.new(self.key, request[:at], hashlib.sha1).digest():
            return message(
                error, transaction, (stun.ERROR_CODE, b"\0\0\4\1Unauthorized"), *challenge
            )
        if self.stale:
            self.stale -= 1
            return message(error, transaction, (stun.ERROR_CODE, b"\0\0\4\x26Stale"), *challenge)
        place = xored(self.relayed, transaction)
        given_ = ((stun.XOR_RELAYED_ADDRESS, place), (stun.LIFETIME, b"\0\0\0\x3c"))
        return message(kind | stun.SUCCESS, transaction, *given_, key=self.key)


def run(client, server):
    request = client.request()
    while request is not None:
        request = client.receive(server.answer(request))
    return client.relayed


@pytest.mark.parametrize("place", [V4, V6])
def test_an_allocation_is_made_with_credentials_and_given_back(place):
    client, server = stun.Client(NAME, PASSWORD), Server(relayed=place)
    assert run(client, server) == place
    first, second = server.asked
    assert stun.USERNAME not in first and second[stun.USERNAME][1] == NAME.encode()
    assert second[stun.REQUESTED_TRANSPORT][1] == b"\x11\0\0\0"
    end = stun.attributes(client.release())
    assert end[stun.LIFETIME][1] == bytes(4) and stun.INTEGRITY in end


def test_a_stale_nonce_is_asked_anew():
    assert run(stun.Client(NAME, PASSWORD), Server(stale=2)) == V4


def test_a_server_that_finds_every_nonce_stale_is_given_up():
    with pytest.raises(stun.TurnError, match="438 Stale"):
        run(stun.Client(NAME, PASSWORD), Server(stale=99))


def test_a_wrong_password_is_refused():
    with pytest.raises(stun.TurnError, match="401 Unauthorized"):
        run(stun.Client(NAME, "other"), Server())


def test_a_server_that_asks_for_no_password_is_an_open_relay():
    client = stun.Client(NAME, PASSWORD)
    transaction = client.request()[8:20]
    place = (stun.XOR_RELAYED_ADDRESS, xored(V4, transaction))
    with pytest.raises(stun.TurnError, match="without a password"):
        client.receive(message(stun.ALLOCATE | stun.SUCCESS, transaction, place))
    assert client.relayed is None


def second_request(client):
    return client.receive(Server().answer(client.request()))


@pytest.mark.parametrize("key", [None, b"another key"])
def test_an_answer_of_somebody_without_the_password_is_no_success(key):
    client = stun.Client(NAME, PASSWORD)
    transaction = second_request(client)[8:20]
    place = (stun.XOR_RELAYED_ADDRESS, xored(V4, transaction))
    with pytest.raises(stun.TurnError, match="MESSAGE-INTEGRITY"):
        client.receive(message(stun.ALLOCATE | stun.SUCCESS, transaction, place, key=key))


def test_what_follows_the_integrity_does_not_count():
    client, server = stun.Client(NAME, PASSWORD), Server()
    transaction = second_request(client)[8:20]
    good = message(stun.ALLOCATE | stun.SUCCESS, transaction, key=server.key)
    late = attribute(stun.XOR_RELAYED_ADDRESS, xored(V4, transaction))
    forged = good[:2] + struct.pack("!H", len(good) - 20 + len(late)) + good[4:] + late
    with pytest.raises(stun.TurnError, match="no relayed address"):
        client.receive(forged)


def test_another_transaction_is_ignored():
    client = stun.Client(NAME, PASSWORD)
    client.request()
    answer = message(stun.ALLOCATE | stun.ERROR, bytes(12), (stun.ERROR_CODE, b"\0\0\4\1"))
    assert client.receive(answer) is None


@pytest.mark.parametrize("code", [b"", b"\0\0", b"\0\0\4\1"])
def test_a_malformed_error_is_an_error(code):
    client = stun.Client(NAME, PASSWORD)
    transaction = client.request()[8:20]
    with pytest.raises(stun.TurnError):
        client.receive(message(stun.ALLOCATE | stun.ERROR, transaction, (stun.ERROR_CODE, code)))


@given(st.binary(max_size=100), st.booleans(), st.sampled_from([0x103, 0x113]))
def test_any_bytes_end_in_nothing_or_an_error(rest, framed, kind):
    client = stun.Client(NAME, PASSWORD)
    transaction = second_request(client)[8:20]
    padded = rest[: len(rest) // 4 * 4]
    data = stun.HEADER.pack(kind, len(padded), stun.MAGIC, transaction) + padded if framed else rest
    try:
        assert client.receive(data) is None
    except stun.TurnError:
        pass
    assert client.relayed is None
