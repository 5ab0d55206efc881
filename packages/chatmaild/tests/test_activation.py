# SPDX-License-Identifier: MIT
"""What a service gets from systemd, and what it gives it to keep."""

import os
import socket
import subprocess
import sys

import pytest

from chatmaild.activation import keep, notify

TAKE = """
import os, sys
from chatmaild.activation import ActivationError, listen_sockets
count = int(sys.argv[1])
passed = [os.dup(int(item)) for item in sys.argv[2:]]
for number, descriptor in enumerate(passed, 53):
    os.dup2(descriptor, number)
for number in range(len(passed)):
    os.dup2(53 + number, 3 + number)
try:
    sockets = listen_sockets("a", optional=("b",), kept="k")
    print({name: sockets[name].getsockname() for name in sockets})
except ActivationError as error:
    print(error)
"""


def take(*names):
    """What listen_sockets says to a process that is passed sockets of these names."""
    sockets = [socket.socket(socket.AF_UNIX) for _ in names]
    for number, item in enumerate(sockets):
        item.bind(f"\0chatmaild-test-{os.getpid()}-{number}")
    numbers = [item.fileno() for item in sockets]
    environment = {**os.environ, "LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)}
    environment.pop("LISTEN_PID", None)
    done = subprocess.run(
        [sys.executable, "-c", TAKE, str(len(names)), *map(str, numbers)],
        pass_fds=numbers,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    for item in sockets:
        item.close()
    return done.stdout


def test_sockets_come_by_name_and_kept_connections_are_counted():
    found = eval(take("b", "a", "k", "k"))
    assert list(found) == ["b", "a", "k 2", "k 3"]
    assert [name.decode()[-1] for name in found.values()] == ["0", "1", "2", "3"]
    assert list(eval(take("a"))) == ["a"]


@pytest.mark.parametrize("names", [(), ("b",), ("a", "a"), ("a", "x"), ("k",)])
def test_anything_else_is_refused(names):
    assert "expected the sockets a from systemd" in take(*names)


def test_a_connection_is_given_to_systemd(tmp_path, monkeypatch):
    path = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    here, there = socket.socketpair()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd, here, there:
        systemd.bind(path)
        keep(there.fileno(), "name")
        text, (descriptor,), _, _ = socket.recv_fds(systemd, 1000, 4)
        assert text == b"FDSTORE=1\nFDNAME=name"
        here.sendall(b"x")
        with socket.socket(fileno=descriptor) as kept:
            assert kept.recv(1) == b"x"
        notify("READY=1")
        assert socket.recv_fds(systemd, 1000, 4)[:2] == (b"READY=1", [])


def test_without_systemd_nothing_happens(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    keep(0, "name")
