# SPDX-License-Identifier: MIT
"""chatmail-metadata: device tokens, server keys, last login; and the process on its sockets."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatmaild import metadata
from chatmaild.dictproxy import Refused
from chatmaild.metadata import LOGINS, LastLogin, Tokens
from chatmaild.users import DAY, MailStore

ALICE = "alice1234@chat.example"
NOW = 1_800_000_000
SHARED = "shared/0123abcd/vendor/vendor.dovecot/pvt/server/vendor/deltachat/"


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
    return Tokens(store, clock)


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


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"devicetoken": 3}', '{"devicetoken": {"a": "b"}}']
)
def test_a_damaged_file_starts_anew(tokens, file, content):
    file.write_text(content)
    assert tokens.get(ALICE) == []
    tokens.add(ALICE, "a")
    assert tokens.get(ALICE) == ["a"]


def test_the_oldest_of_too_many_tokens_gives_way(tokens, clock):
    for number in range(metadata.MAX_TOKENS + 1):
        clock.now = NOW + number
        tokens.add(ALICE, str(number))
    assert tokens.get(ALICE) == [str(number) for number in range(1, metadata.MAX_TOKENS + 1)]


@pytest.mark.parametrize("token", ["", "a b", "a\n", "é", "x" * 4097])
def test_what_is_no_token_is_refused(tokens, file, token):
    with pytest.raises(Refused):
        tokens.add(ALICE, token)
    assert not file.exists()


@pytest.mark.parametrize("user", ["nobody123@chat.example", "../x@y", ""])
def test_a_token_of_nobody_is_refused(tokens, user):
    with pytest.raises(Refused):
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


@settings(deadline=None)
@given(st.text(), st.text())
def test_any_key_and_value_is_a_login_or_refused(key, value):
    login = LastLogin(MailStore("/nonexistent"))
    for name in (key, f"shared/last-login/{key}"):
        try:
            login.commit("", [(name, value)])
        except Refused:
            pass


@pytest.fixture
def service(start_service, store):
    ini = "iroh_relay = https://iroh.example"
    return start_service("chatmaild.metadata", ["metadata", "lastlogin"], ini)


def test_server_keys_are_answered(service):
    request = "H4\t0\t0\t\tmetadata\n"
    for name in ["irohrelay", "maxsmtprecipients", "turn", "appversions", "nonsense"]:
        request += f"L{SHARED}{name}\t{ALICE}\n"
    answer = service.ask("metadata", request.encode())
    assert answer == b"Ohttps://iroh.example\nO1000\nN\nN\nN\n"


def test_a_token_is_set_and_read_back_over_the_socket(service):
    request = f"B1\t{ALICE}\t0\nS1\tpriv/0123/devicetoken\topenpgp:abc=\nC1\n"
    assert service.ask("metadata", request.encode()) == b"O1\n"
    lookup = f"Lpriv/4567/devicetoken\t{ALICE}\n".encode()
    assert service.ask("metadata", lookup) == b"Oopenpgp:abc=\n"


@pytest.mark.parametrize(
    "change",
    [
        "S1\tpriv/0123/comment\tx",
        f"S1\t{SHARED}maxsmtprecipients\t1",
        "U1\tpriv/0123/devicetoken",
        "A1\tpriv/0123/devicetoken\t1",
        "S1\tpriv/0123/devicetoken\t\x01n",
    ],
)
def test_other_changes_fail(service, change):
    request = f"B1\t{ALICE}\t0\n{change}\nC1\n"
    assert service.ask("metadata", request.encode()) == b"F1\n"


def test_a_login_sets_the_day_of_the_password_file(service, store):
    when = 1_700_000_123
    request = f"B1\t{ALICE}\t0\nS1\tshared/last-login/{ALICE}\t{when}\nC1\n"
    assert service.ask("lastlogin", request.encode()) == b"O1\n"
    status = (store.mailbox_path(ALICE) / "password").stat()
    assert status.st_mtime == status.st_atime == when - when % DAY


def test_a_login_is_counted_and_one_of_nobody_is_not(store):
    before = LOGINS.value()
    for user in (ALICE, "nobody123@chat.example"):
        LastLogin(store).commit("", [(f"shared/last-login/{user}", str(NOW))])
    assert LOGINS.value() == before + 1


@pytest.mark.parametrize(
    ("user", "when", "answer"),
    [
        ("nobody123@chat.example", "1", b"O1\n"),
        ("../x@y", "1", b"F1\n"),
        (ALICE, "-1", b"F1\n"),
        (ALICE, "x", b"F1\n"),
    ],
)
def test_a_login_of_nobody_is_no_error_and_nonsense_is_one(service, user, when, answer):
    request = f"B1\t{user}\t0\nS1\tshared/last-login/{user}\t{when}\nC1\n"
    assert service.ask("lastlogin", request.encode()) == answer


def test_an_endless_line_ends_only_its_own_connection(service):
    assert service.ask("metadata", b"L" + b"x" * 100_000) == b""
    assert service.ask("metadata", f"L{SHARED}maxsmtprecipients\t\n".encode()) == b"O1000\n"
