# SPDX-License-Identifier: MIT
"""One line on the terminal that says how far a long command is."""

from __future__ import annotations

import sys
import time

SECONDS = 0.2  # between two states


class Progress:
    """Writes to standard error, and nothing at all if that is no terminal."""

    def __init__(self) -> None:
        # back to the beginning of the line, and erase it (ECMA-48 EL)
        self.clear = "\r\x1b[K" if sys.stderr.isatty() else ""
        self._next = 0.0

    def show(self, text: str) -> None:
        """Replace the line by *text*, a few times a second at most."""
        now = time.monotonic()
        if self.clear and now >= self._next:
            self._next = now + SECONDS
            print(self.clear + text, end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave an empty line for what is printed next."""
        print(end=self.clear, file=sys.stderr, flush=True)
