# SPDX-License-Identifier: MIT
"""Expire and fsreport over many messages, against a walk that only stats every file.

usage: PYTHONPATH=packages/chatmaild/src python3 tests/bench/storage.py [MESSAGES] [FOLDER]

MESSAGES (default 1,000,000), 100 a mailbox, half of them old, are made in a new folder below FOLDER
(default /dev/shm) and removed at the end. Prints JSON: CPU seconds, ratios to the walk, memory in MB. The
goal is a ratio of 1.5 at most, and 60 MB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DAY = 86400
A_MAILBOX = 100  # messages
ROUNDS = 3  # the commands take turns, the best of each counts: others disturb

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
    child = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    _pid, status, usage = os.wait4(child.pid, 0)
    assert status == 0, command
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main(messages: int, parent: str) -> None:
    """Make the store, measure, print."""
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
    result["expire, half of the messages deleted"] = {
        "CPU seconds": round(deleting, 2),
        "peak MB": round(peak, 1),
    }
    print(json.dumps({"messages": messages, "in": parent, **result}, indent=1))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(int(arguments[0]) if arguments else 1_000_000, (arguments[1:] or ["/dev/shm"])[0])
