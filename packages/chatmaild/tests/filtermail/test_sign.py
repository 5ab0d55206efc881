# SPDX-License-Identifier: MIT
"""The sign-only socket: signs bounces, refuses nothing."""

import pytest

from chatmaild.filtermail import dkim, milter
from filtermail_relay import NOW, public, rsa_pem
from filtermail_samples import DOMAIN, encrypted_mail, plain_mail, report_mail, split

DAEMON = "MAILER-DAEMON@chat.example"


@pytest.mark.parametrize("name", [b"Mail Delivery System <%s>", b"%s (Mail Delivery System)"])
def test_bounces_are_signed(relay, name):
    mail = report_mail(DAEMON).replace(b"<" + DAEMON.encode() + b">", name % DAEMON.encode(), 1)
    outcome = relay.sign().send(mail, "", ["carol@other.example"])
    ((position, field, value),) = outcome.inserted
    assert (outcome.reply, position, field) == ("", 0, b"DKIM-Signature")
    fields, body = split(mail)
    verifier = dkim.Verifier([(field, value), *fields], DOMAIN, NOW)
    verifier.body(body)
    keys = {name: [public(rsa_pem())] for name in verifier.key_names()}
    assert verifier.verify(keys)
    assert outcome.changed == []


@pytest.mark.parametrize(
    "mail, sender",
    [
        (report_mail(DAEMON), "alice@chat.example"),
        (report_mail("alice@chat.example"), ""),
        (report_mail("MAILER-DAEMON@other.example"), ""),
        (plain_mail("root@host.example"), "root@host.example"),
        (encrypted_mail("alice@chat.example"), "alice@chat.example"),
        (report_mail(DAEMON).replace(b"From:", b"From: x@y.example\r\nFrom:", 1), ""),
        (report_mail(DAEMON).replace(b"From:", b"Fro:", 1), ""),
        (b"X: " + b"\xff" * 200 + b"\r\n\r\n\xff\x80", ""),
        (b"X: y\r\n" * (milter.MAX_HEADERS + 1) + report_mail(DAEMON), ""),
        (b"X: " + b"y" * (milter.MAX_HEADER_BYTES + 1) + b"\r\n" + report_mail(DAEMON), ""),
        (b"\r\n\r\n", "a@b@c"),
    ],
)
def test_everything_else_passes_unsigned(relay, mail, sender):
    outcome = relay.sign().send(mail, sender, ["carol@other.example"])
    assert (outcome.reply, outcome.inserted) == ("", [])


def test_where_another_milter_signs_bounces_pass_unsigned(relay):
    mail = report_mail(DAEMON)
    outcome = relay.sign().send(mail, "", ["carol@other.example"], chatmail_dkim="opendkim")
    assert (outcome.reply, outcome.inserted) == ("", [])


def test_more_recipients_than_allowed_pass_too(relay):
    recipients = ["x@other.example"] * (milter.MAX_RECIPIENTS + 5)
    assert relay.sign().send(report_mail(DAEMON), "", recipients).reply == ""


@pytest.mark.parametrize("method", ["mail", "rcpt", "header", "end_of_header", "body", "abort"])
def test_a_bug_lets_the_mail_pass_unsigned(relay, monkeypatch, method):
    mta = relay.sign()
    with monkeypatch.context() as patch:
        patch.setattr(mta.session._handler, method, lambda *arguments: 1 / 0)
        assert mta.send(report_mail(DAEMON), "", ["carol@other.example"]).reply == ""
    assert mta.send(report_mail(DAEMON), "", ["carol@other.example"]).inserted
