# SPDX-License-Identifier: MIT
"""What measurements work with: a relay of the lab that is installed when the first of them asks for it."""

from __future__ import annotations

import contextlib
import functools
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from lab import Lab
from lab.host import Host
from lab.mail import Mail
from lab.shell import wait_for
from lab.traffic import works

T = TypeVar("T")
Peer = tuple[Host, str]  # and its domain

DOMAIN, PEER = "_bench.example", "_peer.example"
NUMBER, PEER_NUMBER = 81, 82  # last ones of their addresses
ROUNDS = 5
HEALTHY_SECONDS = 60

#: Limits that would be measured in place of what they limit.
SETTINGS = (
    *("max_new_addresses_per_hour=1000000", "max_load_1m=1000"),
    *("max_user_send_per_minute=100000", "max_user_send_burst_size=100000"),
)


class Bench:
    """`with Bench(short=False) as bench: frame.run(bench, wanted)`; its lab is gone at the end."""

    def __init__(self, *, short: bool, lab: Lab | None = None, peer: Peer | None = None) -> None:
        self.short = short
        self.rounds = 1 if short else ROUNDS
        self._given, self._given_peer = lab, peer
        self._stack = contextlib.ExitStack()
        self.install_seconds = self.message_seconds = 0.0  # both since the beginning of apt

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def scaled(self, full: T, short: T) -> T:
        """*short* in a short run, which is for the program, not for the figures."""
        return short if self.short else full

    @functools.cached_property
    def lab(self) -> Lab:
        """The lab: the one given, or one of its own."""
        return self._given or self._stack.enter_context(Lab("bench"))

    @functools.cached_property
    def folder(self) -> Path:
        """For files of the clients; gone at the end."""
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory()))

    @functools.cached_property
    def host(self) -> Host:
        """The relay."""
        host = self.lab.host("bench", NUMBER, names=(DOMAIN,))
        self.install_seconds = host.install_relay(DOMAIN)
        configure(host)  # does not count; a relay on a busy machine gives no new addresses
        begin = time.monotonic() - self.install_seconds
        works(Mail(self.lab, host.address, DOMAIN), HEALTHY_SECONDS)
        self.message_seconds = time.monotonic() - begin
        return host

    @functools.cached_property
    def peer(self) -> Peer:
        """Another relay, the one given or one of its own; both have their keys in the DNS."""
        peer = self._given_peer or self._install_peer()
        self.lab.publish_key(self.host, DOMAIN)
        self.lab.publish_key(*peer)
        return peer

    def _install_peer(self) -> Peer:
        host = self.lab.host("peer", PEER_NUMBER, names=(PEER,))
        host.install_relay(PEER)
        configure(host)
        return host, PEER

    @property
    def mail(self) -> Mail:
        """Raw SMTP and IMAP to the relay."""
        return Mail(self.lab, self.host.address, DOMAIN)

    def interleaved(self, what: Sequence[T], times: int = 1) -> Iterator[tuple[int, T]]:
        """(round, item): every item once a round, each time in another order; *times* the usual rounds."""
        for number in range(self.rounds if self.short else times * self.rounds):
            for item in random.Random(number).sample(what, len(what)):
                yield number, item


def configure(host: Host) -> None:
    """SETTINGS, in force."""
    healthy(host)
    host.exec("chatmail-relay", "set", *SETTINGS)
    host.exec("chatmail-relay", "apply", timeout=120)
    healthy(host)


def healthy(host: Host) -> None:
    """Wait until the relay says that all is well."""
    check = ("chatmail-relay", "status")
    wait_for(lambda: host.exec(*check, check=False).ok, HEALTHY_SECONDS, "chatmail-relay status")


class CPU:
    """`with CPU(host) as used: ...`; then `used.seconds`, and `used.units` of each unit.

    The time that all services of the relay were on a processor, in user and kernel mode, as their control
    groups have it, those of processes that have ended included. Commands of the lab are in none of them.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self.units: dict[str, float] = {}

    def __enter__(self) -> CPU:
        self._before = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        for unit, seconds in self._read().items():
            spent = seconds - self._before.get(unit, 0.0)
            if spent > 0:
                self.units[unit] = spent

    @property
    def seconds(self) -> float:
        """Of all units."""
        return sum(self.units.values())

    def _read(self) -> dict[str, float]:
        script = "cd /sys/fs/cgroup/system.slice; grep usage_usec */cpu.stat */*.service/cpu.stat || true"
        found: dict[str, float] = {}
        for line in self._host.sh(script, check=False).out.splitlines():
            path, _, value = line.partition(":")
            unit = path.split("/")[-2]
            if unit.endswith(".service"):
                found[unit] = int(value.split()[1]) / 1e6
        return found
