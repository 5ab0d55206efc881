# SPDX-License-Identifier: MIT
"""What every measurement has in common: rows, their budgets, and how a run reports them.

A measurement is a function of tests/bench that takes a Bench (see relay) and returns rows. One that raises,
or that returns another number of rows than it has promised, has failed; the others go on.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .relay import Bench


@dataclass(frozen=True)
class Row:
    """One figure. Budget and goal are about the ratio if there is a floor, else about the value."""

    name: str
    unit: str
    value: float
    floor: float | None = None  # what it is compared with, in the same unit
    ratio: float | None = None  # of value to floor: the median of the rounds' ratios
    budget: float | None = None  # must hold
    goal: float | None = None  # never fails a run
    at_least: bool = False  # budget and goal are the least, not the most, that it may be
    rounds: list[float] = field(default_factory=list)  # values, as measured
    floor_rounds: list[float] = field(default_factory=list)
    detail: dict[str, float] = field(default_factory=dict)  # CPU by unit and the like
    floor_detail: dict[str, float] = field(default_factory=dict)

    @property
    def excess(self) -> float:
        """By which part of it the budget or the goal is missed; 0 if it holds or there is none."""
        limit = self.goal if self.budget is None else self.budget
        if limit is None:
            return 0.0
        judged = self.value if self.ratio is None else self.ratio
        beyond = limit - judged if self.at_least else judged - limit
        return max(beyond / (limit or 1.0), 0.0)

    @property
    def verdict(self) -> str:
        """Budget or goal, and whether it holds."""
        for kind, limit in (("budget", self.budget), ("goal", self.goal)):
            if limit is not None:
                sign = ">=" if self.at_least else "<="
                held = f"missed by {100 * self.excess:.0f} %" if self.excess else "holds"
                return f"{kind} {sign} {shown(limit)}: {held}"
        return ""


def median_row(name: str, unit: str, rounds: Sequence[float], **more: Any) -> Row:
    """A row of the median of *rounds*."""
    return Row(name, unit, statistics.median(rounds), rounds=list(rounds), **more)


def paired_row(
    name: str, unit: str, rounds: Sequence[float], floors: Sequence[float], **more: Any
) -> Row:
    """A row of what was measured side by side with its floor, round by round."""
    ratios = [value / floor for value, floor in zip(rounds, floors, strict=True)]
    return median_row(
        name,
        unit,
        rounds,
        floor=statistics.median(floors),
        ratio=statistics.median(ratios),
        floor_rounds=list(floors),
        **more,
    )


def spread_rows(
    name: str, seconds: Iterable[float], goals: tuple[float | None, float | None]
) -> list[Row]:
    """Median and 95th percentile in milliseconds, with goals for both."""
    ordered = sorted(1000 * value for value in seconds)
    middle, late = goals
    p95 = ordered[int(len(ordered) * 0.95)]
    return [
        median_row(f"{name}, median", "ms", ordered, goal=middle),
        Row(f"{name}, p95", "ms", p95, goal=late),
    ]


@dataclass(frozen=True)
class Measurement:
    """A named function, and how many rows it returns, in a short run too."""

    name: str
    function: Callable[[Bench], list[Row]]
    rows: int
    short_rows: int
    by_name_only: bool  # it takes hours

    @property
    def title(self) -> str:
        """The first line of its docstring."""
        return (self.function.__doc__ or self.name).splitlines()[0].rstrip(".")


MEASUREMENTS: dict[str, Measurement] = {}


def measurement(
    rows: int, short_rows: int = 0, *, by_name_only: bool = False
) -> Callable[[Callable[[Bench], list[Row]]], Callable[[Bench], list[Row]]]:
    """Decorator: it may be asked for by the function's name."""

    def register(function: Callable[[Bench], list[Row]]) -> Callable[[Bench], list[Row]]:
        name = function.__name__
        made = Measurement(name, function, rows, short_rows or rows, by_name_only)
        MEASUREMENTS[name] = made
        return function

    return register


def run(
    bench: Bench,
    wanted: Iterable[Measurement],
    save: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Measure, print each table as it is there, and *save* what there is: a later end loses nothing.

    Returns the document that becomes the JSON file.
    """
    results: dict[str, dict[str, Any]] = {}
    document = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": {**machine(), "load": round(os.getloadavg()[0], 1)},
        "short": bench.short,
        "rounds": bench.rounds,
        "results": results,
    }
    for item in wanted:
        begin = time.monotonic()
        result: dict[str, Any] = {"title": item.title, "rows": []}
        try:
            rows = item.function(bench)
            promised = item.short_rows if bench.short else item.rows
            result["rows"] = [asdict(row) for row in rows]
            if len(rows) != promised:
                result["error"] = f"{len(rows)} rows in place of {promised}"
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            result["error"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        result["seconds"] = round(time.monotonic() - begin, 1)
        results[item.name] = result
        print(table(item.name, result), flush=True)
        save(document)
    return document


def failures(document: Mapping[str, Any]) -> list[str]:
    """One line for each measurement that failed."""
    results = document["results"].items()
    return [f"{name}: {result['error']}" for name, result in results if "error" in result]


def missed(document: Mapping[str, Any]) -> list[str]:
    """One line for each budget that does not hold."""
    return [
        f"{name}: {row.name}: {row.verdict}"
        for name, result in document["results"].items()
        for row in rows_of(result)
        if row.budget is not None and row.excess
    ]


def profile(row: Row) -> str:
    """What takes the value, the most first: "filter 1.33, postfix 1.95 (floor 1.80)"; "" if not known."""
    parts = []
    for name, value in sorted(row.detail.items(), key=lambda item: -item[1]):
        floor = row.floor_detail.get(name, 0.0)
        if row.floor_detail and max(value, floor) > 0.01 * row.value:
            parts.append(f"{name} {shown(value)}" + (f" (floor {shown(floor)})" if floor else ""))
    return ", ".join(parts)


def rows_of(result: Mapping[str, Any]) -> list[Row]:
    """The rows of one measurement of a document."""
    return [Row(**row) for row in result["rows"]]


COLUMNS = ("", "value", "unit", "floor", "ratio", "budget or goal")


def cells(row: Row) -> tuple[str, ...]:
    """A row as the columns of a table."""
    floor = "" if row.floor is None else shown(row.floor)
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return (row.name, shown(row.value), row.unit, floor, ratio, row.verdict)


def table(name: str, result: Mapping[str, Any]) -> str:
    """What one measurement found, for a terminal."""
    lines = [("", *COLUMNS[1:]), *map(cells, rows_of(result))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    text = [f"\n{name}: {result['title']} ({result['seconds']:.0f} s)"]
    for line in lines:
        left, *numbers = (
            cell.ljust(width) if column in (0, 2, 5) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        text.append("  ".join((left, *numbers)).rstrip())
    if "error" in result:
        text.append(f"FAILED: {result['error']}")
    return "\n".join(text)


def shown(value: float) -> str:
    """Three digits that matter, and no more than whole ones above that."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if value >= 10 else 2}f}" if value >= 1 else f"{value:.3g}"


def machine() -> dict[str, Any]:
    """What it ran on; no name of it."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "CPU": found[1] if found else platform.machine(),
        "cores": os.cpu_count(),
        "memory in GiB": round(memory, 1),
        "kernel": ".".join(platform.release().split(".")[:2]),
        "Python": platform.python_version(),
    }
