# SPDX-License-Identifier: MIT
"""What `make test` does around tests: stages that pass, fail, hang, wait for each other; tests that hang."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from chatmail_build import report, stages  # noqa: E402
from chatmail_build.stages import Stage  # noqa: E402
from lab.shell import wait_for  # noqa: E402

#: Tells the number of its child, and both hang.
HANGS = "sleep 1000 & echo $! > {pid}; echo half way; wait"


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "LOGS", tmp_path / "log")
    monkeypatch.setattr(stages, "RESULTS", tmp_path / "stages.json")
    return tmp_path


def shell(name, script, needs=()):
    return Stage(name, ("sh", "-euc", script), needs)


def ended(pid):
    """Its new parent has the kernel remove it; until then it is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


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
    wait_for(lambda: ended(int(pid.read_text())), 10, "the end of the stage's child")


SEEDED = """
import pytest, threading

@pytest.fixture
def stuck():
    threading.Event().wait()

def test_before():
    pass

def test_hangs():
    threading.Event().wait()

def test_waits_for_a_fixture(stuck):
    pass

def test_after():
    pass
"""


def test_a_test_that_hangs_fails_and_tells_where(tmp_path):
    (tmp_path / "test_seeded.py").write_text(SEEDED)
    environment = {**os.environ, "PYTHONPATH": str(Path(report.__file__).parents[1])}
    command = [sys.executable, "-m", "pytest", *report.OPTIONS]
    assert "--timeout" in command
    told = subprocess.run(
        [*command, "--timeout", "1", str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert told.returncode == 1
    assert "1 failed, 2 passed, 1 error" in told.stdout
    assert told.stdout.count("Failed: Timeout (>1.0s)") >= 2
    for where in ("def test_hangs():", "def stuck():"):
        assert f"    {where}\n>       threading.Event().wait()\n" in told.stdout
