# SPDX-License-Identifier: MIT
"""Logins and checks of recipients, by how many addresses there are on disk; and /new.

The disk is the lab's, a tmpfs below an overlay where there is memory for it: what grows with the number of
addresses is the relay's own work, not that of a slow disk.
"""

from __future__ import annotations

import functools
import re
import smtplib
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import webload
from .frame import Row, measurement, median_row
from .relay import CPU, DOMAIN, Bench

PROGRAM = "/root/logins.py"
SIZES, SHORT_SIZES = (1_000, 100_000, 1_000_000), (100, 200, 300)
BUDGET = 1.2  # of what it costs with the fewest addresses
LOGINS, RECIPIENTS = 200, 500  # a round
CREATE_SECONDS = 1200
ROOM = 10_000  # bytes of memory that one address takes, in the lab
PREFIX, NEW_PREFIX = "id", "nw"


def on_relay(bench: Bench, what: str, prefix: str, first: int, count: int, *model: str) -> str:
    """Run logins.py on the relay, for *count* addresses; what it prints."""
    for source in (PROGRAM, "/root/idle.py"):
        bench.host.write(source, (Path(__file__).parent / Path(source).name).read_text())
    words = (what, DOMAIN, prefix, str(first), str(count), *model)
    return bench.host.exec("python3", PROGRAM, *words, timeout=CREATE_SECONDS).out


def available() -> int:
    """Bytes of memory that may be used."""
    text = Path("/proc/meminfo").read_text()
    (kilobytes,) = re.findall(r"^MemAvailable: *(\d+) kB$", text, re.MULTILINE)
    return int(kilobytes) * 1024


Step = Callable[[int], float]  # round -> seconds it took


def _steps(bench: Bench, addresses: int) -> dict[str, tuple[int, Step]]:
    """What is done in a round: name -> (how many, function)."""
    logins, recipients = bench.scaled((LOGINS, RECIPIENTS), (20, 20))
    start = addresses - bench.rounds * logins  # in the part of the store that is new

    def log_in(number: int) -> float:
        return float(on_relay(bench, "login", PREFIX, start + number * logins, logins))

    def first_login(number: int) -> float:
        first = addresses + number * logins  # no address twice
        return float(on_relay(bench, "login", NEW_PREFIX, first, logins))

    def check(number: int) -> float:
        with bench.mail.smtp(None, 25) as session:
            session.mail("x@far.example")
            begin = time.perf_counter()
            for item in range(recipients):
                user = f"{PREFIX}{(start + number + item * 7) % addresses:07d}"
                code, text = session.rcpt(f"{user}@{DOMAIN}")
                if code != 250:
                    raise smtplib.SMTPResponseException(code, text)
            return time.perf_counter() - begin

    return {
        "existing login": (logins, log_in),
        "new login": (logins, first_login),
        "recipient": (recipients, check),
    }


@measurement(18)
def logins(bench: Bench) -> list[Row]:
    """IMAP logins with TLS, new addresses, and RCPT TO on port 25, by addresses on disk."""
    model = bench.mail.account().address
    sizes = bench.scaled(SIZES, SHORT_SIZES)
    need, there = ROOM * sizes[-1] / 2**30, available() / 2**30
    if need > there:
        raise MemoryError(f"{sizes[-1]:,} addresses take {need:.1f} GiB, only {there:.1f} are free")
    try:
        return _logins(bench, sizes, model)
    finally:
        store = f"/var/lib/chatmail/mail/{DOMAIN}"
        bench.host.sh(
            f"find {store} -maxdepth 1 -name '{PREFIX}*@*' -exec rm -r {{}} +", timeout=600
        )


def _logins(bench: Bench, sizes: Sequence[int], model: str) -> list[Row]:
    costs: dict[str, list[Row]] = {}
    rates: dict[str, list[Row]] = {}
    made = 0
    for size in sizes:
        on_relay(bench, "create", PREFIX, made, size - made, model)
        made = size
        steps = _steps(bench, size)
        spent: dict[str, list[float]] = {name: [] for name in steps}
        taken: dict[str, list[float]] = {name: [] for name in steps}
        for number, name in bench.interleaved(list(steps)):
            count, step = steps[name]
            with CPU(bench.host) as used:
                seconds = step(number)
            spent[name].append(1000 * used.seconds / count)
            taken[name].append(count / seconds)
        for name in steps:
            label = f"{name}, {size:,} addresses"
            least = costs[name][0].value if name in costs else None
            cost = functools.partial(median_row, label, f"CPU ms a {name.split()[-1]}", spent[name])
            row = cost()
            if least is not None:
                budget = BUDGET if size == sizes[-1] and name != "new login" else None
                row = cost(floor=least, ratio=statistics.median(spent[name]) / least, budget=budget)
            costs.setdefault(name, []).append(row)
            rate = median_row(label, f"{name.split()[-1]}s/s", taken[name])
            rates.setdefault(name, []).append(rate)
    return [row for rows in (*costs.values(), *rates.values()) for row in rows]


@measurement(2)
def new(bench: Bench) -> list[Row]:
    """Requests for /new at the service's socket, over 16 connections that stay open."""
    requests = bench.scaled(20_000, 500)
    rates, spent = [], []
    program = Path(webload.__file__).read_text()
    for _ in range(bench.rounds):
        with CPU(bench.host) as used:
            done = bench.host.exec("python3", "-", str(requests), input=program, timeout=300)
        rates.append(requests / float(done.out))
        spent.append(1000 * used.seconds / requests)
    return [
        median_row("/new", "requests/s", rates, goal=5000, at_least=True),
        median_row("/new", "CPU ms a request", spent),
    ]
