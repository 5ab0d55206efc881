# SPDX-License-Identifier: MIT
"""Hostile input, by class: what once passed a filter of this kind, or made one slow.

Each case goes through a whole session, outgoing and incoming, as Postfix would show it to a milter:
fields one by one, line ends of fields LF, of the body CRLF.
"""

import time

import pytest
from filtermail_mta import content, interpret, mail_from, packet, rcpt_to
from filtermail_relay import signed
from filtermail_samples import (
    ALICE,
    BOB,
    BOUNDARY,
    DATA_HEADER,
    REMOTE,
    VERSION_PART,
    armor,
    encrypted,
    encrypted_body,
    encrypted_mail,
    header,
    multipart,
    noise,
    packet as pgp_packet,
    plain_mail,
    securejoin_mail,
    split,
)  # fmt: skip

from chatmaild.filtermail import milter, replies

B = BOUNDARY
ME = ALICE.encode()
EVIL = b"evil@other.example"


def with_from(*values):
    """An encrypted message with these From values instead of its own."""
    fields = b"".join(b"From:" + value + b"\r\n" for value in values)
    return encrypted_mail().replace(b"From: <" + ME + b">\r\n", fields, 1)


def raw_fields(*fields):
    """What a milter may be told of odd header lines, in front of an encrypted message."""
    good, body = split(encrypted_mail())
    return [*fields, *good[1:]], body


FORGED_FROM = {
    "two From, good first": with_from(b" <" + ME + b">", b" <" + EVIL + b">"),
    "two From, good last": with_from(b" <" + EVIL + b">", b" <" + ME + b">"),
    "two addresses": with_from(b" <" + ME + b">, <" + EVIL + b">"),
    "a second address behind 3000 blanks": with_from(
        b" <" + ME + b">" + b" " * 3000 + b", <" + EVIL + b">"
    ),
    "a second address on a folded line": with_from(b" <" + ME + b">\r\n , <" + EVIL + b">"),
    "an address as phrase": with_from(b" " + EVIL + b" <" + ME + b">"),
    "an address as comment": with_from(b" <" + ME + b"> (" + EVIL + b")"),
    "a group": with_from(b" x: <" + ME + b">;"),
    "a route": with_from(b" <@" + EVIL.partition(b"@")[2] + b":" + ME + b">"),
    "a quoted local part": with_from(b' "alice"@chat.example'),
    "no address": with_from(b" Alice"),
    "empty": with_from(b""),
    "none": with_from(),
    "another user": with_from(b" <" + BOB.encode() + b">"),
    "8 bit": with_from(b" \xe9 <" + ME + b">"),
    "8 bit in the address": with_from(b" <alic\xe9@chat.example>"),
    "longer than a line": with_from(b' "' + b"x" * 1000 + b'" <' + ME + b">"),
    "as long as Postfix lets it be": with_from(b" " + b"(" * 102_000),
    "quotes without end": with_from(b' "' * 50_000),
    "NUL shown as blank": with_from(b"  <" + ME + b">, <" + EVIL + b">"),
}


@pytest.mark.parametrize("name", FORGED_FROM)
def test_no_sender_is_forged_outgoing(relay, name):
    reply = relay.submit(FORGED_FROM[name]).reply
    assert reply in (replies.BAD_FROM, replies.FROM_NOT_SENDER)


@pytest.mark.parametrize("name", [n for n in FORGED_FROM if n not in ("another user",)])
def test_no_sender_is_forged_incoming(relay, name):
    mail = FORGED_FROM[name].replace(ME, REMOTE.encode())
    reply = relay.receive(signed(mail)).reply
    assert reply in (replies.BAD_FROM, replies.NO_SIGNATURE)


@pytest.mark.parametrize("name", [b"FROM", b"from"])
def test_from_is_found_however_it_is_written(relay, name):
    mta = relay.outgoing()
    for value, reply in ((ME, ""), (EVIL, replies.FROM_NOT_SENDER)):
        fields, body = raw_fields((name, b" <" + value + b">"))
        assert judge(mta, fields, body) == reply
    fields, body = raw_fields((b"From", b" <" + ME + b">"), (name, b" <" + EVIL + b">"))
    assert judge(mta, fields, body) == replies.BAD_FROM


@pytest.mark.parametrize(
    "field",
    [(b"From", b": <" + EVIL + b">"), (b"From ", b" x"), (b"Date\t", b" x"), (b"X", b": y")],
)
@pytest.mark.parametrize("behind", [False, True])
def test_a_blank_before_the_colon_is_refused(relay, field, behind):
    fields, body = raw_fields((b"From", b" <" + ME + b">"))
    fields = [*fields, field] if behind else [field, *fields]
    assert judge(relay.outgoing(), fields, body) == replies.MALFORMED_HEADER
    assert judge(relay.incoming(), fields, body) == replies.MALFORMED_HEADER


@pytest.mark.parametrize("value", [b"\r", b"\n", b"\r\n", b"\x0b", b"\x1f", b"\x7f"])
def test_control_characters_do_not_hide_an_address(relay, value):
    own = b" <" + ME + b">" + value
    for tail in (b"", b"From: <" + EVIL + b">"):
        assert judge(relay.outgoing(), *raw_fields((b"From", own + tail))) == replies.BAD_FROM


def judge(mta, fields, body, sender=ALICE):
    mta.feed(mail_from(sender, sender) + rcpt_to(BOB))
    out = b"".join(packet(b"L", n + b"\0" + v + b"\0") for n, v in fields) + packet(b"N")
    pieces = (packet(b"B", body[at : at + 65535]) for at in range(0, len(body), 65535))
    return interpret(mta.feed(out + b"".join(pieces) + packet(b"E"))).reply


CLEARTEXT = {
    "preamble": header() + encrypted_body(preamble=b"hello\r\n"),
    "epilogue": header() + encrypted_body(epilogue=b"hello\r\n"),
    "epilogue after a second close": header() + encrypted_body(epilogue=b"--%s--\r\nhi\r\n" % B),
    "preamble by a garbage line in the header": encrypted_mail().replace(
        b"Subject: [...]\r\n", b"Subject: [...]\r\n\r\ngarbage line\r\n", 1
    ),
    "second Content-Type": encrypted_mail(extra=b"Content-Type: text/html\r\n"),
    "second Content-Type in another case": encrypted_mail(extra=b"CONTENT-TYPE: text/html\r\n"),
    "encoded as a whole": encrypted_mail(extra=b"Content-Transfer-Encoding: base64\r\n"),
    "not closed": encrypted_mail().replace(b"--" + B + b"--", b"hello, cleartext"),
    "one part": header() + multipart(VERSION_PART),
    "three parts": header()
    + multipart(VERSION_PART, DATA_HEADER + armor(encrypted()), b"Content-Type: a/b\r\n\r\nx"),
    "cleartext instead of armor": encrypted_mail(text=b"hello\r\n"),
    "cleartext in armor": encrypted_mail(text=armor(b"hello, this is cleartext, not OpenPGP")),
    "literal packet": encrypted_mail(text=armor(pgp_packet(11, b"t\0\0\0\0\0hello"))),
    "compressed packet": encrypted_mail(text=armor(pgp_packet(8, b"\0" + noise(80)))),
    "literal behind encrypted": encrypted_mail(
        text=armor(encrypted() + pgp_packet(11, b"t\0\0\0\0\0hi"))
    ),
    "text behind the END line": encrypted_mail(text=armor(encrypted()) + b"hello\r\n"),
    "armor header": encrypted_mail(text=armor(encrypted(), b"Comment: hello there\r\n")),
    "any armor header": encrypted_mail(text=armor(encrypted(), b"Hello: there\r\n")),
    "securejoin with a preamble": securejoin_mail().replace(
        b"\r\n\r\n\r\n--", b"\r\n\r\nhello\r\n--"
    ),
    "securejoin with an epilogue": securejoin_mail() + b"hello\r\n",
    "securejoin with an attachment": securejoin_mail(
        parts=[
            b"Content-Type: text/plain\r\n\r\nsecure-join: vc-request",
            b"Content-Type: text/plain\r\n\r\nhello",
        ]
    ),
    "securejoin with a later step": securejoin_mail(step=b"vg-member-added"),
    "securejoin by name only": plain_mail(extra=b"Secure-Join: vc-request\r\n"),
    "smuggled second message": plain_mail(
        body=b"x\r\n.\r\nMAIL FROM:<evil@other.example>\r\nDATA\r\n" + encrypted_mail()
    ),
    "an encrypted message as attachment": header(
        content_type=b'multipart/mixed; boundary="m"'
    )
    + multipart(
        b'Content-Type: multipart/encrypted; boundary="%s"\r\n\r\n' % B + encrypted_body(),
        b"Content-Type: text/plain\r\n\r\nhello",
        boundary=b"m",
    ),
    "message/rfc822": header(content_type=b"message/rfc822") + encrypted_mail(),
    "8 bit in the armor": encrypted_mail(text=armor(encrypted()).replace(b"\r\n=", b"\xe9\r\n=")),
    "NUL in the armor": encrypted_mail(text=armor(encrypted()).replace(b"\r\n=", b"\0\r\n=")),
    "lone CR in the part's header": encrypted_mail().replace(
        b"Content-Type: application/oct", b"X: y\rhello\r\nContent-Type: application/oct"
    ),
    "LF instead of CRLF": header() + encrypted_body().replace(b"\r\n", b"\n"),
    "empty": header(),
}  # fmt: skip


@pytest.mark.parametrize("name", CLEARTEXT)
def test_no_cleartext_rides_along_outgoing(relay, name):
    outcome = relay.submit(CLEARTEXT[name])
    assert outcome.reply == replies.NOT_ENCRYPTED and not outcome.inserted


@pytest.mark.parametrize("name", [name for name in CLEARTEXT if name != "armor header"])
def test_no_cleartext_rides_along_incoming(relay, name):
    mail = CLEARTEXT[name].replace(ME, REMOTE.encode(), 1)
    assert relay.receive(signed(mail)).reply == replies.NOT_ENCRYPTED


HARMLESS = {
    "Latin-1 in another field": encrypted_mail(extra=b"X-Any: caf\xe9\r\n"),
    "UTF-8 in another field": encrypted_mail(extra="X-Any: café\r\n".encode()),
    "many fields": encrypted_mail(extra=b"X-Any: x\r\n" * 900),
    "one long field": encrypted_mail(extra=b"X-Any: " + b"x" * 100_000 + b"\r\n"),
    "long lines of base64": encrypted_mail(text=armor(encrypted(9000), width=5000)),
    "a field without value": encrypted_mail(extra=b"X-Any:\r\n"),
    "a field with odd characters in its name": encrypted_mail(extra=b"X!#$%&'*+-^_`|~: y\r\n"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_oddities_pass(relay, name):
    assert relay.submit(HARMLESS[name]).reply == ""
    assert relay.receive(signed(HARMLESS[name].replace(ME, REMOTE.encode()))).reply == ""


KEY = pgp_packet(1, noise(90))
MEGABYTE = 1_000_000
SLOW = {
    "partial lengths of one octet": encrypted_mail(
        text=armor(KEY + b"\xd2" + b"\xe0x" * 7 * MEGABYTE, checksum=b"")
    ),
    "small partial lengths after a large one": encrypted_mail(
        text=armor(KEY + b"\xd2\xe9" + noise(512) + b"\xe0x" * 7 * MEGABYTE, checksum=b"")
    ),
    "empty session keys": encrypted_mail(text=armor(b"\xc1\0" * 7 * MEGABYTE, checksum=b"")),
    "fields": encrypted_mail(extra=b"X: y\r\n" * 400_000),
    "From": with_from(b" " + b"(<" * 50_000),
    "quoted From": with_from(b" " + b'"\\' * 50_000),
    "Content-Type": header(content_type=b"multipart/encrypted" + b"; x" * 30_000),
    "quotes in Content-Type": header(content_type=b'multipart/encrypted; x="' + b'\\"' * 50_000),
    "blanks in Content-Type": header(content_type=b"multipart/encrypted" + b" " * 100_000 + b";"),
    "Secure-Join": securejoin_mail(extra=b"Secure-Join:" + b" " * 100_000 + b"x\r\n"),
    "Subject": plain_mail(subject=" " * 100_000 + "x"),
    "DKIM-Signature": plain_mail(extra=b"DKIM-Signature: " + b"a=b;" * 25_000 + b"\r\n"),
    "line ends": header() + b"\r\n" * 9 * MEGABYTE + b"x",
    "hyphens": header() + b"-" * 19 * MEGABYTE,
    "lines that look like delimiters": header() + b"\r\n".join([b"--" + B[:-1]] * 300_000),
    "delimiters": header() + (b"--" + B + b"\r\n") * 300_000,
    "line ends in the armor": encrypted_mail(
        text=armor(encrypted()).replace(b"\r\n=", b"\r\n" * 9 * MEGABYTE + b"=")
    ).replace(b"-----END PGP", b"-----EMD PGP"),
    "one line": header() + multipart(VERSION_PART, DATA_HEADER + b"A" * 19 * MEGABYTE),
    "blanks": plain_mail(body=b" " * 19 * MEGABYTE),
    "alternating blanks": plain_mail(body=b" x\t" * 6 * MEGABYTE),
    "lone CRs and line ends": plain_mail(body=b"\r\r\n\r\n" * 3 * MEGABYTE),
}


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
def test_nothing_takes_long(relay, name, direction):
    mail = SLOW[name]
    if direction == "outgoing":
        mta, sender = relay.outgoing(), ALICE
    else:
        mta, sender = relay.incoming(), REMOTE
        mail = _with_relaxed_signatures(mail.replace(ME, REMOTE.encode(), 1))
    mta.feed(mail_from(sender, sender))
    mta.feed(rcpt_to(BOB))
    data = content(mail)
    started = time.process_time()
    answers = mta.feed(data)
    used = time.process_time() - started
    assert interpret(answers).reply
    assert used < 1.5, f"{used:.2f} s for {len(mail)} octets"


def _with_relaxed_signatures(mail):
    """Signatures that make the verifier hash everything both ways."""
    field = (
        b"DKIM-Signature: v=1; a=rsa-sha256; d=other.example; s=s; h=from; c=%s; b=AAAA;\r\n"
        b" bh=47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\r\n"
    )
    return field % b"relaxed/relaxed" + field % b"simple/simple" + mail


def test_a_header_of_many_signatures_takes_not_long(relay):
    mail = _with_relaxed_signatures(b"") * 499 + encrypted_mail(REMOTE)
    mta = relay.incoming()
    mta.feed(mail_from(REMOTE) + rcpt_to(BOB))
    started = time.process_time()
    assert interpret(mta.feed(content(mail))).reply
    assert time.process_time() - started < 0.5


def test_sender_and_recipients_do_not_leak_into_the_next_message(relay):
    mta = relay.outgoing()
    mta.feed(mail_from(ALICE, ALICE) + rcpt_to(BOB))
    mta.feed(packet(b"A"))
    mta.feed(mail_from(BOB, BOB))
    assert interpret(mta.feed(content(encrypted_mail(ALICE)))).reply == replies.FROM_NOT_SENDER
    assert mta.send(encrypted_mail(BOB), BOB, [ALICE], login=BOB).reply == ""


def test_recipients_of_an_aborted_message_do_not_count(relay):
    mta = relay.incoming()
    mta.feed(mail_from(REMOTE) + rcpt_to(BOB) + packet(b"A"))
    mail = signed(plain_mail(REMOTE))
    assert mta.send(mail, REMOTE, ["dave@chat.example"]).reply == ""
    assert mta.send(mail, REMOTE, [BOB]).reply == replies.NOT_ENCRYPTED
    assert mta.send(mail, REMOTE, ["dave@chat.example"]).reply == ""


def test_many_messages_in_one_session_keep_nothing(relay):
    mta = relay.incoming()
    for _ in range(50):
        assert mta.send(signed(encrypted_mail(REMOTE)), REMOTE, [BOB]).reply == ""
    assert not mta.session._buffer and mta.session._handler._message is None


def test_a_field_as_large_as_all_of_them_may_be_is_refused_not_cut(relay):
    mail = encrypted_mail(extra=b"X: " + b"x" * milter.MAX_HEADER_BYTES + b"\r\n")
    assert relay.submit(mail).reply == replies.HEADER_TOO_LARGE
