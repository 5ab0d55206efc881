# SPDX-License-Identifier: MIT
"""SMTP without I/O: lines, replies, the end of mail data, and what a stranger's mail data may be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatmaild.transport.smtp import (
    MAX_LINE,
    MAX_REPLY,
    BodyCheck,
    DataReader,
    LineReader,
    ProtocolError,
    Reply,
    ReplyReader,
    parse_path,
)

# octets that matter to these parsers, and a few that do not
HOSTILE = st.lists(
    st.sampled_from(
        [b"\r", b"\n", b".", b"\r\n", b"\r\n.\r\n", b"a", b"\0", b"250 ", b"250-", b"\xff"]
    ),
    max_size=30,
).map(b"".join)


def cut(data, places):
    """*data* in pieces."""
    at = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in zip(at, at[1:], strict=False)]


PLACES = st.lists(st.integers(0, 10_000), max_size=8)


def replies_of(pieces):
    reader, found = ReplyReader(), []
    for piece in pieces:
        reader.receive(piece)
        while (reply := reader.next_reply()) is not None:
            found.append(reply)
    return found


def test_replies_of_one_and_of_many_lines():
    wire = b"220 hello\r\n250-one\r\n250-\r\n250 two\r\n354\r\n"
    assert replies_of([wire]) == [Reply(220, "hello"), Reply(250, "one two"), Reply(354, "")]


@given(PLACES)
def test_replies_do_not_depend_on_how_octets_arrive(places):
    wire = b"550-5.1.1 <x>:\r\n550 unknown\r\n250 2.0.0 ok\r\n"
    assert replies_of(cut(wire, places)) == replies_of([wire])


@pytest.mark.parametrize(
    "wire",
    [
        b"250 bare\n",
        b"25 short\r\n",
        b"250-a\r\n550 b\r\n",
        b"250 a\rb\r\n",
        b"250-" + b"x\r\n250-" * MAX_REPLY + b"\r\n",
        b"2" * MAX_LINE,
    ],
)
def test_what_is_no_reply_is_an_error(wire):
    with pytest.raises(ProtocolError):
        replies_of([wire])


@given(HOSTILE, PLACES)
def test_garbage_is_a_reply_or_an_error_and_held_within_bounds(data, places):
    try:
        for reply in replies_of(cut(data, places)):
            assert 200 <= reply.code < 600 and "\n" not in reply.text
    except ProtocolError:
        pass


def test_a_line_has_a_bound():
    reader = LineReader()
    reader.receive(b"x" * (MAX_LINE - 2) + b"\r\n")
    assert len(reader.next_line()) == MAX_LINE - 2
    reader.receive(b"x" * MAX_LINE)
    with pytest.raises(ProtocolError):
        reader.next_line()


@pytest.mark.parametrize(
    ("argument", "parsed"),
    [
        ("FROM:<a@b.example> SIZE=10 BODY=8BITMIME", ("FROM", "a@b.example")),
        ("from:<>", ("FROM", "")),
        ("TO:<c@[192.0.2.1]>", ("TO", "c@[192.0.2.1]")),
    ],
)
def test_paths(argument, parsed):
    assert parse_path(argument) == parsed


@pytest.mark.parametrize(
    "argument", ["", "FROM:a@b", "FROM:<a b>", "FROM:<a>b", "TO:<a\r>", "X:<a>"]
)
def test_what_is_no_path(argument):
    with pytest.raises(ProtocolError):
        parse_path(argument)


def read_data(pieces):
    reader, out = DataReader(), b""
    for piece in pieces:
        if reader.ended:
            reader.rest += piece
        else:
            out += reader.receive(piece)
    return out, reader.ended, reader.rest


@given(HOSTILE, PLACES)
def test_data_ends_at_the_first_line_with_a_dot(data, places):
    whole = b"\r\n" + data
    end = whole.find(b"\r\n.\r\n")
    out, ended, rest = read_data(cut(data, places))
    assert ended == (end >= 0)
    if ended:
        assert out == data[:end] and rest == whole[end + 5 :]
    else:
        assert data.startswith(out) and len(data) - len(out) < 5


def checked(pieces):
    check = BodyCheck()
    return all(check.receive(piece) for piece in pieces) and check.end()


@given(HOSTILE, PLACES)
def test_only_mail_data_that_smtp_reads_as_one_message_is_accepted(data, places):
    lines = data.split(b"\r\n")
    good = data.endswith(b"\r\n") and not any(
        b"\r" in line or b"\n" in line or line == b"." for line in lines
    )
    assert checked(cut(data, places)) == good
    if good:  # the reader of the other direction agrees where it ends
        assert read_data([data + b".\r\n"]) == (data, True, b"")


@given(st.lists(st.text("ab.", max_size=5), min_size=1, max_size=10), PLACES)
def test_dot_stuffed_text_is_accepted(lines, places):
    stuffed = ["." + line if line.startswith(".") else line for line in lines]
    data = "".join(f"{line}\r\n" for line in stuffed).encode()
    assert checked(cut(data, places))
