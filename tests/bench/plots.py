# SPDX-License-Identifier: MIT
"""The plots of docs/benchmarks.md, from its figures; with matplotlib, which nothing else needs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import matplotlib

from .document import FIGURES, FOLDER

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

Rows = list[dict[str, Any]]
REINJECTION = ", re-injection"
BLUE, GREY, RED = "#1f77b4", "#9a9a9a", "#d62728"


def mail_path(axes: Axes, rows: Rows) -> None:
    """Ratios to the floor, the product beside re-injection, with the spread of the rounds."""
    names = [row["name"] for row in rows if not row["name"].endswith(REINJECTION)]
    found = {row["name"]: row for row in rows}
    for shift, suffix, colour, label in (
        (-0.2, "", BLUE, "filter and DKIM (this relay)"),
        (0.2, REINJECTION, GREY, "re-injection, no filter"),
    ):
        for place, name in enumerate(names):
            row = found[name + suffix]
            pairs = zip(row["rounds"], row["floor_rounds"], strict=True)
            ratios = [value / floor for value, floor in pairs]
            middle = row["ratio"]
            error = [[max(middle - min(ratios), 0)], [max(max(ratios) - middle, 0)]]
            axes.bar(
                place + shift,
                middle,
                0.38,
                color=colour,
                yerr=error,
                capsize=3,
                label=label if place == 0 else None,
            )
    for place, name in enumerate(names):
        budget = found[name]["budget"]
        if budget:
            axes.hlines(budget, place - 0.42, place + 0.42, color=RED)
    axes.plot([], [], color=RED, label="budget")
    axes.axhline(1, color="black", linewidth=0.8)
    labels = [name.replace(", ", "\n").removesuffix(" a connection") for name in names]
    axes.set_xticks(range(len(names)), labels)
    axes.set(xlabel="size, and messages a connection", ylabel="CPU a message / floor")
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
    axes.legend(loc="upper left", ncols=3)


def spread(axes: Axes, rows: Rows) -> None:
    """How many of the messages were there after so many milliseconds."""
    (row,) = (row for row in rows if row["name"].endswith("median") and row["unit"] == "ms")
    times = sorted(row["rounds"])
    shares = [100 * (number + 1) / len(times) for number in range(len(times))]
    axes.step(times, shares, where="post", color=BLUE)
    axes.axvline(row["goal"], color=RED, label="goal of the median")
    axes.set(xlabel="milliseconds", ylabel="% of messages", xlim=(0, None), ylim=(0, 100))
    axes.legend()


def growth(axes: Axes, rows: Rows) -> None:
    """CPU time by addresses on disk."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        match = re.fullmatch(r"(.*), ([\d,]+) addresses", row["name"])
        if match and row["unit"].startswith("CPU"):
            size = int(match[2].replace(",", ""))
            lines.setdefault(match[1], []).append((size, row["value"]))
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="addresses on disk", ylabel="CPU ms", xscale="log", ylim=(0, None))
    axes.legend()


DRAW: dict[str, Callable[[Axes, Rows], None]] = {
    "outgoing": mail_path,
    "incoming": mail_path,
    "clients": spread,
    "logins": growth,
}


def main() -> None:
    """Draw all that was measured."""
    if not FIGURES.exists():
        return
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # the same figures make the same file
    for name, result in json.loads(FIGURES.read_text())["results"].items():
        if name in DRAW and "error" not in result:
            figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
            DRAW[name](axes, result["rows"])
            axes.set_title(f"{result['title']} ({result['date']})", fontsize=10)
            figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
            pyplot.close(figure)


if __name__ == "__main__":
    main()
