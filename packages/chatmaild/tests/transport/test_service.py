# SPDX-License-Identifier: MIT
"""The process: its start and end, its numbers, and its memory while large messages pass."""

import re
import signal
import threading
import time

import pytest

from chatmaild.transport.limits import MAX_REQUESTS

MODULE = "chatmaild.transport.__main__"
SOCKETS = ["send", "mxdeliv", "metrics"]
HEAD = b"POST /mxdeliv HTTP/1.1\r\nHost: a\r\nX-Real-IP: 192.0.2.7\r\nX-MAIL-TO: b@chat.example\r\n"


@pytest.fixture
def start(start_service, smtpd):
    def begin(patch=""):
        own = f"service.receiving.Server.__init__.__defaults__ = (None, {smtpd.address!r})\n"
        return start_service(MODULE, SOCKETS, "", own + patch)

    return begin


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def memory(service):
    """Resident octets, and the most there were."""
    status = open(f"/proc/{service.process.pid}/status").read()
    return [1024 * int(re.search(rf"{key}:\s+(\d+)", status)[1]) for key in ("VmRSS", "VmHWM")]


def test_both_directions_answer_and_are_counted(start, smtpd):
    service = start()
    body = b"A: b\r\n\r\nc\r\n"
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    assert service.ask("mxdeliv", request).endswith(b"250 OK")
    said = service.ask("send", b"EHLO x\r\nQUIT\r\n").decode()
    assert said.startswith("220 chat.example ") and said.endswith("221 2.0.0 bye\r\n")
    numbers = service.ask("metrics", b"").decode()
    assert 'chatmail_https_received_total{result="accepted"} 1' in numbers
    assert "chatmail_https_peers 0" in numbers and numbers.endswith("# EOF\n")
    assert "@" not in service.log and "192.0.2.7" not in service.log


def test_it_ends_when_nobody_wants_anything(start):
    service = start("service.IDLE_SECONDS = 0.3; service.TICK_SECONDS = 0.05")
    with service.connect("send") as connection:
        assert connection.recv(3) == b"220"
        threading.Event().wait(0.6)  # longer than it waits for somebody
        assert service.process.poll() is None
    assert service.process.wait(10) == 0


def test_a_message_under_way_is_finished_first(start, smtpd):
    service = start()
    smtpd.hold = threading.Event()
    with service.connect("mxdeliv") as connection:
        connection.sendall(HEAD + b"Content-Length: 6\r\n\r\nA: b\r\n")
        wait_for(lambda: smtpd.messages)
        service.process.send_signal(signal.SIGTERM)
        smtpd.hold.set()
        assert connection.makefile("rb").read().endswith(b"250 OK")
    assert service.process.wait(10) == 0


def test_a_large_message_is_not_held_in_memory(start, smtpd):
    service = start()
    service.ask("mxdeliv", HEAD + b"Content-Length: 6\r\n\r\nA: b\r\n")
    before, _ = memory(service)
    size, line = 30 << 20, b"x" * 1022 + b"\r\n"
    with service.connect("mxdeliv") as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % size)
        for _ in range(size // (64 << 10)):
            connection.sendall(line * 64)
        assert connection.makefile("rb").read().endswith(b"250 OK")
    assert len(smtpd.messages[-1]) == size
    _, most = memory(service)
    assert most - before < 8 << 20


def test_as_many_messages_as_there_may_be_stay_small(start, smtpd):
    service = start()
    service.ask("mxdeliv", HEAD + b"Content-Length: 6\r\n\r\nA: b\r\n")
    before, _ = memory(service)
    size, line, results = 1 << 20, b"x" * 1022 + b"\r\n", []

    def post(client):
        with service.connect("mxdeliv") as connection:
            head = HEAD.replace(b"192.0.2.7", b"192.0.2.%d" % client)
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % size)
            ready.wait(30)
            connection.sendall(line * 1024)
            results.append(connection.makefile("rb").read())

    ready = threading.Barrier(MAX_REQUESTS)
    threads = [threading.Thread(target=post, args=(n % 4,)) for n in range(MAX_REQUESTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [answer.endswith(b"250 OK") for answer in results] == [True] * MAX_REQUESTS
    _, most = memory(service)
    assert most - before < 32 << 20


def test_settings_that_cannot_be_read_are_a_configuration_error(start_service):
    service = start_service(MODULE, SOCKETS, "nonsense = 1")
    assert service.process.wait(10) == 78 and "nonsense" in service.log
