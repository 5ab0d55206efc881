# SPDX-License-Identifier: MIT
"""Findings as they are made, for people and for programs, and the clock that bounds them."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import imaplib
import json
import signal
import smtplib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from ..status import Finding

#: what a broken relay, network or certificate makes the standard library raise
TROUBLE = (OSError, EOFError, ValueError, smtplib.SMTPException, imaplib.IMAP4.error)
ENDS = (signal.SIGTERM, signal.SIGHUP)
#: after which the clock rings once more, if nothing has ended
AGAIN_SECONDS = 1.0


class Wrong(Exception):
    """What a check found wrong, in words; *remedy* where the check knows better than its caller."""

    def __init__(self, detail: str, remedy: str = "") -> None:
        super().__init__(detail)
        self.remedy = remedy


class OutOfTime(BaseException):
    """The time of the whole test is up. Not an Exception: no check must take it for its own."""


class Ending(enum.Enum):
    """How `attempt` ended."""

    DONE = "done"
    LATE = "late"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Timed(Finding):
    """A finding that was measured."""

    seconds: float = 0.0


class Report:
    """Runs checks and keeps what they found. Lines are printed at once, JSON at the end."""

    def __init__(self, as_json: bool) -> None:
        self.findings: list[Finding] = []
        self._json = as_json
        self._progress = sys.stderr.isatty() and not as_json

    @property
    def is_well(self) -> bool:
        """Whether nothing was found wrong, and anything was found at all."""
        return bool(self.findings) and all(item.well for item in self.findings)

    def check(self, what: str, remedy: str, look: Callable[[], str | float]) -> bool:
        """Call *look*, which says what is well, or how many seconds it took, or raises.

        Returns whether it was well.
        """
        with self._at_work(what):
            try:
                said = look()
                if isinstance(said, float):
                    return self.add(Timed(what, True, f"{said:.2f} s", seconds=said))
                return self.add(Finding(what, True, said))
            except Wrong as error:
                return self.add(Finding(what, False, str(error), error.remedy or remedy))
            except TROUBLE as error:
                return self.add(Finding(what, False, describe(error), remedy))

    def add(self, finding: Finding) -> bool:
        """Keep a finding, and say it; returns whether it is well."""
        self.findings.append(finding)
        self._erase()
        if not self._json:
            print(finding, flush=True)
        return finding.well

    def end(self) -> None:
        """Say what is said at the end."""
        if self._json:
            print(json.dumps([dataclasses.asdict(item) for item in self.findings], indent=1))

    @contextlib.contextmanager
    def _at_work(self, what: str) -> Iterator[None]:
        """On a terminal, what is being tried, until it is known."""
        if self._progress:
            print(f"... {what}", end="", file=sys.stderr, flush=True)
        try:
            yield
        finally:
            self._erase()

    def _erase(self) -> None:
        if self._progress:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def describe(error: BaseException) -> str:
    """An error of the standard library in one line."""
    if isinstance(error, smtplib.SMTPResponseException):
        text = error.smtp_error
        shown = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return f"{error.smtp_code} {' '.join(shown.split())}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return " ".join(str(error).split()) or type(error).__name__


def attempt(work: Callable[[], object], seconds: float) -> Ending:
    """Do *work* until it is done, for so many *seconds*, or until Ctrl-C and its like, which is said.

    Main thread only.
    """
    try:
        with interruptible(), bounded(seconds):
            work()
    except OutOfTime:
        return Ending.LATE
    except KeyboardInterrupt:
        print("chatmail-relay: interrupted, cleaning up", file=sys.stderr)
        return Ending.INTERRUPTED
    return Ending.DONE


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in what is inside after *seconds*, wherever it waits. Main thread only.

    And again each second until it ends: an exception in a finalizer is lost, and who is about to make a
    system call when the signal comes waits all the same.
    """

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM, and the end of the terminal, end what is inside as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # nohup(1) has its reason to ignore one
    heard = [number for number in ENDS if signal.getsignal(number) != signal.SIG_IGN]
    with _handled(heard, stop):
        yield


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C, SIGTERM, and the end of the terminal do not end what is inside."""
    with _handled((signal.SIGINT, *ENDS), signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handled(numbers: Sequence[signal.Signals], handler: Any) -> Iterator[None]:
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, usual in zip(numbers, before, strict=True):
            signal.signal(number, usual)
