# SPDX-License-Identifier: MIT
"""Expire and fsreport over many messages, against a walk that only stats every file.

usage: python3 tests/bench/storage.py [MESSAGES] [FOLDER]

MESSAGES (default 1,000,000), 100 a mailbox, half of them old, are made in a new folder below FOLDER
(default /dev/shm, where each takes ROOM) and removed at the end. Prints JSON: CPU seconds, ratios to the
walk, memory in MB. The goal is a ratio of 1.5 at most; more than LIMIT fails. `make bench-storage` runs
it, and tests/test_bench.py with fewer messages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "packages/chatmaild/src"

ROOM = 6000  # bytes, with what the kernel keeps of a file
LIMIT = 60.0  # MB of each program, however many messages there are
DAY = 86400
A_MAILBOX = 100  # messages
ROUNDS = 3  # the commands take turns, the best of each counts: others disturb

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


def measure(messages: int, parent: str) -> dict[str, dict[str, float]]:
    """CPU seconds, peak MB and ratio to the walk of each command, on a store made below *parent*."""
    now = time.time()
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        store = Path(folder) / "mail"
        ini = Path(folder) / "chatmail.ini"
        ini.write_text(f"[params]\nmail_domain = chat.example\nmailboxes_dir = {store}\n")
        make_store(store, messages, now)
        commands = {
            "walk": ("-c", WALK, str(store)),
            "expire --dry-run": ("-m", "chatmaild.expire", "--dry-run", f"--config={ini}"),
            "fsreport": ("-m", "chatmaild.fsreport", f"--config={ini}"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        memory = dict.fromkeys(commands, 0.0)
        for _ in range(ROUNDS):
            for name, command in commands.items():
                taken, peak = run(*command)
                seconds[name].append(taken)
                memory[name] = max(memory[name], peak)
        deleting, peak = run("-m", "chatmaild.expire", f"--config={ini}")
    walk = min(seconds["walk"])
    result = {
        name: {
            "CPU seconds": round(min(times), 2),
            "ratio": round(min(times) / walk, 2),
            "peak MB": round(memory[name], 1),
        }
        for name, times in seconds.items()
    }
    result[DELETING] = {
        "CPU seconds": round(deleting, 2),
        "peak MB": round(peak, 1),
    }
    return result


def main(messages: int = 1_000_000, parent: str = "/dev/shm") -> int:
    """Measure and print; 1 if a program took more than LIMIT."""
    result = measure(messages, parent)
    print(json.dumps({"messages": messages, "in": parent, **result}, indent=1))
    return int(any(numbers["peak MB"] > LIMIT for numbers in result.values()))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2]), *sys.argv[2:3]))
