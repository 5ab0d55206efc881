# SPDX-License-Identifier: MIT
"""The self-test's parts that need no relay; tests/test_selftest.py lets it loose on real ones."""

import contextlib
import datetime
import ipaddress
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from chatmail_relay import cli
from chatmail_relay.accounts import Relay
from chatmail_relay.paths import Paths
from chatmail_relay.selftest import accounts, command, mail, message, net, report, tls, turn
from chatmail_relay.selftest.report import (
    OutOfTime,
    Report,
    Wrong,
    bounded,
    interruptible,
    undisturbed,
)
from chatmaild.filtermail.mime import MimeCheck
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

NOW = datetime.datetime(2026, 6, 1, tzinfo=datetime.timezone.utc)
DAY = datetime.timedelta(days=1)


# --- messages ---------------------------------------------------------------------------------------


def is_encrypted(text):
    """As the relay's own filter judges."""
    check = MimeCheck(False)
    header, _blank, body = text.partition(b"\r\n\r\n")
    for line in header.replace(b"\r\n ", b" ").split(b"\r\n"):
        name, _colon, value = line.partition(b":")
        check.header(name.decode().lower(), value.decode())
    check.end_of_header()
    check.body(body)
    check.end()
    return check.is_encrypted


def test_one_message_is_encrypted_and_the_other_is_not():
    name, text = message.encrypted("a@a.example", "b@b.example")
    assert is_encrypted(text) and name.encode() in text
    assert not is_encrypted(message.cleartext("a@a.example", "b@b.example"))


def test_the_checksum_is_that_of_openpgp():
    assert message._crc24(b"") == 0xB704CE
    assert message._crc24(b"123456789") == 0x21CF02  # the check value of CRC-24/OPENPGP


def test_a_stored_message_must_not_tell_its_way_or_its_subject():
    assert mail.traces(b"From: <a@b>\r\nSubject: [...]\r\n\r\n") == "no way, no subject"
    with pytest.raises(Wrong, match="Received"):
        mail.traces(b"Received: from x\r\nSubject: [...]\r\n\r\n")
    with pytest.raises(Wrong, match="subject"):
        mail.traces(b"From: <a@b>\r\nSubject: self-test\r\n\r\n")


@pytest.mark.parametrize(
    ("reply", "trouble"),
    [
        ((523, "Encryption Needed: Invalid Unencrypted Mail"), None),
        ((250, "2.0.0 Ok"), "is taken"),
        ((554, "5.7.1 no"), "other words: 554 5.7.1 no"),
        ((523, "Encryption needed"), "other words"),
    ],
)
def test_cleartext_is_to_be_refused_in_the_words_clients_know(reply, trouble):
    if trouble is None:
        assert mail._exactly(reply).startswith("523 ")
    else:
        with pytest.raises(Wrong, match=trouble):
            mail._exactly(reply)


# --- METADATA and TURN ------------------------------------------------------------------------------


def test_metadata_is_read_quoted_and_literal():
    key = b"/shared/vendor/deltachat/"
    parts = [
        b'"" ('
        + key
        + b'maxsmtprecipients "1000" '
        + key
        + b"irohrelay NIL "
        + key
        + b'turn "h:1:2:p\\"q"',
        (key + b"appversions {18}", b'{"clients": ["a"]}'),
        b")",
    ]
    assert mail.values(parts) == {
        "maxsmtprecipients": "1000",
        "turn": 'h:1:2:p"q',
        "appversions": '{"clients": ["a"]}',
    }
    assert mail.values([None]) == {}


def test_turn_credentials_are_read_as_clients_do():
    found = turn.Credentials.parse("chat.example:3478:1999999999:abc/+=")
    assert (found.host, found.port, found.expires) == ("chat.example", 3478, 1999999999)
    assert turn.Credentials.parse("[2001:db8::1]:3478:1:x").host == "2001:db8::1"
    for bad in ("", "a:b:c", "h:x:1:p", "h:1:user:p"):
        with pytest.raises(Wrong, match="HOST:PORT:UNIXTIME:PASSWORD"):
            turn.Credentials.parse(bad)


def test_credentials_that_end_soon_are_a_finding():
    soon = turn.Credentials("127.0.0.1", 1, int(time.time()) + 3600, "x")
    with pytest.raises(Wrong, match="1 hours only"):
        turn.allocate(soon, False)


def test_a_silent_turn_server_is_a_finding_after_a_bounded_time(monkeypatch):
    monkeypatch.setattr(turn, "FIRST_WAIT", 0.001)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        late = turn.Credentials("127.0.0.1", port, int(time.time()) + 90000, "x")
        with pytest.raises(Wrong, match=f"no answer from 127.0.0.1, UDP port {port}"):
            turn.allocate(late, False)
        assert len(silent.recv(2048)) > 20


# --- names and certificates -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "domain", "host"),
    [
        ("Chat.Example.", "chat.example", "chat.example"),
        ("_a.example", "_a.example", "_a.example"),
        ("192.0.2.1", "[192.0.2.1]", "192.0.2.1"),
        ("[192.0.2.1]", "[192.0.2.1]", "192.0.2.1"),
    ],
)
def test_a_relay_is_named_by_domain_or_address(text, domain, host):
    assert net.mail_domain(text) == domain and net.host_of(domain) == host
    exempt = net.Target(domain, host, ()).is_exempt
    assert exempt == (domain != "chat.example")


def certificate(*names, begin=-10, end=90):
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([])
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(subject)
    made = made.public_key(key.public_key()).serial_number(7)
    made = made.not_valid_before(NOW + begin * DAY).not_valid_after(NOW + end * DAY)
    if names:
        made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


CHAT = x509.DNSName("chat.example")


@pytest.mark.parametrize(
    ("made", "host", "trouble"),
    [
        (certificate(CHAT), "chat.example", None),
        (certificate(x509.DNSName("*.example")), "chat.example", None),
        (certificate(x509.IPAddress(ipaddress.ip_address("192.0.2.1"))), "192.0.2.1", None),
        (certificate(x509.DNSName("*.example")), "a.chat.example", "does not name"),
        (certificate(x509.DNSName("192.0.2.1")), "192.0.2.1", "does not name"),
        (certificate(), "chat.example", "does not name"),
        (certificate(CHAT, begin=1), "chat.example", "not valid yet"),
        (certificate(CHAT, end=-3), "chat.example", "has expired 3 days ago"),
        (certificate(CHAT, end=13), "chat.example", "expires in 13 days"),
    ],
)
def test_certificates_are_judged_by_names_and_time(made, host, trouble):
    if trouble is None:
        assert tls.judge(made, host, NOW) == f"names {host}, valid for 90 days"
    else:
        with pytest.raises(Wrong, match=trouble):
            tls.judge(made, host, NOW)


def test_the_first_address_that_answers_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with net.dial(("127.0.0.2", "127.0.0.1"), port) as connection:
            assert connection.getpeername() == ("127.0.0.1", port)
    with pytest.raises(ConnectionRefusedError):
        net.dial(("127.0.0.1", "127.0.0.2"), port)


# --- accounts ---------------------------------------------------------------------------------------


def test_an_account_that_could_not_be_made_is_not_used_but_looked_for(monkeypatch):
    made = accounts.Accounts(net.Target("a.example", "a.example", ("192.0.2.1",)))

    def refuse(account, port=993):
        raise accounts.imaplib.IMAP4.error("[AUTHENTICATIONFAILED]")

    monkeypatch.setattr(accounts.Account, "imap", refuse)
    with pytest.raises(Wrong, match="first login is refused"):
        made.by_login()
    assert made.made == [] and made.leave_something  # a server may refuse after it has created


def test_invented_names_are_those_of_test_accounts_and_of_the_length_clients_use():
    made = accounts.Accounts(net.Target("a.example", "a.example", ()))
    address, password = made._invented()
    assert address.startswith("ci-") and len(address.partition("@")[0]) == 9
    assert len(password) == 22


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    ini = tmp_path / "etc/chatmail/chatmail.ini"
    ini.parent.mkdir(parents=True)
    ini.write_text("[params]\nmail_domain = _a.example\n")
    return str(tmp_path)


@pytest.fixture
def cleaned(monkeypatch):
    """What was tried, and that it was cleaned up; the test fills in what `relay` does."""
    calls = []
    monkeypatch.setattr(command.Test, "clean_up", lambda self: calls.append("clean"))
    monkeypatch.setattr(command, "Relay", lambda paths: None)
    return calls


def doing(monkeypatch, relay):
    monkeypatch.setattr(command.Test, "relay", relay)


def test_the_exit_status_and_the_lines_say_how_it_went(root, cleaned, monkeypatch, capsys):
    def relay(self, domain, relay, addresses):
        self.report.check("one", "do this", lambda: "fine")
        self.report.check("two", "do this", lambda: 0.25)

    doing(monkeypatch, relay)
    assert cli.main(["test"], root=root) == 0
    assert capsys.readouterr().out == "ok  one: fine\nok  two: 0.25 s\n"
    assert cleaned == ["clean"]


def fail(error):
    def look():
        raise error

    return look


def test_what_is_wrong_is_told_with_its_remedy(root, cleaned, monkeypatch, capsys):
    def relay(self, domain, relay, addresses):
        self.report.check("one", "do this", fail(ConnectionRefusedError(111, "refused")))
        self.report.check("two", "do this", fail(Wrong("broken", "do that")))
        self.report.check("three", "wait", fail(TimeoutError("timed out")))

    doing(monkeypatch, relay)
    assert cli.main(["test", "--json"], root=root) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(item["detail"], item["remedy"]) for item in found] == [
        ("[Errno 111] refused", "do this"),
        ("broken", "do that"),
        ("no answer in time", "wait"),
    ]
    assert not any(item["well"] for item in found)


def test_a_test_that_found_nothing_is_not_well(root, cleaned, monkeypatch):
    doing(monkeypatch, lambda self, domain, relay, addresses: None)
    assert cli.main(["test"], root=root) == 1


def test_the_time_of_all_is_bounded_wherever_it_waits(root, cleaned, monkeypatch, capsys):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        doing(
            monkeypatch, lambda self, *rest: self.report.check("wait", "", lambda: silent.recv(9))
        )
        assert cli.main(["test", "--timeout", "0.05"], root=root) == 1
    assert "BAD time: not done after 0.05 s" in capsys.readouterr().out
    assert cleaned == ["clean"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_test_cleans_up(root, cleaned, monkeypatch, capsys, number):
    doing(monkeypatch, lambda self, *rest: os.kill(os.getpid(), number))
    before = signal.signal(number, signal.default_int_handler)  # a build in the background
    try:
        assert cli.main(["test"], root=root) == 130
    finally:
        signal.signal(number, before)
    assert "cleaning up" in capsys.readouterr().err
    assert cleaned == ["clean"]


def test_a_defect_of_the_test_is_cleaned_up_after_as_well(root, cleaned, monkeypatch):
    doing(monkeypatch, lambda self, *rest: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["test"], root=root)
    assert cleaned == ["clean"]


def test_cleaning_up_is_not_interrupted_and_bounded(monkeypatch, capsys):
    monkeypatch.setattr(accounts, "CLEAN_UP_SECONDS", 0.05)
    test = command.Test(Report(False), ask_unbound=False)
    held = test._new(net.Target("a.example", "a.example", ()), None)
    held._addresses.append("x@a.example")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        monkeypatch.setattr(held, "_remove", lambda: silent.recv(9))
        test.clean_up()
    assert "BAD clean up a.example: not done after 0.05 s" in capsys.readouterr().out


def test_the_alarm_is_off_afterwards():
    with bounded(60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with pytest.raises(OutOfTime), bounded(0.01):
        signal.pause()


def test_the_alarm_rings_again_if_it_was_lost(monkeypatch):
    monkeypatch.setattr(report, "AGAIN_SECONDS", 0.01)
    with pytest.raises(OutOfTime), bounded(0.01):
        with contextlib.suppress(OutOfTime):  # as a finalizer does
            signal.pause()
        signal.pause()


def test_what_is_ignored_stays_so_and_cleaning_up_ignores_all():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    usual = [signal.getsignal(number) for number in numbers]
    with undisturbed():
        for number in numbers:
            os.kill(os.getpid(), number)
    assert [signal.getsignal(number) for number in numbers] == usual


def test_without_a_relay_here_one_must_be_named(tmp_path, cleaned, monkeypatch, capsys):
    asked = []
    doing(monkeypatch, lambda self, domain, relay, addresses: asked.append((domain, addresses)))
    assert cli.main(["test"], root=str(tmp_path)) == 1
    assert "not configured yet" in capsys.readouterr().out
    words = ["test", "--domain", "192.0.2.1", "--address", "198.51.100.1"]
    cli.main(words, root=str(tmp_path))
    assert asked == [("[192.0.2.1]", ("198.51.100.1",))]


@pytest.mark.parametrize("text", ["0", "-1", "x", "nan", "inf"])
def test_a_time_that_is_none_is_wrong_usage(root, text):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["test", f"--timeout={text}"], root=root)


def test_root_removes_what_is_there_and_only_that(root, monkeypatch):
    relay = Relay(Paths(Path(root)))
    made = accounts.Accounts(net.Target("_a.example", "_a.example", ()), relay)
    Path(relay.tokens._path).parent.mkdir(parents=True)
    address, password = made._invented()
    relay.mail.create(address, password)
    made._addresses += [address, "ci-never@_a.example"]
    monkeypatch.setattr(accounts.Accounts, "_registration", "token")
    token = made.token()
    assert made.token() == token
    assert made.remove() == "1 accounts deleted"
    assert list(relay.mail.taken()) == [] and relay.tokens.tokens(time.time()) == []
