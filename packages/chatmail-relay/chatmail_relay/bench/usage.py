# SPDX-License-Identifier: MIT
"""What units use, all their processes together: read from their control groups (cgroups(7)) and /proc."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import systemd
from ..selftest.command import STATUS
from ..selftest.report import Wrong

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")
_CPU = re.compile(r"^usage_usec (\d+)$", re.MULTILINE)
_PSS = re.compile(r"^Pss: +(\d+) kB$", re.MULTILINE)


def _groups(units: Sequence[str]) -> dict[str, Path]:
    """The control groups of those that run; raises Wrong if none does."""
    states = systemd.properties(list(units), "ControlGroup")
    found = {unit: state.get("ControlGroup", "") for unit, state in states.items()}
    groups = {unit: CGROUPS / group.lstrip("/") for unit, group in found.items() if group}
    if not any(map(Path.is_dir, groups.values())):
        raise Wrong("there are no control groups of the relay's services", STATUS)
    return groups


def cpu_seconds(units: Sequence[str]) -> dict[str, float]:
    """The time that each unit which runs was on a processor since it started, in user and kernel mode.

    Raises Wrong, as memory does.
    """
    found = {}
    for unit, group in _groups(units).items():
        with contextlib.suppress(FileNotFoundError):  # it ends just now
            if used := _CPU.search((group / "cpu.stat").read_text()):
                found[unit] = int(used[1]) / 1e6
    return found


def spent(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Seconds between two readings; a unit that was started in between counts from its start."""
    return sum(
        seconds - before.get(unit, 0.0) if seconds >= before.get(unit, 0.0) else seconds
        for unit, seconds in after.items()
    )


def memory(units: Sequence[str]) -> float:
    """MiB of all processes of the units as proportional set size: what is shared counts in parts."""
    kilobytes = 0
    for group in _groups(units).values():
        for file in group.rglob("cgroup.procs"):
            with contextlib.suppress(FileNotFoundError):
                for process in file.read_text().split():
                    kilobytes += _pss(process)
    return kilobytes / 1024


def _pss(process: str) -> int:
    """kB; 0 of a process that has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        if found := _PSS.search((PROC / process / "smaps_rollup").read_text()):
            return int(found[1])
    return 0
