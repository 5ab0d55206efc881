# SPDX-License-Identifier: MIT
"""Mail from elsewhere: for whom, encrypted, and from whom it says."""

import pytest

from chatmaild.filtermail import replies
from filtermail_relay import ed25519_pem, key_name, public, rsa_pem, signed
from filtermail_samples import (
    PKESK,
    REMOTE,
    SEIPD,
    armor,
    encrypted,
    encrypted_mail,
    noise,
    old_packet,
    packet,
    plain_mail,
    report_mail,
    securejoin_mail,
    setup_mail,
)

NO_SIGNATURE = "554 5.7.1 No valid DKIM signature found"
NOT_ENCRYPTED = "523 Encryption Needed: Invalid Unencrypted Mail"
BOB = "bob@chat.example"
DAVE = "dave@chat.example"
GOOD = signed(encrypted_mail(REMOTE))
OTHER_CHECKSUM = GOOD[: GOOD.index(b"\r\n=") + 3] + b"AAAA" + GOOD[GOOD.index(b"\r\n=") + 7 :]


def test_encrypted_signed_mail_passes_unchanged(relay):
    outcome = relay.receive(GOOD)
    assert (outcome.reply, outcome.sender, outcome.changed, outcome.inserted) == ("", None, [], [])


@pytest.mark.parametrize(
    "mail",
    [
        encrypted_mail(REMOTE),
        signed(encrypted_mail(REMOTE), domain="third.example"),
        signed(encrypted_mail(REMOTE), domain="sub.other.example"),
        signed(encrypted_mail(REMOTE), pem=rsa_pem()),
        signed(encrypted_mail(REMOTE)).replace(b"Subject: [...]", b"Subject: changed"),
        OTHER_CHECKSUM,  # still encrypted mail, but another body
        b"From: x\r\n".replace(b"From", b"Cc") + GOOD,
    ],
)
def test_mail_without_valid_signature_of_its_sender_is_refused(relay, mail):
    relay.keys[key_name("third.example")] = relay.keys[key_name()]
    relay.keys[key_name("sub.other.example")] = relay.keys[key_name()]
    assert relay.receive(mail).reply == NO_SIGNATURE == replies.NO_SIGNATURE


def test_cleartext_is_refused_before_the_signature_is_looked_at(relay):
    assert relay.receive(plain_mail(REMOTE)).reply == NOT_ENCRYPTED
    assert relay.receive(signed(plain_mail(REMOTE))).reply == NOT_ENCRYPTED
    mta = relay.incoming()
    mta.send(plain_mail(REMOTE), REMOTE, [BOB])
    assert mta.asked == []


def test_cleartext_passes_to_whoever_takes_it_if_signed(relay):
    assert relay.receive(signed(plain_mail(REMOTE)), recipients=[DAVE]).reply == ""
    assert relay.receive(plain_mail(REMOTE), recipients=[DAVE]).reply == NO_SIGNATURE


@pytest.mark.parametrize("recipients", [[DAVE, BOB], [BOB, DAVE]])
def test_one_recipient_who_wants_encryption_is_enough_to_refuse(relay, recipients):
    assert relay.receive(signed(plain_mail(REMOTE)), recipients=recipients).reply == NOT_ENCRYPTED


@pytest.mark.parametrize(
    "recipient",
    [
        "bob+ext@chat.example",
        "BOB@Chat.Example",
        "bob+a+b@chat.example",
        '"bob"@chat.example',
        "@relay.example:bob@chat.example",
        "bob@chat.example.",
        "bob",
    ],
)
def test_no_spelling_of_an_address_avoids_the_encryption(relay, recipient):
    assert relay.receive(signed(plain_mail(REMOTE)), recipients=[recipient]).reply == NOT_ENCRYPTED
    assert relay.receive(GOOD, recipients=[recipient]).reply == ""


@pytest.mark.parametrize(
    "recipient",
    [
        "nobody@chat.example",
        "nobody",
        "../bob@chat.example",
        "x/../bob@chat.example",
        ".hidden@chat.example",
        "@chat.example",
        "bob@x@chat.example",
        "bob%chat.example@chat.example",
        "chat.example!bob@chat.example",
        "b\xf6b@chat.example",
        "bob @chat.example",
        "bob\x01@chat.example",
        "x" * 300 + "@chat.example",
        "",
    ],
)
def test_unknown_recipients_are_refused_one_by_one(relay, recipient):
    outcome = relay.receive(GOOD, recipients=[recipient, BOB])
    assert outcome.reply == ""
    assert outcome.refused[recipient].startswith("550 5.1.1 <")
    assert outcome.refused[recipient].endswith(">: unknown recipient")
    assert outcome.refused[recipient].isascii() and "\n" not in outcome.refused[recipient]


def test_refused_recipients_do_not_count_for_the_message(relay):
    relay.add("erin", "DISABLED")
    erin = "erin@chat.example"
    outcome = relay.receive(signed(plain_mail(REMOTE)), recipients=[erin, DAVE])
    assert outcome.refused == {erin: f"550 5.2.1 <{erin}>: account disabled"}
    assert outcome.reply == ""


def test_a_blocked_address_is_unknown(relay):
    relay.add("mallory", password="")
    assert relay.receive(GOOD, recipients=["mallory@chat.example"]).reply.startswith("550 5.1.1")


def test_recipients_of_other_domains_are_the_affair_of_postfix(relay):
    assert relay.receive(GOOD, recipients=["root@host.example", "postmaster"]).reply == ""


def test_an_envelope_sender_other_than_from_becomes_the_null_sender(relay):
    assert relay.receive(GOOD, sender="list@third.example").sender == "<>"
    assert relay.receive(GOOD, sender="").sender is None
    assert relay.receive(GOOD, sender="Carol@Other.example").sender is None


@pytest.mark.parametrize(
    "extra", [b"From: <evil@third.example>\r\n", b"FROM: <carol@other.example>\r\n"]
)
def test_a_second_from_is_refused_even_on_signed_mail(relay, extra):
    assert relay.receive(extra + GOOD).reply == replies.BAD_FROM
    assert relay.receive(signed(encrypted_mail(REMOTE, extra=extra))).reply == replies.BAD_FROM


def test_mail_without_from_or_with_two_addresses_is_refused(relay):
    mail = signed(encrypted_mail(REMOTE))
    assert relay.receive(mail.replace(b"From: <", b"Fro: <")).reply == replies.BAD_FROM
    two = encrypted_mail(REMOTE).replace(b"<carol@", b"<carol@other.example>, <carol@", 1)
    assert relay.receive(signed(two)).reply == replies.BAD_FROM


def test_reports_pass_unencrypted_if_signed(relay):
    mail = signed(report_mail())
    assert relay.receive(mail, sender="").reply == ""
    assert relay.receive(report_mail(), sender="").reply == NO_SIGNATURE


@pytest.mark.parametrize(
    "mail",
    [
        report_mail("postmaster@other.example"),
        report_mail("mailer-daemon-x@other.example"),
        report_mail(automatic=None),
        report_mail(automatic=b""),
        report_mail(automatic=b"no"),
        report_mail().replace(b"multipart/report", b"multipart/mixed"),
    ],
)
def test_what_only_looks_like_a_report_does_not(relay, mail):
    assert relay.receive(signed(mail), sender="").reply == NOT_ENCRYPTED


def test_what_others_write_is_accepted(relay):
    gnupg = old_packet(PKESK, noise(268)) + packet(SEIPD, noise(500))
    for text in (armor(encrypted(), b"Version: ProtonMail\r\n"), armor(gnupg)):
        assert relay.receive(signed(encrypted_mail(REMOTE, text))).reply == ""
    assert relay.receive(signed(securejoin_mail(REMOTE))).reply == ""
    assert relay.receive(signed(setup_mail(REMOTE))).reply == NOT_ENCRYPTED


@pytest.mark.parametrize(
    "literal, client",
    [
        ("[192.0.2.7]", "192.0.2.7"),
        ("[IPv6:2001:db8::7]", "2001:db8::7"),
        ("[ipv6:2001:DB8::7]", "IPv6:2001:db8:0::7"),
        ("[192.0.2.7]", "::ffff:192.0.2.7"),
    ],
)
def test_a_literal_sender_is_accepted_from_its_own_address_only(relay, literal, client):
    sender = f"carol@{literal}"
    mail = encrypted_mail(sender)
    assert relay.receive(mail, sender, client=client).reply == ""
    for other in ("192.0.2.8", "2001:db8::8", "", "unknown"):
        assert relay.receive(mail, sender, client=other).reply == replies.LITERAL_NOT_CLIENT
    assert relay.receive(plain_mail(sender), sender, client=client).reply == NOT_ENCRYPTED


def test_the_address_of_the_client_comes_from_the_protocol(relay):
    from chatmaild.filtermail.policy import IncomingHandler
    from filtermail_mta import Mta, connect

    for address, reply in (("192.0.2.7", ""), ("192.0.2.8", replies.LITERAL_NOT_CLIENT)):
        mta = Mta(IncomingHandler(relay.policy))
        mta.feed(connect(address))
        mail = encrypted_mail("carol@[192.0.2.7]")
        assert mta.send(mail, "carol@[192.0.2.7]", [BOB]).reply == reply


def test_a_key_that_cannot_be_fetched_delays_the_mail(relay):
    relay.keys[key_name()] = None
    assert relay.receive(GOOD).reply == replies.KEY_UNAVAILABLE
    assert replies.KEY_UNAVAILABLE.startswith("451 4.7.5 ")


def test_a_key_that_is_not_there_is_no_signature(relay):
    relay.keys[key_name()] = []
    assert relay.receive(GOOD).reply == NO_SIGNATURE
    del relay.keys[key_name()]
    assert relay.receive(GOOD).reply == NO_SIGNATURE


def test_one_valid_signature_is_enough_if_another_key_cannot_be_fetched(relay):
    relay.keys[key_name(selector="down")] = None
    down = signed(encrypted_mail(REMOTE), selector="down")
    both = down[: down.index(b"From:")] + GOOD
    assert relay.receive(both).reply == ""
    relay.keys[key_name()] = [public(rsa_pem())]
    assert relay.receive(both).reply == replies.KEY_UNAVAILABLE


def test_where_another_milter_verifies_the_filter_checks_everything_else(relay):
    def receive(mail, **more):
        return relay.receive(mail, chatmail_dkim="opendkim", **more)

    assert receive(encrypted_mail(REMOTE)).reply == ""
    assert receive(encrypted_mail(REMOTE), sender="list@third.example").sender == "<>"
    literal = "carol@[192.0.2.7]"
    for mail, reply in (
        (plain_mail(REMOTE), NOT_ENCRYPTED),
        (b"From: x@y.example\r\n" + encrypted_mail(REMOTE), replies.BAD_FROM),
        (encrypted_mail(REMOTE).replace(b"From: ", b"Fro: ", 1), replies.BAD_FROM),
        (encrypted_mail(literal), replies.LITERAL_NOT_CLIENT),
    ):
        assert receive(mail).reply == reply
    assert receive(encrypted_mail(literal), client="192.0.2.7").reply == ""
    assert relay.receive(encrypted_mail(REMOTE), chatmail_dkim="").reply == NO_SIGNATURE
    mta = relay.incoming()
    assert mta.send(encrypted_mail(REMOTE), REMOTE, [BOB], chatmail_dkim="x").reply == ""
    assert mta.send(encrypted_mail(REMOTE), REMOTE, [BOB]).reply == NO_SIGNATURE


def test_a_mail_store_that_cannot_be_read_delays_the_recipient(relay, monkeypatch):
    monkeypatch.setattr(relay.policy.mailboxes, "exists", lambda address: 1 / 0)
    assert relay.receive(GOOD).reply == replies.TEMPORARY_FAILURE


def test_a_bug_delays_the_mail(relay, monkeypatch):
    monkeypatch.setattr("chatmaild.filtermail.dkim.Verifier.verify", lambda self, keys: 1 / 0)
    assert relay.receive(GOOD).reply == replies.TEMPORARY_FAILURE


def test_only_the_sender_is_changed_and_mail_is_not_waited_for(relay):
    mta = relay.incoming()
    assert mta.actions & ~0x100 == 0x40
    assert mta.protocol & 0x4000 and not mta.protocol & 0x8000 and not mta.protocol & 0x01


def test_the_key_is_asked_for_by_selector_and_domain(relay):
    mta = relay.incoming()
    assert mta.send(GOOD, REMOTE, [BOB]).reply == ""
    assert mta.asked == [("s._domainkey.other.example",)]
    assert public(ed25519_pem()) is not None
