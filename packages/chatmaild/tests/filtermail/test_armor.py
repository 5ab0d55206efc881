# SPDX-License-Identifier: MIT
"""ASCII armor: one block, complete, with nothing beside it."""

import pytest

from chatmaild.filtermail.armor import ArmorCheck
from filtermail_samples import LITERAL, PKESK, armor, encrypted, noise, old_packet, packet

GOOD = armor(encrypted())
END = b"-----END PGP MESSAGE-----"


def check(text, incoming=False, chunk=None):
    armored = ArmorCheck(incoming)
    chunk = chunk or max(1, len(text))
    for at in range(0, len(text), chunk):
        if not armored.feed(text[at : at + chunk]):
            return False
    return armored.end()


def lines(text):
    return text.split(b"\r\n")


# 800, 801 and 802 octets: all three forms of padding
ACCEPTED = {
    "ordinary": GOOD,
    "one octet of padding": armor(encrypted(801)),
    "two octets of padding": armor(encrypted(802)),
    "no checksum": armor(encrypted(), checksum=b""),
    "no checksum, padded": armor(encrypted(801), checksum=b""),
    "wrong checksum (RFC 9580: ignored)": armor(encrypted(), checksum=b"=AAAA\r\n"),
    "no line end after END": GOOD[:-2],
    "blank lines around": b"\r\n\r\n" + GOOD + b"\r\n\r\n",
    "blank line between data and checksum": GOOD.replace(b"\r\n=", b"\r\n\r\n="),
    "76 columns": armor(encrypted(), width=76),
    "one line": armor(encrypted(), width=10_000),
    "odd columns": armor(encrypted(), width=63),
    "blank separator with blanks": GOOD.replace(b"MESSAGE-----\r\n", b"MESSAGE-----\r\n \t", 1),
}
REFUSED = {
    "nothing": b"",
    "no BEGIN": GOOD[29:],
    "no END": GOOD[: -len(END) - 2],
    "half of END": GOOD[:-5],
    "other BEGIN": GOOD.replace(b"BEGIN PGP MESSAGE", b"BEGIN PGP PUBLIC KEY BLOCK"),
    "other END": GOOD.replace(b"END PGP MESSAGE", b"END PGP SIGNATURE"),
    "no blank line": GOOD.replace(b"\r\n\r\n", b"\r\n", 1),
    "text before": b"hello\r\n" + GOOD,
    "text after": GOOD + b"hello\r\n",
    "text on the END line": GOOD[:-2] + b" hello\r\n",
    "two blocks": GOOD + GOOD,
    "cleartext within": GOOD.replace(b"\r\n=", b"\r\nhello, you!\r\n="),
    "not base64": GOOD.replace(b"A", b"*"),
    "base64 of something else": armor(b"Hello, this is no OpenPGP at all"),
    "literal packet": armor(packet(LITERAL, b"t\0\0\0\0\0hello")),
    "truncated": armor(encrypted()[:-1]),
    "END on a data line": GOOD.replace(b"\r\n" + END, END),
    "missing quad character": armor(encrypted(801)).replace(b"=\r\n", b"\r\n", 1),
    "too much padding": armor(encrypted(801), checksum=b"").replace(b"=\r\n", b"==\r\n"),
    "padding in the middle": GOOD.replace(b"\r\nA", b"\r\n==A", 1).replace(
        lines(GOOD)[4], b"====" + lines(GOOD)[4][4:]
    ),
    "two checksums": GOOD.replace(END, b"=AAAA\r\n" + END),
    "short checksum": armor(encrypted(), checksum=b"=AAA\r\n"),
    "checksum on a data line": armor(encrypted(), checksum=b"").replace(
        b"\r\n" + END, b"=AAAA\r\n" + END
    ),
    "data after the checksum": GOOD.replace(END, b"AAAA\r\n" + END),
    "unknown header": armor(encrypted(), b"Subject: hello\r\n"),
    "endless header": b"-----BEGIN PGP MESSAGE-----\r\n" + b"Comment: x\r\n" * 5000,
    "endless tail": GOOD.replace(END, b"\r\n" * 500 + END),
}


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("chunk", [1, 3, 64, None])
@pytest.mark.parametrize("incoming", [False, True])
def test_one_complete_block_is_accepted_in_any_pieces(name, chunk, incoming):
    assert check(ACCEPTED[name], incoming, chunk)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("chunk", [1, None])
@pytest.mark.parametrize("incoming", [False, True])
def test_anything_else_is_refused_in_any_pieces(name, chunk, incoming):
    assert not check(REFUSED[name], incoming, chunk)


@pytest.mark.parametrize("content", [100, 1000, 5000, 40_000])
def test_a_character_that_is_no_base64_is_found_wherever_it_stands(content):
    """In one piece, of which the inside of a packet is passed over."""
    good = armor(encrypted(content))
    begin, end = good.index(b"\r\n\r\n") + 4, good.rindex(b"\r\n=")
    assert check(good, False, None)
    for at in {*range(begin, end, 997), begin, end - 1}:
        if good[at] not in b"\r\n":
            assert not check(good[:at] + b"?" + good[at + 1 :], False, None), at


@pytest.mark.parametrize(
    "headers",
    [b"Version: ProtonMail\r\n", b"Comment: https://x\r\n", b"Version: 1\r\nCharset: utf-8\r\n"],
)
def test_version_and_comment_are_accepted_from_others_but_not_from_our_users(headers):
    assert check(armor(encrypted(), headers), incoming=True)
    assert not check(armor(encrypted(), headers), incoming=False)


def test_old_format_packets_are_accepted_from_others_but_not_from_our_users():
    text = armor(old_packet(PKESK, noise(268)) + encrypted(keys=0))
    assert check(text, incoming=True)
    assert not check(text, incoming=False)


def test_blank_lines_before_the_block_cost_nothing_and_are_not_kept():
    armored = ArmorCheck(False)
    for _ in range(100):
        assert armored.feed(b"\r\n" * 30_000)
    assert armored.feed(GOOD) and armored.end()
