# SPDX-License-Identifier: MIT
"""A relay under load, and the clients that do it; the hosts are those of tests/conftest.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench import idle
from conftest import DOMAIN, measured
from lab.host import Host
from lab.mail import Mail

HERE = Path(__file__).parent
ADDRESSES = 20  # of clients on the relay
MINUTES = 30
SHIPPED = "/usr/share/chatmail-relay/components/dovecot/hibernate.conf.j2"
OVERRIDE = "/etc/chatmail/templates/dovecot/hibernate.conf.j2"


def hibernate_after(host: Host, nap: str) -> None:
    """Let idle sessions of *host* hibernate earlier than after five minutes; takes effect by apply."""
    shipped = host.read(SHIPPED)
    assert "= 5 mins\n" in shipped
    host.write(OVERRIDE, shipped.replace("= 5 mins\n", f"= {nap}\n"))


class Load:
    """Clients that run on the relay, with addresses of their own."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def clients(self, *words: str) -> dict[str, object]:
        """Run clients.py; what it found."""
        return self._run("/root/clients.py", *words)

    def idle(self, *words: str) -> dict[str, object]:
        """Run idle.py; what it found."""
        return self._run("/root/idle.py", *words)

    def _run(self, program: str, *words: str) -> dict[str, object]:
        where = ("--domain", DOMAIN, "--host", self.host.address)
        done = self.host.exec("python3", program, *words, *where, timeout=MINUTES * 60)
        return json.loads(done.out)

    @staticmethod
    def note(what: str, value: object) -> None:
        """For the table at the end."""
        measured[what] = value if isinstance(value, str) else json.dumps(value)


@pytest.fixture(scope="session")
def load(relay: Host, mail: Mail) -> Load:
    """The relay, without the limits that are for one client and for one sender."""
    settings = ("max_user_send_per_minute=100000", "max_user_send_burst_size=100000")
    relay.exec("chatmail-relay", "set", "max_connections_per_client=60000", *settings)
    hibernate_after(relay, "1 min")
    relay.exec("chatmail-relay", "apply", timeout=120)
    for number in range(1, ADDRESSES + 1):
        relay.exec("ip", "address", "add", f"10.78.0.{number}/32", "dev", "lo")
    mail.account()  # the model of all others
    for path in (Path(idle.__file__), HERE / "clients.py"):
        relay.write(f"/root/{path.name}", path.read_text())
    return Load(relay)
