# SPDX-License-Identifier: MIT
"""The parsers, without sockets: any octets in any pieces, and what BLAKE3 says elsewhere."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from irohrelay_client import masked

from chatmaild.irohrelay import blake3
from chatmaild.irohrelay.bucket import Bucket
from chatmaild.irohrelay.hub import Hub
from chatmaild.irohrelay.length import LengthFraming
from chatmaild.irohrelay.session import Session
from chatmaild.irohrelay.websocket import MAX_MESSAGE, FramingError, WebSocketFraming

FRAMINGS = [LengthFraming, WebSocketFraming]

payloads = st.one_of(st.binary(max_size=300), st.integers(100, 70000).map(lambda n: b"z" * n))
frames = st.lists(st.tuples(st.integers(0, 255), payloads), max_size=6)
cuts = st.lists(st.integers(1, 70000), max_size=8)


def pieces(octets, cuts):
    """*octets* in pieces of the lengths *cuts*, the rest one by one if it is short."""
    for cut in cuts:
        yield octets[:cut]
        octets = octets[cut:]
    if len(octets) < 500:
        yield from (octets[i : i + 1] for i in range(len(octets)))
    else:
        yield octets


def outcome(framing, octets, cuts):
    """What a parser makes of *octets*: frames, replies, and why it stopped."""
    found, replies = [], b""
    for piece in pieces(octets, cuts):
        try:
            found += framing.receive(piece)
        except FramingError as error:
            return found, str(error)
        replies += framing.replies
        assert len(framing._buffer) <= MAX_MESSAGE + 14
    return found, replies


@settings(deadline=None)
@given(frames, cuts)
def test_any_cut_of_any_frames_gives_the_frames(frames, cuts):
    frames = [(kind, payload) for kind, payload in frames if len(payload) < MAX_MESSAGE]
    octets = b"".join(LengthFraming().wrap(kind, payload) for kind, payload in frames)
    assert outcome(LengthFraming(), octets, cuts) == (frames, b"")
    octets = b"".join(masked(0x82, bytes((kind,)) + payload) for kind, payload in frames)
    assert outcome(WebSocketFraming(), octets, cuts) == (frames, b"")


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=130)), max_size=6), cuts)
def test_websocket_frames_of_any_kind_mean_the_same_in_any_pieces(parts, cuts):
    octets = b"".join(masked(first, payload) for first, payload in parts)
    assert (
        outcome(WebSocketFraming(), octets, [])[1] == outcome(WebSocketFraming(), octets, cuts)[1]
    )


@pytest.mark.parametrize("framing", FRAMINGS)
@settings(deadline=None)
@given(octets=st.binary(max_size=2000), cuts=cuts)
def test_any_octets_are_frames_or_a_framing_error(framing, octets, cuts):
    outcome(framing(), octets, cuts)


@pytest.mark.parametrize("framing", FRAMINGS)
@given(kind=st.integers(0, 255), parts=st.lists(payloads, max_size=3))
def test_what_is_sent_has_the_right_length(framing, kind, parts):
    octets, whole = framing().wrap(kind, *parts), b"".join(parts)
    assert octets.endswith(bytes((kind,)) + whole if framing is WebSocketFraming else whole)
    if framing is WebSocketFraming and len(whole) + 1 < 126:
        assert octets[:2] == bytes((0x82, len(whole) + 1))


class Sink:
    """A link that goes nowhere."""

    def __init__(self):
        self.sent = b""
        self.ended = False

    def send(self, data):
        self.sent += data
        return True

    def close(self):
        self.ended = True

    abort = close


REQUESTS = [
    b"GET /relay HTTP/1.1\r\nUpgrade: iroh derp http\r\n\r\n",
    b"GET /relay HTTP/1.1\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    b"GET /relay HTTP/1.1\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: iroh-relay-v2\r\n\r\n",
]
FRAME = st.tuples(st.sampled_from([1, 2, 4, 5, 8, 9, 10, 12, 13]), st.binary(max_size=120))


@settings(deadline=None)
@given(
    st.sampled_from([*REQUESTS, b""]),
    st.booleans(),
    st.one_of(st.binary(max_size=300), st.lists(FRAME, max_size=4)),
    cuts,
)
def test_no_octets_raise_in_a_session(request_, proved, octets, cuts):
    hub, link = Hub(), Sink()
    session = Session(hub, link, 0.0)
    session.receive(request_, 0.0)
    if proved and request_:
        session.key = bytes(32)
        hub.join(session)
    if isinstance(octets, list):
        wrap = (
            (lambda kind, payload: masked(0x82, bytes((kind,)) + payload))
            if b"websocket" in request_
            else LengthFraming().wrap
        )
        octets = b"".join(wrap(kind, payload) for kind, payload in octets)
    for piece in pieces(octets, cuts):
        if not session.closed:
            session.receive(piece, 1.0)
    session.tick(1000.0)
    session.lost()
    assert len(hub) == 0
    assert session.closed


@pytest.mark.parametrize(
    ("material", "expected"),
    [
        (b"", "b6b792a0756171b7230e473d47721c6d5b54fb029d9393ad392eee24f811a17b"),
        (b"a", "176ce81c69514e3226c4ec0ba9b92638f80abb37a452d32488757cb557ccc7f2"),
        (b"a" * 16, "5597c563c1357b018bcf8951918ea77f8970ee7798b2a8def8e4a790f0edfbd2"),
        (b"a" * 64, "78cf0ccab3db88938ee15af4a7e132a6ad7370203b2c918b9567a2604677cf2d"),
        (b"a" * 65, "5ecc707b11a0ebab6e96f002df84a0f600c7131c05e14c3168ddaefc8d342f38"),
        (b"a" * 1023, "d5aea52d9d77bdc16a099df8de0a66d7756ad24fdc816bda9529a261b3e7d732"),
        (b"a" * 1024, "cb3d29475c2e26984f107b0542b23f550da62ec69e31b6eaf0a9d3c696d20d26"),
    ],
)
def test_keys_are_derived_as_by_b3sum(material, expected):
    context = b"iroh-relay handshake v1 challenge signature"
    assert blake3.derive_key(context, material).hex() == expected


def test_more_than_a_chunk_is_not_derived_from():
    with pytest.raises(ValueError, match="1024"):
        blake3.derive_key(b"x", b"a" * 1025)


def test_a_bucket_lends_and_is_paid_back():
    bucket = Bucket(rate=10, burst=5, now=0.0)
    assert bucket.spend(5, 0.0) == 0
    assert bucket.spend(20, 0.0) == 2
    assert bucket.spend(0, 1.0) == 1
    assert bucket.spend(0, 100.0) == 0
    assert bucket.spend(6, 100.0) == pytest.approx(0.1)  # no more than the burst was saved
