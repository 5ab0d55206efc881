# SPDX-License-Identifier: MIT
"""What `make test` does before pytest: stages that pass, fail, hang, and wait for each other."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from chatmail_build import stages  # noqa: E402
from chatmail_build.stages import Stage  # noqa: E402

#: Tells the number of its child, and both hang.
HANGS = "sleep 1000 & echo $! > {pid}; echo half way; wait"


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "LOGS", tmp_path / "log")
    monkeypatch.setattr(stages, "RESULTS", tmp_path / "stages.json")
    return tmp_path


def shell(name, script, needs=()):
    return Stage(name, ("sh", "-euc", script), needs)


def test_what_failed_is_shown_and_what_needs_it_is_skipped(directory, capfd):
    results = stages.run_all(
        (
            shell("good", "echo fi; echo ne"),
            shell("bad", "echo the reason; exit 3"),
            shell("after good", "true", ("good",)),
            shell("after bad", "true", ("bad",)),
        )
    )
    assert {name: row["result"] for name, row in results.items()} == {
        "good": "passed",
        "bad": "failed",
        "after good": "passed",
        "after bad": "skipped",
    }
    assert json.loads(stages.RESULTS.read_text()) == results
    printed = capfd.readouterr().out
    assert "    the reason\n" in printed and "fi\n" not in printed


def test_what_hangs_is_told_and_ended_with_all_it_started(directory, monkeypatch, capfd):
    monkeypatch.setattr(stages, "PROGRESS", 0.2)
    pid = directory / "pid"
    results = stages.run_all((shell("hangs", HANGS.format(pid=pid)),), limit=2)
    assert results["hangs"]["result"] == "failed"
    printed = capfd.readouterr().out
    assert "s] hangs: ... half way\n" in printed
    assert "    half way\n    \n    not done after 2 s\n" in printed
    # the kernel has it removed by its new parent; until then it is a zombie
    state = Path(f"/proc/{int(pid.read_text())}/stat")
    assert not state.exists() or state.read_text().rpartition(") ")[2][0] == "Z"
