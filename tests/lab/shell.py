# SPDX-License-Identifier: MIT
"""Run programs, wait for conditions, and say how long things took.

Everything here is bounded in time; nothing sleeps without a deadline.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class LabError(Exception):
    """Something in the lab itself (not in the tested system) went wrong."""


class WaitTimeout(LabError, AssertionError):
    """A condition did not come true within its bound."""


@dataclass(frozen=True)
class Result:
    """What a finished command left: exit status, both outputs, wall-clock seconds."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str
    seconds: float

    @property
    def ok(self) -> bool:
        return self.code == 0


class CommandFailed(LabError):
    """A command exited non-zero, or did not end in time (code is then -9)."""

    def __init__(self, result: Result, why: str = "") -> None:
        self.result = result
        text = "\n".join(part for part in (result.out[-4000:], result.err[-4000:]) if part)
        command = " ".join(result.argv)
        super().__init__(f"{why or f'exit status {result.code}'}: {command}\n{text}")


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    check: bool = True,
    input: str | bytes | None = None,
    timeout: float = 60,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> Result:
    """Run a program in a process group of its own; on timeout the whole group is killed.

    Raises CommandFailed on a timeout, and on a non-zero exit status when `check`.
    """
    args = tuple(os.fspath(arg) for arg in argv)
    data = input.encode() if isinstance(input, str) else input
    begin = time.monotonic()
    proc = subprocess.Popen(
        args,
        stdin=subprocess.DEVNULL if data is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        cwd=cwd,
        start_new_session=True,
    )
    try:
        out, err = proc.communicate(data, timeout=timeout)
    except BaseException as exc:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(proc.pid, signal.SIGKILL)
        out, err = proc.communicate()
        if not isinstance(exc, subprocess.TimeoutExpired):
            raise
        result = Result(args, -9, _text(out), _text(err), time.monotonic() - begin)
        raise CommandFailed(result, f"no end within {timeout:g} s") from None
    result = Result(args, proc.returncode, _text(out), _text(err), time.monotonic() - begin)
    if check and result.code:
        raise CommandFailed(result)
    return result


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def wait_for(condition: Callable[[], T], timeout: float = 10, what: str = "") -> T:
    """Call `condition` until it returns something true, and return that.

    The pause grows from 5 to 100 ms. Raises WaitTimeout after `timeout` seconds; an AssertionError
    of the condition counts as "not yet", and the last one is shown.
    """
    deadline = time.monotonic() + timeout
    pause = 0.005
    last: object = None
    while True:
        try:
            value = condition()
            if value:
                return value
            last = value
        except AssertionError as exc:
            last = exc
        if time.monotonic() >= deadline:
            name = what or getattr(condition, "__name__", "condition")
            raise WaitTimeout(f"{name}: not within {timeout:g} s, last: {last!r}")
        time.sleep(pause)
        pause = min(pause * 2, 0.1)


class Stopwatch:
    """Named stages and their seconds, in order: `with watch.stage("boot relay"): ...`."""

    def __init__(self, report: Callable[[str, float], None] | None = None) -> None:
        self.stages: list[tuple[str, float]] = []
        self._report = report

    def add(self, name: str, seconds: float) -> None:
        self.stages.append((name, seconds))
        if self._report:
            self._report(name, seconds)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.add(name, time.monotonic() - begin)
