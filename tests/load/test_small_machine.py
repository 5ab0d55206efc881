# SPDX-License-Identifier: MIT
"""A relay in a container of 1 GB without swap: as many sessions as it says it bears, and steady mail."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench import idle
from conftest import HEALTHY_SECONDS, measured
from lab import Lab
from lab.host import Host
from lab.mail import Mail
from lab.memory import Bound
from lab.shell import wait_for
from load.conftest import hibernate_after

HERE = Path(__file__).parent
DOMAIN = "_small.example"
SIZE = 2**30  # bytes
SESSIONS = 2_000
RATE = 20  # messages a second
SECONDS = int(os.environ.get("CHATMAIL_LOAD_SECONDS", "600"))
NAP = 75  # seconds until sessions that hibernate after one minute have done so
LATE_MS = 1_000


@pytest.fixture
def small(lab: Lab) -> Iterator[Host]:
    """Installed, then booted with 1 GB of memory: what the installation wrote is not counted."""
    host = lab.host("small", 75, names=(DOMAIN,))
    host.install_relay(DOMAIN)
    hibernate_after(host, "1 min")
    host.power_off()
    host.memory_bound = Bound(host._state, host.name, SIZE)
    host.start()
    host.memory_bound.tell(host)
    settings = (
        *("max_load_1m=1000", "max_new_addresses_per_hour=100000"),
        *("max_user_send_per_minute=100000", "max_user_send_burst_size=100000"),
        "max_connections_per_client=10000",  # all come from one address
    )
    host.exec("chatmail-relay", "set", *settings)
    host.exec("chatmail-relay", "apply", timeout=120)
    wait_for(
        lambda: host.exec("chatmail-relay", "status", check=False).ok,
        HEALTHY_SECONDS,
        "chatmail-relay status",
    )
    yield host
    lab.remove(host)


@contextlib.contextmanager
def client(lab: Lab, host: Host, *words: str) -> Iterator[subprocess.Popen[str]]:
    """clients.py at the lab's client: its memory is not the relay's."""
    argv = ["nsenter", f"--net={lab.client.path}", sys.executable, str(HERE / "clients.py"), *words]
    running = subprocess.Popen(
        [*argv, "--domain", DOMAIN, "--host", host.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(idle.__file__).parent)},
    )
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def test_two_thousand_sessions_and_steady_mail_in_one_gigabyte(lab, small):
    said = json.loads(small.exec("chatmail-relay", "status", "--json").out)
    (capacity,) = [item for item in said if item["what"] == "capacity"]
    assert capacity["data"]["limited_by"] == "memory"
    assert capacity["data"]["imap_sessions"] >= SESSIONS
    Mail(lab, small.address, DOMAIN).account()  # the model of all others
    for path in (Path(idle.__file__), HERE / "clients.py"):
        small.write(f"/root/{path.name}", path.read_text())
    small.exec(
        "python3", "/root/clients.py", "create", "--clients", str(SESSIONS), "--domain", DOMAIN
    )

    words = ("--clients", str(SESSIONS), "--rate", str(RATE), "--seconds", str(SECONDS))
    with client(lab, small, "steady", *words, "--nap", str(NAP), "--each", "20") as running:
        assert running.stderr is not None and running.stdin is not None
        line = running.stderr.readline()
        assert line == "hibernated\n", line + running.stderr.read()
        asleep = int(small.sh("cd /root && python3 -c 'import idle; print(idle.hibernated())'").out)
        idle_memory = sum(small.memory().values())
        running.stdin.write("go\n")
        running.stdin.flush()
        out, errors = running.communicate(timeout=SECONDS + 120)
    assert running.returncode == 0, errors
    found = json.loads(out)
    bound = small.memory_bound
    assert bound is not None

    measured[f"1 GB: {SESSIONS} idle sessions"] = (
        f"{asleep} hibernated, {idle_memory:.0f} MB PSS in all"
    )
    measured[f"1 GB: {RATE} messages a second"] = json.dumps(found)
    measured["1 GB: PSS after that"] = f"{sum(small.memory().values()):.0f} MB"
    measured["1 GB: the most in use, with page cache"] = f"{bound.highest >> 20} MB"
    assert asleep >= SESSIONS * 0.99
    assert bound.kills == 0
    assert found["errors"] == 0, found["replies"]
    assert found["lost"] == 0
    assert found["messages"] == RATE * SECONDS and found["a second"] > RATE * 0.95
    assert found["p95 ms"] < LATE_MS
