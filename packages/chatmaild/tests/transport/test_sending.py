# SPDX-License-Identifier: MIT
"""From smtp(8) to a peer: a real SMTP client, a real web server with TLS."""

import smtplib
import socket
import ssl
import threading

import pytest
from transport_peers import TAKES, obliging, response

from chatmaild.transport import link, sending
from chatmaild.transport.peers import FORGET_SECONDS

MESSAGE = b"From: <a@alpha.example>\r\n\r\n.dots\r\nend\r\n"
STUFFED = MESSAGE.replace(b"\r\n.", b"\r\n..")


def send(port, to=("b@beta.example",), message=MESSAGE, sender="a@alpha.example"):
    """Code and text of the reply that decided."""
    with smtplib.SMTP("127.0.0.1", port, "alpha.example", timeout=20) as session:
        session.ehlo()
        session.mail(sender)
        for recipient in to:
            code, text = session.rcpt(recipient)
            if code != 250:
                return code, text.decode()
        code, text = session.data(message)
        return code, text.decode()


def refusing(status, text=b""):
    return lambda request, body: TAKES if request.method == b"GET" else response(status, text)


def test_the_first_message_goes_by_https(start_sender, start_peer):
    peer = start_peer()
    port, client = start_sender(peer)
    assert send(port, ["b@beta.example", "c@beta.example"]) == (250, "2.0.0 OK (HTTPS)")
    question, (method, headers, body) = peer.requests
    assert question[0] == "GET" and method == "POST" and body == STUFFED
    wanted = [
        "host: mx.beta.example",
        "x-mail-from: a@alpha.example",
        "x-mail-to: b@beta.example",
        "x-mail-to: c@beta.example",
        f"content-length: {len(STUFFED)}",
    ]
    assert [line for line in headers if line in wanted] == wanted
    assert peer.connections == 1 and client.peers.known == 1


def test_the_null_sender_has_no_field(start_sender, start_peer):
    peer = start_peer()
    assert send(start_sender(peer)[0], sender="")[0] == 250
    assert not [line for line in peer.requests[1][1] if "from" in line]


def test_large_messages_are_streamed(start_sender, start_peer):
    peer = start_peer()
    port, _ = start_sender(peer)
    message = b"From: a\r\n\r\n" + b"0123456789\r\n" * 500_000
    assert send(port, message=message)[0] == 250
    _, headers, body = peer.requests[1]
    assert body == message and "transfer-encoding: chunked" in headers


def test_a_connection_serves_many_messages_and_its_loss_is_not_noticed(start_sender, start_peer):
    peer = start_peer()
    port, _ = start_sender(peer)
    for _ in range(3):
        assert send(port)[0] == 250
    assert peer.connections == 1
    peer.close_connections()
    assert send(port)[0] == 250
    assert peer.connections == 2 and len(peer.requests) == 5


def test_a_peer_that_closes_after_each_answer(start_sender, start_peer):
    peer = start_peer(once=True)
    port, _ = start_sender(peer)
    assert [send(port)[0] for _ in range(3)] == [250, 250, 250]


@pytest.mark.parametrize("status", [200, 301, 404, 500])
def test_who_does_not_say_405_gets_smtp_and_is_left_alone_for_half_an_hour(
    start_sender, start_peer, status
):
    now = [1000.0]
    peer = start_peer(lambda request, body: response(status, b"x"))
    port, _ = start_sender(peer, clock=lambda: now[0])
    assert send(port) == (450, "4.4.1 not known to take HTTPS")
    assert send(port)[0] == 450 and len(peer.requests) == 1
    now[0] += FORGET_SECONDS
    peer.answer = obliging
    assert send(port)[0] == 250


def test_who_stops_taking_it_gets_smtp_at_once(start_sender, start_peer):
    peer = start_peer()
    port, client = start_sender(peer)
    assert send(port)[0] == 250
    peer.close()
    code, text = send(port)
    assert code == 451 and "not sent by HTTPS" in text and client.peers.known == 0
    assert send(port)[0] == 450


@pytest.mark.parametrize(
    ("status", "text", "stays"),
    [
        (400, b"554 5.7.1 No valid DKIM signature found", True),
        (400, b"550 5.1.1 <b@beta.example>: unknown recipient", True),
        (413, b"<html>", True),
        (429, b"450 4.7.1 Too much mail", True),
        (503, b"451 4.3.0 Temporary failure", True),
        (404, b"", False),
        (502, b"<html>", False),
        (301, b"", False),
        (204, b"", False),
    ],
)
def test_a_refused_message_goes_by_smtp_and_only_a_broken_peer_is_forgotten(
    start_sender, start_peer, status, text, stays
):
    port, client = start_sender(start_peer(refusing(status, text)))
    code, reply = send(port)
    assert code == 451 and "b@beta.example" not in reply
    assert client.peers.known == int(stays)


def test_an_answer_before_the_end_of_the_body(start_sender, start_peer):
    peer = start_peer()
    port, client = start_sender(peer)
    assert send(port)[0] == 250
    peer.early = True
    peer.answer = refusing(413, b"552 Message exceeds maximum size")
    peer.close_connections()
    code, _ = send(port, message=b"A: b\r\n\r\n" + b"0123456789\r\n" * 500_000)
    assert code == 451
    peer.early, peer.answer = False, obliging
    client.peers.learn("beta.example", True)
    assert send(port)[0] == 250


@pytest.mark.parametrize(
    ("options", "domain", "code"),
    [
        ({"trusted": False}, "beta.example", 450),
        ({"name": "other.example"}, "beta.example", 450),
        ({"trusted": False}, "_beta.example", 250),
        ({"newest": ssl.TLSVersion.TLSv1_1}, "_beta.example", 450),
        ({"newest": ssl.TLSVersion.TLSv1_2}, "beta.example", 250),
    ],
)
def test_certificates_are_verified_where_there_can_be_good_ones(
    start_sender, start_peer, options, domain, code
):
    port, _ = start_sender(start_peer(**options))
    assert send(port, [f"b@{domain}"])[0] == code


def test_a_slow_answer_to_the_question_holds_up_one_message_for_a_moment(
    start_sender, start_peer, monkeypatch
):
    monkeypatch.setattr(sending, "PROBE_PATIENCE", 0.2)
    go = threading.Event()

    def slow(request, body):
        if request.method == b"GET":
            go.wait(10)
        return obliging(request, body)

    port, client = start_sender(start_peer(slow))
    assert send(port)[0] == 450
    assert client.busy
    go.set()
    while client.busy:
        threading.Event().wait(0.01)
    assert send(port)[0] == 250


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"SSH-2.0\r\n\r\n", "no HTTP"),
        (None, "connection lost"),
        (b"HTTP/1.1 200 ok\r\nContent-Length: 10\r\n\r\n250", "connection lost|no HTTP"),
    ],
)
def test_what_is_no_answer(start_sender, start_peer, answer, why):
    peer = start_peer(
        lambda request, body: TAKES if request.method == b"GET" else answer, once=True
    )
    port, client = start_sender(peer)
    code, _ = send(port)
    assert code == 451 and client.peers.known == 0


def test_a_silent_peer_is_not_waited_for(start_sender, start_peer, monkeypatch):
    monkeypatch.setattr(link, "ANSWER_SECONDS", 0.2)
    stop = threading.Event()

    def silent(request, body):
        if request.method == b"GET":
            return TAKES
        stop.wait(10)

    port, client = start_sender(start_peer(silent))
    assert send(port)[0] == 451 and client.peers.known == 0
    stop.set()


def test_an_endless_answer_is_cut(start_sender, start_peer):
    body = b"250 OK" + b"x" * 1_000_000
    peer = start_peer(lambda r, b: TAKES if r.method == b"GET" else response(200, body))
    assert send(start_sender(peer)[0])[0] == 250


def test_no_host(start_sender, start_peer):
    assert send(start_sender(start_peer(), no="null MX")[0])[0] == 450


def test_a_dead_address_is_passed_over(start_sender, start_peer):
    port, _ = start_sender(start_peer(), addresses=("127.0.0.2", "127.0.0.1"))
    # the peer listens on 127.0.0.1 only
    assert send(port)[0] == 250


def raw(port, octets):
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.settimeout(10)
        connection.sendall(octets)
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


def test_commands_may_come_together(start_sender, start_peer):
    peer = start_peer()
    port, _ = start_sender(peer)
    transaction = (
        b"MAIL FROM:<a@alpha.example>\r\nRCPT TO:<b@beta.example>\r\nDATA\r\n" + STUFFED + b".\r\n"
    )
    said = raw(port, b"EHLO x\r\n" + transaction * 2 + b"QUIT\r\n")
    assert said.count("250 2.0.0 OK (HTTPS)") == 2 and said.endswith("221 2.0.0 bye\r\n")
    assert [body for _, _, body in peer.requests] == [b"", STUFFED, STUFFED]


@pytest.mark.parametrize(
    ("octets", "reply"),
    [
        (b"RCPT TO:<b@beta.example>\r\n", "503"),
        (b"DATA\r\n", "503"),
        (b"MAIL FROM:<a@alpha.example>\r\nDATA\r\n", "503"),
        (b"MAIL FROM:<a b>\r\n", "450"),
        (b"MAIL FROM:<>\r\nRCPT TO:<x>\r\n", "450"),
        (b"MAIL FROM:<>\r\nRCPT TO:<>\r\n", "450"),
        (b"MAIL FROM:<>\r\nRCPT TO:<b@beta.example>\r\nRCPT TO:<b@gamma.example>\r\n", "452"),
        (b'MAIL FROM:<>\r\nRCPT TO:<b@x"y.example>\r\n', "450"),
        (b"VRFY a\r\n", "502"),
        (b"x" * 5000, "421"),
        (b"NOOP\n", "421"),
    ],
)
def test_what_smtp_does_not_say_reaches_no_peer(start_sender, start_peer, octets, reply):
    peer = start_peer()
    port, _ = start_sender(peer)
    said = raw(port, b"EHLO x\r\n" + octets + (b"" if reply == "421" else b"QUIT\r\n"))
    assert f"\r\n{reply} " in said
    assert not [1 for method, _, _ in peer.requests if method == "POST"]


def test_a_message_that_is_cut_off_is_not_delivered(start_sender, start_peer):
    peer = start_peer()
    port, client = start_sender(peer)
    assert send(port)[0] == 250
    large = b"0123456789\r\n" * 50_000
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(
            b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@beta.example>\r\nDATA\r\n" + large
        )
        peer.got_request.clear()
        assert peer.got_request.wait(10)
    # the peer saw a request without an end; and is not blamed for it
    assert send(port)[0] == 250
    assert (
        client.peers.known == 1
        and [len(b) for m, _, b in peer.requests if m == "POST"] == [len(STUFFED)] * 2
    )


def test_a_stranger_may_not_hold_all_sessions(start_sender, start_peer, monkeypatch):
    monkeypatch.setattr(sending, "MAX_SESSIONS", 2)
    port, _ = start_sender(start_peer())
    with (
        socket.create_connection(("127.0.0.1", port)) as one,
        socket.create_connection(("127.0.0.1", port)) as two,
    ):
        assert one.recv(3) == two.recv(3) == b"220"
        with socket.create_connection(("127.0.0.1", port)) as three:
            assert three.recv(3) == b"421"
