# SPDX-License-Identifier: MIT
"""docs/benchmarks.md, and beside it the figures as JSON; plots draws them.

A run of some measurements replaces those and keeps the others, each with the day it was measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import frame

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, FOLDER = DOCS / "benchmarks.md", DOCS / "benchmarks"
FIGURES = FOLDER / "benchmarks.json"

#: Plot -> what it shows, and the measurement that it stands with; see plots.
PLOTS = {
    "outgoing": "CPU a message, as a multiple of the floor",
    "incoming": "CPU a message, as a multiple of the floor",
    "clients": "Every message from client to client",
    "logins": "CPU of a login and of a check, by addresses on disk",
}

HEAD = """\
<!-- SPDX-License-Identifier: MIT -->
<!-- made by tools/bench; the figures are in benchmarks/benchmarks.json -->

# Benchmarks

`make bench` measures a relay in a container of the lab and writes this page; `make bench BENCH="outgoing
clients"` measures some things only, `tools/bench --help` lists them all. It takes about 40 minutes.

**Read ratios, not times.** What a message costs is CPU time, user and kernel, of all services of the relay,
by control group. It is measured in turns with the floor, {rounds} rounds, three times as many for messages of
up to 1 MB, and the median of the rounds' ratios counts. The *floor* is the same Postfix without any filter.
*Re-injection* is a second smtpd that takes the message over, with no program between the two: the least that
a filter costs which is a proxy. Senders and the sink are outside of what is counted.

Times in milliseconds and rates depend on the machine and on what else runs on it. Each table says where it
was measured, and the load average at the beginning. Above 0.5, other work shared the machine: its times
would be shorter on a quiet one.

`chatmail-relay bench` measures what needs no lab on any installed relay, by the ways that clients use:
delivery, submission, logins, `/new`, memory, the clean-up and `apply`. It makes accounts of its own and
deletes them, changes no settings and keeps within the relay's limits; chatmail-relay(8) tells more.

"""


def update(measured: dict[str, Any]) -> None:
    """Write page and JSON; raises ValueError for the figures of a short run."""
    if measured["short"]:
        raise ValueError("a short run is no benchmark: nothing was written")
    before = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"results": {}}
    results = {**before["results"]}
    for name, result in measured["results"].items():
        results[name] = {"date": measured["date"], "machine": measured["machine"], **result}
    # in the order of the program, which says what belongs together
    order = [name for name in frame.MEASUREMENTS if name in results]
    whole = {**measured, "results": {name: results[name] for name in order}}
    FOLDER.mkdir(exist_ok=True)
    FIGURES.write_text(json.dumps(whole, indent=1) + "\n")
    PAGE.write_text(page(whole))


def page(whole: dict[str, Any]) -> str:
    """The page of a document."""
    text = HEAD.format(rounds=whole["rounds"])
    missed = frame.missed(whole)
    text += "## Budgets\n\n"
    text += f"{len(missed)} missed:\n\n" if missed else "All hold.\n"
    text += "".join(f"* {line}\n" for line in missed)
    usual = [item.name for item in frame.MEASUREMENTS.values() if not item.by_name_only]
    if absent := [name for name in usual if name not in whole["results"]]:
        text += f"\nNot measured yet: {', '.join(absent)}.\n"
    for name, result in whole["results"].items():
        text += section(name, result)
    return text


def section(name: str, result: dict[str, Any]) -> str:
    """One measurement."""
    what = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    lines = [f"\n## {name}", "", f"{result['title']}.", "", f"{result['date']}: {what}.", ""]
    if name in PLOTS:
        lines += [f"![{PLOTS[name]}](benchmarks/{name}.svg)", ""]
    lines += [f"| {' | '.join(frame.COLUMNS)} |", "| --- | ---: | --- | ---: | ---: | --- |"]
    lines += [f"| {' | '.join(frame.cells(row))} |" for row in frame.rows_of(result)]
    for row in frame.rows_of(result):
        if row.budget is not None and row.excess and (parts := frame.profile(row)):
            lines += ["", f"{row.name}, {row.unit}: {parts}."]
    if "error" in result:
        lines += ["", f"**Failed**: {result['error']}"]
    return "\n".join(lines) + "\n"
