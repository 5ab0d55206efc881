# SPDX-License-Identifier: MIT
"""`chatmail-relay bench` on a healthy relay: every figure is there, and nothing stays, however it ends."""

import json
import re

import pytest

from conftest import DOMAIN, measured
from lab.shell import wait_for
from test_selftest import started

FIGURES = {
    ("delivery", "250 to EXISTS"),
    ("submission", "one after the other"),
    ("submission", "all services"),
    ("logins", "existing address"),
    ("logins", "new address"),
    ("new", "one after the other"),
    ("memory", "PSS of all services"),
    *(
        ("storage", f"{name}{what}")
        for name in ("os.scandir walk", "expire --dry-run", "fsreport")
        for what in ("", ", files")
    ),
    ("storage", "expire --dry-run, of the walk"),
    ("storage", "fsreport, of the walk"),
    ("apply", "nothing to do"),
}


def mailboxes(host):
    return {path.name for path in (host.root / "var/lib/chatmail/mail" / DOMAIN).glob("*@*")}


def bench(host, *words):
    """Exit status, and the figures by part and name."""
    done = host.exec("chatmail-relay", "bench", "--json", *words, check=False, timeout=120)
    assert done.err == "", done.err
    return done.code, {(row["part"], row["name"]): row for row in json.loads(done.out)}


def test_everything_is_measured_and_the_relay_is_left_as_it_was(relay):
    before, settings = mailboxes(relay), relay.read("/etc/chatmail/chatmail.ini")
    done = relay.exec(
        "chatmail-relay", "bench", "--rounds=1", "--messages=12", "--json", timeout=120
    )
    rows = {(row["part"], row["name"]): row for row in json.loads(done.out)}
    assert set(rows) == FIGURES and done.err == ""
    assert {row["trouble"] for row in rows.values()} == {""}
    assert all(row["median"] > 0 and row["rounds"] == 1 for row in rows.values())
    # more than one address may send at once
    assert len(rows["delivery", "250 to EXISTS"]["samples"]) == 12
    assert mailboxes(relay) == before
    assert relay.read("/etc/chatmail/chatmail.ini") == settings
    assert re.findall(r"ci-[a-z0-9]{6}", relay.journal()) == []
    for key in (("delivery", "250 to EXISTS"), ("submission", "all services")):
        measured[f"bench on the relay: {', '.join(key)}"] = (
            f"{rows[key]['median']:.1f} {rows[key]['unit']}"
        )
    measured["bench on the relay, one round"] = f"{done.seconds:.1f} s"


def test_a_table_is_for_people(relay):
    done = relay.exec("chatmail-relay", "bench", "memory", "delivery", "--rounds=2")
    head, delivery, memory = done.out.splitlines()
    assert head.split() == ["median", "p95", "least", "most", "unit"]
    assert re.fullmatch(r"delivery: 250 to EXISTS( +[\d.,]+){4}  ms", delivery)
    assert re.fullmatch(r"memory: PSS of all services +\d+ +- +\d+ +\d+  MiB", memory)


LIMIT = "max_new_addresses_per_hour"


def test_the_limit_on_new_addresses_is_named(relay):
    usual = relay.exec("chatmail-relay", "get", LIMIT).out.strip()
    relay.exec("chatmail-relay", "set", f"{LIMIT}=7")
    relay.exec("chatmail-relay", "apply", timeout=120)
    before = mailboxes(relay)
    try:
        status, rows = bench(relay, "logins", "new", "--rounds=3")
    finally:
        relay.exec("chatmail-relay", "set", f"{LIMIT}={usual}")
        relay.exec("chatmail-relay", "apply", timeout=120)
    assert status == 1
    for key in (("logins", "new address"), ("new", "one after the other")):
        assert rows[key]["trouble"] == f"limited by {LIMIT} = 7; try again in an hour"
        assert rows[key]["rounds"] == 1
    assert rows["logins", "existing address"]["rounds"] == 3
    assert mailboxes(relay) == before


@pytest.fixture(scope="module")
def unlimited(relay):
    """Nobody is told to wait: what is measured goes on until it is ended, however fast the machine is."""
    names = ("max_user_send_burst_size", "max_user_send_per_minute")
    usual = [f"{name}={relay.exec('chatmail-relay', 'get', name).out.strip()}" for name in names]
    for settings in ([f"{name}=100000" for name in names], usual):
        relay.exec("chatmail-relay", "set", *settings)
        relay.exec("chatmail-relay", "apply", timeout=120)
        if settings != usual:
            yield


LONG = ("--rounds=20", "--messages=100")


def test_after_its_time_nothing_stays(relay, unlimited):
    before = mailboxes(relay)
    status, rows = bench(relay, "delivery", "submission", "--timeout=0.7", *LONG)
    assert status == 1
    assert {row["trouble"] for row in rows.values()} == {"not done after 0.7 s"}
    assert mailboxes(relay) == before


def test_after_an_interruption_nothing_stays(relay, unlimited):
    before = mailboxes(relay)
    running, process = started(relay, "bench", "delivery", *LONG)
    wait_for(lambda: len(mailboxes(relay) - before) > 1, 30, "a sender")
    relay.exec("kill", "-INT", process)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "interrupted, cleaning up" in err
    assert re.fullmatch(r"delivery: after 1?\d rounds: interrupted", out.splitlines()[-1])
    assert mailboxes(relay) == before


def test_it_is_for_root(relay):
    command = ("setpriv", "--reuid=nobody", "--clear-groups", "chatmail-relay", "bench")
    done = relay.exec(*command, check=False)
    assert done.code == 1 and "root measures the relay" in done.err
