# SPDX-License-Identifier: MIT
"""What the relay does for well-behaved clients of each protocol, over its real socket."""

import struct
import time

import pytest
from irohrelay_client import ALL, CURRENT, LEGACY, WEBSOCKET, Closed, masked

from chatmaild.irohrelay import hub

PAIRS = [(a, b) for kinds in (LEGACY, CURRENT) for a in kinds for b in kinds]
STRANGER = bytes(range(32))


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_datagrams_pass_in_both_directions(relay, first, second):
    alice, bob = relay.client(first), relay.client(second)
    for size in (0, 1, 125, 1200, 60000):
        alice.send_to(bob.key, b"a" * size)
        assert bob.receive_from(alice.key) == b"a" * size
        bob.send_to(alice.key, b"b" * size)
        assert alice.receive_from(bob.key) == b"b" * size


def test_a_batch_keeps_its_segment_size_and_congestion_bits(relay):
    alice, bob = (relay.client(kind) for kind in CURRENT)
    alice.send(5, bob.key + b"\2" + struct.pack(">H", 3) + b"abcdef")
    assert bob.receive() == (7, alice.key + b"\2\0\3abcdef")


def test_the_largest_datagrams_pass_and_larger_ones_end_the_connection(relay):
    alice, bob = relay.client("legacy"), relay.client("legacy")
    alice.send_to(bob.key, b"x" * 65536)
    assert bob.receive_from(alice.key) == b"x" * 65536
    alice.send_to(bob.key, b"x" * 65537)
    assert alice.wait_closed() == b""
    alice, bob = relay.client("iroh-relay-v2"), relay.client("iroh-relay-v2")
    alice.send(4, bob.key + b"x" * (65536 - 32))
    assert bob.receive() == (6, alice.key + b"x" * (65536 - 32))
    alice.send(4, bob.key + b"x" * (65537 - 32))  # clients refuse to receive that
    assert alice.wait_closed() == b""
    assert bob.receive() == (8, alice.key)


def test_generations_do_not_hear_each_other(relay):
    old, new = relay.client("legacy"), relay.client("iroh-relay-v2")
    old.send_to(new.key, b"x")
    old.sync()
    new.sync()
    new.send_to(old.key, b"x")
    assert new.receive() == (8, old.key)
    old.sync()


def test_who_sends_to_nobody_is_told_in_the_new_protocol(relay):
    old, new = relay.client("legacy"), relay.client("iroh-relay-v1")
    old.send_to(STRANGER, b"x")
    old.sync()
    new.send_to(STRANGER, b"x")
    assert new.receive() == (8, STRANGER)


@pytest.mark.parametrize("kind", ALL)
def test_peers_hear_when_a_client_that_wrote_to_them_goes(relay, kind):
    alice, bob, carol = relay.client(kind), relay.client(kind), relay.client(kind)
    alice.send_to(bob.key, b"x")
    assert bob.receive_from(alice.key) == b"x"
    alice.close()
    assert bob.receive() == (8, alice.key)
    carol.sync()  # and nobody else does


def test_a_goodbye_is_for_the_last_peers_only(relay):
    alice = relay.client("iroh-relay-v2")
    peers = [relay.client("iroh-relay-v2") for _ in range(hub.MAX_REMEMBERED + 1)]
    for peer in peers:
        alice.send_to(peer.key, b"x")
        assert peer.receive_from(alice.key) == b"x"
    alice.close()
    for peer in peers[1:]:
        assert peer.receive() == (8, alice.key)
    peers[0].sync()


@pytest.mark.parametrize("kind", ALL)
def test_what_newer_clients_may_say_is_ignored(relay, kind):
    client = relay.client(kind)
    for number in (6, 7, 11, 14, 63, 200):
        client.send(number, b"?")
    client.sync()


@pytest.mark.parametrize("kind", LEGACY)
def test_a_key_that_connects_again_takes_over_and_the_old_connection_ends(relay, kind):
    first = relay.client(kind)
    second = relay.client(kind, first.secret)
    assert first.wait_closed() == b""
    second.send_to(second.key, b"me")
    assert second.receive_from(second.key) == b"me"


def test_a_key_that_connects_again_takes_over_until_it_goes(relay):
    first = relay.client("iroh-relay-v2")
    second = relay.client("iroh-relay-v1", first.secret)
    assert first.receive() == (13, b"\1")
    third = relay.client("iroh-relay-v2", first.secret)
    assert second.receive() == (11, b"this key is connected elsewhere as well")
    first.send_to(first.key, b"x")  # it may still send
    assert third.receive_from(first.key) == b"x"
    second.close()
    third.close()
    assert first.receive() == (13, b"\0")
    first.send_to(first.key, b"me")
    assert first.receive_from(first.key) == b"me"


def test_one_key_has_a_few_connections_only(relay):
    clients = [relay.client("iroh-relay-v2")]
    for _ in range(hub.MAX_SAME_KEY):
        clients.append(relay.client("iroh-relay-v2", clients[0].secret))
        assert clients[-2].receive() == (13, b"\1")
    assert clients[0].wait_closed() == b""
    clients[1].sync()


@pytest.mark.parametrize("kind", CURRENT)
def test_a_wrong_signature_is_denied_with_a_reason(relay, kind):
    client = relay.client(kind, prove=False)
    client.prove(damage=1)
    assert client.receive() == (3, b"\x0fwrong signature")
    assert client.wait_closed() == b""


@pytest.mark.parametrize("kind", LEGACY)
def test_a_wrong_signature_ends_an_old_connection(relay, kind):
    client = relay.client(kind, prove=False)
    client.prove(damage=1)
    assert client.wait_closed() == b""


@pytest.mark.parametrize("kind", ALL)
def test_datagrams_before_the_proof_end_the_connection(relay, kind):
    peer, client = relay.client(kind), relay.client(kind, prove=False)
    client.send_to(peer.key, b"x")
    client.wait_closed()
    peer.sync()


def test_another_version_of_the_old_protocol_is_refused(relay):
    client = relay.client("legacy", prove=False)
    message = b"\4"
    proof = "RELAY\U0001f511".encode() + client.key + client.secret.sign(message) + message
    client.send(2, proof)
    assert client.wait_closed() == b""


def test_the_best_common_version_is_chosen(relay):
    wire = relay.wire()
    status, fields = wire.request(
        Upgrade="WebSocket",
        Connection="upgrade",
        Sec_WebSocket_Version="13",
        Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZQ==",
        Sec_WebSocket_Protocol="other, iroh-relay-v1,iroh-relay-v2",
    )
    assert status == 101 and fields["sec-websocket-protocol"] == "iroh-relay-v2"


GOOD = {
    "Upgrade": "websocket",
    "Sec_WebSocket_Version": "13",
    "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"Upgrade": "h2c"},
        {**GOOD, "Sec_WebSocket_Version": "12"},
        {**GOOD, "Sec_WebSocket_Key": "short"},
        {**GOOD, "Sec_WebSocket_Key": "\xe4\xf6"},
        {**GOOD, "Sec_WebSocket_Protocol": "iroh-relay-v3"},
    ],
)
def test_what_is_not_asked_as_a_client_asks_is_refused(relay, fields):
    wire = relay.wire()
    status, answer = wire.request(**fields)
    assert status == 400 and answer["connection"] == "close"
    wire.read(int(answer["content-length"]))
    with pytest.raises(Closed):
        wire.read(1)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"POST /relay HTTP/1.1\r\nUpgrade: iroh derp http\r\n\r\n", 405),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /relay HTTP/1.1\r\nA: " + b"x" * 9000, 431),
    ],
)
def test_other_requests_are_refused(relay, request_, status):
    wire = relay.wire()
    wire.sock.sendall(request_)
    assert wire.read_head()[0] == status


def test_a_proof_sent_together_with_the_request_counts(relay):
    wire = relay.client("legacy", prove=False)
    proof = "RELAY\U0001f511".encode() + wire.key + wire.secret.sign(b"\3") + b"\3"
    early = relay.wire()
    early.sock.sendall(
        b"GET /relay HTTP/1.1\r\nUpgrade: iroh derp http\r\n\r\n"
        + wire.frame(2, proof)
        + wire.frame(12, b"12345678")
    )
    assert early.read_head()[0] == 101
    assert early.read(13) == b"\x0d\0\0\0\x0812345678"


@pytest.mark.parametrize("kind", WEBSOCKET)
def test_fragments_are_put_together_and_pings_answered(relay, kind):
    alice, bob = relay.client(kind), relay.client(kind)
    payload = b"\4" + bob.key + (b"" if kind in LEGACY else b"\0") + b"hello"
    alice.sock.sendall(
        masked(0x02, payload[:20])
        + masked(0x89, b"are you there?")
        + masked(0x00, payload[20:21])
        + masked(0x80, payload[21:])
    )
    assert bob.receive_from(alice.key) == b"hello"
    assert alice.receive_websocket() == (10, b"are you there?")


def test_a_close_is_answered(relay):
    client = relay.client("iroh-relay-v2")
    client.sock.sendall(masked(0x88, b"\x03\xe8bye") + masked(0x82, b"\x0912345678"))
    assert client.receive_websocket() == (8, b"\x03\xe8")
    assert client.wait_closed() == b""


@pytest.mark.parametrize("kind", ALL)
def test_the_relay_asks_and_the_answer_keeps_the_connection(start_relay, kind):
    relay = start_relay(
        "service.SWEEP_SECONDS = 0.05; session.PING_SECONDS = 0.1; session.PONG_SECONDS = 0.4"
    )
    client = relay.client(kind)
    pings = []
    begin = time.monotonic()
    while time.monotonic() - begin < 1:
        number, payload = client.receive()
        assert number == (12 if kind in LEGACY else 9)
        client.send(number + 1, payload)
        pings.append(payload)
    assert len(set(pings)) == len(pings) >= 4


def test_the_process_ends_when_nobody_needs_it_and_only_then(start_relay):
    relay = start_relay("service.SWEEP_SECONDS = 0.05; service.IDLE_SECONDS = 0.5")
    client = relay.client("legacy")
    begin = time.monotonic()
    while time.monotonic() - begin < 1:
        client.sync()
        time.sleep(0.05)
    client.close()
    assert relay.process.wait(5) == 0
    assert "2 connections" not in relay.service.log and "1 connections" in relay.service.log


def test_it_stops_at_once_when_it_is_told_to(start_relay):
    relay = start_relay()
    client = relay.client("iroh-relay-v2")
    relay.process.terminate()
    assert relay.process.wait(5) == 0
    assert client.wait_closed() == b""


def test_without_its_socket_it_does_not_start(start_service):
    service = start_service("chatmaild.irohrelay.__main__", ["other"])
    assert service.process.wait(10) == 1
    assert "iroh-relay" in service.log
