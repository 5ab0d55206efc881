# SPDX-License-Identifier: MIT
"""`make test` as stages: run what can run at the same time, keep a log each, tell who took how long.

A stage is a command. It starts when the stages it needs have passed and a slot is free; it is skipped
when one of them has not. Not done after LIMIT, it is ended, has failed, and what it printed is shown.
The results go to build/stages.json, which report.py (a pytest plugin) turns into the table at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from .paths import BUILD, LOGS, ROOT

RESULTS = BUILD / "stages.json"

#: Seconds after which a stage hangs: six times what the longest takes on two cores.
LIMIT = 1200.0

#: Seconds after which it is told what still runs, and how far it is.
PROGRESS = 120.0

#: Lines of a failed stage's log that are shown at once.
TAIL = 80


@dataclass(frozen=True)
class Stage:
    """One command, from the top of the work tree."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()


STAGES = (
    Stage("repository", ("tools/build", "repo")),
    Stage("wheel", ("tools/build-wheel",)),
    Stage("lint", ("tools/lint", "--static")),
    Stage("lint-packages", ("tools/lint", "--packages"), ("repository",)),
    Stage("reproducible", ("tools/build", "again"), ("repository",)),
)


def log_of(stage: Stage) -> Path:
    """Where a stage's output is."""
    return LOGS / f"{stage.name}.log"


def _last_line(path: Path) -> str:
    """The end of a log, for the curious."""
    lines = path.read_text(errors="replace").splitlines() or [""]
    return lines[-1][:100]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a stage with all it started; the namespaces of sandbox.py end with their first process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _run(stage: Stage, limit: float, running: dict[Stage, subprocess.Popen[bytes]]) -> bool:
    with log_of(stage).open("wb") as log:
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            process_group=0,
        )
        running[stage] = process
        try:
            return process.wait(limit) == 0
        except subprocess.TimeoutExpired:
            _end(process)
            log.write(f"\nnot done after {limit:.0f} s\n".encode())
            return False
        finally:
            del running[stage]


def run_all(
    stages: tuple[Stage, ...] = STAGES, slots: int = 2, limit: float = LIMIT
) -> dict[str, dict[str, object]]:
    """Run all stages; returns and writes {name: {"result": passed|failed|skipped, "seconds": s}}."""
    LOGS.mkdir(parents=True, exist_ok=True)
    RESULTS.unlink(missing_ok=True)
    begin = time.monotonic()
    results: dict[str, dict[str, object]] = {}
    changed = threading.Condition()
    free = threading.Semaphore(slots)
    running: dict[Stage, subprocess.Popen[bytes]] = {}

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:6.1f} s] {text}", flush=True)

    def passed(name: str) -> bool:
        return results[name]["result"] == "passed"

    def work(stage: Stage) -> None:
        with changed:
            changed.wait_for(lambda: all(name in results for name in stage.needs))
            wanted = all(passed(name) for name in stage.needs)
        result, seconds = "skipped", 0.0
        if wanted:
            with free:
                say(f"{stage.name}: {' '.join(stage.command)}")
                start = time.monotonic()
                result = "passed" if _run(stage, limit, running) else "failed"
                seconds = time.monotonic() - start
        with changed:
            say(f"{stage.name}: {result} after {seconds:.1f} s")
            if result == "failed":
                lines = log_of(stage).read_text(errors="replace").splitlines()[-TAIL:]
                print("\n".join(f"    {line[:300]}" for line in lines), flush=True)
            results[stage.name] = {"result": result, "seconds": round(seconds, 1)}
            changed.notify_all()

    for stage in stages:
        threading.Thread(target=work, args=(stage,), daemon=True).start()
    try:
        with changed:
            while not changed.wait_for(lambda: len(results) == len(stages), PROGRESS):
                for stage in list(running):
                    say(f"{stage.name}: ... {_last_line(log_of(stage))}")
    finally:
        for process in list(running.values()):
            _end(process)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    sys.stdout.flush()
    return results
