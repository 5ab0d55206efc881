# SPDX-License-Identifier: MIT
"""pytest plugin of `make test`: a table of all that ran; a stage that is missing or failed fails the run."""

from __future__ import annotations

import json
import time
from typing import Any

from .stages import RESULTS, STAGES

#: Of pytest in `make test`. Two workers: most of the time of a test is waiting for daemons. A test that
#: hangs, its fixtures included, fails after three times what the longest takes; a few failures end the run.
OPTIONS = (
    *("-p", "chatmail_build.report", "-p", "no:cacheprovider", "-ra"),
    *("-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder"),
    *("--timeout", "600", "--maxfail", "5"),
)

_start = time.monotonic()


def rows() -> list[tuple[str, str, float]]:
    """(name, result, seconds) of every stage; "missing" if it left no result."""
    try:
        results = json.loads(RESULTS.read_text())
    except FileNotFoundError:
        results = {}
    return [
        (
            stage.name,
            results.get(stage.name, {}).get("result", "missing"),
            float(results.get(stage.name, {}).get("seconds", 0)),
        )
        for stage in STAGES
    ]


def pytest_sessionfinish(session: Any, exitstatus: int) -> None:
    """A green run of pytest does not hide a red stage."""
    if exitstatus == 0 and any(result != "passed" for _, result, _ in rows()):
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table, just above pytest's own last line."""
    terminalreporter.section("what ran")
    for name, result, seconds in rows():
        terminalreporter.write_line(f"{result:8} {seconds:8.1f} s  {name}")
    seconds_by_file: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration") and hasattr(report, "nodeid"):
                file = report.nodeid.split("::")[0]
                seconds_by_file[file] = seconds_by_file.get(file, 0) + report.duration
    for file, seconds in sorted(seconds_by_file.items()):
        terminalreporter.write_line(f"{'tests':8} {seconds:8.1f} s  {file}")
    terminalreporter.write_line(f"{'in all':8} {time.monotonic() - _start:8.1f} s  pytest")
