# SPDX-License-Identifier: MIT
"""Submission: who may send what, and what the relay adds."""

import dataclasses
import logging

import dkim as dkimpy
import pytest

from chatmaild.config import read_settings
from chatmaild.filtermail import dkim, policy, replies
from chatmaild.filtermail.__main__ import load_keys
from chatmaild.filtermail.limiter import Limiter
from filtermail_mta import Mta, connect, mail_from, packets
from filtermail_relay import NOW, Relay, ed25519_pem, public, rsa_pem
from filtermail_samples import (
    ALICE,
    BOB,
    DOMAIN,
    REMOTE,
    armor,
    encrypted,
    encrypted_mail,
    plain_mail,
    report_mail,
    securejoin_mail,
    setup_mail,
    split,
)

NOT_ENCRYPTED = "523 Encryption Needed: Invalid Unencrypted Mail"


def test_encrypted_mail_passes_and_is_signed(relay):
    outcome = relay.submit(encrypted_mail())
    assert (outcome.reply, outcome.changed) == ("", [])
    ((position, name, value),) = outcome.inserted
    assert (position, name) == (0, b"DKIM-Signature")
    assert value.startswith(b" v=1; a=rsa-sha256; c=relaxed/simple; d=chat.example;\n\ts=chatmail;")


def queued(mail, outcome):
    """*mail* as Postfix queues it."""
    fields, body = split(mail)
    counts = {}
    result = []
    for name, value in fields:
        number = counts[name.lower()] = counts.get(name.lower(), 0) + 1
        for wanted, changed, new in outcome.changed:
            if (wanted, changed.lower()) == (number, name.lower()):
                value = new
        result.append((name, value))
    result[0:0] = [(name, value) for _, name, value in outcome.inserted]
    header = b"".join(name + b":" + value + b"\n" for name, value in result)
    return header.replace(b"\n", b"\r\n") + b"\r\n" + body


@pytest.mark.parametrize("subject", ["[...]", "secret plans", "", "[...] x"])
def test_what_is_queued_carries_a_valid_signature(relay, subject):
    mail = encrypted_mail(subject=subject)
    delivered = queued(mail, relay.submit(mail))
    assert b"\r\nSubject: [...]\r\n" in delivered
    key = public(rsa_pem()).key
    fields, body = split(delivered)
    verifier = dkim.Verifier(fields, DOMAIN, NOW)
    verifier.body(body)
    assert verifier.verify({name: [dkim.KeyRecord(key, True)] for name in verifier.key_names()})
    data = key_record(key)
    assert dkimpy.DKIM(delivered).verify(0, dnsfunc=lambda *_, **__: data)


def key_record(key):
    import base64

    from cryptography.hazmat.primitives import serialization

    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return b"v=DKIM1; p=" + base64.b64encode(der)


def test_a_second_key_gives_a_second_signature(tmp_path):
    keys = [
        dkim.SigningKey(rsa_pem(), DOMAIN, "chatmail"),
        dkim.SigningKey(ed25519_pem(), DOMAIN, "chatmail-ed25519"),
    ]
    outcome = Relay(tmp_path, signing_keys=keys).submit(encrypted_mail())
    assert [position for position, _, _ in outcome.inserted] == [0, 1]
    assert b"s=chatmail-ed25519;" in outcome.inserted[1][2]


def test_without_a_key_nothing_is_signed_and_all_else_stays(tmp_path):
    """A relay with an address in place of its domain."""
    relay = Relay(tmp_path, signing_keys=[])
    outcome = relay.submit(encrypted_mail(subject="hello"))
    assert (outcome.reply, outcome.inserted) == ("", [])
    assert outcome.changed == [(1, b"Subject", b" [...]")]
    bounce = relay.sign().send(report_mail(f"mailer-daemon@{DOMAIN}"), "", ["carol@other.example"])
    assert (bounce.reply, bounce.inserted) == ("", [])


def test_an_address_in_place_of_the_domain_takes_no_key(tmp_path):
    config = read_settings("test.ini", "[params]\nmail_domain = 192.0.2.1\n")[0]
    assert load_keys(tmp_path / "nothing here", config) == []


@pytest.mark.parametrize("subject", ["hello", "Re: [...]", "[...] ", "\r\n [...]"])
def test_a_subject_is_replaced_only_if_it_differs(relay, subject):
    outcome = relay.submit(encrypted_mail(subject=subject))
    expected = [] if subject.strip() == "[...]" else [(1, b"Subject", b" [...]")]
    assert outcome.changed == expected


def test_every_subject_is_replaced_and_none_is_added(relay):
    mail = encrypted_mail(subject="[...]", extra=b"subject: secret\r\nSUBJECT: too\r\n")
    assert [number for number, _, _ in relay.submit(mail).changed] == [2, 3]
    without = encrypted_mail().replace(b"Subject: [...]\r\n", b"")
    assert relay.submit(without).changed == []


@pytest.mark.parametrize(
    "mail",
    [
        plain_mail(),
        setup_mail(),
        report_mail(ALICE),
        securejoin_mail(step=b"vc-request-with-auth"),
        encrypted_mail(text=armor(encrypted(), b"Version: x\r\n")),
    ],
)
def test_other_mail_is_refused_with_the_text_that_clients_know(relay, mail):
    assert relay.submit(mail).reply == NOT_ENCRYPTED
    assert replies.NOT_ENCRYPTED == NOT_ENCRYPTED


def test_a_securejoin_request_passes_and_loses_its_subject(relay):
    outcome = relay.submit(securejoin_mail())
    assert outcome.reply == "" and outcome.inserted
    assert outcome.changed == [(1, b"Subject", b" [...]")]


def test_a_setup_message_passes_only_to_oneself(relay):
    assert relay.submit(setup_mail(), recipients=[ALICE]).reply == ""
    assert relay.submit(setup_mail(), recipients=["Alice@Chat.Example"]).reply == ""
    assert relay.submit(setup_mail(), recipients=[BOB]).reply == NOT_ENCRYPTED
    assert relay.submit(setup_mail(), recipients=[ALICE, BOB]).reply == NOT_ENCRYPTED
    assert relay.submit(setup_mail(), recipients=[ALICE, ALICE]).reply == NOT_ENCRYPTED
    for a, b in (
        (b"Autocrypt Setup Message\r\nX", b"Autocrypt setup message\r\nX"),
        (b"multipart/mixed", b"multipart/related"),
        (b"MIME-Version", b"Subject: x\r\nMIME-Version"),
    ):
        mail = setup_mail().replace(b"Message\r\n", b"Message\r\nX: y\r\n", 1).replace(a, b, 1)
        assert relay.submit(mail, recipients=[ALICE]).reply == NOT_ENCRYPTED


def test_passthrough_senders_may_send_anything_but_forge_nothing(tmp_path):
    relay = Relay(tmp_path, passthrough_senders=[ALICE])
    assert relay.submit(plain_mail()).reply == ""
    assert relay.submit(plain_mail()).changed == [(1, b"Subject", b" [...]")]
    assert relay.submit(plain_mail(BOB)).reply == replies.FROM_NOT_SENDER
    assert relay.submit(plain_mail(BOB), sender=BOB).reply == NOT_ENCRYPTED
    suffix = Relay(tmp_path, passthrough_senders=["@chat.example"])
    assert suffix.submit(plain_mail(BOB), sender=BOB).reply == ""


def test_passthrough_recipients_may_be_sent_anything_if_all_are(tmp_path):
    relay = Relay(tmp_path, passthrough_recipients=[BOB, "@other.example"])
    for recipients in ([BOB], [REMOTE], [BOB, "Any@Other.Example"]):
        assert relay.submit(plain_mail(), recipients=recipients).reply == ""
    for recipients in ([BOB, ALICE], ["x@sub.other.example"], ["x@another.example"], []):
        assert relay.submit(plain_mail(), recipients=recipients).reply == NOT_ENCRYPTED


@pytest.mark.parametrize(
    "sender, login",
    [
        (ALICE, None),
        (ALICE, BOB),
        (BOB, ALICE),
        ("", ALICE),
        ("", None),
        ("alice", "alice"),
        ("alice@other.example", "alice@other.example"),
        ("alice+x@chat.example", ALICE),
        ("@chat.example", "@chat.example"),
        ("al\xefce@chat.example", ALICE),
    ],
)
def test_the_envelope_sender_must_be_the_login(relay, sender, login):
    assert relay.submit(encrypted_mail(), sender, login=login).reply == replies.NOT_LOGIN


def test_case_does_not_matter(relay):
    mail = encrypted_mail("Alice@CHAT.example")
    assert relay.submit(mail, "ALICE@chat.example", login="alice@chat.EXAMPLE").reply == ""


def test_a_login_counts_for_one_message_only(relay):
    mta = relay.outgoing()
    assert mta.send(encrypted_mail(), ALICE, [BOB], login=ALICE).reply == ""
    assert mta.send(encrypted_mail(), ALICE, [BOB], login=None).reply == replies.NOT_LOGIN


@pytest.mark.parametrize(
    "value",
    [
        b"<bob@chat.example>",
        b"alice@chat.example, bob@chat.example",
        b"alice@chat.example\r\nFrom: bob@chat.example",
        b"alice@chat.example\r\nFrom: alice@chat.example",
        b"",
        b"bob@chat.example <alice@chat.example>",
        b"alice@chat.example" + b" " * 1000,
        b"\xc3\xa9 <alice@chat.example>",
    ],
)
def test_from_must_be_the_sender_once_and_alone(relay, value):
    mail = encrypted_mail().replace(b"<alice@chat.example>", value, 1)
    assert relay.submit(mail).reply in (replies.BAD_FROM, replies.FROM_NOT_SENDER)


def test_a_message_without_from_is_refused(relay):
    mail = encrypted_mail().replace(b"From: ", b"X-From: ", 1)
    assert relay.submit(mail).reply == replies.BAD_FROM


def test_a_disabled_sender_is_refused(relay):
    relay.add("erin", "DISABLED")
    reply = relay.submit(encrypted_mail("erin@chat.example"), "erin@chat.example").reply
    assert reply == "554 5.7.1 <erin@chat.example>: account disabled"


def test_unknown_and_disabled_recipients_are_accepted_here_and_bounced_later(relay):
    """One refused recipient would fail the whole message in the client."""
    relay.add("erin", "DISABLED")
    recipients = ["erin@chat.example", "nobody@chat.example", REMOTE]
    assert relay.submit(encrypted_mail(), recipients=recipients).reply == ""


def test_where_another_milter_signs_the_filter_does_not_and_checks_all_the_same(relay):
    outcome = relay.submit(encrypted_mail(subject="secret"), chatmail_dkim="opendkim")
    assert (outcome.reply, outcome.inserted) == ("", [])
    assert outcome.changed == [(1, b"Subject", b" [...]")]
    for mail, reply in (
        (plain_mail(), NOT_ENCRYPTED),
        (encrypted_mail(BOB), replies.FROM_NOT_SENDER),
        (encrypted_mail().replace(b"From: ", b"X-From: ", 1), replies.BAD_FROM),
    ):
        assert relay.submit(mail, chatmail_dkim="opendkim").reply == reply
    mta = relay.outgoing()
    assert mta.send(encrypted_mail(), ALICE, [BOB], login=ALICE, chatmail_dkim="x").inserted == []
    assert mta.send(encrypted_mail(), ALICE, [BOB], login=ALICE).inserted != []


def test_too_much_mail_is_delayed_at_mail_and_others_are_not_affected(relay):
    for _ in range(10):
        assert relay.submit(encrypted_mail()).reply == ""
    reply = relay.submit(encrypted_mail()).reply
    assert reply == "450 4.7.1 Too much mail from <alice@chat.example>"
    assert relay.submit(encrypted_mail(BOB), BOB).reply == ""
    relay.now += 1.0
    assert relay.submit(encrypted_mail()).reply == ""
    assert relay.submit(encrypted_mail()).reply.startswith("450 4.7.1")


def test_refused_mail_does_not_end_the_session(relay):
    mta = relay.outgoing()
    assert mta.send(plain_mail(), ALICE, [BOB], login=ALICE).reply == NOT_ENCRYPTED
    assert mta.send(encrypted_mail(BOB), ALICE, [BOB], login=ALICE).reply
    assert mta.send(encrypted_mail(), BOB, [BOB], login=ALICE).reply
    assert mta.send(encrypted_mail(), ALICE, [BOB], login=ALICE).reply == ""


def test_a_mail_store_that_cannot_be_read_delays_the_mail(relay, monkeypatch, caplog):
    def broken(address):
        raise PermissionError("/secret/path/of/alice")

    monkeypatch.setattr(relay.policy.mailboxes, "is_disabled", broken)
    assert relay.submit(encrypted_mail()).reply == replies.TEMPORARY_FAILURE
    assert "PermissionError" in caplog.text and "secret" not in caplog.text


def test_a_bug_delays_the_mail_and_the_next_one_is_judged(relay, monkeypatch):
    mta = relay.outgoing()
    with monkeypatch.context() as patch:
        patch.setattr("chatmaild.filtermail.mime.MimeCheck.body", lambda self, data: 1 / 0)
        reply = mta.send(encrypted_mail(), ALICE, [BOB], login=ALICE).reply
        assert reply == replies.TEMPORARY_FAILURE
    assert mta.send(encrypted_mail(), ALICE, [BOB], login=ALICE).reply == ""


def test_the_log_names_no_one(relay, caplog):
    caplog.set_level(logging.DEBUG)
    relay.add("erin", "DISABLED")
    relay.submit(encrypted_mail(), recipients=[BOB, "erin@chat.example"])
    relay.submit(plain_mail())
    relay.submit(encrypted_mail(), BOB, login=ALICE)
    relay.submit(encrypted_mail("erin@chat.example"), "erin@chat.example")
    relay.receive(plain_mail(REMOTE))
    relay.receive(plain_mail(REMOTE), recipients=["nobody@chat.example"])
    told = "\n".join([caplog.text, *policy.accepted_since({})])
    assert "Outgoing: encrypted mail accepted (" in told
    assert "Outgoing: refused, unencrypted mail" in caplog.text
    assert "Incoming: refused, unknown recipient" in caplog.text
    for word in ("alice", "bob", "erin", "nobody", "carol", "example", "192.0", "hello"):
        assert word not in told


def test_the_recipients_are_not_waited_for_and_the_client_is_not_asked_for(relay):
    mta = relay.outgoing()
    assert mta.protocol & 0x01 and mta.protocol & 0x8000 and mta.protocol & 0x100000
    assert mta.actions & ~0x100 == 0x01 | 0x10


def test_an_mta_that_sends_the_client_all_the_same_is_answered(relay):
    mta = relay.outgoing()
    assert packets(mta.feed(connect())) == [(b"c", b"")]
    assert mta.feed(mail_from(ALICE, ALICE))


def test_policy_is_immutable(relay):
    with pytest.raises(dataclasses.FrozenInstanceError):
        relay.policy.domain = "x"


def test_a_policy_that_forgot_the_check_would_be_noticed(relay, monkeypatch):
    """The tests above can fail: seed the defect they are there for."""
    assert relay.submit(plain_mail()).reply == NOT_ENCRYPTED
    monkeypatch.setattr(policy.OutgoingHandler, "_accepted_as", lambda self, message: "anything")
    assert relay.submit(plain_mail()).reply == ""


def test_limits_of_the_settings_are_used(tmp_path):
    relay = Relay(tmp_path, limiter=Limiter(1, 2))
    results = [relay.submit(encrypted_mail()).reply[:3] for _ in range(3)]
    assert results == ["", "", "450"]


def test_postfix_is_told_which_macros_to_send(relay):
    from filtermail_mta import negotiation

    session = Mta(policy.OutgoingHandler(relay.policy)).session.__class__(
        policy.OutgoingHandler(relay.policy)
    )
    ((_, payload),) = packets(session.feed(negotiation()))
    assert b"{auth_authen} {chatmail_dkim}\0" in payload[12:]
