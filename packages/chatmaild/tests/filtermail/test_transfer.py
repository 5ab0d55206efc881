# SPDX-License-Identifier: MIT
"""Content-Transfer-Encoding: strict, and the same in any pieces."""

import base64
import quopri

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatmaild.filtermail import transfer
from filtermail_samples import noise


def decode(encoding, text, chunk=None):
    decoder = transfer.decoder(encoding)
    chunk = chunk or max(1, len(text))
    pieces = [decoder.feed(text[at : at + chunk]) for at in range(0, len(text), chunk)]
    return b"".join(pieces) + decoder.end()


@pytest.mark.parametrize("name", ["7bit", " 8BIT\r\n", "binary"])
def test_identity_changes_nothing(name):
    assert decode(name, b"a=20\r\n", 1) == b"a=20\r\n"


@pytest.mark.parametrize("name", ["", "x-uuencode", "base64 quoted-printable", "7bit; x"])
def test_an_unknown_encoding_has_no_decoder(name):
    assert transfer.decoder(name) is None


@pytest.mark.parametrize("chunk", [1, 3, 100, None])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000])
def test_base64_is_decoded_in_any_pieces(size, chunk):
    text = base64.encodebytes(noise(size)).replace(b"\n", b"\r\n")
    assert decode("Base64", text, chunk) == noise(size)


@pytest.mark.parametrize("text", [b"AAA", b"AAA=AAAA", b"A===", b"AA=A", b"AA-A", b"AA A", b"="])
@pytest.mark.parametrize("chunk", [1, None])
def test_sloppy_base64_is_refused(text, chunk):
    with pytest.raises(ValueError):
        decode("base64", text, chunk)


@given(st.text("ab =\t.é\x00", max_size=300), st.integers(1, 50))
def test_quoted_printable_is_decoded_in_any_pieces(text, chunk):
    data = text.encode()
    encoded = quopri.encodestring(data).replace(b"\n", b"\r\n")
    assert decode("quoted-printable", encoded, chunk) == data


@pytest.mark.parametrize("text", [b"a=", b"a=2", b"=ZZ", b"=\n", b"a\rb", b"\xff", b"\0", b"a=\r"])
@pytest.mark.parametrize("chunk", [1, None])
def test_sloppy_quoted_printable_is_refused(text, chunk):
    with pytest.raises(ValueError):
        decode("quoted-printable", text, chunk)


@pytest.mark.parametrize("chunk", [1, 500, None])
def test_an_endless_quoted_printable_line_is_refused(chunk):
    with pytest.raises(ValueError, match="line too long"):
        decode("quoted-printable", b"a" * (transfer.MAX_QP_LINE + 1) + b"\r\n", chunk)
