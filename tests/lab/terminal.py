# SPDX-License-Identifier: MIT
"""A terminal inside a host: what a person at a keyboard sees and types."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pexpect

from .host import Host
from .shell import LabError

SECONDS = 120
KILL_LINE = "\x15"  # ^U; readline offers the present value for editing
KILL_ENTRY = "\x01\x0b"  # ^A ^K, the same in a dialog
ESCAPE = "\x1b"
SIZE = (30, 100)  # rows, columns


class Terminal:
    """One program on a pseudo-terminal of the machine below, running inside the host."""

    def __init__(self, child: pexpect.spawn) -> None:
        self._child = child

    def expect(self, pattern: str) -> str:
        """Wait for *pattern* (a regular expression); returns what was printed up to its end."""
        try:
            self._child.expect(pattern)
        except (pexpect.TIMEOUT, pexpect.EOF):
            raise LabError(f"no {pattern!r} on the terminal; last:\n{self._last()}") from None
        return str(self._child.before) + str(self._child.after)

    def type(self, line: str, *, kill: str = KILL_LINE) -> None:
        """Type a line and Return, in place of what is offered."""
        self._child.send(kill + line + "\r")

    def send(self, keys: str) -> None:
        """Type keys as they are."""
        self._child.send(keys)

    def finish(self) -> tuple[int, str]:
        """Wait for the end; exit status and what was printed since the last match."""
        self._child.expect(pexpect.EOF)
        self._child.close()
        return self._child.exitstatus or 0, str(self._child.before)

    def _last(self) -> str:
        return str(self._child.buffer or self._child.before)[-2000:]


@contextmanager
def terminal(
    host: Host,
    *argv: str,
    frontend: str = "readline",
    priority: str = "",
    language: str = "",
    timeout: float = SECONDS,
) -> Iterator[Terminal]:
    """Run *argv* inside *host* on a terminal, with debconf's *frontend*; *priority* wins over options."""
    program, *arguments = host.command(
        "env",
        "TERM=xterm",
        f"DEBIAN_FRONTEND={frontend}",
        *([f"DEBIAN_PRIORITY={priority}"] if priority else []),
        f"LANGUAGE={language}",
        *argv,
    )
    child = pexpect.spawn(program, arguments, timeout=timeout, encoding="utf-8", dimensions=SIZE)
    try:
        yield Terminal(child)
    finally:
        child.close(force=True)
