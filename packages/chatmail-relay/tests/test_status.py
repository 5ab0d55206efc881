# SPDX-License-Identifier: MIT
"""What status says of sockets; units, ports and the rest are looked at on a booted relay."""

import socket

import pytest
from chatmail_relay import status, systemd
from chatmaild.config import explicit_values, read_settings
from chatmaild.sizing import MIB, Machine


@pytest.fixture
def shown(monkeypatch):
    """Lets systemd show one socket unit with these properties; returns its finding."""

    def show(**properties):
        state = {"ActiveState": "active", "UnitFileState": "enabled", **properties}
        monkeypatch.setattr(systemd, "properties", lambda names, *_: dict.fromkeys(names, state))
        return list(status._sockets({"toy.socket": "toy.service", "toy.timer": "toy.service"}))

    return show


def test_a_socket_that_listens_is_well(shown, tmp_path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        assert [item.well for item in shown(Listen=f"{tmp_path}/s (Stream)")] == [True]
    assert [item.well for item in shown(Listen="127.0.0.1:3905 (Stream)")] == [True]


def test_a_socket_whose_file_is_gone_is_not_well(shown, tmp_path):
    (finding,) = shown(Listen=f"{tmp_path}/gone (Stream)")
    assert not finding.well and "gone is gone" in finding.detail
    assert "systemctl restart toy.socket toy.service" in finding.remedy


@pytest.mark.parametrize(
    "state", [{"ActiveState": "failed"}, {"UnitFileState": "disabled"}, {"UnitFileState": "masked"}]
)
def test_a_socket_that_is_down_is_not_well(shown, state):
    (finding,) = shown(Listen="127.0.0.1:3905 (Stream)", **state)
    assert not finding.well and "toy.socket" in finding.remedy


@pytest.fixture
def capacity(monkeypatch):
    """The finding on a machine, with lines of the settings."""

    def find(machine, lines=""):
        text = f"[params]\nmail_domain = a.example\n{lines}"
        monkeypatch.setattr(Machine, "this", classmethod(lambda cls, root=None: machine))
        config = read_settings("test.ini", text)[0]
        return status.capacity(machine, config, explicit_values("test.ini", text))

    return find


@pytest.mark.parametrize(
    ("machine", "sessions", "by"),
    [
        (Machine(1024 * MIB, 2), 2000, "memory"),
        (Machine(24105 * MIB, 2), 10000, "cores"),
        (Machine(24105 * MIB, 16, files=20000), 28000, "open files"),
        (Machine(65000 * MIB, 16), 60000, "inotify instances"),
    ],
)
def test_the_capacity_names_what_limits_it(capacity, machine, sessions, by):
    found = capacity(machine)
    assert found.well and f"about {sessions} idle IMAP sessions, limited by {by};" in found.detail
    assert (found.data["imap_sessions"], found.data["limited_by"]) == (sessions, by)
    assert found.data["max_imap_connections"] == sessions


def test_a_setting_may_limit_the_capacity(capacity):
    found = capacity(Machine(1024 * MIB, 2), "max_imap_connections = 300")
    assert "about 300 idle IMAP sessions, limited by max_imap_connections;" in found.detail


def test_a_setting_above_the_capacity_is_named(capacity):
    found = capacity(Machine(1024 * MIB, 2), "max_imap_connections = 9000")
    assert "about 2093 idle IMAP sessions, limited by memory; " in found.detail
    assert "max_imap_connections allows 9000" in found.detail and found.well
