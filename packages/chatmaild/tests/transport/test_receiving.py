# SPDX-License-Identifier: MIT
"""/mxdeliv: real HTTP over a unix socket, as nginx speaks it, and a smtpd."""

import socket
import threading
import time

import pytest
from hypothesis import given, settings, HealthCheck
from hypothesis import strategies as st

from chatmaild.transport import receiving
from chatmaild.transport.limits import Limits

MESSAGE = b"From: <x@beta.example>\r\n\r\n..dots\r\nend\r\n"
TO = "X-MAIL-TO: bob@alpha.example"
FROM = "X-MAIL-FROM: x@beta.example"


@pytest.fixture
def start(loop, smtpd, tmp_path):
    """Start the server with *limits*; returns a function that posts and gives status and text."""

    def begin(limits=None, max_size=100_000, address=None):
        server = receiving.Server(max_size, limits, address or smtpd.address)
        path = tmp_path / "mxdeliv.socket"
        loop.serve(server.connected, path)
        return Door(path)

    return begin


class Door:
    def __init__(self, path):
        self.path = path

    def connect(self):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(10)
        connection.connect(str(self.path))
        return connection

    def say(self, octets, connection=None):
        with connection or self.connect() as connection:
            try:
                connection.sendall(octets)
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            return answer(connection)

    def post(self, *headers, body=MESSAGE, method="POST", client="192.0.2.7", path="/mxdeliv"):
        lines = [
            f"{method} {path} HTTP/1.1",
            "Host: alpha.example",
            f"X-Real-IP: {client}",
            *headers,
        ]
        lines.append(f"Content-Length: {len(body)}")
        return self.say("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)


def answer(connection):
    data = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, text = data.partition(b"\r\n\r\n")
    return (int(head.split()[1]), text.decode()) if data else None


def test_a_message_is_handed_over_as_it_came(start, smtpd):
    assert start().post(FROM, TO, "X-MAIL-TO: Carol@Alpha.Example") == (200, "250 OK")
    assert smtpd.messages == [MESSAGE]
    assert smtpd.commands[:6] == [
        "PROXY TCP4 192.0.2.7 127.0.0.1 443 25",
        "EHLO [127.0.0.1]",
        f"MAIL FROM:<x@beta.example> SIZE={len(MESSAGE)}",
        "RCPT TO:<bob@alpha.example>",
        "RCPT TO:<carol@alpha.example>",
        "DATA",
    ]


@pytest.mark.parametrize("headers", [(TO,), (TO, "X-MAIL-FROM:")])
def test_without_a_sender_it_is_the_null_sender(start, smtpd, headers):
    assert start().post(*headers)[0] == 200
    assert f"MAIL FROM:<> SIZE={len(MESSAGE)}" in smtpd.commands


@pytest.mark.parametrize(
    ("client", "line"),
    [
        ("2001:db8::1", "PROXY TCP6 2001:db8::1 ::1 443 25"),
        ("::ffff:192.0.2.1", "PROXY TCP4 192.0.2.1 127.0.0.1 443 25"),
    ],
)
def test_postfix_is_told_who_the_peer_is(start, smtpd, client, line):
    assert start().post(TO, client=client)[0] == 200
    assert smtpd.commands[0] == line


def test_a_chunked_body_and_a_path_below(start, smtpd):
    head = f"POST /mxdeliv/x?y HTTP/1.1\r\nHost: a\r\nX-Real-IP: 192.0.2.7\r\n{TO}\r\n"
    body = b"Transfer-Encoding: chunked\r\n\r\n5\r\nA: b\r\r\n9\r\n\n\r\nbody\r\n\r\n0\r\n\r\n"
    assert start().say(head.encode() + body) == (200, "250 OK")
    assert smtpd.messages == [b"A: b\r\n\r\nbody\r\n"]


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"])
def test_other_methods_are_405(start, method):
    status, text = start().post(TO, method=method)
    assert status == 405 and text == ("" if method == "HEAD" else "Method Not Allowed")


@pytest.mark.parametrize(
    ("where", "reply", "expected"),
    [
        ("RCPT", "550 5.1.1 <b@a>: unknown recipient", (400, "550 5.1.1 <b@a>: unknown recipient")),
        (
            ".",
            "523 Encryption Needed: Invalid Unencrypted Mail",
            (400, "523 Encryption Needed: Invalid Unencrypted Mail"),
        ),
        (
            ".",
            "554 5.7.1 No valid DKIM signature found",
            (400, "554 5.7.1 No valid DKIM signature found"),
        ),
        (".", "451 4.7.5 later", (400, "451 4.7.5 later")),
        ("MAIL", "552 5.3.4 too big", (413, "552 Message exceeds maximum size")),
        ("connect", "421 4.3.2 down", (400, "421 4.3.2 down")),
        ("DATA", "250 what", (503, "451 4.3.0 Temporary failure")),
        (".", "nonsense", (503, "451 4.3.0 Temporary failure")),
    ],
)
def test_what_postfix_says_is_the_answer(start, smtpd, where, reply, expected):
    smtpd.replies[where] = reply
    assert start().post(FROM, TO) == expected


def test_without_postfix_it_is_503(start):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        nobody = listening.getsockname()
    assert start(address=nobody).post(TO) == (503, "451 4.3.0 Temporary failure")


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ((), "554"),
        (("X-MAIL-TO: ",), "501"),
        (("X-MAIL-TO: bob",), "501"),
        (("X-MAIL-TO: <bob@alpha.example>",), "501"),
        (("X-MAIL-TO: bob@alpha.example>\tSIZE=1",), "501"),
        (("X-MAIL-TO: bob@alpha.example, carol@alpha.example",), "501"),
        (("X-MAIL-TO: b\xf6b@alpha.example",), "501"),
        (("X-MAIL-TO: " + "b" * 300 + "@alpha.example",), "501"),
        ((TO, "X-MAIL-FROM: x"), "501"),
        ((TO, FROM, FROM), "501"),
        ((TO,) * 1001, "452"),
    ],
)
def test_addresses_must_be_plain_ones(start, smtpd, headers, code):
    status, text = start().post(*headers)
    assert status == 400 and text.startswith(code) or status == 431
    assert smtpd.commands == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"A: b\r\n\r\nno end",
        b"A: b\n\nbare\n",
        b"A: b\r\n\r\nx\r\n.\r\nMAIL FROM:<>\r\n",
        b".\r\n",
        b"A: b\r\n\r\nx\n.\r\ny\r\n",
        b"A: b\r\n\r\nx\r\n.\ny\r\n",
        b"A: b\r\rc\r\n",
    ],
)
def test_data_with_two_ends_is_refused_and_nothing_is_queued(start, smtpd, body):
    assert start().post(TO, body=body) == (400, "500 Invalid DATA")
    assert smtpd.cut.wait(10) and smtpd.messages == []
    assert not any(command.startswith("MAIL") for command in smtpd.commands[3:])


@given(
    st.lists(st.sampled_from([b"a", b".", b"\r", b"\n", b"\r\n", b"\r\n.\r\n"]), max_size=12).map(
        b"".join
    )
)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None
)
def test_no_body_becomes_two_messages_or_another_one(start, smtpd, body):
    if not hasattr(smtpd, "door"):
        smtpd.door = start(Limits(burst=100_000))
    smtpd.messages.clear()
    smtpd.commands.clear()
    status, _ = smtpd.door.post(TO, body=body)
    assert smtpd.messages == ([body] if status == 200 else [])
    # (the QUIT of the one before may come late)
    verbs = [command.split(" ")[0] for command in smtpd.commands]
    assert [verb for verb in verbs if verb != "QUIT"] == ["PROXY", "EHLO", "MAIL", "RCPT", "DATA"]


def test_what_is_too_large_is_413_announced_or_not(start, smtpd):
    door = start(max_size=1000)
    expected = (413, "552 Message exceeds maximum size")
    assert door.post(TO, body=b"x" * 2000 + b"\r\n") == expected
    assert smtpd.commands == []
    head = f"POST /mxdeliv HTTP/1.1\r\nHost: a\r\nX-Real-IP: 192.0.2.7\r\n{TO}\r\n"
    chunk = b"3e8\r\n" + b"x" * 1000 + b"\r\n"
    assert (
        door.say(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 2 + b"0\r\n\r\n")
        == expected
    )
    assert smtpd.messages == []
    assert door.post(TO, body=b"x" * 998 + b"\r\n")[0] == 200


def test_a_peer_that_goes_away_leaves_nothing_behind(start, smtpd):
    with start().connect() as connection:
        connection.sendall(
            f"POST /mxdeliv HTTP/1.1\r\nHost: a\r\nX-Real-IP: 192.0.2.7\r\n{TO}\r\n"
            "Content-Length: 100\r\n\r\nA: b\r\n".encode()
        )
        deadline = time.monotonic() + 10
        while "DATA" not in smtpd.commands and time.monotonic() < deadline:
            threading.Event().wait(0.01)
    assert smtpd.cut.wait(10) and smtpd.messages == []


@pytest.mark.parametrize(
    "octets",
    [
        b"\0\0\0\0\r\n\r\n",
        b"POST /mxdeliv HTTP/1.1\r\n\r\n",
        b"POST /mxdeliv HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        b"POST /mxdeliv HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST /mxdeliv HTTP/1.1\r\nHost: a\r\nX-MAIL-TO: a@b\r\n RCPT TO:<c@d>\r\nbad header\r\n\r\n",
        b"POST /mxdeliv HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 40_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused(start, smtpd, octets):
    status, _ = start().say(octets)
    assert 400 <= status < 600 and smtpd.commands == []


def test_another_path_is_not_ours(start, smtpd):
    assert start().post(TO, path="/mxdelivery")[0] == 404
    assert smtpd.commands == []


def test_a_request_that_nginx_did_not_sign_is_refused(start, smtpd):
    assert start().post(TO, client="somebody")[0] == 503
    assert smtpd.commands == []


def test_limits_answer_429_and_only_the_peer_that_exceeds_them(start, smtpd):
    door = start(Limits(per_minute=60, burst=2))
    codes = [door.post(TO)[0] for _ in range(3)]
    assert codes == [200, 200, 429]
    assert door.post(TO, client="192.0.2.8")[0] == 200
    assert door.post(TO) == (429, "450 4.7.1 Too much mail")


def test_requests_at_a_time(start, smtpd):
    smtpd.hold = threading.Event()
    door = start(Limits(per_peer=2))
    results = []
    threads = [threading.Thread(target=lambda: results.append(door.post(TO)[0])) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while len(smtpd.messages) < 2 and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert door.post(TO)[0] == 429
    smtpd.hold.set()
    for thread in threads:
        thread.join(10)
    assert results == [200, 200] and door.post(TO)[0] == 200


def test_a_silent_peer_is_not_waited_for(start, smtpd, monkeypatch):
    monkeypatch.setattr(receiving, "STALL_SECONDS", 0.2)
    door = start()
    with door.connect() as connection:
        connection.sendall(b"POST /mxdeliv HTTP/1.1\r\nHost: a\r\nX-Real-IP: 192.0.2.7\r\n")
        assert answer(connection) is None
    with door.connect() as connection:
        connection.sendall(
            f"POST /mxdeliv HTTP/1.1\r\nHost: a\r\nX-Real-IP: 192.0.2.7\r\n{TO}\r\n"
            "Content-Length: 100\r\n\r\nA: b\r\n".encode()
        )
        assert answer(connection) is None
    assert smtpd.cut.wait(10)
