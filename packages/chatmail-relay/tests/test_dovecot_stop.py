# SPDX-License-Identifier: MIT
"""The end of dovecot.service: inotify watches of another process; tests/test_restarts.py has the rest."""

import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "chatmail-dovecot-conf/dovecot-stop"

#: Opens inotify instances, one without a watch; says so, and waits. Then: do they still watch?
SLEEPER = """
import ctypes, os, select, sys
libc, folders = ctypes.CDLL(None), sys.argv[1:]
instances = [libc.inotify_init1(os.O_NONBLOCK) for _ in folders]
for number, instance in enumerate(instances[1:]):
    for folder in folders[: 1 + number % 2]:
        assert libc.inotify_add_watch(instance, folder.encode(), 0x100) > 0
print(flush=True)
input()
open(folders[0] + "/new", "w").close()
for instance in instances:
    try:
        events = os.read(instance, 4096)
    except BlockingIOError:
        events = b""
    print(b"new" in events)
"""


@pytest.fixture
def program():
    """The program as a module."""
    loader = importlib.machinery.SourceFileLoader("dovecot_stop", str(PROGRAM))
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_loader("dovecot_stop", loader)
    )
    loader.exec_module(module)
    return module


@pytest.fixture
def sleeper(tmp_path):
    """A process with 20 instances, of which one watches nothing, and others one folder or two."""
    folders = [tmp_path / str(number) for number in range(20)]
    for folder in folders:
        folder.mkdir()
    words = [sys.executable, "-c", SLEEPER, *map(str, folders)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as made:
        assert made.stdout.readline() == "\n"
        yield made
        made.kill()


def watching(sleeper):
    """How many of its instances hear of a new file."""
    return sleeper.communicate("\n")[0].count("True")


def test_all_watches_of_a_process_are_removed(program, sleeper):
    assert program.unwatch(sleeper.pid) == 19
    assert program.unwatch(sleeper.pid) == 0
    assert watching(sleeper) == 0


def test_untouched_it_would_have_heard(sleeper):
    assert watching(sleeper) == 19


def test_a_process_that_has_ended_is_an_error_that_says_so(program):
    with subprocess.Popen(["true"]) as ended:
        pass
    with pytest.raises(OSError, match="No such process"):
        program.unwatch(ended.pid)


def test_what_may_not_be_touched_is_an_error_that_says_so(program, sleeper, monkeypatch):
    monkeypatch.setattr(program, "PIDFD_GETFD", -1)
    with pytest.raises(OSError, match="pidfd_getfd: "):
        program.unwatch(sleeper.pid)


def test_the_master_and_its_log_are_left_for_the_end(program, tmp_path):
    running = []
    for name in ("dovecot", "log", "imap"):
        (tmp_path / name).symlink_to("/bin/sh")
        words = [tmp_path / name, "-c", "echo; read line"]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process.stdout.readline()
        running.append(process)
    master, _log, imap = pids = [process.pid for process in running]
    (tmp_path / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in [*pids, 2**22 + 1]))
    assert list(program.others(tmp_path, master)) == [(imap, "imap")]
    for process in running:
        process.communicate(b"\n")
