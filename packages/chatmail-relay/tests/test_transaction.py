# SPDX-License-Identifier: MIT
"""All files or none, whatever dies in between."""

import errno
import json
import os
import time
from pathlib import Path

import pytest
from chatmail_relay.transaction import Change, Transaction, TransactionError, differs

OLD = {"a.conf": b"old a\n", "b.conf": b"old b\n"}
SYSTEM_CALLS = ("open", "replace", "link", "unlink", "rmdir", "makedirs", "fsync")


def change(path: Path, content: bytes | None, mode: int = 0o644) -> Change:
    return Change(path, content, mode, os.geteuid(), os.getegid())


def make_files(folder: Path) -> list[Change]:
    """Two files to replace, one to remove, one to make in a new folder."""
    for name, content in OLD.items():
        (folder / name).write_bytes(content)
    (folder / "gone.conf").write_bytes(b"old gone\n")
    return [
        change(folder / "a.conf", b"new a\n", 0o600),
        change(folder / "b.conf", b"new b\n"),
        change(folder / "gone.conf", None),
        change(folder / "deep/er/c.conf", b"new c\n"),
    ]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


NEW_TREE = {"a.conf": b"new a\n", "b.conf": b"new b\n", "deep/er/c.conf": b"new c\n"}
OLD_TREE = OLD | {"gone.conf": b"old gone\n"}


def die_at(number: int, work: object) -> bool:
    """Run *work* in a child that dies like kill -9 at its system call *number*; True if it did."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def dying(function):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == number:
                    os._exit(9)
                return function(*args, **kwargs)

            return call

        for name in SYSTEM_CALLS:
            setattr(os, name, dying(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def test_all_changes_are_made_and_nothing_is_left_beside_them(tmp_path):
    files, state = tmp_path / "etc", tmp_path / "state"
    files.mkdir()
    Transaction(state).run(make_files(files))
    assert tree(files) == NEW_TREE
    assert (files / "a.conf").stat().st_mode & 0o777 == 0o600
    assert tree(state) == {}


def test_a_file_can_look_older_than_it_is(tmp_path):
    files = [
        Change(tmp_path / name, b"new\n", 0o644, os.geteuid(), os.getegid(), age)
        for name, age in (("new.conf", 0), ("settled.conf", 1000))
    ]
    Transaction(tmp_path / "state").run(files)
    ages = [time.time() - file.dest.stat().st_mtime for file in files]
    assert 0 <= ages[0] < 500 and 1000 <= ages[1] < 1500


def test_a_kill_at_any_system_call_leaves_all_or_nothing(tmp_path):
    outcomes = set()
    for number in range(1, 200):
        folder = tmp_path / str(number)
        files, state = folder / "etc", folder / "state"
        files.mkdir(parents=True)
        changes = make_files(files)
        died = die_at(number, lambda: Transaction(state).run(changes))
        Transaction(state).recover()
        assert tree(files) in (OLD_TREE, NEW_TREE), f"system call {number}"
        assert not (state / "journal.json").exists()
        outcomes.add("new" if tree(files) == NEW_TREE else "old")
        if not died:
            break
    else:
        pytest.fail("the transaction never came to its end")
    assert outcomes == {"old", "new"}
    assert number > 30, "the deaths were not where the work is"


def test_a_kill_during_recovery_is_recovered_too(tmp_path):
    for number in range(1, 60):
        files, state = tmp_path / f"{number}/etc", tmp_path / f"{number}/state"
        files.mkdir(parents=True)
        changes = make_files(files)
        assert die_at(30, lambda: Transaction(state).run(changes))
        assert json.loads((state / "journal.json").read_text())["state"] == "installing"
        died = die_at(number, lambda: Transaction(state).recover())
        Transaction(state).recover()
        assert tree(files) == OLD_TREE
        if not died:
            return
    pytest.fail("recovery never came to its end")


def test_a_refusal_puts_everything_back(tmp_path):
    changes = make_files(tmp_path)

    def refuse():
        assert (tmp_path / "a.conf").read_bytes() == b"new a\n"
        raise RuntimeError("checker says no")

    with pytest.raises(RuntimeError, match="checker says no"):
        Transaction(tmp_path / "state").run(changes, refuse)
    assert tree(tmp_path) == OLD_TREE
    assert not (tmp_path / "deep").exists()


def test_a_full_disk_changes_nothing_and_is_told_with_the_path(tmp_path, monkeypatch):
    changes = make_files(tmp_path)
    real = os.open

    def full(path, *args, **kwargs):
        if "c.conf" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(TransactionError, match=r"c\.conf.*No space left.*nothing was changed"):
        Transaction(tmp_path / "state").run(changes)
    assert tree(tmp_path) == OLD_TREE


def test_a_symbolic_link_is_replaced_and_comes_back(tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"theirs\n")
    link = tmp_path / "link.conf"
    link.symlink_to(target)
    with pytest.raises(RuntimeError):
        Transaction(tmp_path / "state").run([change(link, b"ours\n")], _no)
    assert link.is_symlink() and link.read_bytes() == b"theirs\n"
    Transaction(tmp_path / "state").run([change(link, b"ours\n")])
    assert not link.is_symlink() and target.read_bytes() == b"theirs\n"


def _no():
    raise RuntimeError


def test_a_directory_in_the_way_is_an_error(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(TransactionError, match="is a directory"):
        differs(change(tmp_path / "x", b""))
