# SPDX-License-Identifier: MIT
"""What a big mail store costs; `make bench-storage` does the same with a million messages."""

import json
import shutil
import subprocess
import sys

from bench import storage
from conftest import measured

MESSAGES = 200_000


def test_expire_and_the_report_need_little_memory_for_many_messages(tmp_path):
    room = shutil.disk_usage("/dev/shm").free > storage.ROOM * MESSAGES
    folder = "/dev/shm" if room else str(tmp_path)
    # a process of its own, as the peak of a child begins with what its parent has
    command = [sys.executable, storage.__file__, str(MESSAGES), folder]
    result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout)
    for name in ("walk", "expire --dry-run", "fsreport", storage.DELETING):
        numbers = ", ".join(f"{what} {number}" for what, number in result[name].items())
        measured[f"{name}, {MESSAGES:,} messages"] = numbers
        assert 0 < result[name]["peak MB"] <= storage.LIMIT
