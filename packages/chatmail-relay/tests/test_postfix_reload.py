# SPDX-License-Identifier: MIT
"""The reload of postfix.service, without Postfix; tests/test_restarts.py has it with."""

import contextlib
import importlib.machinery
import importlib.util
import os
import socket
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "chatmail-postfix-conf/postfix-reload"
MASTER = 1


@pytest.fixture
def program(monkeypatch):
    """The program as a module, without pauses."""
    loader = importlib.machinery.SourceFileLoader("postfix_reload", str(PROGRAM))
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_loader("postfix_reload", loader)
    )
    monkeypatch.setitem(sys.modules, "postfix_reload", module)  # for its dataclass
    loader.exec_module(module)
    monkeypatch.setattr(module, "PAUSES", (0.0,) * 100)
    monkeypatch.setattr(module, "LEAVE_SECONDS", 0.01)
    monkeypatch.setattr(module, "START_SECONDS", 0.1)
    monkeypatch.setattr(module, "PAUSE", 0.001)
    return module


class Master:
    """A master(8) after a reload: starts a process for who connects, but takes *phantom* for a free one."""

    def __init__(self, program, monkeypatch, old, phantom):
        self.ended, self._phantom, self._waiting = [], phantom, False
        self._new = program.Server
        self.servers = [program.Server(begun, 100 + begun, "submissions", True) for begun in old]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0)
        monkeypatch.setattr(program, "servers", self._look)
        monkeypatch.setattr(program, "address", lambda _service: self._listener.getsockname())
        monkeypatch.setattr(program.os, "kill", self._end)

    def _look(self, master):
        assert master == MASTER
        with contextlib.suppress(BlockingIOError):
            self._listener.accept()
            self._waiting = True
        if self._waiting and self._phantom not in [server.pid for server in self.servers]:
            self.servers.append(self._new(999, 999, "submissions", False))
            self._waiting = False
        return self.servers

    def _end(self, pid, _signal):
        self.ended.append(pid)
        self.servers = [server for server in self.servers if server.pid != pid]


def test_who_is_forgotten_is_ended_the_youngest_first(program, monkeypatch, capsys):
    master = Master(program, monkeypatch, range(10), 107)
    program.wake(MASTER)
    assert master.ended == [109, 108, 107]
    assert [server.pid for server in master.servers] == [*range(100, 107), 999]
    assert "submissions: no new smtpd was started, so 3 of before" in capsys.readouterr().out


def test_where_all_is_well_nobody_is_ended(program, monkeypatch, capsys):
    master = Master(program, monkeypatch, range(10), None)
    program.wake(MASTER)
    assert master.ended == [] and len(master.servers) == 11
    assert capsys.readouterr().out == ""


def test_where_no_client_stayed_nobody_connects(program, monkeypatch):
    master = Master(program, monkeypatch, [], None)
    program.wake(MASTER)
    assert master.ended == [] and master.servers == []


@pytest.mark.parametrize(
    ("service", "where"),
    [
        ("submissions", ("127.0.0.1", 465)),
        ("smtp", ("127.0.0.1", 25)),
        ("2525", ("127.0.0.1", 2525)),
        ("127.0.0.1:10465", ("127.0.0.1", 10465)),
        ("[::1]:smtp", ("::1", 25)),
    ],
)
def test_addresses_of_services(program, service, where):
    assert program.address(service) == where


def test_a_service_nobody_knows_is_no_address(program):
    with pytest.raises(OSError):
        program.address("no-such-service")


def test_only_what_is_new_gets_a_time_of_before(program, tmp_path):
    new, old, now = tmp_path / "new", tmp_path / "old", time.time()
    for path in (new, old):
        path.touch()
    (tmp_path / "folder").mkdir()
    os.utime(old, (now - 1000, now - 1000))
    program.settle([str(tmp_path), str(tmp_path / "nowhere")])
    assert now - 10 < new.stat().st_mtime < now - 2
    assert old.stat().st_mtime == pytest.approx(now - 1000)


def test_only_processes_of_that_master_count(program):
    assert program.servers(os.getpid()) == []
