# SPDX-License-Identifier: MIT
"""Every bound of the process, exceeded over the real sockets: memory, descriptors, and what is said."""

import functools
import socket
import threading
import time

import pytest
from filtermail_mta import content, macros, mail_from, packet, rcpt_to
from filtermail_process import Client, running
from filtermail_relay import signed
from filtermail_samples import ALICE, BOB, REMOTE, armor, encrypted, encrypted_mail, split

from chatmaild.filtermail import milter

SETTINGS = "max_user_send_burst_size = 1000\nmax_smtp_connections = 50\n"
MAX_SESSIONS = 3 * 50 + 200
IDLE = 1.0  # seconds, in place of an hour
DNS_TIMEOUT = 0.3
BUDGET = 40_000  # kB, with four messages of 20 MB in flight


@pytest.fixture(scope="module")
def mute_resolver():
    """A DNS server that never answers."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver:
        resolver.bind(("127.0.0.1", 0))
        yield resolver.getsockname()


@pytest.fixture(scope="module")
def service(tmp_path_factory, mute_resolver):
    patch = (
        f"service.IDLE_TIMEOUT, service.SWEEP_INTERVAL = {IDLE}, 0.1\n"
        f"from chatmaild.filtermail.keys import KeyStore\n"
        f"service.KeyStore = lambda: KeyStore({mute_resolver}, {DNS_TIMEOUT})\n"
    )
    with running(tmp_path_factory.mktemp("limits"), SETTINGS, patch=patch) as service:
        session = service.session("outgoing")
        assert session.submit(encrypted_mail()).reply == ""
        service.idle_descriptors = service.descriptors() - 1
        session.socket.close()
        yield service


@pytest.fixture
def bounded(service):
    """The service; afterwards it has no more descriptors and not much more memory than before."""
    wait_for(lambda: not sessions(service))
    memory = service.status("VmRSS")
    yield service
    wait_for(lambda: not sessions(service))
    assert service.status("VmRSS") - memory < 4000  # kB


def sessions(service):
    """How many sockets beyond those of an idle process are open."""
    return service.descriptors() - service.idle_descriptors


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def open_message(service, mail=None):
    """A session after MAIL and RCPT, and the fields of *mail* as packets."""
    session = service.session("outgoing")
    session.send(mail_from(ALICE, ALICE))
    assert session.outcome().reply == ""
    session.send(rcpt_to(BOB))
    fields, _ = split(mail or encrypted_mail())
    return session, [packet(b"L", name + b"\0" + value + b"\0") for name, value in fields]


def rest(mail=None):
    """Everything of *mail* behind its header."""
    whole = content(mail or encrypted_mail())
    return whole[whole.index(packet(b"N")) :]


def test_a_hundred_thousand_header_fields(bounded):
    session, fields = open_message(bounded)
    session.send(b"".join(fields))
    for _ in range(100):
        session.send(packet(b"L", b"X-Y\0z\0") * 1000)
    session.send(rest())
    assert session.outcome().reply == "552 5.3.4 Message header too large"
    assert session.submit(encrypted_mail()).reply == ""
    session.socket.close()


def test_a_hundred_megabytes_of_header(bounded):
    session, _ = open_message(bounded)
    field = packet(b"L", b"X-Y\0" + b"z" * 100_000 + b"\0")
    before = bounded.status("VmRSS")
    for _ in range(1000):
        session.send(field)
    session.send(rest())
    assert session.outcome().reply == "552 5.3.4 Message header too large"
    assert bounded.status("VmRSS") - before < 2000
    session.socket.close()


def test_a_header_that_is_one_line_too_large_for_a_packet(bounded):
    session, _ = open_message(bounded)
    session.send(packet(b"L", b"X\0" + b"y" * milter.MAX_PACKET + b"\0")[:1000])
    assert session.is_closed()


@pytest.mark.parametrize("size", [milter.MAX_PACKET + 1, 1 << 31])
def test_a_piece_of_a_body_too_large(bounded, size):
    session, fields = open_message(bounded)
    session.send(b"".join(fields) + packet(b"N") + size.to_bytes(4, "big") + b"B" + b"x" * 1000)
    assert session.is_closed()


def test_pieces_of_a_body_that_never_become_complete(bounded):
    held = []
    for _ in range(20):
        session, fields = open_message(bounded)
        largest = packet(b"B", b"x" * (milter.MAX_PACKET - 1))
        session.send(b"".join(fields) + packet(b"N") + largest[:-1])
        held.append(session)
    assert bounded.status("VmHWM") < BUDGET + 20 * milter.MAX_PACKET // 1000
    for session in held:
        session.socket.close()
    # Postfix sends pieces of 64 kB, so its 20 sessions hold 1.3 MB


def test_a_thousand_and_one_recipients(bounded):
    session = bounded.session("outgoing")
    session.send(mail_from(ALICE, ALICE))
    assert session.outcome().reply == ""
    session.send(rcpt_to(BOB) * (milter.MAX_RECIPIENTS + 1) + content(encrypted_mail()))
    assert session.outcome().reply == "452 4.5.3 Too many recipients"
    session.socket.close()


def test_sessions_beyond_the_limit(bounded):
    before = bounded.status("VmRSS")
    held = [bounded.session("outgoing") for _ in range(MAX_SESSIONS)]
    for _ in range(50):
        assert Client(bounded.path / "outgoing.sock", negotiate=False).is_closed()
    assert sessions(bounded) == MAX_SESSIONS
    assert bounded.status("VmRSS") - before < 10 * MAX_SESSIONS  # kB
    assert "too many sessions" in bounded.log.read_text()
    for session in held:
        session.socket.close()
    wait_for(lambda: not sessions(bounded))
    session = bounded.session("outgoing")
    assert session.submit(encrypted_mail()).reply == ""
    session.socket.close()


@pytest.mark.parametrize("said", ["nothing", "hello", "half a message"])
def test_a_session_silent_for_too_long(bounded, said):
    if said == "half a message":
        session, fields = open_message(bounded)
        session.send(b"".join(fields) + packet(b"N"))
    else:
        session = Client(bounded.path / "outgoing.sock", negotiate=said == "hello")
    began = time.monotonic()
    assert session.is_closed()
    assert IDLE / 2 < time.monotonic() - began < IDLE + 5


def test_a_session_that_speaks_now_and_then_is_kept(bounded):
    session = bounded.session("outgoing")
    deadline = time.monotonic() + 2 * IDLE
    while time.monotonic() < deadline:
        session.send(macros(b"M"))
        time.sleep(IDLE / 5)
    assert session.submit(encrypted_mail()).reply == ""
    session.socket.close()


def test_a_resolver_that_never_answers(bounded):
    session = bounded.session("incoming")
    session.send(packet(b"C", b"x\0U") + mail_from(REMOTE) + rcpt_to(BOB))
    assert session.outcome().reply == ""
    began = time.monotonic()
    session.send(content(signed(encrypted_mail(REMOTE))))
    assert session.outcome().reply.startswith("451 4.7.5 ")
    assert time.monotonic() - began < DNS_TIMEOUT + 5
    session.socket.close()


def test_one_sender_who_sends_too_much(bounded):
    session = bounded.session("outgoing")
    replies = []
    for _ in range(1500):
        session.send(mail_from(BOB, BOB))
        replies.append(session.outcome().reply)
    assert replies[0] == "" and replies[-1] == f"450 4.7.1 Too much mail from <{BOB}>"
    session.socket.close()


@functools.cache
def twenty_megabytes():
    return content(encrypted_mail(text=armor(encrypted(14_500_000), checksum=b"")))


def test_four_messages_of_twenty_megabytes_at_a_time(bounded):
    assert len(twenty_megabytes()) > 19_500_000

    def send(outcomes):
        session, _ = open_message(bounded)
        session.send(twenty_megabytes())
        outcomes.append(session.outcome().reply)
        session.socket.close()

    outcomes = []
    threads = [threading.Thread(target=send, args=(outcomes,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    peak = 0
    while any(thread.is_alive() for thread in threads):
        peak = max(peak, bounded.status("VmRSS"))
        time.sleep(0.01)
    assert outcomes == [""] * 4
    assert peak < BUDGET
