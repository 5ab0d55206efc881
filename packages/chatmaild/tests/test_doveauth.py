# SPDX-License-Identifier: MIT
"""chatmail-doveauth: its policy, and the process on its sockets."""

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import crypt_r
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatmaild import doveauth
from chatmaild.config import read_settings
from chatmaild.doveauth import Creator, Policy, Refused
from chatmaild.tokens import TokenStore
from chatmaild.users import MailStore

NAMES = ["create", "new"]
# neither the machine's state nor a flag of the host decides about tests
ALWAYS = """
from pathlib import Path
service.NOCREATE = service.PROC = Path('/nonexistent')
service.TOKENS = Path(ini).parent / 'tokens.sqlite'
"""
INI = "min_free_disk_space = 1M"


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(doveauth, "NOCREATE", tmp_path / "nocreate")
    monkeypatch.setattr(doveauth, "PROC", tmp_path)
    monkeypatch.setattr(doveauth, "TOKENS", tmp_path / "tokens.sqlite")
    text = f"[params]\nmail_domain = chat.example\nmailboxes_dir = {tmp_path}/mail\n{INI}\n"
    return read_settings("test.ini", text)[0]


@pytest.fixture
def service(start_service):
    return start_service("chatmaild.doveauth", NAMES, INI, ALWAYS)


@pytest.mark.parametrize(
    ("address", "password", "reason"),
    [
        ("alice1234@chat.example", "short678", "at least 9 characters"),
        ("alice1234@chat.example", "éééééééé", "at least 9 characters"),
        ("alice1234@chat.example", "with\ncontrol", "control characters"),
        ("alice1234@chat.example", "x" * 512, "longer than 511 bytes"),
        ("alice1234@other.example", "longenough", "proper e-mail address"),
        ("alice1234@@chat.example", "longenough", "proper e-mail address"),
        ("a@lice1234@chat.example", "longenough", "proper e-mail address"),
        ("alice1234", "longenough", "proper e-mail address"),
        ("alice123@chat.example", "longenough", "between 9 and 9"),
        ("alice12345@chat.example", "longenough", "between 9 and 9"),
        ("Alice1234@chat.example", "longenough", "invalid characters"),
        ("alice+123@chat.example", "longenough", "invalid characters"),
        ("alice/../@chat.example", "longenough", "invalid characters"),
        ("alice123\n@chat.example", "longenough", "invalid characters"),
        (".alice123@chat.example", "longenough", "invalid characters"),
        ("webmaster@chat.example", "longenough", "reserved"),
    ],
)
def test_policy_refuses(config, address, password, reason):
    with pytest.raises(Refused, match=reason) as caught:
        Policy(config).check(address, password)
    assert password not in str(caught.value) and "alice" not in str(caught.value)


def test_the_name_of_the_echo_bot_is_for_nobody_else(tmp_path):
    text = "[params]\nmail_domain = chat.example\nusername_min_length = 3\n" + INI
    config = read_settings("test.ini", text)[0]
    with pytest.raises(Refused, match="reserved"):
        Policy(config).check("echo@chat.example", "longenough")


def test_the_flag_closes_the_relay(config, tmp_path):
    (tmp_path / "nocreate").touch()
    with pytest.raises(Refused, match="blocked account creation because .*nocreate' exists"):
        Policy(config).check("alice1234@chat.example", "longenough")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("loadavg", "5.01 1 1 1/1 1", "load avg 5.01 > 5.0"),
        ("meminfo", "MemTotal: 9 kB\nMemAvailable: 1024 kB\n", "available memory 1MB < 200MB"),
    ],
)
def test_a_busy_machine_takes_nobody(config, tmp_path, name, content, reason):
    (tmp_path / name).write_text(content)
    with pytest.raises(Refused, match=reason):
        Policy(config).check("alice1234@chat.example", "longenough")
    (tmp_path / name).write_text("nonsense")
    Policy(config).check("alice1234@chat.example", "longenough")


def test_a_full_disk_takes_nobody(config, monkeypatch):
    monkeypatch.setattr(doveauth, "_free_disk", lambda path: 1024)
    with pytest.raises(Refused, match="free disk 0MB < 1MB"):
        Policy(config).check("alice1234@chat.example", "longenough")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(),
        st.tuples(st.text(), st.text()).map(
            lambda pair: f"C\t{pair[0]}\t{pair[1]}".encode("utf-8", "surrogatepass")
        ),
    )
)
def test_any_line_gets_one_line(config, line):
    reply = Creator(config).answer(line.replace(b"\n", b""))
    assert reply[:2] in (b"N\t", b"F\t", b"O\t") and b"\n" not in reply


def test_an_account_is_made_and_its_hash_is_answered_ever_after(service, tmp_path):
    request = b"C\talice1234@chat.example\tsecret'\"\\ \xc3\xa9\n"
    first = service.ask("create", request)
    hashed = first.decode().removeprefix("O\t{SHA512-CRYPT}").rstrip("\n")
    assert crypt_r.crypt("secret'\"\\ é", hashed) == hashed
    assert service.ask("create", b"C\talice1234@chat.example\tx\n" * 2) == first * 2
    assert service.log.count("Created address") == 1
    assert "secret" not in service.log and "alice" not in service.log


def test_many_first_logins_at_once_get_one_hash(service):
    def login(number):
        return service.ask("create", b"C\talice1234@chat.example\tpassword%d\n" % number)

    with ThreadPoolExecutor(40) as pool:
        answers = set(pool.map(login, range(40)))
    assert len(answers) == 1 and answers.pop().startswith(b"O\t{SHA512-CRYPT}$6$")


def test_a_blocked_address_is_refused(service, tmp_path):
    store = MailStore(tmp_path / "mail")
    store.create("alice1234@chat.example", "secret")
    (store.mailbox_path("alice1234@chat.example") / "password").write_text("")
    answer = service.ask("create", b"C\talice1234@chat.example\tlongenough\n")
    assert answer == b"N\tblocked\n"
    assert "password file is empty" in service.log and "alice" not in service.log


def test_a_store_that_cannot_be_written_is_a_failure_for_now(service, tmp_path):
    (tmp_path / "mail").write_text("not a directory")
    answer = service.ask("create", b"C\talice1234@chat.example\tlongenough\n")
    assert answer.startswith(b"F\t")


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (b"C\tx@y\t\xff\n", b"N\tmalformed request\n"),
        (b"X\ta\tb\n", b"N\tunknown command\n"),
        (b"\n", b"N\tmalformed request\n"),
        (b"C\t" + b"x" * doveauth.MAX_LINE + b"\n", b"N\trequest too long\n"),
        (b"C\thalf a line", b""),
    ],
)
def test_a_bad_request_does_no_harm(service, request_, answer):
    assert service.ask("create", request_) == answer
    assert service.ask("create", b"C\talice1234@chat.example\tlongenough\n").startswith(b"O\t")


def test_connections_beyond_the_bound_are_told_to_come_back(start_service):
    service = start_service(
        "chatmaild.doveauth", NAMES, INI, ALWAYS + "service.MAX_CONNECTIONS = 1"
    )
    with service.connect("create") as held:
        held.sendall(b"C\talice1234@chat.example\tlongenough\n")
        assert held.recv(2) == b"O\t"
        assert service.ask("create", b"") == b"F\ttoo many connections\n"
    assert service.process.poll() is None


def test_more_connections_than_it_takes_cost_neither_descriptors_nor_memory(service):
    def numbers():
        status = Path(f"/proc/{service.process.pid}/status").read_text()
        rss = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])
        return len(os.listdir(f"/proc/{service.process.pid}/fd")), rss

    assert service.ask("create", b"C\talice1234@chat.example\tlongenough\n").startswith(b"O")
    descriptors, before = numbers()
    held = []
    try:
        for name, bound in (
            ("create", doveauth.MAX_CONNECTIONS),
            ("new", doveauth.newemail.MAX_CONNECTIONS),
        ):
            for _ in range(bound):
                held.append(service.connect(name))
                held[-1].sendall(b"C\thalf a line" if name == "create" else b"POST /new HT")
        for _ in range(20):
            assert service.ask("create", b"") == b"F\ttoo many connections\n"
            assert service.ask("new", b"").startswith(b"HTTP/1.1 503 ")
        most, after = numbers()
        assert (
            most - descriptors <= doveauth.MAX_CONNECTIONS + doveauth.newemail.MAX_CONNECTIONS + 2
        )
        assert after - before < 16_000, after - before  # about 10 kB each
    finally:
        for connection in held:
            connection.close()
    deadline = time.monotonic() + 10
    while numbers()[0] > descriptors:
        assert time.monotonic() < deadline
    assert service.ask("create", b"C\talice1234@chat.example\tlongenough\n").startswith(b"O")


@pytest.mark.parametrize(
    ("name", "patch", "start"),
    [
        ("create", "service.IDLE_SECONDS = 0.2", b"C\thalf"),
        ("new", "service.newemail.REQUEST_SECONDS = 0.2", b"POST /new HT"),
        ("new", "service.newemail.IDLE_SECONDS = 0.2", b""),
    ],
)
def test_a_peer_that_says_nothing_more_is_dropped(start_service, name, patch, start):
    service = start_service("chatmaild.doveauth", NAMES, INI, ALWAYS + patch)
    with service.connect(name) as connection:
        connection.sendall(start)
        assert connection.recv(1) == b""


def test_a_closed_relay_takes_nobody(start_service):
    service = start_service("chatmaild.doveauth", NAMES, INI + "\nregistration = closed", ALWAYS)
    answer = service.ask("create", b"C\talice1234@chat.example\tlongenough\n")
    assert answer == b"N\tblocked account creation because registration is closed\n"
    answer = service.ask("new", b"POST /new HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 503 ") and b"does not take new accounts" in answer


def test_one_source_makes_so_many_addresses_and_logins_cost_nothing(start_service):
    ini = INI + "\nmax_new_addresses_per_hour = 2"
    service = start_service("chatmaild.doveauth", NAMES, ini, ALWAYS)

    def login(name, ip):
        return service.ask("create", f"C\t{name}@chat.example\tlongenough\t{ip}\n".encode())[:2]

    first = [login(name, "2001:db8::1") for name in ("alice1234", "alice1234", "bobby1234")]
    assert first == [b"O\t"] * 3
    assert login("carol1234", "2001:db8::2") == b"N\t"
    assert login("alice1234", "2001:db8::2") == b"O\t"
    assert login("carol1234", "192.0.2.1") == b"O\t"
    assert "more than 2 new addresses an hour from one source" in service.log
    assert "2001:db8" not in service.log


def test_many_first_logins_at_once_cost_their_source_one_address(start_service):
    ini = INI + "\nmax_new_addresses_per_hour = 1"
    service = start_service("chatmaild.doveauth", NAMES, ini, ALWAYS)
    request = b"C\talice1234@chat.example\tlongenough\t192.0.2.1\n"
    with ThreadPoolExecutor(40) as pool:
        answers = set(pool.map(lambda _: service.ask("create", request), range(40)))
    assert len(answers) == 1 and answers.pop().startswith(b"O\t")


@pytest.fixture
def by_token(start_service, tmp_path):
    service = start_service("chatmaild.doveauth", NAMES, INI + "\nregistration = token", ALWAYS)
    service.tokens = TokenStore(tmp_path / "tokens.sqlite", MailStore(tmp_path / "mail").is_taken)
    return service


def new_by_token(service, token):
    request = f"POST /new?token={token} HTTP/1.1\r\n\r\n".encode()
    return json.loads(service.ask("new", request).split(b"\r\n\r\n")[1])


def test_by_token_only_what_the_page_gave_may_be_made(by_token):
    token = by_token.tokens.create(1, None, "", now=0).token
    first, second = new_by_token(by_token, token), new_by_token(by_token, token)

    def login(address, password):
        return by_token.ask("create", f"C\t{address}\t{password}\t192.0.2.1\n".encode())[:2]

    assert login("alice1234@chat.example", "longenough") == b"N\t"
    assert login(first["email"], "longenough") == b"N\t"
    with ThreadPoolExecutor(8) as pool:
        same = [(first["email"], first["password"])] * 8
        assert set(pool.map(lambda pair: login(*pair), same)) == {b"O\t"}
    assert login(second["email"], second["password"]) == b"N\t"
    assert [item.used for item in by_token.tokens.tokens(0)] == [1]
    assert new_by_token(by_token, token)["reason"] == "this invitation has been used up"
    assert token not in by_token.log and "registration rejected: " in by_token.log


def test_without_its_token_file_a_relay_by_token_fails_for_now(by_token, tmp_path):
    (tmp_path / "tokens.sqlite").mkdir()
    answer = by_token.ask("create", b"C\talice1234@chat.example\tlongenough\n")
    assert answer.startswith(b"F\t")


def test_what_happened_is_counted(start_service):
    service = start_service("chatmaild.doveauth", [*NAMES, "metrics"], INI, ALWAYS)
    service.ask("create", b"C\talice1234@chat.example\tlongenough\n")
    service.ask("create", b"C\talice1234@chat.example\tlongenough\n")
    service.ask("create", b"C\tbobby1234@chat.example\tshort\n")
    numbers = service.ask("metrics", b"").decode()
    assert "chatmail_accounts_created_total 1" in numbers
    assert 'chatmail_accounts_refused_total{reason="password"} 1' in numbers


@pytest.mark.parametrize("addresses", [0, 1])
def test_the_mailboxes_are_counted(start_service, tmp_path, addresses):
    for _ in range(addresses):  # the first one makes the store
        MailStore(tmp_path / "mail").create("alice1234@chat.example", "secret")
    service = start_service("chatmaild.doveauth", [*NAMES, "metrics"], INI, ALWAYS)
    deadline = time.monotonic() + 10
    while f"chatmail_mailboxes {addresses}\n".encode() not in service.ask("metrics", b""):
        assert time.monotonic() < deadline


def test_the_web_page_gets_an_account_that_can_be_made(service):
    answer = service.ask("new", b"POST /new HTTP/1.1\r\nHost: chat.example\r\n\r\n")
    head, body = answer.split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    account = json.loads(body)
    request = f"C\t{account['email']}\t{account['password']}\n".encode()
    assert service.ask("create", request).startswith(b"O\t")


def test_a_request_that_is_not_http_gets_400(service):
    answer = service.ask("new", b"nonsense\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ") and b"Connection: close" in answer


def test_settings_that_are_wrong_stop_the_service(start_service):
    service = start_service("chatmaild.doveauth", NAMES, "unknown_key = 1")
    assert service.process.wait(10) == 78
    assert "unknown_key" in service.log
