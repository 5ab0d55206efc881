# SPDX-License-Identifier: MIT
"""What all measurements have in common: what they work with, their rounds, and their figures."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..accounts import AccountError, Relay
from ..selftest.accounts import Accounts
from ..selftest.command import STATUS
from ..selftest.net import Target
from ..selftest.report import TROUBLE, Wrong, describe
from .limits import Senders

LEAST_FOR_P95 = 20  # samples


@dataclass(frozen=True)
class Bench:
    """One run, for those who measure; *units* are the relay's, *messages* is the number of a round."""

    relay: Relay
    target: Target
    accounts: Accounts
    senders: Senders
    units: Sequence[str]
    messages: int


#: Takes the samples of a round: figure -> numbers in its unit. Raises Wrong, AccountError, TROUBLE.
Round = Callable[[], Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class Measurement:
    """*figures* is name -> unit. *begin* prepares, outside of all clocks; it raises what a round does."""

    part: str
    figures: Mapping[str, str]
    begin: Callable[[Bench], Round]


@dataclass(frozen=True)
class Row:
    """One figure: *samples* in its unit, from so many *rounds*; *trouble* is why there are not more."""

    part: str
    name: str
    unit: str
    rounds: int
    samples: tuple[float, ...]
    trouble: str

    @property
    def p95(self) -> float | None:
        """The 95th percentile; None if there are too few samples for one."""
        if len(self.samples) < LEAST_FOR_P95:
            return None
        return sorted(self.samples)[int(len(self.samples) * 0.95)]

    def as_data(self) -> dict[str, Any]:
        """For JSON; numbers that could not be measured are None."""
        return {
            "part": self.part,
            "name": self.name,
            "unit": self.unit,
            "median": statistics.median(self.samples) if self.samples else None,
            "p95": self.p95,
            "least": min(self.samples, default=None),
            "most": max(self.samples, default=None),
            "rounds": self.rounds,
            "samples": list(self.samples),
            "trouble": self.trouble,
        }


class Result:
    """What a measurement has found so far; after a trouble it goes no further."""

    def __init__(self, measurement: Measurement) -> None:
        self.measurement = measurement
        self.rounds = 0
        self.trouble = ""
        self._round: Round | None = None
        self._samples: dict[str, list[float]] = {name: [] for name in measurement.figures}

    def begin(self, bench: Bench) -> None:
        """Prepare the rounds."""
        with self._noticing():
            self._round = self.measurement.begin(bench)

    def add_round(self) -> None:
        """Measure once more."""
        if self._round is None or self.trouble:
            return
        with self._noticing():
            found = self._round()
            for name, samples in self._samples.items():
                samples += found[name]
            self.rounds += 1

    @contextlib.contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            yield
        except Wrong as error:
            self.trouble = "; ".join(filter(None, (str(error), error.remedy)))
        except (AccountError, *TROUBLE) as error:
            self.trouble = f"{describe(error)}; {STATUS}"

    def rows(self) -> list[Row]:
        """All its figures, measured or not."""
        part, units = self.measurement.part, self.measurement.figures
        return [
            Row(part, name, units[name], self.rounds, tuple(samples), self.trouble)
            for name, samples in self._samples.items()
        ]


NUMBERS = ("median", "p95", "least", "most")


def table(rows: Sequence[Row]) -> list[str]:
    """Lines for people: the figures, and below them what has stopped whom."""
    lines: list[tuple[str, ...]] = [("", *NUMBERS, "unit")]
    for row in rows:
        data = row.as_data()
        cells = [_shown(data[key]) for key in NUMBERS]
        lines.append((f"{row.part}: {row.name}", *cells, row.unit))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = []
    for name, *cells, unit in lines:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=False)]
        text.append("  ".join((name.ljust(widths[0]), *right, unit)).rstrip())
    said = [f"{row.part}: after {row.rounds} rounds: {row.trouble}" for row in rows if row.trouble]
    return text + list(dict.fromkeys(said))


def _shown(value: float | None) -> str:
    """Three digits that matter, and no more than whole ones above that."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
