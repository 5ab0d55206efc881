# SPDX-License-Identifier: MIT
"""The table of replies, word for word, and for each what brings it about; each is counted and logged."""

import pytest
from filtermail_relay import key_name, signed
from filtermail_samples import (
    ALICE,
    BOB,
    REMOTE,
    encrypted_mail,
    plain_mail,
)

from chatmaild.filtermail import milter, policy, replies

TABLE = {
    "NOT_ENCRYPTED": "523 Encryption Needed: Invalid Unencrypted Mail",
    "NO_SIGNATURE": "554 5.7.1 No valid DKIM signature found",
    "BAD_FROM": "554 5.7.1 Exactly one From with exactly one address is required",
    "FROM_NOT_SENDER": "554 5.7.1 From is not the envelope sender",
    "LITERAL_NOT_CLIENT": "554 5.7.1 From is an address literal of another host",
    "MALFORMED_HEADER": "554 5.6.0 Malformed message header",
    "HEADER_TOO_LARGE": "552 5.3.4 Message header too large",
    "NOT_LOGIN": "553 5.7.1 Sender address is not the login",
    "SENDER_DISABLED": "554 5.7.1 <{}>: account disabled",
    "RATE_LIMITED": "450 4.7.1 Too much mail from <{}>",
    "UNKNOWN_RECIPIENT": "550 5.1.1 <{}>: unknown recipient",
    "RECIPIENT_DISABLED": "550 5.2.1 <{}>: account disabled",
    "TOO_MANY_RECIPIENTS": "452 4.5.3 Too many recipients",
    "TEMPORARY_FAILURE": "451 4.3.0 Temporary failure, try again later",
    "KEY_UNAVAILABLE": "451 4.7.5 DKIM key temporarily unavailable, try again later",
}

ERIN = "erin@chat.example"  # disabled
MANY_FIELDS = b"X: y\r\n" * milter.MAX_HEADERS
SIGNED = signed(encrypted_mail(REMOTE))


def too_much(relay):
    for _ in range(10):
        relay.submit(encrypted_mail())
    return relay.submit(encrypted_mail())


def no_dns(relay):
    relay.keys[key_name()] = None
    return relay.receive(SIGNED)


def a_bug(relay):
    relay.policy.limiter.allow = None
    return relay.submit(encrypted_mail())


# name of a reply: (address in it, (direction, what brings it about) ...)
CASES = {
    "NOT_ENCRYPTED": (
        "",
        ("outgoing", lambda relay: relay.submit(plain_mail())),
        ("incoming", lambda relay: relay.receive(signed(plain_mail(REMOTE)))),
    ),
    "NO_SIGNATURE": ("", ("incoming", lambda relay: relay.receive(encrypted_mail(REMOTE)))),
    "BAD_FROM": (
        "",
        ("outgoing", lambda relay: relay.submit(encrypted_mail().replace(b"From", b"X", 1))),
        ("incoming", lambda relay: relay.receive(b"From: x@y.example\r\n" + SIGNED)),
    ),
    "FROM_NOT_SENDER": ("", ("outgoing", lambda relay: relay.submit(encrypted_mail(BOB)))),
    "LITERAL_NOT_CLIENT": (
        "",
        ("incoming", lambda relay: relay.receive(encrypted_mail("carol@[192.0.2.9]"))),
    ),
    "MALFORMED_HEADER": (
        "",
        ("outgoing", lambda relay: relay.submit(b"X : y\r\n" + encrypted_mail())),
        ("incoming", lambda relay: relay.receive(b"X : y\r\n" + SIGNED)),
    ),
    "HEADER_TOO_LARGE": (
        "",
        ("outgoing", lambda relay: relay.submit(MANY_FIELDS + encrypted_mail())),
        ("incoming", lambda relay: relay.receive(MANY_FIELDS + SIGNED)),
    ),
    "NOT_LOGIN": ("", ("outgoing", lambda relay: relay.submit(encrypted_mail(), login=BOB))),
    "SENDER_DISABLED": (
        ERIN,
        ("outgoing", lambda relay: relay.submit(encrypted_mail(ERIN), ERIN)),
    ),
    "RATE_LIMITED": (ALICE, ("outgoing", too_much)),
    "UNKNOWN_RECIPIENT": (
        "no@chat.example",
        ("incoming", lambda relay: relay.receive(SIGNED, recipients=["no@chat.example"])),
    ),
    "RECIPIENT_DISABLED": (
        ERIN,
        ("incoming", lambda relay: relay.receive(SIGNED, recipients=[ERIN])),
    ),
    "TOO_MANY_RECIPIENTS": (
        "",
        (
            "outgoing",
            lambda relay: relay.submit(
                encrypted_mail(), recipients=[REMOTE] * (milter.MAX_RECIPIENTS + 1)
            ),
        ),
    ),
    "TEMPORARY_FAILURE": ("", ("outgoing", a_bug)),
    "KEY_UNAVAILABLE": ("", ("incoming", no_dns)),
}


def table():
    return {k: v for k, v in vars(replies).items() if isinstance(v, replies.Reply)}


def test_the_table_is_this_one():
    assert table() == TABLE
    reasons = [reply.why for reply in table().values()]
    assert len(set(reasons)) == len(reasons)


@pytest.mark.parametrize(
    "name, address, direction, cause",
    [(name, case[0], *step) for name, case in CASES.items() for step in case[1:]],
)
def test_each_reply_is_given_counted_and_logged(relay, caplog, name, address, direction, cause):
    caplog.set_level("INFO")
    relay.add("erin", "DISABLED")
    why = getattr(replies, name).why
    before = policy.REFUSED.value(direction, why)
    outcome = cause(relay)
    assert outcome.reply == TABLE[name].format(address)
    assert policy.REFUSED.value(direction, why) == before + 1
    assert f"{direction.capitalize()}: refused, {why}" in caplog.messages


def test_no_reply_is_without_a_case():
    assert set(CASES) == set(TABLE)


def test_an_address_in_a_reply_is_printable_and_short_and_no_format():
    reply = replies.with_address(replies.UNKNOWN_RECIPIENT, "a b\r\n{0}\xff%" + "x" * 300)
    assert reply.startswith("550 5.1.1 <a?b??{0}?%xxx") and len(reply) < 300
    assert reply.why == "unknown recipient"


def test_what_passes_is_counted_by_kind(relay):
    def counts():
        return (
            policy.ACCEPTED.value("outgoing", "encrypted mail"),
            policy.ACCEPTED.value("incoming", "encrypted mail"),
            policy.ACCEPTED.value("bounce", "unsigned mail"),
            policy.DKIM.value("signed"),
            policy.DKIM.value("valid"),
            policy.DKIM.value("none valid"),
        )

    before = counts()
    relay.submit(encrypted_mail())
    relay.receive(SIGNED)
    relay.receive(encrypted_mail(REMOTE))
    relay.sign().send(plain_mail(), ALICE, [REMOTE])
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [1] * 6


def test_the_counters_hold_every_reason_and_kind():
    """Beyond metrics.MAX_SERIES they would be counted as "other"."""
    from chatmaild.metrics import MAX_SERIES

    assert 2 * len(TABLE) < MAX_SERIES
