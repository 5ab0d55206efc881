# SPDX-License-Identifier: MIT
"""The notify plugin and hibernation at scale, on a relay of the lab; docs/dovecot-plugin.md has results.

usage: make bench-dovecot, or tools/bench-dovecot latency|race|leaks|memory [NUMBER...]

latency     LMTP's reply to EXISTS and CPU a message, with the plugin and without
race        100,000 notifications around the moment of hibernation; NUMBER is another count
leaks       the same with LeakSanitizer in every imap process
memory      idle sessions, 1,000 and 10,000 or NUMBER..., awake and hibernated, by client_limit
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from lab import Lab, image
from lab.host import Host
from lab.shell import wait_for

from . import idle

DOMAIN = "_alpha.example"
CLIENT = "/root/idle.py"
SHIPPED = "/usr/share/chatmail-relay/components/dovecot"
OVERRIDES = "/etc/chatmail/templates/dovecot"
HOURS = 4 * 3600

RACE_CLIENTS = 100  # more than this, and Dovecot on two cores falls behind the clock
NAP = "1 s"

#: Sessions hibernate after one minute here, idle imap processes end after another, and workers of auth
#: after five.
MEMORY_NAP, MEMORY_LOOKS = "1 min", ("5", "400")
CLIENT_LIMITS = (100, 10)

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


def say(what: str, value: object) -> None:
    """One line of the result."""
    print(f"{what}: {value if isinstance(value, str) else json.dumps(value)}", flush=True)


def client(host: Host, *words: str) -> dict[str, object]:
    """Run idle.py on the relay."""
    done = host.exec("python3", CLIENT, *words, "--domain", DOMAIN, timeout=HOURS)
    return json.loads(done.out)


def settings(host: Host, nap: str, more: str = "") -> None:
    """Let sessions hibernate after *nap*, with *more* settings."""
    host.exec("mkdir", "-p", OVERRIDES)
    shipped = host.read(f"{SHIPPED}/hibernate.conf.j2")
    assert "= 5 mins\n" in shipped
    text = shipped.replace("= 5 mins\n", f"= {nap}\n") + more
    host.write(f"{OVERRIDES}/hibernate.conf.j2", text)
    host.exec("chatmail-relay", "apply", timeout=120)
    decision = host.read("/run/chatmail-dovecot/notify.conf")
    assert "hibernate.conf" in decision, decision


def cpu_seconds(host: Host) -> float:
    """What dovecot.service has used."""
    shown = host.exec("systemctl", "show", "-P", "CPUUsageNSec", "dovecot.service").out
    return int(shown) / 1e9


def latency(host: Host, _numbers: list[int]) -> None:
    """One message to each of ten clients in turn."""
    host.exec("systemctl", "restart", "dovecot")
    for name, remove in (("with the plugin", False), ("stock", True)):
        if remove:
            host.sh("apt-get remove -q --yes dovecot-chatmail", timeout=120)
        client(host, "latency", "--clients", "10", "--rounds", "3")  # all processes are there
        before = cpu_seconds(host)
        words = ("--clients", "10", "--rounds", "50", "--pause", "1.1")
        found = client(host, "latency", *words)
        used = cpu_seconds(host) - before
        assert isinstance(found["notifications"], int)
        found["CPU ms a message"] = round(1000 * used / found["notifications"], 2)
        say(name, found)
    host.sh("apt-get install -q --yes --no-install-recommends dovecot-chatmail", timeout=120)


def race(host: Host, numbers: list[int]) -> None:
    """Deliveries around the moment of hibernation."""
    rounds = (numbers[0] if numbers else 100_000) // RACE_CLIENTS
    settings(host, NAP)
    words = ("--clients", str(RACE_CLIENTS), "--rounds", str(rounds), "--prefix", "race")
    say("race", client(host, "race", *words))


def leaks(host: Host, numbers: list[int]) -> None:
    """The race, and what LeakSanitizer reports of the imap processes when they end."""
    host.sh("apt-get install -q --yes --no-install-recommends liblsan0", timeout=120)
    host.write("/usr/local/bin/imap-sanitized", SANITIZED, 0o755)
    host.exec("install", "-d", "-m", "1777", REPORTS)
    rounds = (numbers[0] if numbers else 100_000) // RACE_CLIENTS
    settings(host, NAP, SANITIZED_SETTINGS)
    words = ("--clients", str(RACE_CLIENTS), "--rounds", str(rounds), "--prefix", "race")
    say("race", client(host, "race", *words))
    host.exec("systemctl", "restart", "dovecot")
    reports = host.files(REPORTS)
    say("reports of leaks", len(reports))
    for path in sorted(reports):
        print(host.read(path), flush=True)


def memory(host: Host, numbers: list[int]) -> None:
    """Idle sessions by client_limit of imap: after the logins, hibernated, and one message to some."""
    for count in numbers or [1000, 10000]:
        for limit in CLIENT_LIMITS:
            processes = -(-count // limit) + 50
            more = f"service imap {{\n  client_limit = {limit}\n  process_limit = {processes}\n}}\n"
            settings(host, MEMORY_NAP, more)
            host.exec("systemctl", "restart", "dovecot", "chatmail-front")
            words = ("--clients", str(count), "--at-a-time", "30", "--create")
            found = client(host, "hold", *words, "--wait", *MEMORY_LOOKS)
            say(f"{count} sessions, client_limit {limit}", found)


def main() -> None:
    """Boot a relay, measure, remove it."""
    parts: dict[str, Callable[[Host, list[int]], None]] = {
        function.__name__: function for function in (latency, race, leaks, memory)
    }
    if len(sys.argv) > 1 and sys.argv[1] not in parts:
        sys.exit(__doc__)
    wanted = sys.argv[1:2] or list(parts)
    numbers = [int(word) for word in sys.argv[2:]]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # the lab leaves nothing
    with image.host_tree() as tree:
        image.download(tree, *(["liblsan0"] if "leaks" in wanted else []))
    with Lab("bench") as lab:
        host = lab.host("bench", 11, names=(DOMAIN,))
        host.install_relay(DOMAIN)
        wait_for(lambda: "on, hib" in host.exec("chatmail-relay", "status", check=False).out, 60)
        accounts = ("max_new_addresses_per_hour=100000", "max_load_1m=1000")
        sessions = ("max_imap_connections=20000", "max_connections_per_client=60000")
        host.exec("chatmail-relay", "set", *accounts, *sessions)
        host.exec("chatmail-relay", "apply", timeout=120)
        host.write(CLIENT, Path(idle.__file__).read_text())
        session = client(host, "latency", "--clients", "1")  # the model of all mailboxes
        assert session["lost"] == 0
        for name in wanted:
            parts[name](host, numbers)


if __name__ == "__main__":
    main()
