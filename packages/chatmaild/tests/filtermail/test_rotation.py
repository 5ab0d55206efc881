# SPDX-License-Identifier: MIT
"""A peer that exchanges its key under the same name: the service, over sockets, with a DNS of its own."""

import contextlib
import socket
import threading

import dns.message
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from filtermail_mta import content, mail_from, packet, rcpt_to
from filtermail_process import Service
from filtermail_relay import key_name, signed
from filtermail_samples import BOB, encrypted_mail
from test_dkim import pem, record_of
from test_keys import respond, txt

CAROL = "carol@other.example"
OLD, NEW, FORGED = (
    ed25519.Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2, 3)
)
REFUSED = "554 5.7.1 No valid DKIM signature found"


class Dns:
    """Says on loopback that `key` is the key of everybody, for a day."""

    def __init__(self, key):
        self.key = key
        self.questions = 0
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                data, client = self.socket.recvfrom(4096)
                self.questions += 1
                record = txt(record_of(self.key).decode(), key_name(), ttl=86400)
                answer = respond(dns.message.from_wire(data), record)
                self.socket.sendto(answer.to_wire(), client)


@pytest.fixture
def peer():
    made = Dns(OLD)
    yield made
    made.socket.close()


@pytest.fixture
def start(tmp_path, peer):
    """Start the service: old is a key that was asked for so many seconds ago."""
    services = []

    def begin(refresh_after):
        patch = (
            "from chatmaild.filtermail import keys\n"
            f"keys.REFRESH_AFTER = {refresh_after}\n"
            f"service.KeyStore = lambda: keys.KeyStore({peer.socket.getsockname()})\n"
        )
        services.append(Service(tmp_path, patch=patch, keys=["dkim_rsa.pem"]))
        services[0].wait_ready()
        session = services[0].session("incoming")
        session.send(packet(b"C", b"x\0U"))

        def receive(key):
            session.send(mail_from(CAROL) + rcpt_to(BOB))
            assert session.outcome().reply == ""
            session.send(content(signed(encrypted_mail(CAROL), "other.example", pem=pem(key))))
            return session.outcome().reply

        return receive

    yield begin
    for service in services:
        service.stop()


def test_a_new_key_is_good_at_once_and_the_old_one_no_more(start, peer):
    receive = start(refresh_after=0)
    assert receive(OLD) == receive(OLD) == ""
    assert peer.questions == 1
    peer.key = NEW
    assert receive(NEW) == ""
    assert receive(OLD) == REFUSED
    assert peer.questions == 3


def test_forged_mail_does_not_make_questions(start, peer):
    receive = start(refresh_after=60)
    assert receive(OLD) == ""
    assert {receive(FORGED) for _ in range(50)} == {REFUSED}
    assert receive(OLD) == ""
    assert peer.questions == 1
