# SPDX-License-Identifier: MIT
"""What status says of sockets; units, ports and the rest are looked at on a booted relay."""

import socket

import pytest
from chatmail_relay import status, systemd


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
