# SPDX-License-Identifier: MIT
"""Headers, parts and keys from files: what they say, and that nothing in them does harm."""

import io

import pytest
from chatmail_echobot import autocrypt, mime, openpgp
from hypothesis import given
from hypothesis import strategies as st

LINES = st.lists(
    st.sampled_from(
        [
            b"--b\r\n",
            b"--b--\r\n",
            b"--b",
            b"\n",
            b"\r\n",
            b"a: b\r\n",
            b"Content-Type: multipart/mixed; boundary=b\r\n",
            b"Content-Transfer-Encoding: base64\r\n",
            b"Content-Transfer-Encoding: quoted-printable\r\n",
        ]
    )
    | st.binary(max_size=30),
    max_size=25,
).map(b"".join)


def test_fields_are_unfolded_and_without_control_characters():
    file = io.BytesIO(b"A: one\r\n\ttwo\r\nb : \x00x\xc3\xa9\x1b\nno field\n\nbody")
    fields = mime.read_fields(file)
    assert fields.items == (("a", "one two"), ("b", "xé"))
    assert file.read() == b"body"


@pytest.mark.parametrize(
    "data", [b"a: " + b"x" * mime.MAX_HEADER, b"a: b\n" * (mime.MAX_FIELDS + 2)]
)
def test_a_header_without_end_is_refused(data):
    with pytest.raises(mime.MimeError):
        mime.read_fields(io.BytesIO(data))


def test_parts_of_nested_multiparts_are_found_in_order():
    data = (
        b'Content-Type: multipart/mixed; boundary="b"\r\n\r\npreamble\r\n'
        b'--b\r\nContent-Type: multipart/alternative; boundary="c"\r\n\r\n'
        b"--c\r\nContent-Type: text/plain\r\n\r\none\r\n"
        b"--c\r\nContent-Type: text/html\r\n\r\n<p>\r\n--c--\r\n"
        b"--b\r\n\r\ntwo\r\n\r\n--bad\r\n--b--\r\nepilogue"
    )
    file = io.BytesIO(data)
    found = mime.parts(file, mime.read_fields(file))
    assert [b"".join(mime.decoded(file, part)) for part in found] == [
        b"one",
        b"<p>",
        b"two\r\n\r\n--bad",
    ]


@given(LINES)
def test_no_value_can_end_a_line(data):
    for name, value in mime.read_fields(io.BytesIO(data + b" \rx: y\n\n")).items:
        assert not any(ord(char) < 32 for char in name + value)


@given(LINES)
def test_any_message_has_parts_within_itself_or_is_refused(data):
    file = io.BytesIO(data)
    try:
        found = mime.parts(file, mime.read_fields(file))
        assert len(found) <= mime.MAX_PARTS
        for part in found:
            assert 0 <= part.start <= part.end <= len(data)
            assert len(b"".join(mime.decoded(file, part))) <= len(data)
    except mime.MimeError as error:
        assert str(error)


@given(st.text(max_size=200) | LINES.map(lambda data: data.decode("latin-1")))
def test_any_autocrypt_field_is_a_key_or_none(value):
    assert autocrypt.parse(value, "a@b.example") is None


def test_an_autocrypt_field_counts_for_its_address_only(alice):
    value = autocrypt.field(alice.address, alice.cert).partition(":")[2]
    assert autocrypt.parse(value, alice.address) == alice.cert
    assert autocrypt.parse(value, "other@chat.example") is None
    assert autocrypt.parse(f"{value}; _x=1", alice.address) == alice.cert
    assert autocrypt.parse(f"{value}; x=1", alice.address) is None


@given(st.binary(max_size=100))
def test_any_octets_have_a_fingerprint_or_are_refused(data):
    try:
        assert len(openpgp.fingerprint(data)) == 40
    except openpgp.OpenPGPError as error:
        assert "certificate" in str(error)


def test_a_fingerprint_does_not_depend_on_how_the_length_is_written(alice):
    length, body = alice.cert[1], alice.cert[2 : 2 + alice.cert[1]]
    assert alice.cert[0] == 0xC6 and length < 192
    written = [bytes([0x98, length]), bytes([0x99, 0, length]), bytes([0x9A, 0, 0, 0, length])]
    wanted = openpgp.fingerprint(alice.cert)
    assert [openpgp.fingerprint(head + body) for head in written] == [wanted] * 3


def test_our_key_makes_clients_write_what_everybody_reads(me):
    """Version 4; a primary key that certifies and signs; no features subpacket (RFC 9580 5.2.3.32)."""
    assert me.cert[2] == 4
    packets = []
    rest = me.cert
    while rest:
        assert rest[1] < 192
        packets.append((rest[0] & 63, rest[2 : 2 + rest[1]]))
        rest = rest[2 + rest[1] :]
    assert [tag for tag, _body in packets] == [6, 13, 2, 14, 2]
    hashed = packets[2][1][6 : 6 + int.from_bytes(packets[2][1][4:6], "big")]
    subpackets = {}
    while hashed:
        subpackets[hashed[1] & 127] = hashed[2 : 1 + hashed[0]]
        hashed = hashed[1 + hashed[0] :]
    flags, features = 27, 30
    assert subpackets[flags][0] & 3 == 3 and features not in subpackets


@pytest.mark.parametrize("limit", ["MAX_OUTPUT", "MAX_MEMORY"])
def test_what_takes_too_much_ends_rsop_and_not_us(me, alice, monkeypatch, limit):
    with openpgp.temporary() as plain:
        plain.write(bytes(24 << 20))
        plain.seek(0)
        monkeypatch.setattr(openpgp, limit, 32 << 20)
        with pytest.raises(openpgp.OpenPGPError, match="rsop encrypt: status"):
            openpgp.encrypt(plain, alice.key, me.cert)
