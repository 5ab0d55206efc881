# SPDX-License-Identifier: MIT
"""Every bound, exceeded: what it costs the relay, what the peer hears, that others go on."""

import itertools
import struct
import threading
import time

import pytest
from irohrelay_client import ALL, CURRENT, LEGACY, WEBSOCKET, Closed, Wire, masked

from chatmaild.irohrelay import __main__ as service
from chatmaild.irohrelay.websocket import MAX_MESSAGE

MEGABYTE = 1 << 20


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("kind", WEBSOCKET)
@pytest.mark.parametrize("length", [MAX_MESSAGE + 1, 1 << 62, (1 << 64) - 1])
def test_a_length_that_is_too_large_is_refused_before_the_octets_come(relay, kind, length):
    client = relay.client(kind)
    before = relay.memory
    client.sock.sendall(struct.pack(">BBQ", 0x82, 0xFF, length))
    assert client.receive_websocket() == (8, struct.pack(">H", 1009))
    assert client.wait_closed() == b""
    assert relay.memory - before < MEGABYTE


@pytest.mark.parametrize("length", [MAX_MESSAGE, 0xFFFFFFFF])
def test_the_same_for_the_old_framing(relay, length):
    client = relay.client("legacy")
    client.sock.sendall(struct.pack(">BI", 4, length))
    assert client.wait_closed() == b""


def test_fragments_do_not_add_up_to_more(relay):
    client = relay.client("iroh-relay-v2")
    client.sock.sendall(masked(0x02, b"\4" * 40000))
    client.sock.sendall(masked(0x80, b"x" * 40000)[:14])
    assert client.receive_websocket() == (8, struct.pack(">H", 1009))


@pytest.mark.parametrize(
    "octets",
    [
        b"\x82\x05hello",  # not masked
        masked(0xC2, b"\x09"),  # an extension's bit
        masked(0x81, b"text"),
        masked(0x80, b"of nothing"),
        masked(0x02, b"a") + masked(0x82, b"b"),
        masked(0x09, b"a ping in parts"),
        masked(0x89, b"x" * 126),
        masked(0x83, b"unknown opcode"),
        masked(0x82, b""),
    ],
)
def test_a_broken_framing_ends_the_connection(relay, octets):
    client = relay.client("iroh-relay-v1")
    client.sock.sendall(octets)
    assert client.receive_websocket() == (8, struct.pack(">H", 1002))
    assert client.wait_closed() == b""


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("payload", [b"", b"1234567", b"123456789"])
def test_a_malformed_frame_ends_the_connection(relay, kind, payload):
    client = relay.client(kind)
    client.send(12 if kind in LEGACY else 9, payload)
    client.wait_closed()
    client = relay.client(kind)
    client.send(4, payload)
    client.wait_closed()


@pytest.mark.parametrize(
    "said",
    [b"", b"GET /relay HTTP/1.1\r\n", b"GET /relay HTTP/1.1\r\nUpgrade: iroh derp http\r\n\r\n"],
)
def test_who_does_not_prove_a_key_in_time_is_disconnected(start_relay, said):
    relay = start_relay("service.SWEEP_SECONDS = 0.05; session.HANDSHAKE_SECONDS = 0.3")
    wire = relay.wire()
    wire.sock.sendall(said)
    begin = time.monotonic()
    wire.wait_closed()
    assert 0.2 < time.monotonic() - begin < 5
    relay.client("legacy")  # the time of one is not that of another


@pytest.mark.parametrize("kind", ALL)
def test_who_answers_no_ping_is_disconnected(start_relay, kind):
    relay = start_relay(
        "service.SWEEP_SECONDS = 0.05; session.PING_SECONDS = 0.1; session.PONG_SECONDS = 0.3"
    )
    client = relay.client(kind)
    number, payload = client.receive()
    client.send(number + 1, bytes(8))  # a pong, but not the one
    assert client.wait_closed() == b""
    assert payload != bytes(8)


@pytest.mark.parametrize("kind", ["legacy", "iroh-relay-v2"])
def test_a_slow_reader_costs_a_bounded_queue_and_the_sender_nothing(start_relay, kind):
    relay = start_relay("service.RATE = service.BURST = 1 << 30")
    slow, sender, other = relay.client(kind), relay.client(kind), relay.client(kind)
    sender.sync()
    before = relay.memory
    for _ in range(400):  # 24 MB
        sender.send_to(slow.key, b"x" * 60000)
    sender.sync()
    assert relay.memory - before < service.QUEUE + 3 * MEGABYTE
    sender.send_to(other.key, b"still here")
    assert other.receive_from(sender.key) == b"still here"
    # and what waits for the slow one is whole frames
    received = 0
    while True:
        assert slow.receive_from(sender.key) == b"x" * 60000
        received += 60000
        if received >= service.QUEUE:
            break
    assert received < 1 * MEGABYTE


def test_a_slow_reader_that_never_reads_is_disconnected(start_relay):
    relay = start_relay(
        "service.RATE = service.BURST = 1 << 30; service.SWEEP_SECONDS = 0.05\n"
        "session.PING_SECONDS = 0.3; session.PONG_SECONDS = 0.3"
    )
    slow, sender = relay.client("legacy"), relay.client("iroh-relay-v2")
    sender = relay.client("legacy")
    descriptors = relay.descriptors
    for _ in range(20):
        sender.send_to(slow.key, b"x" * 60000)
    wait_until(lambda: relay.descriptors < descriptors)


def test_who_sends_more_than_its_rate_waits_and_others_do_not(start_relay):
    relay = start_relay("service.RATE = 500_000; service.BURST = 100_000")
    flood, sender, receiver = (relay.client("iroh-relay-v2") for _ in range(3))
    finished = []

    def send():
        for _ in range(60):  # 600 kB
            flood.send_to(receiver.key, b"x" * 10000)
        flood.send(9, b"12345678")
        while flood.receive() != (10, b"12345678"):
            pass
        finished.append(time.monotonic())

    begin = time.monotonic()
    thread = threading.Thread(target=send)
    thread.start()
    sender.sync()
    sender.send_to(receiver.key, b"x")
    answered = time.monotonic() - begin
    thread.join(20)
    assert finished[0] - begin > 0.8  # (600 - 100) / 500
    assert answered < 0.5


# what begins, what is sent many times, what ends
SMALL = {
    "frames": (b"", masked(0x82, b"\x7f"), b""),
    "pings": (b"", masked(0x89, b""), b""),
    "pongs": (b"", masked(0x8A, b""), b""),
    "fragments": (masked(0x02, b"\x7f"), masked(0x00, b""), masked(0x80, b"")),
}


@pytest.mark.parametrize("kind, what", [("legacy", None), *itertools.product(CURRENT, SMALL)])
def test_small_frames_are_not_cheaper(start_relay, kind, what):
    first, small, last = SMALL.get(what, (b"", struct.pack(">BI", 6, 0), b""))
    relay = start_relay("service.RATE = 500_000; service.BURST = 100_000")
    client = relay.client(kind)
    begin = time.monotonic()
    client.sock.sendall(first + small * 2000 + last)  # 14 kB at most, counted as 522 kB
    client.sync()
    client.sync()
    assert time.monotonic() - begin > 0.7


def test_pings_that_nobody_reads_the_answers_of_cost_a_bounded_queue(start_relay):
    relay = start_relay("service.RATE = service.BURST = 1 << 30")
    client, other = relay.client("iroh-relay-v2"), relay.client("iroh-relay-v2")
    before = relay.memory
    octets = client.frame(9, b"12345678") * 1000 + masked(0x89, b"y" * 100) * 1000
    for _ in range(20):
        client.sock.sendall(octets)
    other.sync()
    assert relay.memory - before < service.QUEUE + 3 * MEGABYTE


def test_beyond_the_most_connections_one_is_told_so(start_relay):
    relay = start_relay("service.MAX_CONNECTIONS = 5")
    clients = [relay.client("legacy") for _ in range(5)]
    descriptors = relay.descriptors
    for _ in range(20):
        wire = relay.wire()
        assert wire.read_head()[0] == 503
        with pytest.raises(Closed):
            wire.read(1)
    assert relay.descriptors <= descriptors
    clients[0].sync()
    clients.pop().close()
    wait_until(lambda: relay.descriptors < descriptors)
    relay.client("iroh-relay-v1").sync()


def test_many_connections_leave_nothing_behind(start_relay):
    relay = start_relay()
    relay.client("iroh-relay-v2").sync()
    descriptors, memory = relay.descriptors, relay.memory
    for _ in range(5):
        many = [relay.client(kind) for kind in ALL * 10]
        for client in many:
            client.send_to(many[0].key, b"x" * 1000)
        for client in many:
            client.close()
        wait_until(lambda: relay.descriptors <= descriptors)
    assert relay.memory - memory < 3 * MEGABYTE


def test_as_many_as_it_takes_at_their_worst_cost_what_the_unit_allows(start_relay):
    relay = start_relay("service.RATE = service.BURST = 1 << 30")
    sender, *clients = [relay.client("legacy") for _ in range(service.MAX_CONNECTIONS)]
    for client in clients:  # none of them reads ...
        for _ in range(12):
            sender.send_to(client.key, b"x" * 30000)
    sender.sync()
    queued = relay.memory
    for client in clients:  # ... and each leaves the largest frame unfinished
        client.sock.sendall(client.frame(4, sender.key + b"x" * 65536)[:-1])
    wait_until(lambda: relay.memory - queued > 30 * MEGABYTE)
    sender.sync()
    assert 90 * MEGABYTE < relay.memory < 150 * MEGABYTE
    assert relay.wire().read_head()[0] == 503


def test_who_does_not_take_the_last_octets_is_disconnected(start_relay):
    relay = start_relay("service.RATE = service.BURST = 1 << 30; service.CLOSE_SECONDS = 0.3")
    client, sender = relay.client("legacy"), relay.client("legacy")
    for _ in range(20):
        sender.send_to(client.key, b"x" * 60000)
    sender.sync()
    descriptors = relay.descriptors
    client.send(4, b"malformed")
    wait_until(lambda: relay.descriptors < descriptors)


def test_without_descriptors_it_waits_and_goes_on(start_relay):
    relay = start_relay("import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))")
    clients = [relay.client("legacy")]
    waiting = [Wire(relay.service.connect("iroh-relay")) for _ in range(30)]
    wait_until(lambda: "Too many open files" in relay.service.log)
    clients[0].sync()
    for wire in waiting:
        wire.sock.close()
    relay.client("legacy").sync()
    assert relay.service.log.count("Too many open files") < 20


@pytest.mark.parametrize("kind", CURRENT)
def test_a_reset_in_the_middle_of_everything_hurts_nobody(relay, kind):
    other = relay.client(kind)
    for cut in range(0, 40, 7):
        client = relay.client(kind)
        client.sock.sendall(client.frame(4, other.key + b"\0abc")[:cut])
        client.sock.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SO_LINGER
        client.close()
    other.sync()
    assert relay.process.poll() is None and relay.service.log == ""
