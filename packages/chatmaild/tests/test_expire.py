# SPDX-License-Identifier: MIT
"""Expiry: ages, sizes, idle accounts, quota; odd files, kills, races, memory."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
from mailstore import NOW, make_box, set_age

from chatmaild import expire, maildir
from chatmaild.config import read_settings
from chatmaild.users import DAY, MailStore

ALICE, BOB = "alice1234@chat.example", "bob123456@chat.example"
MEGABYTE = 2**20


@pytest.fixture
def store(tmp_path):
    made = MailStore(tmp_path / "mail")
    made.path.mkdir()
    return made


@pytest.fixture
def ini(tmp_path):
    path = tmp_path / "chatmail.ini"
    path.write_text(
        f"[params]\nmail_domain = chat.example\nmailboxes_dir = {tmp_path}/mail\n"
        "max_mailbox_size = 100M\n"
    )
    return path


@pytest.fixture
def run(store, ini):
    """Run over the whole store, at *now*; the summary."""

    def run(now=NOW, dry_run=False, connected=frozenset):
        settings = read_settings(ini)[0]
        expiry = expire.Expiry(settings, now, dry_run=dry_run, connected=connected)
        with maildir.open_store(store.path) as opened:
            expiry.run(opened)
        return expiry.summary

    return run


@pytest.mark.parametrize("folder", ["cur", "new", "tmp", ".Sent/cur", ".Sent/new"])
def test_old_messages_go_and_younger_stay(store, run, folder):
    box = make_box(store, ALICE)
    old, young = box.message(20.1, folder), box.message(19.9, folder)
    summary = run()
    assert not old.exists() and young.exists()
    assert (summary.messages, summary.removed_messages, summary.removed_bytes) == (2, 1, 100)
    assert summary.removed_by == {"age": 1, "large": 0, "quota": 0}


def test_large_messages_go_earlier_where_a_client_has_seen_them(store, run):
    box = make_box(store, ALICE)
    gone = [box.message(7.1, folder, expire.LARGE + 1) for folder in ("cur", ".Sent/cur")]
    stay = [
        box.message(7.1, "new", expire.LARGE + 1),
        box.message(6.9, "cur", expire.LARGE + 1),
        box.message(7.1, "cur", expire.LARGE),
    ]
    summary = run()
    assert not any(path.exists() for path in gone) and all(path.exists() for path in stay)
    assert summary.removed_by["large"] == 2


def test_dovecots_quota_is_forgotten_only_where_something_went(store, run):
    alice, bob = make_box(store, ALICE), make_box(store, BOB)
    alice.message(30)
    bob.message(1)
    run()
    assert not (alice.path / "maildirsize").exists() and (bob.path / "maildirsize").exists()
    assert (alice.path / "dovecot.index.log").exists()


@pytest.mark.parametrize(("age", "goes"), [(90.9, False), (91, True), (500, True), (-3, False)])
def test_an_account_goes_after_as_many_days_without_login(store, run, age, goes):
    box = make_box(store, ALICE, login_age=age)
    box.message(1)
    summary = run()
    assert box.path.exists() is not goes
    assert summary.removed_mailboxes == goes and summary.mailboxes == 1
    assert run().errors == 0


@pytest.mark.parametrize("how", ["empty", "disabled", "link", "directory"])
def test_a_blocked_or_odd_address_loses_its_mail_but_is_not_given_away(store, run, how):
    box = make_box(store, ALICE, login_age=500)
    old = box.message(30)
    password = box.path / "password"
    if how == "disabled":
        (box.path / "DISABLED").touch()
    elif how == "empty":
        password.write_text("")
        set_age(password, 500)
    else:
        password.unlink()
        password.symlink_to("/etc/passwd") if how == "link" else password.mkdir()
    set_age(box.path, 500)
    summary = run()
    assert os.path.lexists(password) and not old.exists()
    assert summary.removed_mailboxes == 0


def test_a_remainder_that_is_no_account_goes_when_it_is_empty_and_idle(store, run):
    names = [f"{name}@chat.example" for name in ("young", "old", "mail", "blocked")]
    boxes = [make_box(store, name) for name in names]
    for box in boxes:
        (box.path / "password").unlink()
    boxes[2].message(1)
    (boxes[3].path / "DISABLED").touch()
    for box in boxes[1:]:
        set_age(box.path, 92)
    run()
    assert [box.path.exists() for box in boxes] == [True, False, True, True]


def test_a_dry_run_counts_the_same_and_changes_nothing(store, run):
    make_box(store, BOB, login_age=100).message(1)
    box = make_box(store, ALICE)
    for age in (30, 1.5, 1.2, 0.5):
        box.message(age, tag=60 * MEGABYTE)
    (store.path / maildir.REMOVED / "leftover").mkdir(parents=True)

    def picture():
        return sorted((str(path), path.lstat().st_mtime) for path in store.path.rglob("*"))

    before = picture()
    said = run(dry_run=True)
    assert picture() == before
    done = run()
    assert {**vars(said), "dry_run": False, "seconds": 0} == {**vars(done), "seconds": 0}
    assert done.removed_by == {"age": 1, "large": 0, "quota": 2} and done.removed_mailboxes == 1


def test_trimming_takes_the_oldest_of_all_folders_and_no_more_than_needed(store, run):
    box = make_box(store, ALICE)
    folders = ["cur", "new", ".Sent/cur", "cur", "new"]
    paths = [
        box.message(5 - number / 10, folder, tag=20 * MEGABYTE)
        for number, folder in enumerate(folders)
    ]
    waiting = box.message(3, "tmp", tag=500 * MEGABYTE)
    run()
    assert [path.exists() for path in paths] == [False, False, True, True, True]
    assert waiting.exists() and not (box.path / "maildirsize").exists()


def test_trimming_spares_the_last_day(store, run):
    box = make_box(store, ALICE)
    young = [box.message(0.9, tag=50 * MEGABYTE) for _ in range(3)]
    assert run().removed_messages == 0
    assert all(path.exists() for path in young)


def test_trimming_in_rounds_is_the_same(store, run, monkeypatch):
    monkeypatch.setattr(expire, "ROUND", 2)
    box = make_box(store, ALICE)
    paths = [box.message(10 - number / 10, tag=10 * MEGABYTE) for number in range(12)]
    for path in paths[3:9]:
        set_age(path, 9.5)  # of the same second
    assert run(dry_run=True).removed_messages == 5
    assert run().removed_messages == 5
    assert box.left() == 7 and not any(path.exists() for path in paths[:3])


def test_a_message_renamed_by_dovecot_meanwhile_does_not_cost_a_younger_one(
    store, ini, monkeypatch
):
    box = make_box(store, ALICE)
    paths = [box.message(5 - number, "new", tag=30 * MEGABYTE) for number in range(3)]
    unlink = expire.unlink

    def renaming(name, directory):
        if name.startswith("new/") and paths[0].exists():
            paths[0].rename(box.path / "cur" / f"{paths[0].name}:2,S")
        return unlink(name, directory)

    monkeypatch.setattr(expire, "unlink", renaming)
    expiry = expire.Expiry(read_settings(ini)[0], NOW)
    with maildir.open_store(store.path) as opened, maildir.open_directory(ALICE, opened) as mailbox:
        expiry.trim_mailbox(mailbox)
    assert expiry.summary.removed_messages == 1
    assert paths[1].exists() and paths[2].exists() and box.left() == 2


def test_odd_files_are_left_alone(store, run, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").touch()
    set_age(outside / "x", 99)
    box = make_box(store, ALICE)
    odd = box.path / "cur" / os.fsdecode(b"\xff\n odd")
    odd.touch()
    set_age(odd, 30)
    os.mkfifo(box.path / "cur" / "fifo")
    (box.path / "cur" / "directory").mkdir()
    (box.path / "cur" / "link").symlink_to(outside / "x")
    (box.path / "new").rmdir()
    (box.path / "new").symlink_to(outside)
    for name in ["fifo", "directory", "link"]:
        set_age(box.path / "cur" / name, 99)
    (store.path / "link@chat.example").symlink_to(outside)
    set_age(store.path / "link@chat.example", 500)
    summary = run()
    assert summary.errors == 0 and summary.removed_messages == 1
    assert sorted(os.listdir(box.path / "cur")) == ["directory", "fifo", "link"]
    assert (outside / "x").exists() and (store.path / "link@chat.example").is_symlink()


def test_a_mailbox_that_fails_is_counted_and_the_others_are_visited(
    store, run, monkeypatch, caplog
):
    for name in (ALICE, BOB):
        make_box(store, name).message(30)
    unlink = expire.unlink
    inode = (store.path / ALICE / "cur").stat().st_ino

    def failing(name, directory):
        if os.fstat(directory).st_ino == inode:
            raise PermissionError(13, "Permission denied")
        return unlink(name, directory)

    monkeypatch.setattr(expire, "unlink", failing)
    summary = run()
    assert summary.errors == 1 and summary.removed_messages == 1
    assert f"{ALICE}: [Errno 13] Permission denied" in caplog.text


def test_a_removal_that_cannot_be_finished_does_not_keep_mail_from_expiring(
    store, run, monkeypatch, caplog
):
    make_box(store, ALICE).message(30)

    def failing(opened):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(expire, "finish_removals", failing)
    summary = run()
    assert (summary.errors, summary.removed_messages) == (1, 1)
    assert "an interrupted removal: [Errno 1]" in caplog.text


def test_no_store_yet_is_nothing_to_do(ini, capsys):
    assert expire.main(["--config", str(ini)]) == 0
    assert "0 out of 0 mailboxes" in capsys.readouterr().out


def test_the_command_speaks_text_and_json(store, ini, capsys, caplog):
    make_box(store, ALICE).message(30)
    make_box(store, BOB, login_age=100)
    assert expire.main(["--config", str(ini), "--dry-run", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["dry_run"] and data["removed_messages"] == data["removed_mailboxes"] == 1
    caplog.set_level("INFO")
    assert expire.main(["--config", str(ini)]) == 0
    assert capsys.readouterr().out.startswith(
        "Removed 1 out of 2 mailboxes and 1 out of 1 messages in existing mailboxes in 0."
    )
    assert f"{ALICE}: 1 message(s)" in caplog.text and f"{BOB}: idle" in caplog.text


def test_later_days_are_only_for_a_dry_run(store, ini, capsys):
    make_box(store, ALICE)
    assert expire.main(["--config", str(ini), "--dry-run", "--days", "92", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed_mailboxes"] == 1
    with pytest.raises(SystemExit) as error:
        expire.main(["--config", str(ini), "--days", "92"])
    assert error.value.code == 2 and store.exists(ALICE)


def test_bad_settings_delete_nothing(store, ini, caplog):
    box = make_box(store, ALICE)
    box.message(30)
    ini.write_text(ini.read_text() + "delete_mails_after = 0\n")
    assert expire.main(["--config", str(ini)]) == 78
    assert "delete_mails_after" in caplog.text and box.left() == 1


def test_one_mailbox_is_trimmed_and_only_trimmed(store, ini, capsys):
    box = make_box(store, ALICE, login_age=500)
    for age in (30, 20, 10):
        box.message(age, tag=30 * MEGABYTE)
    make_box(store, BOB).message(30)
    assert expire.main(["--config", str(ini), "--mailbox", ALICE]) == 0
    assert box.left() == 2 and (store.path / BOB / "cur").exists()
    assert "Removed 0 out of 1 mailboxes and 1 out of 3 messages" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nobody123@chat.example", "../outside@x", "", "a", ".@x"])
def test_what_is_no_mailbox_is_not_trimmed(store, ini, name, caplog):
    assert expire.main(["--config", str(ini), "--mailbox", name]) == 1
    assert "expire: " in caplog.text


def test_progress_is_shown_on_a_terminal_only(store, ini):
    make_box(store, ALICE).message(30)
    command = [sys.executable, "-m", "chatmaild.expire", "--config", str(ini), "--dry-run"]
    leader, follower = os.openpty()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=follower, text=True)
    os.close(follower)
    shown = os.read(leader, 10_000).decode()
    os.close(leader)
    assert "1 mailboxes, 1 messages" in shown and done.stdout.startswith("Would remove 0")
    assert subprocess.run(command, capture_output=True, text=True).stderr == ""


def run_and_kill(ini, step):
    """Run in a child that gets SIGKILL instead of its call number *step* to the system; its exit."""
    pid = os.fork()
    if pid == 0:
        left = [step]

        def faulty(function):
            def wrapper(*args, **kwargs):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return function(*args, **kwargs)

            return wrapper

        for name in ["mkdir", "open", "unlink", "rename", "rmdir", "scandir", "stat"]:
            setattr(os, name, faulty(getattr(os, name)))
        os._exit(expire.main(["--config", str(ini)]))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_killed_at_any_step_nothing_is_lost_or_half_there_and_the_next_run_finishes(store, ini):
    def build():
        idle = make_box(store, BOB, login_age=100)
        idle.message(1)
        box = make_box(store, ALICE)
        keep = [box.message(0.5), box.message(2, "new", tag=60 * MEGABYTE)]
        box.message(30)
        box.message(3, ".Sent/cur", tag=60 * MEGABYTE)
        return idle, box, keep

    kills = 0
    for step in range(400):
        idle, box, keep = build()
        whole = sorted(path.relative_to(idle.path) for path in idle.path.rglob("*"))
        code = run_and_kill(ini, step)
        assert all(path.exists() for path in keep) and store.exists(ALICE)
        if idle.path.exists():
            assert sorted(path.relative_to(idle.path) for path in idle.path.rglob("*")) == whole
        if box.left() < 4:
            assert not (box.path / "maildirsize").exists()
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        assert expire.main(["--config", str(ini)]) == 0
        assert box.left() == 2 and not idle.path.exists()
        assert os.listdir(store.path / maildir.REMOVED) == []
        shutil.rmtree(store.path)
        store.path.mkdir()
    assert code == 0 and kills > 50


def test_two_runs_at_once_do_what_one_does(store, ini):
    for number in range(60):
        box = make_box(store, f"{number}@chat.example", login_age=100 * (number % 2))
        for age in (0.5, 30, 31):
            box.message(age)
    command = [sys.executable, "-m", "chatmaild.expire", "--config", str(ini), "--json"]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    results = [json.loads(child.communicate()[0]) for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sum(result["removed_mailboxes"] for result in results) == 30
    assert sum(result["removed_messages"] for result in results) == 60
    assert len(list(store)) == 30 and os.listdir(store.path / maildir.REMOVED) == []


def test_a_login_at_the_last_moment_keeps_the_account(store, run, monkeypatch):
    box = make_box(store, ALICE, login_age=100)
    box.message(1)
    rename = os.rename

    def login_then_rename(*args, **kwargs):
        if box.path.exists():
            assert store.set_last_login(ALICE, NOW)
        rename(*args, **kwargs)

    monkeypatch.setattr(os, "rename", login_then_rename)
    assert run().removed_mailboxes == 0
    assert store.exists(ALICE) and box.left() == 1


def log_in_at_random(path, turns, begin, done, logged_in):
    """Log alice in, at a random moment after each *begin*."""
    store = MailStore(path)
    for _ in range(turns):
        begin.acquire()
        for _ in range(random.randrange(400)):
            pass
        try:
            logged_in.value = store.set_last_login(ALICE, NOW)
        except FileNotFoundError:
            logged_in.value = False
        done.release()


def test_of_logins_and_removals_at_once_one_wins_whole(store, run):
    turns = 100
    begin, done = multiprocessing.Semaphore(0), multiprocessing.Semaphore(0)
    logged_in = multiprocessing.Value("b", False)
    arguments = (store.path, turns, begin, done, logged_in)
    other = multiprocessing.Process(target=log_in_at_random, args=arguments)
    other.start()
    for _ in range(turns):
        box = make_box(store, ALICE, login_age=100)
        box.message(1)
        begin.release()
        for _ in range(random.randrange(3000)):
            pass
        run()
        done.acquire()
        assert store.exists(ALICE) == logged_in.value == (box.left() == 1)
        shutil.rmtree(box.path, ignore_errors=True)
    other.join()
    assert other.exitcode == 0


def test_who_is_logged_in_since_long_is_not_idle(store, run):
    alice, bob = make_box(store, ALICE, login_age=100), make_box(store, BOB, login_age=100)
    old = alice.message(30)
    asked = []

    def connected():
        asked.append(True)
        return frozenset([ALICE])

    summary = run(connected=connected)
    assert store.exists(ALICE) and not bob.path.exists() and not old.exists()
    assert summary.removed_mailboxes == 1 and len(asked) == 1
    assert run().removed_mailboxes == 0  # it counted as a login


def test_no_account_goes_while_nobody_knows_who_is_logged_in(store, run, caplog):
    for name in (ALICE, "carol1234@chat.example"):
        make_box(store, name, login_age=100)
    old = make_box(store, BOB).message(30)
    asked = []

    def connected():
        asked.append(True)
        raise OSError("Dovecot is down")

    summary = run(connected=connected)
    assert store.exists(ALICE) and not old.exists()
    assert summary.errors == 2 and f"{ALICE}: Dovecot is down" in caplog.text
    assert len(asked) == 1 and len(list(store)) == 3


@pytest.mark.parametrize(
    ("program", "users"),
    [
        ("printf 'username\\tconns\\na@x\\t1\\nb@x\\t2\\n'", {"a@x", "b@x"}),
        ("printf 'username\\tconns\\n'", set()),
        (None, set()),
    ],
)
def test_dovecot_is_asked_who_is_logged_in(tmp_path, monkeypatch, program, users):
    fake_doveadm(tmp_path, monkeypatch, program)
    assert expire.connected_users() == users


@pytest.mark.parametrize("program", ["echo 'not running' >&2; exit 75", "exec sleep 60"])
def test_a_dovecot_that_does_not_answer_is_an_error(tmp_path, monkeypatch, program):
    fake_doveadm(tmp_path, monkeypatch, program)
    monkeypatch.setattr(expire, "WHO_SECONDS", 0.5)
    with pytest.raises(OSError):
        expire.connected_users()


def fake_doveadm(folder, monkeypatch, program):
    """Let "doveadm" be this shell script, or not be there."""
    binaries = folder / "bin"
    binaries.mkdir()
    if program:
        (binaries / "doveadm").write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{program}\n")
        (binaries / "doveadm").chmod(0o755)
    monkeypatch.setenv("PATH", str(binaries))


# rusage would count what the process was before its exec: pytest
PEAK = """
import sys
from chatmaild import expire
assert expire.main(["--config", sys.argv[1]]) == 0
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_does_not_depend_on_the_number_of_messages(store, ini):
    def peak():
        out = subprocess.check_output([sys.executable, "-c", PEAK, ini], text=True)
        return int(out.splitlines()[-1])  # KiB

    def fill(name, messages):
        box = make_box(store, name)
        for item in range(messages):
            path = f"{box.path}/new/{NOW}.M{item}P1.host,S=100000"
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            then = NOW - (30 * (item % 2) + 2) * DAY
            os.utime(path, (then, then))
        return box

    fill(ALICE, 1)
    alone = peak()
    big = fill(BOB, 10_000)  # 500 MB to trim are left of it
    for number in range(100):
        fill(f"{number}@chat.example", 100)
    many = peak()
    assert many < alone + 5 * 1024 and many < 60 * 1024
    assert sum(len(os.listdir(path / "new")) for path in store.path.glob("[0-9]*")) == 5_000
    assert len(os.listdir(big.path / "new")) == int(100 * MEGABYTE * expire.TRIM_TO) // 100_000
