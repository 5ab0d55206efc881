# SPDX-License-Identifier: MIT
"""Whom the bot answers, and what; with real keys and encryption."""

import base64
import io

import pytest
from chatmail_echobot import autocrypt, openpgp
from chatmail_echobot.bot import BURST, HELP, Bot, Ignored
from conftest import ALICE, BOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def request(alice, number, *, sender=ALICE, cert=None):
    """Step 1 of SecureJoin as a client writes it."""
    lines = [
        f"From: <{sender}>",
        autocrypt.field(ALICE, cert or alice.cert),
        'Content-Type: multipart/mixed; boundary="b"',
        "Secure-Join: vc-request",
        f"Secure-Join-Invitenumber: {number}",
        "",
        "--b\r\nContent-Type: text/plain\r\n\r\nSecure-Join: vc-request\r\n--b--",
    ]
    return io.BytesIO("\r\n".join(lines).encode())


def with_auth(alice, auth, fingerprint):
    """Step 5, before encryption."""
    return alice.chat(
        "Secure-Join: vc-request-with-auth",
        f"Secure-Join-Auth: {auth}",
        f"Secure-Join-Fingerprint: {fingerprint}",
        # what clients write into their handshake messages is automatic
        "Auto-Submitted: auto-replied",
    )


def mixed(*parts: bytes) -> bytes:
    return b"".join(b"--in\r\n" + part + b"\r\n" for part in parts) + b"--in--\r\n"


def test_securejoin_is_answered_in_two_steps_and_shows_the_key_it_saw(bot, me, alice, outbox):
    bot.handle(request(alice, me.invite_number))
    fingerprint = openpgp.fingerprint(alice.cert)
    bot.handle(alice.encrypted(me, with_auth(alice, me.auth, fingerprint)))
    assert [a.inner.get("secure-join") for a in outbox.answers] == [
        "vc-auth-required",
        "vc-contact-confirm",
    ]
    for answer in outbox.answers:
        assert answer.recipient == ALICE
        assert autocrypt.parse(answer.inner.get("autocrypt-gossip"), ALICE) == alice.cert
        assert autocrypt.parse(answer.inner.get("autocrypt"), BOT) == me.cert
        assert answer.inner.get("secure-join-fingerprint") == openpgp.fingerprint(me.cert)
        assert answer.outer.get("secure-join") == ""


def test_securejoin_with_a_wrong_code_or_another_key_is_ignored(bot, me, alice, mallory, outbox):
    fingerprint = openpgp.fingerprint(alice.cert)
    other = openpgp.fingerprint(mallory.cert)
    cases = [
        request(alice, "wrong"),
        request(alice, me.invite_number, sender=mallory.address),
        request(alice, me.invite_number, cert=b"\x01"),
        alice.encrypted(me, with_auth(alice, "wrong", fingerprint)),
        alice.encrypted(me, with_auth(alice, me.auth, other)),
        alice.encrypted(me, with_auth(alice, me.auth, fingerprint), signer=mallory.key),
        alice.encrypted(me, alice.chat("Secure-Join: vc-contact-confirm")),
    ]
    for message in cases:
        with pytest.raises(Ignored):
            bot.handle(message)
    assert outbox.answers == []


def test_text_comes_back_automatic_encrypted_and_hidden_outside(bot, me, alice, outbox):
    text = "hello écho ✓\r\n-- \r\nx".encode()
    bot.handle(alice.encrypted(me, alice.chat(body=text)))
    (answer,) = outbox.answers
    ((fields, content),) = answer.parts
    assert content == text and fields.content_type.kind == "text/plain"
    assert answer.inner.get("auto-submitted") == "auto-replied"
    assert answer.inner.get("in-reply-to") == "<1@localhost>"
    assert answer.inner.get("from") == f'"Echo" <{BOT}>'
    shown = dict(answer.outer.items)
    assert shown.keys() == {
        *("from", "to", "date", "message-id", "subject", "mime-version", "content-type")
    }
    assert shown["from"] == f"<{BOT}>" and shown["subject"] == "[...]"
    assert ALICE not in str(shown)


def test_a_file_comes_back_byte_for_byte_with_its_name(bot, me, alice, outbox):
    content = bytes(range(256)) * 500 + b"--in\r\n\r\n"
    file = (
        b'Content-Type: image/png\r\nContent-Disposition: attachment; filename="a b.png"\r\n'
        b"Content-Transfer-Encoding: base64\r\n\r\n" + base64.encodebytes(content)
    )
    text = b"Content-Type: text/plain; charset=utf-8\r\n\r\nlook"
    inner = alice.chat(kind='multipart/mixed; boundary="in"', body=mixed(text, file))
    bot.handle(alice.encrypted(me, inner))
    (answer,) = outbox.answers
    assert [content for _fields, content in answer.parts] == [b"look", content]
    assert answer.parts[1][0].get("content-disposition") == 'attachment; filename="a b.png"'
    assert answer.parts[1][0].content_type.kind == "image/png"


def test_help_is_answered_by_a_text(bot, me, alice, outbox):
    bot.handle(alice.encrypted(me, alice.chat(body=b" /HELP me")))
    assert [content for _fields, content in outbox.answers[0].parts] == [HELP.encode()]


def test_a_timer_for_disappearing_messages_stays(bot, me, alice, outbox):
    for value in ("60", "60 x", "soon"):
        bot.handle(alice.encrypted(me, alice.chat(f"Ephemeral-Timer: {value}", body=b"x")))
    assert [a.inner.get("ephemeral-timer") for a in outbox.answers] == ["60", "", ""]


@pytest.mark.parametrize(
    ("line", "kind", "body"),
    [
        ("Auto-Submitted: auto-generated", "text/plain", b"x"),
        ("Auto-Submitted: Auto-Replied; owner", "text/plain", b"x"),
        ("X: x", 'multipart/report; report-type=disposition-notification; boundary="in"', mixed()),
        ("Chat-Group-ID: abc", "text/plain", b"x"),
        ("Chat-Edit: <1@x>", "text/plain", b"x"),
        ("Chat-Delete: <1@x>", "text/plain", b"x"),
        ("Chat-Content: call", "text/plain", b"x"),
        ("Content-Disposition: reaction", "text/plain", b":)"),
        ("X: x", "text/plain", b""),
        ("X: x", 'multipart/mixed; boundary="in"', mixed(b"Content-Type: text/plain\r\n\r\n")),
        (
            "X: x",
            'multipart/mixed; boundary="in"',
            mixed(
                b"Content-Type: application/json\r\n"
                b'Content-Disposition: attachment; filename="status-update.json"\r\n\r\n{}'
            ),
        ),
        ("X: x", "multipart/mixed", b"no boundary"),
        ("Content-Transfer-Encoding: base64", "text/plain", b"=x=="),
    ],
)
def test_what_nobody_said_to_the_bot_alone_gets_no_answer(bot, me, alice, outbox, line, kind, body):
    with pytest.raises(Ignored):
        bot.handle(alice.encrypted(me, alice.chat(line, kind=kind, body=body)))
    assert outbox.answers == []


def test_automatic_outside_own_and_unencrypted_mail_gets_no_answer(bot, me, alice, outbox):
    inner = alice.chat(body=b"x")
    own = alice.encrypted(me, inner).read().replace(ALICE.encode(), BOT.encode(), 1)
    cases = [
        alice.encrypted(me, inner, outer="Auto-Submitted: auto-notified"),
        io.BytesIO(own),
        io.BytesIO(b"From: <alice1234@chat.example>\r\n\r\nhello\r\n"),
        io.BytesIO(b"Subject: nobody\r\n\r\nhello\r\n"),
        io.BytesIO(b"From: <a@b.example>\r\nFrom: <c@d.example>\r\n\r\nhello\r\n"),
        io.BytesIO(b""),
    ]
    for message in cases:
        with pytest.raises(Ignored):
            bot.handle(message)
    assert outbox.answers == []


def test_a_message_counts_only_with_a_signature_by_the_key_it_brings(
    bot, me, alice, mallory, outbox
):
    cases = [
        # mallory signs what claims to be of alice
        alice.encrypted(me, alice.chat(body=b"x"), signer=mallory.key),
        # mallory's From outside, alice's inside
        mallory.encrypted(me, alice.chat(body=b"x"), signer=alice.key),
        # no key at all
        alice.encrypted(me, b"From: <alice1234@chat.example>\r\nChat-Version: 1.0\r\n\r\nx"),
    ]
    for message in cases:
        with pytest.raises(Ignored):
            bot.handle(message)
    assert outbox.answers == []


def test_who_sends_too_much_waits_and_others_do_not(me, alice, mallory, outbox):
    now = 0.0
    bot = Bot(me, outbox, clock=lambda: now)
    message = alice.encrypted(me, alice.chat(body=b"x"))
    for _ in range(BURST):
        message.seek(0)
        bot.handle(message)
    message.seek(0)
    with pytest.raises(Ignored, match="too many"):
        bot.handle(message)
    with pytest.raises(Ignored, match="unencrypted"):
        bot.handle(io.BytesIO(f"From: <{mallory.address}>\r\n\r\n".encode()))
    now = 60.0
    message.seek(0)
    bot.handle(message)
    assert len(outbox.answers) == BURST + 1


def test_a_try_that_the_relay_refused_for_now_can_be_repeated(me, alice):
    class Busy(Exception):
        pass

    sent = []

    def send(recipient, message):
        sent.append(recipient)
        if len(sent) == 1:
            raise Busy

    bot = Bot(me, send)
    message = alice.encrypted(me, alice.chat(body=b"x"))
    with pytest.raises(Busy):
        bot.handle(message)
    message.seek(0)
    assert bot.handle(message) == "message echoed" and len(sent) == 2


HEADERS = st.sampled_from(
    [
        b"From: <alice1234@chat.example>\r\n",
        b"From: \xff\r\n",
        b'Content-Type: multipart/encrypted; boundary="b"\r\n',
        b"Content-Type: multipart/mixed; boundary=\r\n",
        b"Secure-Join: vc-request\r\n",
        b"Autocrypt: addr=alice1234@chat.example; keydata=xjME\r\n",
        b"Auto-Submitted: \r\n",
        b"\r\n",
        b" folded\r\n",
        b"-----BEGIN PGP MESSAGE-----\r\n\r\nwV4D\r\n-----END PGP MESSAGE-----\r\n",
    ]
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(HEADERS | st.binary(max_size=60), max_size=12).map(b"".join))
def test_hostile_mail_is_ignored_and_nothing_else(me, alice, data):
    bot = Bot(me, lambda recipient, message: pytest.fail("an answer"))
    with pytest.raises(Ignored):
        bot.handle(io.BytesIO(data))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                b'Content-Type: multipart/mixed; boundary="in"\r\n',
                b"Content-Type: text/plain; name=x\r\n",
                b"Content-Transfer-Encoding: base64\r\n",
                b"Content-Disposition: attachment\r\n",
                b"Message-ID: <\x00\r\n",
                b"--in\r\n",
                b"--in--\r\n",
                b"\r\n",
                b"\n",
                b"AAAA",
            ]
        )
        | st.binary(max_size=40),
        max_size=12,
    ).map(b"".join)
)
def test_hostile_content_of_a_peer_is_answered_or_ignored(me, alice, data):
    sent = []
    bot = Bot(me, lambda recipient, message: sent.append(recipient))
    head = alice.chat().partition(b"Content-Type")[0]
    try:
        assert bot.handle(alice.encrypted(me, head + data)) == "message echoed"
    except Ignored:
        assert sent == []
    else:
        assert sent == [ALICE]
