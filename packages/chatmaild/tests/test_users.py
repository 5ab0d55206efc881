# SPDX-License-Identifier: MIT
"""The mail store: names, creation by many at once, creation killed at every step."""

import multiprocessing
import os
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatmaild.maildir import open_store, remove_mailbox
from chatmaild.users import DAY, PASSWORD_MAX_BYTES, Blocked, MailStore, hash_password

ALICE = "alice1234@chat.example"


@pytest.fixture
def store(tmp_path):
    return MailStore(tmp_path / "mail")


@pytest.mark.parametrize(
    "address",
    ["", "@", "a@", "@b", "a@b@c", "../x@y", "a/b@c", ".a@b", "a\n@b", "a\0@b", "a\x7f@b", "noat"]
    + ["x" * 250 + "@chat.example", "\ud800a@b"],
)
def test_what_cannot_be_an_address_has_no_path_and_does_not_exist(store, address):
    with pytest.raises(ValueError):
        store.mailbox_path(address)
    assert not store.exists(address)
    assert not store.is_disabled(address) and not store.requires_encryption(address)


@settings(deadline=None)
@given(st.text())
def test_no_name_leads_out_of_the_store(address):
    store = MailStore("/store")
    try:
        path = store.mailbox_path(address)
    except ValueError:
        return
    assert os.path.normpath(path) == str(path) and path.parent == store.path


def test_a_new_account_is_private_hashed_and_takes_encrypted_mail_only(store):
    hashed, made = store.create(ALICE, "secret")
    mailbox = store.mailbox_path(ALICE)
    assert made and hashed.startswith("{SHA512-CRYPT}$6$")
    assert (mailbox / "password").read_text() == hashed
    assert stat.S_IMODE(mailbox.stat().st_mode) == 0o700
    assert stat.S_IMODE((mailbox / "password").stat().st_mode) == 0o600
    assert sorted(os.listdir(mailbox)) == ["enforceE2EEincoming", "password"]
    assert store.exists(ALICE) and store.requires_encryption(ALICE)
    assert list(store) == [ALICE]


def test_an_existing_account_keeps_its_hash_and_its_missing_flag(store):
    first, _ = store.create(ALICE, "secret")
    (store.mailbox_path(ALICE) / "enforceE2EEincoming").unlink()
    assert store.create(ALICE, "another") == (first, False)
    assert not store.requires_encryption(ALICE)


@pytest.mark.parametrize("content", ["", "\n", "  \n"])
def test_an_empty_password_file_blocks_and_is_never_given_away(store, content):
    store.create(ALICE, "secret")
    password = store.mailbox_path(ALICE) / "password"
    password.write_text(content)
    with pytest.raises(Blocked):
        store.create(ALICE, "stranger")
    assert password.read_text() == content
    assert not store.exists(ALICE) and list(store) == []


def test_a_password_that_cannot_be_hashed_leaves_nothing(store):
    for password in ["x" * (PASSWORD_MAX_BYTES + 1), "a\0b"]:
        with pytest.raises(ValueError):
            store.create(ALICE, password)
    assert not store.path.exists()
    assert hash_password("x" * PASSWORD_MAX_BYTES).startswith("{SHA512-CRYPT}$6$")


def _create(path, number, barrier, results):
    barrier.wait()
    results.put(MailStore(path).create(ALICE, f"password{number}"))


def test_processes_that_create_at_once_make_one_account(store):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(6), context.Queue()
    workers = [
        context.Process(target=_create, args=(store.path, number, barrier, results))
        for number in range(6)
    ]
    for worker in workers:
        worker.start()
    answers = [results.get(timeout=20) for _ in workers]
    for worker in workers:
        worker.join()
    assert len({hashed for hashed, _made in answers}) == 1
    assert sum(made for _hashed, made in answers) == 1


# kill -9 when the Nth call of any function that changes or syncs files is about to happen
KILLED = """
import os, signal, sys
from chatmaild.users import MailStore
left = int(sys.argv[2])
def faulty(function):
    def wrapper(*args, **kwargs):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return function(*args, **kwargs)
    return wrapper
for name in ["mkdir", "open", "write", "fsync", "link", "unlink", "close", "fstat", "stat"]:
    setattr(os, name, faulty(getattr(os, name)))
MailStore(sys.argv[1]).create("alice1234@chat.example", "first")
"""


def test_killed_at_any_step_the_account_is_absent_or_complete_and_the_next_login_repairs(tmp_path):
    for step in range(60):
        store = MailStore(tmp_path / str(step))
        child = subprocess.run([sys.executable, "-c", KILLED, store.path, str(step)])
        mailbox = store.mailbox_path(ALICE)
        if store.exists(ALICE):
            assert store.requires_encryption(ALICE)
            assert len((mailbox / "password").read_text()) > 100
        else:
            assert not (mailbox / "password").exists()
        before = store.read_hash(ALICE)
        hashed, made = store.create(ALICE, "second")
        assert made == (before is None) and hashed == (before or hashed)
        assert store.requires_encryption(ALICE)
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL
    assert step > 10, "the steps of a creation were not interrupted"


def test_a_full_disk_makes_no_account(store, monkeypatch):
    monkeypatch.setattr(os, "write", lambda file, data: len(data) - 1)
    with pytest.raises(OSError):
        store.create(ALICE, "secret")
    monkeypatch.undo()
    assert not store.exists(ALICE)
    assert store.create(ALICE, "secret")[1]


def test_the_last_login_is_a_day_and_written_only_when_it_changes(store):
    store.create(ALICE, "secret")
    password = store.mailbox_path(ALICE) / "password"
    assert store.set_last_login(ALICE, 20 * DAY + 12345)
    assert password.stat().st_mtime == password.stat().st_atime == 20 * DAY
    assert not store.set_last_login(ALICE, 20 * DAY + 23456)
    assert store.set_last_login(ALICE, 21 * DAY)
    with pytest.raises(FileNotFoundError):
        store.set_last_login("nobody123@chat.example", DAY)


def test_a_block_is_a_flag_and_can_be_undone(store):
    hashed, _ = store.create(ALICE, "secret")
    assert store.block(ALICE) and not store.block(ALICE)
    assert store.is_disabled(ALICE) and store.read_hash(ALICE) == hashed
    assert store.unblock(ALICE) and not store.unblock(ALICE)
    assert not store.is_disabled(ALICE)
    with pytest.raises(FileNotFoundError):
        store.block("nobody123@chat.example")
    assert not store.mailbox_path("nobody123@chat.example").exists()


def test_removals_and_creations_at_once_leave_an_account_or_nothing(store):
    def work(number):
        if number % 2:
            with open_store(store.path) as opened:
                remove_mailbox(opened, ALICE)
            return
        with suppress(BlockingIOError):  # removed again and again: a failure for now
            store.create(ALICE, f"password{number}")

    store.create(ALICE, "first")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(60)))
    hashed, _made = store.create(ALICE, "last")
    assert store.read_hash(ALICE) == hashed
    assert sorted(os.listdir(store.path)) == [".removed", ALICE]
    assert os.listdir(store.path / ".removed") == []


def test_the_last_login_is_told_as_a_day(store):
    store.create(ALICE, "secret")
    os.utime(store.mailbox_path(ALICE) / "password", (5 * DAY + 7, 5 * DAY + 7))
    assert store.last_login(ALICE) == 5 * DAY


def test_only_accounts_are_listed(store):
    store.create(ALICE, "secret")
    (store.path / "half@chat.example").mkdir()
    (store.path / "pending_notifications").mkdir()
    assert list(store) == [ALICE]
    assert list(MailStore(store.path / "missing")) == []
