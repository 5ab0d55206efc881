# SPDX-License-Identifier: MIT
"""`make bench`: a short run measures everything; its figures are for the document of a long one alone."""

import copy
import functools
import json
import math

import pytest
from bench import __main__ as program
from bench import document, frame
from bench.relay import Bench
from conftest import DOMAIN, measured

#: What the document of a run must have; a row that is missing here would not be missed there.
ROWS = {
    "outgoing": ("2 kB, 1 a", "2 kB, 20 a", "50 kB, 1 a", "1 MB, 20 a", "20 MB, 1 a"),
    "incoming": ("2 kB, 1 a", "2 kB, 20 a", "50 kB, 1 a", "1 MB, 20 a", "20 MB, 1 a"),
    "delivery": ("250 to EXISTS, median", "250 to EXISTS, p95"),
    "clients": ("account set-up", "SecureJoin", "client to client, median", "of it, CPU"),
    "relays": ("account set-up", "SecureJoin", "client to client, median", "of it, CPU"),
    "logins": ("existing login, 100 ", "new login, 300 ", "recipient, 300 "),
    "new": ("/new",),
    "idling": ("LMTP to EXISTS", "Dovecot"),
    "sessions": ("10 sessions", "20 sessions"),
    "idle_memory": ("idle relay",),
    "filter_memory": ("filter, 4 x 20 MB",),
    "install": ("apt-get install", "first message"),
    "apply": ("apply",),
    "storage": ("expire --dry-run", "fsreport", "expire, half"),
    "pushes": ("notifications",),
}


@pytest.fixture(scope="module")
def short(lab, relay):
    """The document of a short run."""
    with Bench(short=True, lab=lab, peer=(relay, DOMAIN)) as bench:
        wanted = [item for item in frame.MEASUREMENTS.values() if not item.by_name_only]
        found = frame.run(bench, wanted)
        lab.remove(bench.host)
    for row in found["results"].get("install", {"rows": []})["rows"]:
        if row["name"].startswith("first message"):
            measured["apt install to first message"] = f"{row['value']:.1f} s (goal 60 s)"
    return found


def lacking(document):
    """What of ROWS the document does not have as a number."""
    found = {
        (name, row["name"])
        for name, result in document["results"].items()
        for row in result["rows"]
        if math.isfinite(row["value"]) and row["value"] >= 0
    }
    return [
        (name, start)
        for name, starts in ROWS.items()
        for start in starts
        if not any(here == name and row.startswith(start) for here, row in found)
    ]


def test_a_short_run_measures_everything(short):
    assert frame.failures(short) == []
    assert lacking(short) == []
    assert set(ROWS) == set(short["results"])
    measured["a short run of the benchmarks"] = (
        f"{sum(result['seconds'] for result in short['results'].values()):.0f} s"
    )


def test_memory_stays_within_its_budgets(short):
    """Unlike time it does not depend on what else the machine does."""
    rows = [row for result in short["results"].values() for row in frame.rows_of(result)]
    bounded = [row for row in rows if row.budget and row.unit in ("MB", "MiB", "MiB PSS")]
    assert len(bounded) == 4
    assert [row.name for row in bounded if row.excess] == []
    for row in bounded:
        measured[row.name] = f"{row.value:.1f} {row.unit} (at most {row.budget:.0f})"


@pytest.mark.parametrize("name, start", [(name, row) for name in ROWS for row in ROWS[name]])
def test_a_row_that_is_missing_is_noticed(short, name, start):
    without = copy.deepcopy(short)
    rows = without["results"][name]["rows"]
    rows[:] = [row for row in rows if not row["name"].startswith(start)]
    assert (name, start) in lacking(without)


def measurement(function, rows=1):
    return frame.Measurement(function.__name__, function, rows, rows, False)


def failing(_bench):
    """Fails."""
    raise RuntimeError("the sink is closed\nand more")


def empty(_bench):
    """Returns nothing."""
    return []


def working(_bench):
    """Works, and misses its budget by a fifth."""
    return [frame.paired_row("x", "ms", [2.0, 9.0, 2.4], [2.0, 2.0, 2.0], budget=1.0)]


def test_a_failure_is_told_and_the_others_go_on(capsys):
    found = frame.run(Bench(short=True), map(measurement, (failing, empty, working)))
    assert frame.failures(found) == [
        "failing: RuntimeError: the sink is closed",
        "empty: 0 rows in place of 1",
    ]
    assert "FAILED: RuntimeError: the sink is closed" in capsys.readouterr().out
    (row,) = frame.rows_of(found["results"]["working"])
    assert (row.value, row.floor, row.ratio) == (2.4, 2.0, 1.2)


@pytest.mark.parametrize(
    "options, functions, status",
    [
        ([], [working], 0),
        (["--budgets"], [working], 1),
        ([], [working, empty], 1),
        ([], [failing], 1),
    ],
)
def test_the_exit_status_is_of_failures_and_if_asked_for_of_budgets(
    options, functions, status, capsys, tmp_path
):
    file = tmp_path / "figures.json"
    given = program.parser().parse_args([*options, "--json", str(file)])
    save = functools.partial(program.save, given)
    found = frame.run(Bench(short=True), map(measurement, functions), save)
    assert program.finish(given, found) == status
    assert json.loads(file.read_text()) == found
    if options:
        assert (
            "budget missed: working: x: budget <= 1.00: missed by 20 %" in capsys.readouterr().err
        )


@pytest.mark.parametrize("value, verdict", [(4000.0, "missed by 20 %"), (5000.0, "holds")])
def test_a_bound_from_below(value, verdict):
    row = frame.Row("new", "requests/s", value, goal=5000, at_least=True)
    assert row.verdict == f"goal >= 5,000: {verdict}"


def test_a_short_run_is_not_published(short):
    with pytest.raises(ValueError, match="short run"):
        document.update(short)


def test_the_page_is_that_of_the_figures():
    """Nobody edits it by hand, and every figure and plot of it is there."""
    figures = json.loads(document.FIGURES.read_text())
    assert document.PAGE.read_text() == document.page(figures)
    for name in figures["results"].keys() & document.PLOTS:
        assert (document.FOLDER / f"{name}.svg").stat().st_size > 0


def test_the_page_says_what_takes_the_time_where_a_budget_is_missed():
    spent = {"filter": 1.25, "postfix": 2.0, "dbus": 0.001}
    row = frame.paired_row(
        *("x", "CPU ms", [3.25], [1.9]), budget=1.0, detail=spent, floor_detail={"postfix": 1.9}
    )
    result = {"title": "t", "date": "d", "machine": {}, "rows": [frame.asdict(row)]}
    said = "\n\nx, CPU ms: postfix 2.00 (floor 1.90), filter 1.25.\n"
    assert said in document.section("name", result)
    kept = {**result, "rows": [{**frame.asdict(row), "budget": 2.0}]}
    assert "filter 1.25" not in document.section("name", kept)
