# SPDX-License-Identifier: MIT
"""What needs no client: memory of the services, passes over the mailboxes, and `apply`."""

from __future__ import annotations

import json
import os
import subprocess
import time

from chatmaild.expire import Expiry, connected_users
from chatmaild.fsreport import Selection, make_report
from chatmaild.maildir import open_store

from ..selftest.report import Wrong
from . import usage
from .frame import Bench, Measurement, Round

PROGRAM = "/usr/sbin/chatmail-relay"


def _memory(bench: Bench) -> Round:
    return lambda: {"PSS of all services": [usage.memory(bench.units)]}


# --- passes over the mailboxes ----------------------------------------------------------------------


def _walk(folder: str | os.PathLike[str]) -> int:
    """Look at every file below; how many there are."""
    files = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    files += _walk(entry.path)
                else:
                    entry.stat(follow_symlinks=False)
                    files += 1
            except FileNotFoundError:
                continue  # a mailbox or a message that is deleted just now
    return files


def _storage(bench: Bench) -> Round:
    """With the rights of the mailboxes' owner, as the timers have them."""
    relay = bench.relay

    def measure() -> dict[str, list[float]]:
        now = time.time()
        with relay.as_owner(), open_store(relay.mail.path) as store:
            if store is None:
                raise Wrong("there are no mailboxes yet")
            times = [time.monotonic()]
            files = _walk(relay.mail.path)
            times.append(time.monotonic())
            Expiry(relay.config, now, dry_run=True, connected=connected_users).run(store)
            times.append(time.monotonic())
            make_report(store, Selection(now))
            times.append(time.monotonic())
        if not files:
            raise Wrong("there are no files in the mailboxes yet")
        walk, expire, report = (end - begin for begin, end in zip(times, times[1:], strict=False))
        return {
            "os.scandir walk": [1000 * walk],
            "expire --dry-run": [1000 * expire],
            "fsreport": [1000 * report],
            "os.scandir walk, files": [files / walk],
            "expire --dry-run, files": [files / expire],
            "fsreport, files": [files / report],
            "expire --dry-run, of the walk": [expire / walk],
            "fsreport, of the walk": [report / walk],
        }

    return measure


# --- apply ------------------------------------------------------------------------------------------


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [PROGRAM, *words, "--json"]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def _apply(bench: Bench) -> Round:
    def measure() -> dict[str, list[float]]:
        if _run("diff").returncode:
            raise Wrong("there is something to do", "see chatmail-relay diff")
        begin = time.monotonic()
        done = _run("apply")
        seconds = time.monotonic() - begin
        if done.returncode:
            raise Wrong(f"apply failed: {' '.join(done.stderr.split())}")
        if changed := json.loads(done.stdout)["changed"]:
            raise Wrong(f"apply has changed {', '.join(changed)}")
        return {"nothing to do": [seconds]}

    return measure


MEASUREMENTS = (
    Measurement("memory", {"PSS of all services": "MiB"}, _memory),
    Measurement(
        "storage",
        {
            "os.scandir walk": "ms",
            "expire --dry-run": "ms",
            "fsreport": "ms",
            "os.scandir walk, files": "files/s",
            "expire --dry-run, files": "files/s",
            "fsreport, files": "files/s",
            "expire --dry-run, of the walk": "times",
            "fsreport, of the walk": "times",
        },
        _storage,
    ),
    Measurement("apply", {"nothing to do": "s"}, _apply),
)
