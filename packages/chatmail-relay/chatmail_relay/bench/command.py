# SPDX-License-Identifier: MIT
"""`chatmail-relay bench`: all measurements in rounds, within a time, and whatever happens cleaned up."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Sequence

from chatmaild.progress import Progress
from cryptography.hazmat.primitives.serialization import Encoding

from .. import systemd
from ..accounts import Relay
from ..certificate import live
from ..component import load_components
from ..paths import Paths
from ..selftest import tls
from ..selftest.accounts import Accounts
from ..selftest.command import INTERRUPTED
from ..selftest.net import LOOPBACK, Target, host_of, resolve, secure
from ..selftest.report import TROUBLE, Ending, Wrong, attempt, describe, undisturbed
from . import BenchError, accounts, machine, mail
from .frame import Bench, Result, table
from .limits import Senders

JOURNAL = "systemd-journald@chatmail.service"  # writes what the others log

MEASUREMENTS = (*mail.MEASUREMENTS, *accounts.MEASUREMENTS, *machine.MEASUREMENTS)


def run(paths: Paths, options: argparse.Namespace) -> int:
    """0 if all was measured that was asked for, 1 if not, INTERRUPTED after Ctrl-C."""
    bench = _bench(paths, options.messages)
    results = [
        Result(item) for item in MEASUREMENTS if not options.part or item.part in options.part
    ]
    try:
        ending = attempt(lambda: measure(bench, results, options.rounds), options.timeout)
    finally:
        with undisturbed():
            left = clean_up(bench.accounts)
    if ending is not Ending.DONE:
        late = ending is Ending.LATE
        text = f"not done after {options.timeout:g} s" if late else "interrupted"
        for result in results:
            if result.rounds < options.rounds:
                result.trouble = result.trouble or text
    rows = [row for result in results for row in result.rows()]
    if options.json:
        print(json.dumps([row.as_data() for row in rows], indent=1))
    else:
        print("\n".join(table(rows)))
    if left:
        print(f"chatmail-relay: cleaning up: {left}", file=sys.stderr)
    if ending is Ending.INTERRUPTED:
        return INTERRUPTED
    return 1 if left or any(result.trouble for result in results) else 0


def _bench(paths: Paths, messages: int) -> Bench:
    """What there is to measure; raises NotConfigured, and BenchError if it cannot be done here."""
    relay = Relay(paths)
    if os.geteuid() != 0:
        raise BenchError("root measures the relay, as it deletes the accounts that it has made")
    if not paths.is_live:
        raise BenchError("no services run here; measure the relay on its own machine")
    units = [unit for component in load_components(paths.components) for unit in component.units]
    target = _target(paths, relay.config.mail_domain)
    made = Accounts(target, relay, uses=None)
    services = [*systemd.services(units), JOURNAL]
    return Bench(relay, target, made, Senders(made, relay.config), services, messages)


def _target(paths: Paths, domain: str) -> Target:
    """This relay at its public address, or on loopback if that is not reached; raises BenchError."""
    host = host_of(domain)
    try:
        public = resolve(host, own=True)
    except Wrong:
        public = ()
    pair = live(paths)
    ours = None if pair is None else pair.certificate.public_bytes(Encoding.DER)
    trouble = ""
    for addresses in filter(None, (public, LOOPBACK)):
        target = Target(domain, host, addresses)
        try:
            with secure(target, 443, "http/1.1") as connection:
                there = tls.peer(connection)
        except TROUBLE as error:
            trouble = describe(error)
            continue
        if there == ours:
            return target
        text = f"{host} at {', '.join(addresses)} has another certificate than this machine"
        raise BenchError(f"{text}; see chatmail-relay dns, and measure the relay where it runs")
    raise BenchError(f"port 443: {trouble}; see chatmail-relay status")


def measure(bench: Bench, results: Sequence[Result], rounds: int) -> None:
    """All rounds of all measurements, each round in another order."""
    progress = Progress()
    try:
        for result in results:
            progress.show(f"preparing {result.measurement.part}")
            result.begin(bench)
        for number in range(rounds):
            for result in random.Random(number).sample(results, len(results)):
                progress.show(f"round {number + 1} of {rounds}: {result.measurement.part}")
                result.add_round()
    finally:
        progress.end()


def clean_up(made: Accounts) -> str:
    """Delete the accounts; what has gone wrong, in words, or ""."""
    try:
        made.remove()
    except Wrong as error:
        return "; ".join(filter(None, (str(error), error.remedy)))
    except TROUBLE as error:
        return describe(error)
    return ""
