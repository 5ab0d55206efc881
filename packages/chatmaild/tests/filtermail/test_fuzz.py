# SPDX-License-Identifier: MIT
"""Random input: nothing raises, pieces do not matter, and an independent reader agrees.

"Independent" is Python's email package, which reads MIME leniently, as mail programs do: what the
filter calls encrypted must look encrypted, and nothing else, to such a reader too.
"""

import base64
import email
import email.policy
import email.utils
import random

import pytest
from filtermail_mta import content, mail_from, negotiation, packets, rcpt_to
from filtermail_relay import Relay, signed
from filtermail_samples import (
    ALICE,
    BOB,
    BOUNDARY,
    REMOTE,
    armor,
    encrypted_mail,
    noise,
    normalized,
    packet,
    partial_packet,
    plain_mail,
    report_mail,
    securejoin_mail,
    split,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_mime import judge

from chatmaild.filtermail import address, dkim, mime, policy
from chatmaild.filtermail.milter import Session
from chatmaild.filtermail.openpgp import PacketWalk

FAST = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

SMALL = armor(packet(1, noise(20)) + packet(18, noise(40)))
PARTIAL = armor(packet(3, noise(20)) + partial_packet(18, noise(1300)))
SEEDS = [
    encrypted_mail(text=SMALL),
    encrypted_mail(text=PARTIAL),
    securejoin_mail(),
    report_mail(),
    plain_mail(),
]
HANDLERS = [policy.OutgoingHandler, policy.IncomingHandler, policy.SignHandler]

# what attackers insert
FRAGMENTS = [
    b"\r\n", b"\n", b"\r", b" ", b"\t", b"\0", b"\xff", b"-", b"--", b"=", b":", b";", b'"', b"\\",
    b"(", b"<evil@other.example>", b"--" + BOUNDARY, b"--" + BOUNDARY + b"--", b"\r\n\r\n",
    b"\r\n--" + BOUNDARY + b"\r\n", b"\r\n--" + BOUNDARY + b"--\r\n", b"cleartext",
    b"Content-Type: text/plain\r\n", b"Content-Transfer-Encoding: base64\r\n", b"boundary=x",
    b"-----BEGIN PGP MESSAGE-----\r\n", b"-----END PGP MESSAGE-----\r\n", b"Version: 1\r\n",
    b"From: <evil@other.example>\r\n", b"Secure-Join: vc-request\r\n", b"secure-join: vc-request",
]  # fmt: skip


@st.composite
def mutated(draw):
    """A message with a few insertions, deletions, copies and replacements."""
    data = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.sampled_from([0, 0, 1, 2, 30, 200]))
        match draw(st.integers(0, 3)):
            case 0:
                data = data[:at] + draw(st.sampled_from(FRAGMENTS)) + data[at:]
            case 1:
                data = data[:at] + data[at + size :]
            case 2:
                other = draw(st.integers(0, len(data)))
                data = data[:at] + data[other : other + size] + data[at:]
            case 3:
                data = data[:at] + draw(st.sampled_from(FRAGMENTS)) + data[at + size :]
    return normalized(data)


def queued(mail):
    """*mail* as Postfix passes it on: with an empty line behind the header."""
    fields, body = split(mail)
    header = b"".join(name + b":" + value + b"\n" for name, value in fields)
    return header.replace(b"\n", b"\r\n") + b"\r\n" + body


def looks_encrypted(mail):
    """Whether Python's email package sees encrypted mail and nothing beside it."""
    message = email.message_from_bytes(mail, policy=email.policy.compat32)
    if (
        message.get_content_type() != "multipart/encrypted"
        or len(message.get_all("Content-Type")) > 1
    ):
        return False
    parts = message.get_payload()
    if not isinstance(parts, list) or len(parts) != 2 or any(p.is_multipart() for p in parts):
        return False
    if (message.preamble or "").strip() or (message.epilogue or "").strip() or message.defects:
        return False
    types = [part.get_content_type() for part in parts]
    if types != ["application/pgp-encrypted", "application/octet-stream"]:
        return False
    version, text = (part.get_payload(decode=True).strip() for part in parts)
    lines = [line.rstrip(b" \t") for line in text.split(b"\r\n")]
    if version != b"Version: 1" or lines[0] != b"-----BEGIN PGP MESSAGE-----":
        return False
    if lines[-1] != b"-----END PGP MESSAGE-----" or b"" not in lines:
        return False
    body = [line for line in lines[lines.index(b"") + 1 : -1] if line.strip()]
    if body and body[-1].startswith(b"="):
        body.pop()
    tags = []
    data = base64.b64decode(b"".join(body))
    while data:
        tag, first = data[0] & 0x3F, data[1]
        if data[0] & 0xC0 == 0x80:
            octets = (1, 2, 4)[data[0] & 3]
            tag, size, start = (
                data[0] >> 2 & 15,
                int.from_bytes(data[1 : 1 + octets], "big"),
                1 + octets,
            )
        elif first < 192:
            size, start = first, 2
        elif first < 224:
            size, start = ((first - 192) << 8) + data[2] + 192, 3
        elif first == 255:
            size, start = int.from_bytes(data[2:6], "big"), 6
        else:
            rest = data[1:]
            while 224 <= rest[0] < 255:
                rest = rest[1 + (1 << (rest[0] & 31)) :]
            data = bytes([data[0]]) + rest
            continue
        tags.append(tag)
        if len(data) < start + size:
            return False
        data = data[start + size :]
    return tags[-1:] == [18] and set(tags[:-1]) <= {1, 3} and len(tags) > 1


@FAST
@given(mutated(), st.booleans())
def test_what_is_called_encrypted_looks_encrypted_to_others(mail, incoming):
    if judge(mail, incoming) == "encrypted":
        malformed = any(value.startswith(b":") for _, value in split(mail)[0])
        assert looks_encrypted(queued(mail)) or malformed


@FAST
@given(mutated())
def test_what_passes_has_one_sender_for_others_too(shared, mail):
    shared.policy.limiter._full_at.clear()
    if shared.submit(mail).reply == "":
        message = email.message_from_bytes(queued(mail), policy=email.policy.compat32)
        senders = email.utils.getaddresses(message.get_all("From"))
        assert [address.lower() for _, address in senders] == [ALICE]


def test_the_independent_reader_can_tell():
    assert looks_encrypted(SEEDS[0]) and looks_encrypted(SEEDS[1])
    assert not any(map(looks_encrypted, SEEDS[2:]))


@FAST
@given(mutated(), st.integers(1, 100), st.booleans())
def test_pieces_do_not_change_the_verdict(mail, chunk, incoming):
    assert judge(mail, incoming, chunk) == judge(mail, incoming)


@FAST
@given(st.binary(max_size=300), st.integers(1, 9), st.booleans())
def test_random_packets_never_raise_and_pieces_do_not_matter(data, chunk, old_format):
    whole, parts = PacketWalk(old_format), PacketWalk(old_format)
    whole.feed(data)
    for at in range(0, len(data), chunk):
        parts.feed(data[at : at + chunk])
    assert whole.end() == parts.end()


@FAST
@given(st.text(max_size=200))
def test_random_addresses_never_raise_anything_else(text):
    try:
        assert address.parse_from(text) == address.parse_from(text).lower()
    except address.AddressError:
        pass
    address.parse_envelope(text)
    address.parse_ip(text)


@FAST
@given(st.text(max_size=200) | st.text("a/b;=\"\\ \t\r\n'*0", max_size=200))
def test_random_content_types_never_raise_anything_else(text):
    try:
        mime.parse_content_type(text)
    except mime.MimeError:
        pass


TAGS = st.lists(
    st.tuples(
        st.sampled_from(list("vabcdhilqstx") + ["bh", "k", "p", "n", "zz", ""]),
        st.sampled_from(
            [b"1", b"DKIM1", b"rsa-sha256", b"AAAA", b"relaxed/simple", b"from", b"other.example",
             b"@other.example", b"dns/txt", b"s", b"999", b"rsa", b"ed25519", b"email", b"\xff"]
        ),
    ),
    max_size=14,
)  # fmt: skip


@FAST
@given(st.binary(max_size=200) | TAGS.map(lambda t: b";".join(n.encode() + b"=" + v for n, v in t)))
def test_random_signatures_and_keys_never_raise_anything_else(text):
    for parse in (lambda t: dkim.parse_signature(t, 0), dkim.parse_key_record):
        try:
            parse(text)
        except dkim.DkimError:
            pass
    verifier = dkim.Verifier([(b"DKIM-Signature", text), (b"From", b"x")], "other.example", 0)
    verifier.body(text)
    assert not verifier.verify(dict.fromkeys(verifier.key_names(), ()))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    relay = Relay(tmp_path_factory.mktemp("fuzz"))
    relay.add("alice")
    relay.add("bob")
    return relay


def stream(mail):
    return negotiation() + mail_from(ALICE, ALICE) + rcpt_to(BOB) + content(mail)


def talk(relay, handler, data, sizes):
    """All answers of a session that is fed *data* in pieces of *sizes*, over and over."""
    session = Session(handler(relay.policy))
    out = b""
    at = 0
    turn = 0
    while at < len(data) and not session.closed:
        size = sizes[turn % len(sizes)]
        out += session.feed(data[at : at + size])
        at += size
        turn += 1
        while session.wanted is not None:
            out += session.answer({name: relay.keys.get(name, ()) for name in session.wanted})
    assert len(session._buffer) <= len(data)
    return packets(out), session.closed


@FAST
@given(
    st.sampled_from(HANDLERS), st.lists(mutated(), min_size=1, max_size=2),
    st.lists(st.integers(1, 3000), min_size=1, max_size=9),
)  # fmt: skip
def test_pieces_of_the_stream_do_not_change_the_answers(shared, handler, mails, sizes):
    shared.policy.limiter._full_at.clear()
    data = negotiation() + b"".join(stream(signed(mail))[len(negotiation()) :] for mail in mails)
    whole = talk(shared, handler, data, [len(data)])
    shared.policy.limiter._full_at.clear()
    assert talk(shared, handler, data, sizes) == whole


@FAST
@given(st.sampled_from(HANDLERS), st.integers(0, 2**32), st.integers(1, 30))
def test_broken_streams_end_or_are_answered_but_never_raise(shared, handler, seed, damage):
    chance = random.Random(seed)
    data = bytearray(stream(chance.choice(SEEDS)) * 2)
    for _ in range(damage):
        data[chance.randrange(17, len(data))] = chance.choice(b"\0\1\4\5ABCDEHLMNOQRTUK\x7f\xff")
    if chance.random() < 0.3:
        del data[chance.randrange(17, len(data)) :]
    talk(shared, handler, bytes(data), [chance.randrange(1, 5000)])


@FAST
@given(st.sampled_from(HANDLERS), st.binary(max_size=400))
def test_random_streams_never_raise(shared, handler, data):
    talk(shared, handler, data, [7])
    talk(shared, handler, negotiation() + data, [11])


@pytest.mark.parametrize("seed", SEEDS)
def test_every_cut_of_a_stream_gives_the_same_answers(shared, seed):
    data = stream(signed(seed.replace(ALICE.encode(), REMOTE.encode(), 1)))
    for handler in HANDLERS:
        shared.policy.limiter._full_at.clear()
        whole = talk(shared, handler, data, [len(data)])
        for cut in range(1, len(data), 13):
            shared.policy.limiter._full_at.clear()
            assert talk(shared, handler, data, [cut, len(data)]) == whole
