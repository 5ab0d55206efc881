# SPDX-License-Identifier: MIT
"""chatmail-metadata: server keys, last login; and the process on its sockets."""

import base64
import hashlib
import hmac
import os
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatmaild.dictproxy import Refused
from chatmaild.metadata import LOGINS, TURN_SECONDS, LastLogin, Turn
from chatmaild.users import DAY, MailStore

ALICE = "alice1234@chat.example"
NOW = 1_800_000_000
SHARED = "shared/0123abcd/vendor/vendor.dovecot/pvt/server/vendor/deltachat/"


@pytest.fixture
def store(tmp_path):
    store = MailStore(tmp_path / "mail")
    store.create(ALICE, "secret")
    return store


def test_turn_credentials_are_those_of_the_rest_api():
    value = Turn("chat.example", b"north", lambda: NOW + 0.9).value()
    host, port, name, password = value.split(":")
    assert (host, port, name) == ("chat.example", "3478", str(NOW + TURN_SECONDS))
    digest = hmac.new(b"north", name.encode(), hashlib.sha1).digest()
    assert base64.b64decode(password) == digest
    assert TURN_SECONDS == 5 * DAY


def test_without_a_secret_there_are_no_turn_credentials():
    assert Turn("chat.example", b"").value() is None


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
def credentials(tmp_path, monkeypatch):
    """What systemd's LoadCredential= is to a service."""
    (tmp_path / "credentials").mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    return tmp_path / "credentials"


@pytest.fixture
def start(start_service, store, credentials, tmp_path):
    """Start the service, with more settings, and code that runs before it."""

    def start(ini="iroh_relay = https://iroh.example", patch=""):
        places = (
            "from pathlib import Path; from chatmaild import appversions\n"
            f"service.QUEUE = Path({str(tmp_path / 'queue.sqlite')!r})\n"
            "service.AppVersions = lambda: appversions.AppVersions("
            f"Path({str(tmp_path / 'appversions.json')!r}))\n"
        )
        names = ["metadata", "lastlogin", "events"]
        return start_service("chatmaild.metadata", names, ini, places + patch)

    return start


@pytest.fixture
def service(start):
    return start()


def lookup(service, name):
    return service.ask("metadata", f"L{SHARED}{name}\t{ALICE}\n".encode()).decode()


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


def test_turn_credentials_come_from_the_secret_that_systemd_passes(start, credentials):
    (credentials / "turn_secret").write_text("north")
    begin = int(time.time())
    service = start()
    host, port, name, password = lookup(service, "turn")[1:-1].split(":")
    assert (host, port) == ("chat.example", "3478")
    assert begin <= int(name) - TURN_SECONDS <= time.time()
    made = hmac.new(b"north", name.encode(), hashlib.sha1).digest()
    assert base64.b64decode(password) == made
    (credentials / "turn_secret").write_text("south")
    service.restart()
    name, password = lookup(service, "turn")[1:-1].split(":")[2:]
    assert base64.b64decode(password) == hmac.new(b"south", name.encode(), hashlib.sha1).digest()


def test_app_versions_follow_the_file_without_a_restart(service, tmp_path):
    file = tmp_path / "appversions.json"
    assert lookup(service, "appversions") == "N\n"
    file.write_text('{\n "clients": []\n}\n')
    assert lookup(service, "appversions") == 'O{"clients":[]}\n'
    file.write_text('{\n "clients": [}\n')
    assert lookup(service, "appversions") == "N\n"
    assert f"{file}:2: no JSON" in service.log
    assert lookup(service, "appversions") == "N\n"
    assert service.log.count("no JSON") == 1
    file.unlink()
    assert lookup(service, "appversions") == "N\n"


def test_a_disk_that_hangs_keeps_nobody_else_waiting(start, tmp_path):
    """fsync blocks until the test says so; meanwhile another connection is answered."""
    go = tmp_path / "go"
    fifo = f"import os\nos.fsync = lambda file: open({str(go)!r}).read()\n"
    os.mkfifo(go)
    service = start(patch=fifo)
    answers = []
    request = f"B1\t{ALICE}\t0\nS1\tpriv/0123/devicetoken\ta\nC1\n".encode()
    setting = threading.Thread(target=lambda: answers.append(service.ask("metadata", request)))
    setting.start()
    with open(go, "w"):  # opens when the service waits in fsync
        assert lookup(service, "maxsmtprecipients") == "O1000\n"
        assert answers == []
    setting.join(10)
    assert answers == [b"O1\n"]
