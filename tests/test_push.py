# SPDX-License-Identifier: MIT
"""Notifications: from a delivery to the notification server, by the relay as it is installed."""

import json
import re
import statistics
import time

import pytest
from conftest import DOMAIN, measured, new_account
from lab.mail import Account
from lab.messages import encrypted
from lab.shell import wait_for

UNIT = "chatmail-metadata.service"
KEY = "/private/devicetoken"
DELIVER = """
import smtplib, sys
user, count = sys.argv[1], int(sys.argv[2])
session = smtplib.LMTP("/var/spool/postfix/private/dovecot-lmtp")
for number in range(count):
    text = f"From: <x@y.example>\\r\\nSubject: {number}\\r\\n\\r\\nx\\r\\n"
    session.sendmail("x@y.example", [user], text)
session.quit()
"""
NUMBERS = """
import socket
connection = socket.socket(socket.AF_UNIX)
connection.connect("/run/chatmail/metadata/metrics.socket")
print(connection.makefile().read())
"""


@pytest.fixture
def alice(mail):
    return mail.account()


@pytest.fixture
def bob(mail):
    return mail.account()


@pytest.fixture
def send(mail):
    """Send an encrypted message over SMTP; when its end was acknowledged (monotonic)."""

    def send(sender, *recipients):
        session = mail.smtp(sender)
        to = [recipient.address for recipient in recipients]
        code, text = mail.send(session, sender.address, to, encrypted(sender.address, to[0]))
        assert code == 250, text
        return time.monotonic()

    return send


def deliver(relay, account, count):
    """Deliver *count* messages at once, past Postfix; returns seconds it took."""
    return relay.exec("python3", "-c", DELIVER, account.address, str(count)).seconds


def test_a_message_posts_the_token_of_the_recipient(push, mail, send, alice, bob):
    mail.set_token(bob, "openpgp:bob=")
    mail.set_token(alice, "openpgp:alice=")
    times = []
    for count in range(1, 6):
        begin = send(alice, bob)
        push.wait_for(lambda seen, count=count: seen.count("openpgp:bob=") == count)
        times.append(max(time.monotonic() - begin, 0))
    assert "openpgp:alice=" not in push.tokens
    middle = statistics.median(times) * 1000
    measured["from SMTP's 250 to the notification server"] = f"{middle:.0f} ms"


def test_an_own_copy_wakes_nobody(push, mail, send, alice, bob):
    mail.set_token(alice, "own")
    mail.set_token(bob, "other")
    send(alice, alice, bob)
    push.wait_for(lambda seen: "other" in seen)
    send(bob, alice)
    push.wait_for(lambda seen: "own" in seen)
    assert len(mail.received(alice)) == 2
    assert push.tokens.count("own") == 1


def test_a_token_that_is_gone_is_forgotten(push, mail, send, alice, bob):
    mail.set_token(bob, "gone")
    mail.set_token(bob, "stays")
    push.answers["gone"] = 410
    send(alice, bob)
    push.wait_for(lambda seen: {"gone", "stays"} <= set(seen))
    wait_for(lambda: mail.metadata(bob, KEY, "INBOX") == "stays")


def test_a_real_client_wakes_another(push, mail, delta):
    sender, receiver = new_account(delta, "sender"), new_account(delta, "receiver")
    (transport,) = receiver.list_transports()
    mail.set_token(Account(transport["addr"], transport["password"]), "phone")
    sender.create_chat(receiver).send_text("hello")
    assert receiver.wait_for_incoming_msg().get_snapshot().text == "hello"
    push.wait_for(lambda seen: "phone" in seen)


def set_tokens(relay, account, tokens):
    """All tokens of an account at once, as its mailbox holds them."""
    path = f"/var/lib/chatmail/mail/{DOMAIN}/{account.address}/metadata.json"
    relay.write(path, json.dumps({"devicetoken": dict.fromkeys(tokens, int(time.time()))}), 0o600)
    relay.exec("chown", "_chatmail:_chatmail", path)


def queued(relay):
    """How many notifications wait, as the service tells."""
    text = relay.exec("python3", "-c", NUMBERS).out
    return int(float(re.search(r"^chatmail_notifier_queue (\S+)$", text, re.MULTILINE)[1]))


@pytest.mark.parametrize("end", [("kill", "--signal=KILL"), ("restart",)])
def test_the_end_of_the_service_loses_nothing_that_was_queued(push, mail, relay, end):
    users = [mail.account() for _ in range(3)]
    wanted = set()
    for number, user in enumerate(users):
        tokens = [f"{end[0]}-{number}-{item}" for item in range(32)]
        set_tokens(relay, user, tokens)
        wanted |= set(tokens)
    push.answering.clear()
    try:
        for user in users:
            deliver(relay, user, 1)
        wait_for(lambda: queued(relay) == len(wanted))
        relay.exec("systemctl", *end, UNIT)
        push.tokens.clear()
    finally:
        push.answering.set()
    push.wait_for(lambda seen: wanted <= set(seen))
    wait_for(lambda: queued(relay) == 0)


@pytest.mark.parametrize("end", [("kill", "--signal=KILL"), ("restart",)])
def test_a_message_right_after_the_end_of_the_service_wakes_as_well(push, mail, relay, bob, end):
    mail.set_token(bob, f"after-{end[0]}")
    deliver(relay, bob, 1)
    push.wait_for(lambda seen: seen.count(f"after-{end[0]}") == 1)
    relay.exec("systemctl", *end, UNIT)
    deliver(relay, bob, 1)
    push.wait_for(lambda seen: seen.count(f"after-{end[0]}") == 2)


def test_deliveries_do_not_wait_for_the_notifier(push, mail, relay, bob):
    """It is frozen: more messages arrive than the socket holds events, as fast as before."""
    mail.set_token(bob, "thawed")
    usual = deliver(relay, bob, 500)
    relay.exec("systemctl", "kill", "--signal=STOP", UNIT)
    try:
        frozen = deliver(relay, bob, 1000) / 2
    finally:
        relay.exec("systemctl", "kill", "--signal=CONT", UNIT)
    assert frozen < 2 * usual + 1
    push.wait_for(lambda seen: "thawed" in seen)
    wait_for(lambda: queued(relay) == 0)
    push.tokens.clear()
    # Dovecot gave the full connection up, and loses the event with which it finds out
    wait_for(lambda: deliver(relay, bob, 1) and "thawed" in push.tokens)


def test_the_log_names_nobody(push, mail, relay, send, alice, bob):
    mail.set_token(bob, "secret-token")
    push.answers["secret-token"] = 500
    since = time.time()
    send(alice, bob)
    relay.wait_log("Notification request failed, will try again: 500", since)
    log = relay.journal("chatmail", "-u", UNIT)
    assert "secret-token" not in log and DOMAIN not in log


def test_memory_is_measured(push, relay):
    used = relay.memory()[UNIT]
    measured["memory (PSS) of METADATA and notifier after use"] = f"{used:.1f} MB"
    assert used < 40
