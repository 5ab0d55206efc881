# SPDX-License-Identifier: MIT
"""Who listens where, for TCP and UDP, and which listeners stand in the way."""

import os
import socket
import subprocess
import sys
from ipaddress import ip_address
from types import SimpleNamespace

import pytest
from chatmail_relay import ports, status, systemd
from chatmail_relay.component import ComponentError, Listen, load_component
from chatmail_relay.ports import Listener, foreign_listeners, listeners

TOML = """
name = "toy"
order = 10
units = ["toy.service"]
[[listen]]
port = {port}
protocol = "{protocol}"
what = "toys"
"""


@pytest.mark.parametrize(
    ("protocol", "kind"), [("tcp", socket.SOCK_STREAM), ("udp", socket.SOCK_DGRAM)]
)
def test_a_listener_is_found_by_protocol_and_port(tmp_path, protocol, kind):
    path = tmp_path / "component.toml"
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        if protocol == "tcp":
            sock.listen()
        port = sock.getsockname()[1]
        found = listeners({(protocol, port)})
        assert [(item.port, str(item.address)) for item in found] == [
            ((protocol, port), "127.0.0.1")
        ]
        assert f"pid {os.getpid()}" in found[0].process
        other = "udp" if protocol == "tcp" else "tcp"
        assert listeners({(other, port)}) == []
        path.write_text(TOML.format(port=port, protocol=protocol))
        problems = foreign_listeners([load_component(path)])
        assert len(problems) == 1 and f"port {port} (toys) is in use by" in problems[0]
    assert listeners({(protocol, port)}) == []


@pytest.mark.parametrize(("kept", "problems"), [("1", 0), ("0", 1), (None, 1)])
def test_what_systemd_holds_for_the_unit_is_no_strangers(tmp_path, monkeypatch, kept, problems):
    """As it does for dovecot.service, between two starts or while it fails to start."""
    path = tmp_path / "component.toml"
    path.write_text(TOML.format(port=143, protocol="tcp"))
    listener = Listener(("tcp", 143), ip_address("0.0.0.0"), "", "systemd (pid 1)")
    monkeypatch.setattr(ports, "listeners", lambda ports: [listener])
    states = {"toy.service": {"NFileDescriptorStore": kept}} if kept else {}
    monkeypatch.setattr(systemd, "properties", lambda units, *names: states)
    assert len(foreign_listeners([load_component(path)])) == problems


def test_a_udp_socket_with_a_peer_is_no_listener():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.connect(("127.0.0.1", 9))
        assert listeners({("udp", sock.getsockname()[1])}) == []


def test_another_protocol_is_a_defect_of_the_component(tmp_path):
    path = tmp_path / "component.toml"
    path.write_text(TOML.format(port=1, protocol="sctp"))
    with pytest.raises(ComponentError, match="protocol = sctp: write tcp or udp"):
        load_component(path)


def test_a_unit_that_runs_a_replaced_program_is_outdated(tmp_path, monkeypatch):
    program = tmp_path / "program"
    program.write_bytes(open(os.path.realpath(sys.executable), "rb").read())
    program.chmod(0o755)
    environment = {**os.environ, "PYTHONHOME": sys.base_prefix}
    script = "print(flush=True); input()"
    with subprocess.Popen(
        [program, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as process:
        process.stdout.readline()
        states = {
            "toy.service": {"MainPID": str(process.pid)},
            "toy.socket": {"Triggers": "behind.service"},
            "behind.service": {"MainPID": str(process.pid)},
            "idle.socket": {"Triggers": "down.service"},
            "down.service": {"MainPID": "0"},
            "new.service": {},
            "toy.timer": {"Triggers": "nightly.service"},
        }

        def properties(units, *names):
            return {unit: states[unit] for unit in units}

        monkeypatch.setattr(systemd, "properties", properties)
        units = [unit for unit in states if unit != "behind.service"]
        assert systemd.outdated(units) == []
        program.rename(tmp_path / "old")
        (tmp_path / "old").unlink()
        assert systemd.outdated(units) == ["toy.service", "behind.service"]
        process.stdin.close()


def test_status_looks_at_the_address_that_is_ours(monkeypatch):
    ours = Listener(("tcp", 53), ip_address("127.0.0.1"), "unbound.service", "unbound")
    other = Listener(("tcp", 53), ip_address("127.0.0.53"), "systemd-resolved.service", "resolved")
    listen = Listen(53, "tcp", "127.0.0.1", "DNS for the relay", "unbound.service", False)
    component = SimpleNamespace(listen=[listen])
    for held, well in (([ours, other], True), ([other, ours], True), ([other], False)):
        monkeypatch.setattr(status, "listeners", lambda ports, held=held: held)
        assert [finding.well for finding in status._ports([component])] == [well]
