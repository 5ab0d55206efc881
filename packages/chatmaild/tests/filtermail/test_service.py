# SPDX-License-Identifier: MIT
"""The real process: socket activation, sessions over unix sockets, limits, signals."""

import ast
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from filtermail_mta import (
    content,
    macros,
    mail_from,
    packet,
    rcpt_to,
)
from filtermail_process import NAMES, Client, Service, environment, running
from filtermail_relay import signed
from filtermail_samples import ALICE, BOB, REMOTE, armor, encrypted, encrypted_mail, plain_mail


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """One process for the tests that do not end it."""
    with running(
        tmp_path_factory.mktemp("filtermail"),
        "max_user_send_burst_size = 1000\ndkim_ed25519 = yes\n",
    ) as service:
        yield service


def test_mail_is_judged_over_the_real_sockets(service):
    session = service.session("outgoing")
    outcome = session.submit(encrypted_mail())
    assert outcome.reply == ""
    assert [b"s=chatmail;" in value for _, _, value in outcome.inserted] == [True, False]
    assert b"s=chatmail-ed25519;" in outcome.inserted[1][2]
    assert session.submit(plain_mail()).reply.startswith("523 ")
    assert session.submit(encrypted_mail(BOB), ALICE).reply.startswith("554 ")


def test_incoming_and_sign_sockets_are_what_their_names_say(service):
    session = service.session("incoming")
    session.send(packet(b"C", b"x\0U") + mail_from(REMOTE) + rcpt_to("nobody@chat.example"))
    assert session.outcome().reply.startswith("550 5.1.1")
    session.send(rcpt_to(BOB))
    assert session.outcome().reply == ""
    session.send(content(encrypted_mail(REMOTE)))
    assert session.outcome().reply == "554 5.7.1 No valid DKIM signature found"
    session = service.session("sign")
    session.send(
        mail_from("") + rcpt_to(REMOTE) + content(plain_mail("MAILER-DAEMON@chat.example"))
    )
    assert len(session.outcome().inserted) == 2


def test_without_a_resolver_signed_mail_is_delayed(service):
    """Where packages are built nothing listens on port 53, or it does not know key.invalid."""
    session = service.session("incoming")
    session.send(packet(b"C", b"x\0U") + mail_from(REMOTE) + rcpt_to(BOB))
    assert session.outcome().reply == ""
    mail = signed(encrypted_mail("carol@key.invalid"), "key.invalid")
    session.send(content(mail))
    assert session.outcome().reply[:9] in ("451 4.7.5", "554 5.7.1")


def test_a_large_message_in_many_pieces_does_not_grow_the_process(service):
    body = armor(encrypted(18_000_000), checksum=b"")
    mail = encrypted_mail(text=body)
    session = service.session("outgoing")
    assert session.submit(encrypted_mail()).reply == ""
    before = service.status("VmHWM")
    assert session.submit(mail).reply == ""
    assert service.status("VmHWM") - before < 3000  # kB


def test_garbage_ends_one_session_and_no_other(service):
    other = service.session("outgoing")
    for garbage in (b"\0\0\0\0", b"GET / HTTP/1.0\r\n\r\n", os.urandom(5000), packet(b"E")):
        session = service.session("outgoing")
        session.send(garbage)
        if garbage[:4] != b"\0\0\0\0" and len(garbage) == 5000:
            session.socket.shutdown(socket.SHUT_WR)
        assert session.is_closed()
    assert other.submit(encrypted_mail()).reply == ""


def test_a_peer_that_does_not_read_is_not_read_from(service):
    session = service.session("outgoing")
    session.socket.setblocking(False)
    before = service.status("VmRSS")
    sent = 0
    data = packet(b"H", b"x\0") * 10_000
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline and sent < 80_000_000:
        try:
            sent += session.socket.send(data[sent % len(data) :])
        except BlockingIOError:
            time.sleep(0.01)
    assert sent < 20_000_000
    assert service.status("VmRSS") - before < 20_000  # kB
    other = service.session("outgoing")
    assert other.submit(encrypted_mail()).reply == ""
    session.socket.settimeout(20)
    missing = sent // len(packet(b"H", b"x\0")) * len(packet(b"c"))
    while missing > 0:
        missing -= len(session.socket.recv(1 << 16))
    assert missing == 0


def test_who_connects_while_descriptors_lack_is_served_later(start):
    patch = (
        "def accept(listening, real=service.socket.socket.accept, failures=[24, 24]):\n"
        "    if failures:\n"
        "        raise OSError(failures.pop(), 'Too many open files')\n"
        "    return real(listening)\n"
        "service.socket.socket.accept = accept\n"
        "service.ACCEPT_RETRY = 0.1\n"
    )
    service = start(patch=patch)
    service.wait_ready()
    assert service.session("outgoing").submit(encrypted_mail()).reply == ""
    assert service.log.read_text().count("accept: Too many open files") == 2


def test_many_sessions_at_a_time_are_served(service):
    sessions = [service.session("outgoing") for _ in range(200)]
    for session in sessions:
        session.send(macros(b"M", auth_authen=ALICE) + packet(b"M", b"<alice@chat.example>\0"))
    assert [session.outcome().reply for session in sessions] == [""] * 200


def test_a_session_that_ends_in_the_middle_leaves_nothing_behind(service):
    session = service.session("outgoing")
    session.send(mail_from(ALICE, ALICE) + rcpt_to(BOB) + content(encrypted_mail())[:-5])
    session.socket.close()
    assert service.session("outgoing").submit(encrypted_mail()).reply == ""


def test_the_log_says_what_happened_and_to_nobody(service):
    session = service.session("outgoing")
    session.submit(encrypted_mail())
    session.submit(plain_mail())
    deadline = time.monotonic() + 20
    while not re.search(
        r"Outgoing: encrypted mail accepted \(\d+\)\n\Z", log := service.log.read_text()
    ):
        assert time.monotonic() < deadline, log
        time.sleep(0.05)
    assert "entering serving loop" in log
    assert "Outgoing: refused, unencrypted mail" in log
    for word in ("alice", "bob", "carol", "example", "Traceback"):
        assert word not in log


def test_what_was_accepted_is_told_together_and_at_the_end(start):
    service = start()
    session = service.session("outgoing")
    for _ in range(3):
        session.submit(encrypted_mail())
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(20) == 0
    log = service.log.read_text()
    numbers = re.findall(r"Outgoing: encrypted mail accepted \((\d)\)", log)
    assert sum(map(int, numbers)) == 3 > len(numbers)


@pytest.fixture
def start(tmp_path):
    services = []

    def make(*arguments, **options):
        services.append(Service(tmp_path, *arguments, **options))
        return services[-1]

    yield make
    for service in services:
        service.stop()


def test_sigterm_ends_idle_sessions_and_lets_a_message_finish(start):
    service = start()
    service.wait_ready()
    idle = service.session("outgoing")
    busy = service.session("outgoing")
    busy.send(mail_from(ALICE, ALICE))
    assert busy.outcome().reply == ""
    service.process.send_signal(signal.SIGTERM)
    assert idle.is_closed()
    busy.send(rcpt_to(BOB) + content(encrypted_mail()))
    assert busy.outcome().reply == ""
    assert busy.is_closed()
    assert service.process.wait(10) == 0
    # they are systemd's, and the next process's
    assert all((service.path / f"{name}.sock").is_socket() for name in NAMES)


def test_sigterm_does_not_wait_for_a_message_for_ever(start, tmp_path):
    service = start()
    service.wait_ready()
    busy = service.session("outgoing")
    busy.send(mail_from(ALICE, ALICE))
    assert busy.outcome().reply == ""
    started = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(15) == 0
    assert 3 < time.monotonic() - started < 10
    assert "1 messages under way" in service.log.read_text()


def test_sessions_beyond_the_limit_are_closed_at_once(start):
    service = start("max_smtp_connections = 5\n")  # 3 * 5 + 200
    service.wait_ready()
    sessions = [service.session("outgoing") for _ in range(215)]
    assert Client(service.path / "outgoing.sock", negotiate=False).is_closed()
    sessions.pop().socket.close()
    assert sessions[0].submit(encrypted_mail()).reply == ""
    assert service.session("outgoing").submit(encrypted_mail()).reply == ""


def test_sighup_reloads_without_dropping_sessions_or_messages(start):
    service = start("max_user_send_burst_size = 2\n")
    service.wait_ready()
    session, busy = service.session("outgoing"), service.session("outgoing")
    for _ in range(2):
        assert len(session.submit(encrypted_mail()).inserted) == 1
    assert session.submit(encrypted_mail()).reply.startswith("450 ")
    busy.send(mail_from(BOB, BOB))
    assert busy.outcome().reply == ""
    service.reload("max_user_send_burst_size = 4\ndkim_ed25519 = yes\npassthrough_senders = " + BOB)
    busy.send(rcpt_to(ALICE) + content(plain_mail(BOB)))
    assert busy.outcome().reply.startswith("523 "), "judged by the settings at its MAIL"
    assert busy.submit(plain_mail(BOB), BOB).reply == ""
    for _ in range(2):  # two of the four had been sent before
        assert len(session.submit(encrypted_mail()).inserted) == 2
    assert session.submit(encrypted_mail()).reply.startswith("450 ")


def test_sighup_with_settings_that_are_wrong_changes_nothing_and_says_so(start):
    service = start("max_user_send_burst_size = 100\n")
    service.wait_ready()
    session = service.session("outgoing")
    service.reload("max_user_send_burst_size = many\n")
    log = service.log.read_text()
    assert "nothing changed: " in log and "max_user_send_burst_size = many" in log
    (service.path / "dkim_rsa.pem").write_text("garbage")
    service.reload("max_user_send_burst_size = 100\n")
    assert "not an unencrypted private key" in service.log.read_text()
    assert len(session.submit(encrypted_mail()).inserted) == 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"keys": []}, ["dkim_rsa.pem is missing", "chatmail-relay apply"]),
        ({"keys": ["dkim_rsa.pem"], "more": "dkim_ed25519 = yes"}, ["dkim_ed25519.pem is missing"]),
        ({"names": ["outgoing"]}, ["expected the sockets"]),
        ({"more": "mail_domain = \n"}, ["chatmail.ini"]),
        ({"overrides": {"CREDENTIALS_DIRECTORY": ""}}, ["CREDENTIALS_DIRECTORY"]),
    ],
)
def test_what_is_missing_is_said_and_the_service_does_not_start(start, options, words):
    service = start(**options)
    assert service.process.wait(20) == 1
    log = service.log.read_text()
    assert all(word in log for word in words) and "Traceback" not in log


def test_a_broken_key_is_said(start, tmp_path):
    (tmp_path / "dkim_ed25519.pem").write_text("garbage")
    service = start("dkim_ed25519 = yes", keys=["dkim_rsa.pem"])
    assert service.process.wait(20) == 1
    assert "dkim_ed25519.pem: not an unencrypted private key" in service.log.read_text()


def test_nothing_that_judges_mail_loads_the_email_package():
    """It takes a megabyte; dnspython loads it, by importlib.metadata, when it is first needed."""
    code = "import sys, chatmaild.filtermail.__main__; print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True)
    modules = ast.literal_eval(out.stdout.decode())
    assert "chatmaild.filtermail.milter" in modules
    assert not {"email", "smtplib", "http", "dns", "importlib.metadata"} & set(modules)
