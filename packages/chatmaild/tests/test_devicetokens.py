# SPDX-License-Identifier: MIT
"""Device tokens of users: which are valid, what is kept of old files, who may change them at once."""

import json
import os
import threading

import pytest

from chatmaild.devicetokens import MAX_TOKENS, DeviceTokens, InvalidToken
from chatmaild.users import DAY, MailStore

ALICE = "alice1234@chat.example"
NOW = 1_800_000_000


class Clock:
    now = NOW

    def __call__(self):
        return self.now


@pytest.fixture
def store(tmp_path):
    store = MailStore(tmp_path / "mail")
    store.create(ALICE, "secret")
    return store


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def tokens(store, clock):
    return DeviceTokens(store, clock)


@pytest.fixture
def file(store):
    return store.mailbox_path(ALICE) / "metadata.json"


def test_tokens_are_added_in_order_and_once(tokens, file):
    for token in ["b", "a", "b"]:
        tokens.add(ALICE, token)
    assert tokens.get(ALICE) == ["b", "a"]
    assert json.loads(file.read_text()) == {"devicetoken": {"b": NOW, "a": NOW}}


def test_a_token_is_valid_for_90_days_from_its_last_set(tokens, clock):
    tokens.add(ALICE, "a")
    tokens.add(ALICE, "b")
    clock.now = NOW + 50 * DAY
    tokens.add(ALICE, "a")
    clock.now = NOW + 91 * DAY
    assert tokens.get(ALICE) == ["a"]
    clock.now = NOW + 141 * DAY
    assert tokens.get(ALICE) == []


def test_a_token_from_the_future_is_not_valid(tokens, clock):
    tokens.add(ALICE, "a")
    clock.now = NOW - 60
    assert tokens.get(ALICE) == ["a"]
    clock.now = NOW - 61
    assert tokens.get(ALICE) == []


def test_the_list_of_old_relays_is_read_and_rewritten(tokens, file):
    file.write_text('{"devicetoken": ["x", "y"], "other": 1}')
    assert tokens.get(ALICE) == ["x", "y"]
    tokens.add(ALICE, "z")
    data = json.loads(file.read_text())
    assert data == {"devicetoken": {"x": NOW, "y": NOW, "z": NOW}, "other": 1}


def test_tokens_of_the_old_list_age_from_their_first_reading_on(tokens, file, clock):
    file.write_text('{"devicetoken": ["x"]}')
    assert tokens.get(ALICE) == ["x"]
    clock.now = NOW + 91 * DAY
    assert tokens.get(ALICE) == []


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"devicetoken": 3}', '{"devicetoken": {"a": "b"}}']
)
def test_a_damaged_file_starts_anew(tokens, file, content):
    file.write_text(content)
    assert tokens.get(ALICE) == []
    tokens.add(ALICE, "a")
    assert tokens.get(ALICE) == ["a"]


def test_the_oldest_of_too_many_tokens_gives_way(tokens, clock):
    for number in range(MAX_TOKENS + 1):
        clock.now = NOW + number
        tokens.add(ALICE, str(number))
    assert tokens.get(ALICE) == [str(number) for number in range(1, MAX_TOKENS + 1)]


@pytest.mark.parametrize("token", ["", "a b", "a\n", "é", "x" * 4097])
def test_what_is_no_token_is_refused(tokens, file, token):
    with pytest.raises(InvalidToken):
        tokens.add(ALICE, token)
    assert not file.exists()


@pytest.mark.parametrize("user", ["nobody123@chat.example", "../x@y", ""])
def test_a_token_of_nobody_is_refused(tokens, user):
    with pytest.raises(InvalidToken):
        tokens.add(user, "a")
    assert tokens.get(user) == []


def test_a_write_that_fails_keeps_the_old_tokens(tokens, monkeypatch):
    tokens.add(ALICE, "a")

    def broken(_file):
        raise OSError("disk")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError):
        tokens.add(ALICE, "b")
    assert tokens.get(ALICE) == ["a"]


def test_expired_tokens_leave_the_file_when_somebody_reads_it(tokens, clock, file):
    file.write_text(json.dumps({"devicetoken": {"a": NOW, "b": NOW + 10}, "other": 1}))
    clock.now = NOW + 90 * DAY
    assert tokens.get(ALICE) == ["a", "b"]
    before = file.stat()
    clock.now += 1
    assert tokens.get(ALICE) == ["b"]
    assert json.loads(file.read_text()) == {"devicetoken": {"b": NOW + 10}, "other": 1}
    after = file.stat()
    assert after.st_ino != before.st_ino
    assert tokens.get(ALICE) == ["b"]
    assert file.stat() == after  # nothing to do, nothing written


def test_tokens_from_the_future_stay_in_the_file(tokens, clock, file):
    """Or a machine that boots in 1970 would forget them all."""
    tokens.add(ALICE, "a")
    clock.now = 0
    assert tokens.get(ALICE) == []
    clock.now = NOW
    assert tokens.get(ALICE) == ["a"]


def test_a_token_is_removed(tokens, file):
    for token in "abc":
        tokens.add(ALICE, token)
    tokens.remove(ALICE, "b")
    assert json.loads(file.read_text()) == {"devicetoken": {"a": NOW, "c": NOW}}
    tokens.remove(ALICE, "b")
    tokens.remove("nobody123@chat.example", "b")
    tokens.remove("../x", "b")
    assert tokens.get(ALICE) == ["a", "c"]


def test_a_token_is_removed_from_the_list_of_old_relays(tokens, file):
    file.write_text('{"devicetoken": ["x", "y", 3]}')
    tokens.remove(ALICE, "x")
    assert tokens.get(ALICE) == ["y"]


def test_threads_that_change_the_tokens_of_one_user_lose_nothing(tokens):
    def add(number):
        for count in range(4):
            tokens.add(ALICE, f"{number}-{count}")
        tokens.remove(ALICE, f"{number}-0")

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = {f"{number}-{count}" for number in range(8) for count in range(1, 4)}
    assert set(tokens.get(ALICE)) == wanted
