# SPDX-License-Identifier: MIT
"""Idling clients: the notify plugin against stock Dovecot, hibernation, memory a session.

docs/dovecot-plugin.md has results of the long runs, `race` and `leaks`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab import image
from lab.host import Host

from . import accounts, idle
from .frame import Row, measurement, paired_row
from .relay import CPU, DOMAIN, Bench, healthy

CLIENT = "/root/idle.py"
SHIPPED = "/usr/share/chatmail-relay/components/dovecot"
OVERRIDES = "/etc/chatmail/templates/dovecot"
HOURS = 4 * 3600
PACKAGE = "dovecot-chatmail"

RACE_CLIENTS = 100  # more than this, and Dovecot on two cores falls behind the clock
NAP = "1 s"

MANY = ("max_imap_connections=20000", "max_connections_per_client=60000")
SETTINGS = "/etc/chatmail/chatmail.ini"

#: Sessions hibernate after one minute here; workers of auth end after five.
MEMORY_NAP, MEMORY_LOOK = "1 min", "330"
SESSIONS = (1_000, 10_000)
HELD = "held"  # four letters that their addresses begin with

#: LeakSanitizer looks at a process that ends. It needs memory without limit, and to be traced by itself,
#: which a process that has changed its user may not: hence the sockets that _chatmail must reach.
SANITIZER = "/usr/lib/x86_64-linux-gnu/liblsan.so.0"
REPORTS = "/srv/leaks"
SANITIZED = f"""\
#!/bin/sh
export GDB=1 LD_PRELOAD={SANITIZER} LSAN_OPTIONS=log_path={REPORTS}/report:exitcode=0
exec /usr/lib/dovecot/imap "$@"
"""
SANITIZED_SETTINGS = """
service imap {
  executable = /usr/local/bin/imap-sanitized
  drop_priv_before_exec = yes
  vsz_limit = unlimited
}
service config {
  unix_listener config {
    mode = 0666
  }
}
service auth {
  unix_listener auth-master {
    mode = 0666
  }
}
service anvil {
  unix_listener anvil {
    mode = 0666
  }
}
"""


def client(host: Host, *words: str) -> dict[str, Any]:
    """Run idle.py on the relay."""
    host.write(CLIENT, Path(idle.__file__).read_text())
    done = host.exec("python3", CLIENT, *words, "--domain", DOMAIN, timeout=HOURS)
    return json.loads(done.out)


@contextlib.contextmanager
def hibernation(host: Host, nap: str, more: str = "") -> Iterator[None]:
    """Many sessions, which hibernate after *nap*, with *more* settings; as before at the end."""
    before = host.read(SETTINGS)
    host.exec("chatmail-relay", "set", *MANY)
    shipped = host.read(f"{SHIPPED}/hibernate.conf.j2")
    assert "= 5 mins\n" in shipped
    text = shipped.replace("= 5 mins\n", f"= {nap}\n") + more
    override = f"{OVERRIDES}/hibernate.conf.j2"
    host.write(override, text)
    try:
        host.exec("chatmail-relay", "apply", timeout=120)
        decision = host.read("/run/chatmail/dovecot/notify.conf")
        assert "hibernate.conf" in decision, decision
        yield
    finally:
        host.exec("rm", "-f", override)
        host.write(SETTINGS, before)
        host.exec("chatmail-relay", "apply", timeout=120)
        healthy(host)


@measurement(2)
def idling(bench: Bench) -> list[Row]:
    """From LMTP's reply to EXISTS, ten clients in turn; the floor is stock Dovecot, without the plugin."""
    host = bench.host
    times: dict[bool, list[float]] = {True: [], False: []}
    spent: dict[bool, list[float]] = {True: [], False: []}
    for _round, plugin in bench.interleaved((True, False)):
        command = "install --no-install-recommends" if plugin else "remove"
        host.sh(f"apt-get -q --yes {command} {PACKAGE}", timeout=120)
        client(host, "latency", "--clients", "10", "--rounds", "2")  # all processes are there
        with CPU(host) as used:
            words = ("--clients", "10", "--rounds", bench.scaled("5", "1"), "--pause", "1.1")
            found = client(host, "latency", *words)
        assert not found["lost"], found
        times[plugin].append(found["median ms"])
        spent[plugin].append(1000 * used.units["dovecot.service"] / found["notifications"])
    host.sh(f"apt-get -q --yes install --no-install-recommends {PACKAGE}", timeout=120)
    healthy(host)
    return [
        paired_row("LMTP to EXISTS, median", "ms", times[True], times[False]),
        paired_row("Dovecot", "CPU ms a message", spent[True], spent[False]),
    ]


@measurement(4)
def sessions(bench: Bench) -> list[Row]:
    """Hibernated IMAP sessions with TLS: user-space memory of Dovecot and the front for each."""
    host = bench.host
    model, made = bench.mail.account().address, 0
    rows = []
    nap, look = bench.scaled((MEMORY_NAP, MEMORY_LOOK), ("1 s", "5"))
    with hibernation(host, nap):
        for count in bench.scaled(SESSIONS, (10, 20)):
            host.exec("systemctl", "restart", "dovecot", "chatmail-front")
            accounts.on_relay(bench, "create", HELD, made, count - made, model)
            made = count
            words = ("--prefix", HELD, "--clients", str(count), "--at-a-time", "30")
            found = client(host, "hold", *words, "--wait", look)
            now = found[f"after {float(look)} s"]
            lost = found["one message to 100 of them"]["lost"]
            assert not lost, f"{lost} sessions were not told of a message"
            label = f"{count:,} sessions, {now['hibernated']:,} of them hibernated"
            rows += [
                Row(label, "KiB a session", now["KiB a session"], goal=50, detail=now["MiB"]),
                Row(f"{count:,} sessions", "logins/s", found["logins a second"]),
            ]
    return rows


@measurement(2, by_name_only=True)
def race(bench: Bench) -> list[Row]:
    """100,000 deliveries around the moment of hibernation."""
    with hibernation(bench.host, NAP):
        return _race(bench)


@measurement(3, by_name_only=True)
def leaks(bench: Bench) -> list[Row]:
    """The race, and what LeakSanitizer reports of the imap processes when they end."""
    host = bench.host
    image.download(bench.lab.tree, "liblsan0")
    host.sh("apt-get install -q --yes --no-install-recommends liblsan0", timeout=120)
    host.write("/usr/local/bin/imap-sanitized", SANITIZED, 0o755)
    host.exec("install", "-d", "-m", "1777", REPORTS)
    with hibernation(host, NAP, SANITIZED_SETTINGS):
        rows = _race(bench)
        host.exec("systemctl", "restart", "dovecot")
        reports = sorted(host.files(REPORTS))
    for path in reports:
        print(host.read(path), flush=True)
    return [*rows, Row("reports of leaks", "reports", len(reports), budget=0)]


def _race(bench: Bench) -> list[Row]:
    rounds = bench.scaled(100_000, 1_000) // RACE_CLIENTS
    words = ("--clients", str(RACE_CLIENTS), "--rounds", str(rounds), "--prefix", "race")
    found = client(bench.host, "race", *words)
    return [
        Row("lost", f"of {found['notifications']:,}", found["lost"], budget=0),
        Row("LMTP to EXISTS, median", "ms", found["median ms"]),
    ]
