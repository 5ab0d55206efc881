# SPDX-License-Identifier: MIT
"""Walking and removing mailboxes: odd files, links, races, kills."""

import os

import pytest
from mailstore import make_box

from chatmaild import maildir
from chatmaild.users import MailStore

ALICE = "alice1234@chat.example"


@pytest.fixture
def store(tmp_path):
    made = MailStore(tmp_path / "mail")
    made.path.mkdir()
    return made


@pytest.fixture
def opened(store):
    with maildir.open_store(store.path) as descriptor:
        yield descriptor


@pytest.fixture
def outside(tmp_path):
    """A directory that nothing of the store may touch."""
    folder = tmp_path / "outside"
    (folder / "cur").mkdir(parents=True)
    (folder / "password").write_text("{SHA512-CRYPT}$6$x")
    (folder / "cur" / "precious").touch()
    yield folder
    assert (folder / "cur" / "precious").exists() and (folder / "password").exists()


def test_only_directories_with_an_address_are_mailboxes(store, opened, outside):
    make_box(store, ALICE)
    for name in ["pending_notifications", ".x@chat.example", maildir.REMOVED]:
        (store.path / name).mkdir()
    (store.path / "file@chat.example").touch()
    (store.path / "link@chat.example").symlink_to(outside)
    assert list(maildir.mailboxes(opened)) == [ALICE]


def test_folders_are_those_of_maildir_and_no_links(store, opened, outside):
    box = make_box(store, ALICE)
    box.message(1, folder=".Sent/cur")
    (box.path / ".Sent" / "new").symlink_to(outside)
    (box.path / ".Link").symlink_to(outside)
    (box.path / "odd" / "cur").mkdir(parents=True)
    (box.path / ".A" / ".B" / "cur").mkdir(parents=True)
    others = []
    with maildir.open_directory(ALICE, opened) as mailbox:
        names = sorted(
            name for name, _ in maildir.folders(mailbox, lambda entry: others.append(entry.name))
        )
    assert names == [".Sent/cur", "cur", "new", "tmp"]
    assert {"password", "maildirsize", ".Link"} <= set(others)


def test_what_vanishes_during_a_walk_is_no_error(store, opened):
    box = make_box(store, ALICE)
    paths = [box.message(1) for _ in range(3)]
    with (
        maildir.open_directory(ALICE, opened) as mailbox,
        maildir.open_directory("cur", mailbox) as directory,
    ):
        found = maildir.files(directory)
        name, _status = next(found)
        for path in paths:
            path.unlink()
        assert list(found) == []
        assert not maildir.unlink(name, directory) and not maildir.unlink(f"cur/{name}", mailbox)
        (box.path / "cur").rmdir()
        assert not maildir.unlink(f"cur/{name}", mailbox)
        assert sorted(folder for folder, _ in maildir.folders(mailbox)) == ["new", "tmp"]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("1.M1P1.h,S=5000,W=5100:2,S", 5000),
        ("1.M1P1.h,S=7:2,", 7),
        ("1.M1P1.h", 100),
        ("1.M1P1.h,S=:2,", 100),
        ("1,S=x", 100),
    ],
)
def test_the_quota_counts_the_size_before_compression(name, size):
    assert maildir.quota_size(name, 100) == size


def test_a_mailbox_is_removed_with_everything_and_links_are_not_followed(store, opened, outside):
    box = make_box(store, ALICE)
    box.message(1)
    (box.path / "cur" / "deep" / "er").mkdir(parents=True)
    (box.path / ".Link").symlink_to(outside)
    (box.path / "cur" / "link").symlink_to(outside / "password")
    os.mkfifo(box.path / "fifo")
    (box.path / os.fsdecode(b"\xff\n")).touch()
    assert maildir.remove_mailbox(opened, ALICE)
    assert os.listdir(store.path) == [maildir.REMOVED]
    assert os.listdir(store.path / maildir.REMOVED) == []


def test_a_link_or_a_file_is_not_removed_as_a_mailbox(store, opened, outside):
    (store.path / "link@chat.example").symlink_to(outside)
    (store.path / "file@chat.example").touch()
    for name in ["link@chat.example", "file@chat.example", "gone@chat.example"]:
        assert not maildir.remove_mailbox(opened, name)
    assert len(os.listdir(store.path)) == 2


def test_a_link_in_the_place_of_removed_mailboxes_is_not_followed(store, opened, outside):
    make_box(store, ALICE)
    (store.path / maildir.REMOVED).symlink_to(outside)
    with pytest.raises(OSError):
        maildir.remove_mailbox(opened, ALICE)
    assert maildir.finish_removals(opened) == 0
    assert store.exists(ALICE)


@pytest.mark.parametrize("answers", [[False], [True, False]])
def test_who_logs_in_before_or_during_the_removal_keeps_everything(store, opened, answers):
    box = make_box(store, ALICE)
    message = box.message(1)
    seen = []

    def still(mailbox):
        seen.append(store.exists(ALICE))
        return answers.pop(0)

    assert not maildir.remove_mailbox(opened, ALICE, still)
    assert seen == [True, False][: len(seen)] and answers == []
    assert store.exists(ALICE) and message.exists()
    assert maildir.finish_removals(opened) == 0


def test_an_address_made_anew_during_the_removal_stays(store, opened):
    box = make_box(store, ALICE)
    box.message(1)

    def still(mailbox):
        if not box.path.exists():
            store.create(ALICE, "new-password")
            return False  # even a login of the old owner then
        return True

    assert maildir.remove_mailbox(opened, ALICE, still)
    assert store.exists(ALICE) and box.left() == 0


def test_a_creation_under_way_keeps_its_directory(store, opened):
    import fcntl

    box = make_box(store, ALICE)
    with maildir.open_directory(ALICE, opened) as creator:
        fcntl.flock(creator, fcntl.LOCK_EX)
        assert not maildir.remove_mailbox(opened, ALICE)
    assert box.path.exists()
    assert maildir.remove_mailbox(opened, ALICE)


def test_a_creation_that_waited_for_the_removal_makes_a_new_account(store, opened):
    import threading

    box = make_box(store, ALICE)
    made = []
    waiting = threading.Event()
    creators = []

    def create():
        waiting.set()
        made.append(store.create(ALICE, "new-password"))

    def still(mailbox):
        if not creators:
            (box.path / "password").rename(box.path / "old")  # else it has nothing to wait for
            creators.append(threading.Thread(target=create))
            creators[0].start()
            waiting.wait(5)
        return True

    assert maildir.remove_mailbox(opened, ALICE, still)
    creators[0].join(5)
    assert made[0][1] and store.exists(ALICE)
    assert sorted(os.listdir(box.path)) == ["enforceE2EEincoming", "password"]


def test_a_file_added_while_a_removal_runs_is_left_for_the_next_one(store, opened, monkeypatch):
    make_box(store, ALICE)
    rmdir = os.rmdir

    def busy(name, *, dir_fd):
        if len(name) == 32:
            path = store.path / maildir.REMOVED / name / "late"
            if not path.exists():
                path.touch()
        rmdir(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", busy)
    assert maildir.remove_mailbox(opened, ALICE)
    monkeypatch.undo()
    assert len(os.listdir(store.path / maildir.REMOVED)) == 1
    assert maildir.finish_removals(opened) == 1
    assert os.listdir(store.path / maildir.REMOVED) == []
