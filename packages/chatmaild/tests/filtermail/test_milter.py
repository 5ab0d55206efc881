# SPDX-License-Identifier: MIT
"""The milter protocol: negotiation, order, lengths, limits; garbage ends the session."""

import struct
import time
import tracemalloc

import pytest

from chatmaild.filtermail import milter, policy, replies
from chatmaild.filtermail.milter import Session
from filtermail_mta import (
    Mta,
    connect,
    content,
    interpret,
    macros,
    mail_from,
    negotiation,
    packet,
    packets,
    rcpt_to,
)
from filtermail_relay import key_name, signed
from filtermail_samples import ALICE, BOB, REMOTE, encrypted_mail, plain_mail, split

CONTINUE = (b"c", b"")


@pytest.fixture
def session(relay):
    """An outgoing session, negotiated."""
    result = Session(policy.OutgoingHandler(relay.policy))
    result.feed(negotiation())
    return result


@pytest.fixture
def incoming(relay):
    result = Session(policy.IncomingHandler(relay.policy))
    result.feed(negotiation() + connect())
    return result


def start(session, sender=ALICE):
    assert packets(session.feed(mail_from(sender, sender))) == [CONTINUE]
    session.feed(rcpt_to(BOB))


# --- negotiation ----------------------------------------------------------------------------------


def test_negotiation_answers_with_what_both_can_do(relay):
    session = Session(policy.OutgoingHandler(relay.policy))
    ((command, payload),) = packets(session.feed(negotiation(protocol=0x100000 | 0x80)))
    version, actions, protocol = struct.unpack_from(">III", payload)
    assert (command, version, actions) == (b"O", 6, 0x111)
    assert protocol == 0x100000 | 0x80
    assert not session.closed


@pytest.mark.parametrize(
    "offer",
    [
        negotiation(version=2),
        negotiation(actions=0),
        negotiation(protocol=0x0FFFFF),  # no leading space: DKIM could not be right
        packet(b"O", b"\0\0\0\6"),
        packet(b"M", b"<x>\0"),
        packet(b"A"),
        packet(b"C", b"x\0U"),
        packet(b"D", b"M"),
    ],
)
def test_a_session_that_does_not_begin_right_is_over(relay, offer):
    session = Session(policy.OutgoingHandler(relay.policy))
    assert session.feed(offer) == b"" and session.closed


def test_an_mta_without_macro_lists_is_not_sent_any(relay):
    session = Session(policy.OutgoingHandler(relay.policy))
    ((_, payload),) = packets(session.feed(negotiation(actions=0xFF)))
    assert len(payload) == 12


def test_an_mta_that_waits_for_every_answer_gets_one(relay):
    session = Session(policy.IncomingHandler(relay.policy))
    session.feed(negotiation(protocol=0x100000))
    for data in (
        connect(),
        packet(b"H", b"helo\0"),
        mail_from(REMOTE),
        rcpt_to(BOB),
        packet(b"T"),
        packet(b"L", b"From\0 <carol@other.example>\0"),
        packet(b"N"),
        packet(b"B", b"x"),
        packet(b"U", b"xyzzy\0"),
    ):
        assert packets(session.feed(data)) == [CONTINUE], data
    assert packets(session.feed(packet(b"E"))) == [(b"y", replies.NOT_ENCRYPTED.encode() + b"\0")]


# --- garbage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0\0\0\0",
        b"\0\0\0\0x",
        b"\xff\xff\xff\xffx",
        struct.pack(">I", milter.MAX_PACKET + 1) + b"B",
        b"GET / HTTP/1.1\r\n\r\n",
        packet(b"?"),
        packet(b"\0"),
        packet(b"Z", b"x"),
        negotiation(),
        packet(b"M", b"<x>"),
        packet(b"M"),
        packet(b"R", b"<x>\0"),
        packet(b"L", b"From\0x\0"),
        packet(b"N"),
        packet(b"B", b"x"),
        packet(b"E"),
        packet(b"C"),
        packet(b"C", b"host"),
        packet(b"C", b"host\x004"),
        packet(b"C", b"host\x004\0\0001.2.3.4"),
        packet(b"D"),
        packet(b"D", b"Mname"),
        packet(b"D", b"M" + b"a\0" * (milter.MAX_STRINGS + 1)),
        packet(b"M", b"a\0" * (milter.MAX_STRINGS + 1)),
    ],
)
def test_garbage_between_messages_ends_the_session(session, garbage):
    session.feed(garbage)
    assert session.closed
    assert session.feed(mail_from(ALICE, ALICE)) == b""


@pytest.mark.parametrize(
    "garbage",
    [
        packet(b"L", b"From"),
        packet(b"L", b"From\0"),
        packet(b"L", b"From\0x"),
        packet(b"L", b"From\0x\0y\0"),
        packet(b"L"),
        packet(b"R", b"<x>"),
        packet(b"E"),
        packet(b"B", b"x"),
        packet(b"N") + packet(b"N"),
        packet(b"N") + packet(b"L", b"a\0b\0"),
        packet(b"N") + packet(b"R", b"<x>\0"),
        packet(b"L", b"a\0b\0") + packet(b"R", b"<x>\0"),
    ],
)
def test_garbage_within_a_message_ends_the_session(session, garbage):
    start(session)
    session.feed(garbage)
    assert session.closed


def test_quit_ends_the_session_and_abort_does_not(session):
    start(session)
    assert session.feed(packet(b"A")) == b"" and not session.closed
    start(session)
    assert session.feed(packet(b"K")) == b"" and not session.closed and not session.in_message
    start(session)
    assert session.feed(packet(b"Q")) == b"" and session.closed


def test_a_new_message_forgets_the_old_one(session):
    start(session)
    session.feed(packet(b"L", b"From\0 <evil@x.example>\0"))
    start(session)
    assert interpret(session.feed(content(encrypted_mail()))).reply == ""


def test_answers_before_the_garbage_are_still_sent(session):
    out = session.feed(mail_from(ALICE, ALICE) + b"\0\0\0\0")
    assert packets(out) == [CONTINUE] and session.closed


def test_percent_signs_are_doubled_for_the_mta(session):
    out = session.feed(mail_from("100%@chat.example", "100%@chat.example"))
    assert packets(out) == [CONTINUE]
    assert milter.encode_reply("550 5.1.1 <100%x>: no")[5:] == b"550 5.1.1 <100%%x>: no\0"


@pytest.mark.parametrize(
    "data, login",
    [
        (macros(b"M", auth_type="PLAIN", auth_authen=ALICE), True),
        (macros(b"M", auth_type="PLAIN", auth_author=ALICE), False),
        (macros(b"C", auth_authen=ALICE), False),
        (packet(b"D", b"M{auth_authen}\0"), False),
        (packet(b"D", b"Mx\0{auth_authen}\0y\0" + ALICE.encode() + b"\0"), False),
        (macros(b"M", auth_authen=ALICE) + macros(b"M"), False),
    ],
)
def test_the_login_is_the_macro_of_mail_and_nothing_else(session, data, login):
    out = session.feed(data + packet(b"M", b"<alice@chat.example>\0"))
    assert (packets(out) == [CONTINUE]) is login


# --- limits ---------------------------------------------------------------------------------------


def test_so_many_fields_are_allowed_and_no_more(session):
    for extra, reply in ((0, ""), (1, replies.HEADER_TOO_LARGE)):
        start(session)
        count = milter.MAX_HEADERS - 7 + extra  # 7 in the sample
        mail = b"X: y\r\n" * count + encrypted_mail()
        assert interpret(session.feed(content(mail))).reply == reply


def test_so_large_a_header_is_allowed_and_no_larger(session):
    size = sum(len(n) + len(v) + 2 for n, v in split(encrypted_mail())[0])
    for extra, reply in ((0, ""), (1, replies.HEADER_TOO_LARGE)):
        start(session)
        room = milter.MAX_HEADER_BYTES - size + extra
        mail = b"X:" + b"y" * (room - 3) + b"\r\n" + encrypted_mail()
        assert interpret(session.feed(content(mail))).reply == reply


def test_fields_beyond_the_limit_are_not_kept(session):
    start(session)
    field = packet(b"L", b"X\0" + b"y" * 1000 + b"\0")
    tracemalloc.start()
    for _ in range(20_000):
        session.feed(field)
    current, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert current < 2 * milter.MAX_HEADER_BYTES + 500_000


def test_a_refused_recipient_leaves_room_for_another(incoming):
    incoming.feed(mail_from(REMOTE))
    for _ in range(milter.MAX_RECIPIENTS):
        assert packets(incoming.feed(rcpt_to(BOB))) == [CONTINUE]
        assert packets(incoming.feed(rcpt_to("nobody@chat.example")))[0][0] == b"y"
        if incoming.closed:
            break
    reply = interpret(incoming.feed(rcpt_to(BOB))).reply
    assert reply == replies.TOO_MANY_RECIPIENTS


def test_too_many_recipients_of_our_users_fail_the_message(session):
    start(session)
    for _ in range(milter.MAX_RECIPIENTS):
        assert session.feed(rcpt_to(BOB)) == b""
    assert interpret(session.feed(content(encrypted_mail()))).reply == replies.TOO_MANY_RECIPIENTS
    start(session)
    assert interpret(session.feed(content(encrypted_mail()))).reply == ""


def test_a_packet_of_the_largest_size_is_taken(session):
    start(session)
    session.feed(packet(b"N") + packet(b"B", b"x" * (milter.MAX_PACKET - 1)))
    assert not session.closed


def test_memory_is_bounded_whatever_is_pipelined(session):
    start(session)
    session.feed(packet(b"N"))
    piece = packet(b"B", b"x" * 65535) * 2
    stream = piece[:-1000]  # so that packets are always cut
    tracemalloc.start()
    session.feed(stream)
    data = piece[-1000:] + piece[:-1000]
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(64):  # 8 MB
        session.feed(data)
    current, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not session.closed
    assert current - before < 10_000
    assert peak < 1_500_000


def test_a_large_packet_in_small_pieces_is_not_copied_again_and_again(session):
    start(session)
    session.feed(packet(b"N"))
    data = packet(b"B", b"x" * (milter.MAX_PACKET - 1))
    started = time.process_time()
    for at in range(0, len(data), 16):
        session.feed(data[at : at + 16])
    assert time.process_time() - started < 1.0
    assert not session._buffer


def test_small_packets_pipelined_are_handled_in_linear_time(session):
    started = time.process_time()
    out = session.feed(packet(b"H", b"x\0") * 20_000)
    assert len(out) == 5 * 20_000
    assert time.process_time() - started < 1.0


# --- waiting for keys -----------------------------------------------------------------------------


def test_while_keys_are_fetched_nothing_is_answered_and_then_everything(incoming, relay):
    incoming.feed(mail_from(REMOTE) + rcpt_to(BOB))
    mail = signed(encrypted_mail(REMOTE))
    assert incoming.feed(content(mail) + mail_from(REMOTE)) == b""
    assert incoming.wanted == (key_name(),) and incoming.in_message
    assert incoming.feed(rcpt_to("nobody@chat.example")) == b""
    answers = packets(incoming.answer(relay.keys))
    assert answers[0] == CONTINUE
    assert answers[1][0] == b"y" and answers[1][1].startswith(b"550 5.1.1")
    assert incoming.wanted is None and not incoming.closed


def test_what_is_pipelined_while_keys_are_fetched_is_bounded(incoming):
    incoming.feed(mail_from(REMOTE) + rcpt_to(BOB) + content(signed(encrypted_mail(REMOTE))))
    for _ in range(20):
        incoming.feed(b"x" * 100_000)
    assert incoming.closed and incoming.wanted is None
    assert incoming.answer({}) == b""


def test_an_answer_nobody_asked_for_is_ignored(session):
    assert session.answer({}) == b"" and not session.closed


def test_garbage_after_a_message_that_waits_still_ends_the_session(incoming, relay):
    incoming.feed(mail_from(REMOTE) + rcpt_to(BOB))
    incoming.feed(content(signed(encrypted_mail(REMOTE))) + b"\0\0\0\0\0\0")
    assert packets(incoming.answer(relay.keys)) == [CONTINUE]
    assert incoming.closed


def test_the_body_may_come_with_the_end(session):
    start(session)
    mail = plain_mail()
    fields, _ = split(mail)
    for name, value in fields:
        session.feed(packet(b"L", name + b"\0" + value + b"\0"))
    session.feed(packet(b"N"))
    assert interpret(session.feed(packet(b"E", b"text"))).reply == replies.NOT_ENCRYPTED


def test_a_session_that_let_anything_pass_would_be_noticed(relay, monkeypatch):
    """The tests above can fail: seed the defect they are there for."""
    monkeypatch.setattr(Session, "_require", staticmethod(lambda condition: None))
    session = Session(policy.OutgoingHandler(relay.policy))
    session.feed(negotiation() + packet(b"N"))
    assert not session.closed


def test_mta_of_these_tests_stops_where_postfix_would(relay):
    outcome = Mta(policy.IncomingHandler(relay.policy)).send(
        plain_mail(), REMOTE, ["x@chat.example"]
    )
    assert outcome.reply.startswith("550 5.1.1")
