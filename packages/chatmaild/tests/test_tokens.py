# SPDX-License-Identifier: MIT
"""Invitations: reserved, claimed, counted once for each account, whatever is killed in between."""

import signal
import sqlite3
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from chatmaild import tokens
from chatmaild.tokens import RESERVED_SECONDS, Invalid, TokenStore
from chatmaild.users import MailStore

ALICE, BOB = "alice1234@chat.example", "bobby1234@chat.example"
DAY = 86400


@pytest.fixture
def store(tmp_path):
    return TokenStore(tmp_path / "tokens.sqlite", lambda address: False)


def used(store, now=0):
    return [token.used for token in store.tokens(now)]


def test_a_token_is_long_random_and_listed_with_what_it_allows(store):
    first = store.create(2, 100, "for the choir", now=1)
    second = store.create(None, None, "", now=2)
    assert first.token != second.token
    assert len(first.token) == 20 and first.token.isalnum() and first.token.islower()
    assert store.tokens(3) == [first, second]
    assert (first.note, first.max_uses, first.used, first.expires) == ("for the choir", 2, 0, 100)
    assert first.state(99) == "valid" and first.state(100) == "expired"
    assert first._replace(used=2).state(99) == "used up"
    assert second.state(10**12) == "valid"


def test_a_use_is_counted_when_the_address_is_claimed_and_only_once(store):
    token = store.create(1, None, "", now=0).token
    for address in (ALICE, BOB):
        store.reserve(token, address, "secret", now=0)
    assert used(store) == [0]
    for _ in range(3):
        store.claim(ALICE, "secret", now=1)
    assert used(store) == [1]
    with pytest.raises(Invalid, match="used up"):
        store.claim(BOB, "secret", now=2)
    with pytest.raises(Invalid, match="used up"):
        store.reserve(token, "third1234@chat.example", "secret", now=2)
    store.confirm(ALICE)
    assert used(store) == [1]


@pytest.mark.parametrize(
    ("address", "password", "now", "reason"),
    [
        (BOB, "secret", 1, "no invitation has reserved this address"),
        (ALICE, "another", 1, "another password"),
        (ALICE, "secret", RESERVED_SECONDS, "no invitation has reserved this address"),
    ],
)
def test_only_the_reserved_pair_may_be_created_and_for_one_hour(
    store, address, password, now, reason
):
    store.reserve(store.create(None, None, "", now=0).token, ALICE, "secret", now=0)
    with pytest.raises(Invalid, match=reason):
        store.claim(address, password, now)
    assert used(store) == [0]
    store.claim(ALICE, "secret", RESERVED_SECONDS - 1)


def test_a_token_that_is_unknown_or_expired_reserves_nothing(store):
    token = store.create(None, DAY, "", now=0).token
    with pytest.raises(Invalid, match="expired"):
        store.reserve(token, ALICE, "secret", now=DAY)
    for wrong in ("", "nonsense", token.upper(), "' OR 1=1 --"):
        with pytest.raises(Invalid, match="not valid"):
            store.reserve(wrong, ALICE, "secret", now=1)


def test_what_was_reserved_before_the_token_expired_may_be_created(store):
    token = store.create(1, DAY, "", now=0).token
    store.reserve(token, ALICE, "secret", now=DAY - 1)
    store.claim(ALICE, "secret", now=DAY + 1)


def test_a_revoked_token_and_what_it_reserved_are_void_at_once(store):
    token = store.create(None, None, "", now=0).token
    store.reserve(token, ALICE, "secret", now=0)
    assert store.revoke(token) and not store.revoke(token)
    assert store.tokens(0) == []
    with pytest.raises(Invalid):
        store.claim(ALICE, "secret", now=1)


def test_a_token_has_a_bounded_number_of_addresses_that_wait(store, monkeypatch):
    monkeypatch.setattr(tokens, "MAX_RESERVED", 5)
    token, other = (store.create(None, None, "", now=0).token for _ in range(2))
    for number in range(5):
        store.reserve(token, f"user{number}@chat.example", "secret", now=0)
    with pytest.raises(Invalid, match="too many at once"):
        store.reserve(token, ALICE, "secret", now=1)
    store.reserve(other, ALICE, "secret", now=1)
    store.reserve(token, BOB, "secret", now=RESERVED_SECONDS)


def test_a_counted_use_without_an_account_is_given_back(tmp_path):
    mail = MailStore(tmp_path / "mail")
    store = TokenStore(tmp_path / "tokens.sqlite", mail.is_taken)
    token = store.create(2, None, "", now=0).token
    for address in (ALICE, BOB):
        store.reserve(token, address, "secret-of-them", now=0)
        store.claim(address, "secret-of-them", now=1)
    mail.create(BOB, "secret-of-them")
    late = RESERVED_SECONDS + 61
    assert used(store, RESERVED_SECONDS) == [2]  # a creation may still be on its way
    assert used(store, late) == [1]
    assert used(store, late) == [1]


def test_many_at_once_use_a_token_as_often_as_it_allows(store):
    token = store.create(7, None, "", now=0).token
    names = [f"user{number:05}@chat.example" for number in range(40)]
    for name in names:
        store.reserve(token, name, "secret", now=0)

    def claim(name):
        try:
            store.claim(name, "secret", now=1)
        except Invalid:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(claim, names)) == 7
    assert used(store) == [7]


def test_the_file_is_private_and_holds_no_password(store, tmp_path):
    import os

    before = os.umask(0o077)
    try:
        store.reserve(store.create(None, None, "", now=0).token, ALICE, "secret", now=0)
    finally:
        os.umask(before)
    path = tmp_path / "tokens.sqlite"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert b"secret" not in path.read_bytes()


def test_a_damaged_file_is_a_failure_for_now_and_is_left_as_it_is(store, tmp_path):
    (tmp_path / "tokens.sqlite").write_bytes(b"not a database, but " * 100)
    with pytest.raises(OSError, match="not a database"):
        store.claim(ALICE, "secret", now=0)
    assert (tmp_path / "tokens.sqlite").read_bytes().startswith(b"not a database")


# kill -9 at the Nth of: statements of SQLite, and the steps that make an account
KILLED = """
import os, signal, sqlite3, sys
from chatmaild import tokens, users
left = int(sys.argv[2])
def step(*_):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
def faulty(function):
    def wrapper(*args, **kwargs):
        step()
        return function(*args, **kwargs)
    return wrapper
for name in ["fsync", "link", "unlink"]:
    setattr(os, name, faulty(getattr(os, name)))
connect = sqlite3.connect
def connecting(*args, **kwargs):
    connection = connect(*args, **kwargs)
    connection.set_trace_callback(step)
    return connection
sqlite3.connect = connecting
mail = users.MailStore(sys.argv[1] + "/mail")
store = tokens.TokenStore(sys.argv[1] + "/tokens.sqlite", mail.is_taken)
store.claim("alice1234@chat.example", "secret-of-alice", 1)
mail.create("alice1234@chat.example", "secret-of-alice")
store.confirm("alice1234@chat.example")
"""


def test_killed_at_any_step_an_account_is_one_use_and_no_account_is_none(tmp_path):
    interrupted = 0
    for step in range(60):
        place = tmp_path / str(step)
        place.mkdir()
        mail = MailStore(place / "mail")
        store = TokenStore(place / "tokens.sqlite", mail.is_taken)
        store.reserve(store.create(1, None, "", now=0).token, ALICE, "secret-of-alice", now=0)
        child = subprocess.run([sys.executable, "-c", KILLED, place, str(step)])
        # the client comes back and has its account; or it never does
        if step % 2 and not mail.exists(ALICE):
            store.claim(ALICE, "secret-of-alice", 2)
            mail.create(ALICE, "secret-of-alice")
        assert used(store, RESERVED_SECONDS + 61) == [int(mail.exists(ALICE))]
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL
        interrupted += 1
    assert interrupted > 10, "the steps were not interrupted"


def test_a_file_of_today_can_be_read_by_sqlite_itself(store, tmp_path):
    store.create(None, None, "", now=0)
    connection = sqlite3.connect(tmp_path / "tokens.sqlite")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    connection.close()
