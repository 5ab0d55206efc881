# SPDX-License-Identifier: MIT
"""Expire and fsreport over many messages, against a walk that only stats every file.

usage: storage.py MESSAGES FOLDER ROUNDS

MESSAGES, 100 a mailbox, half of them old, are made in a new folder below FOLDER (in a tmpfs each takes ROOM)
and removed at the end. Prints JSON: CPU seconds by round, peak memory in MB. services.py runs it: a program
of its own, because the peak memory of a child begins with what its parent has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[2] / "packages/chatmaild/src"

ROOM = 6000  # bytes, with what the kernel keeps of a file
DAY = 86400
A_MAILBOX = 100  # messages

WALKING, EXPIRE, REPORT = "walk", "expire --dry-run", "fsreport"
DELETING = "expire, half of the messages deleted"

WALK = """
import os, sys
def walk(path):
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                walk(entry.path)
            else:
                entry.stat(follow_symlinks=False)
walk(sys.argv[1])
"""


def make_store(store: Path, messages: int, now: float) -> None:
    """Mailboxes of A_MAILBOX messages of one byte: half in cur, half in new, half of each old."""
    old = now - 40 * DAY
    for number in range(messages // A_MAILBOX):
        mailbox = store / f"{number:09d}@chat.example"
        for name in ("cur", "new", "tmp"):
            (mailbox / name).mkdir(parents=True)
        (mailbox / "password").write_text("{SHA512-CRYPT}$6$x")
        for item in range(A_MAILBOX):
            folder, flags = ("cur", ":2,S") if item % 2 else ("new", "")
            path = f"{mailbox}/{folder}/17000000{item:02d}.M{number}P1.host,S=5000,W=5100{flags}"
            with open(path, "wb") as file:
                file.write(b"x")
            if item % 4 < 2:
                os.utime(path, (old, old))


def run(*command: str) -> tuple[float, float]:
    """Seconds of CPU and peak memory (MB) of a Python program."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    child = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, env=environment)
    _pid, status, usage = os.wait4(child.pid, 0)
    assert status == 0, command
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def measure(messages: int, parent: str, rounds: int) -> dict[str, dict[str, Any]]:
    """CPU seconds of each round, and peak MB, of each command, on a store made below *parent*."""
    now = time.time()
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        store = Path(folder) / "mail"
        ini = Path(folder) / "chatmail.ini"
        ini.write_text(f"[params]\nmail_domain = chat.example\nmailboxes_dir = {store}\n")
        make_store(store, messages, now)
        commands = {
            WALKING: ("-c", WALK, str(store)),
            EXPIRE: ("-m", "chatmaild.expire", "--dry-run", f"--config={ini}"),
            REPORT: ("-m", "chatmaild.fsreport", f"--config={ini}"),
        }
        found = {name: [run(*command)] for name, command in commands.items()}
        for _ in range(rounds - 1):
            for name, command in commands.items():
                found[name].append(run(*command))
        found[DELETING] = [run("-m", "chatmaild.expire", f"--config={ini}")]
    return {
        name: {"CPU seconds": [cpu for cpu, _ in runs], "peak MB": max(peak for _, peak in runs)}
        for name, runs in found.items()
    }


def main(messages: int, parent: str, rounds: int) -> None:
    """Measure and print."""
    print(json.dumps(measure(messages, parent, rounds)))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
