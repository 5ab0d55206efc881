# SPDX-License-Identifier: MIT
"""Dovecot's dict protocol, and how many may speak it at a time."""

import asyncio
import contextlib
import functools
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatmaild import dictproxy
from chatmaild.dictproxy import Commit, Connection, Iterate, Lookup, ProtocolError, answer


class Dictionary:
    def __init__(self):
        self.committed = []

    def lookup(self, key, user):
        if key == "broken":
            raise OSError("disk")
        return {"key": f"of\t{user}"}.get(key)

    def commit(self, user, changes):
        if changes and changes[0][0] == "no":
            raise dictproxy.Refused("no")
        self.committed.append((user, changes))


def talk(data, dictionary=None):
    connection, dictionary = Connection(), dictionary or Dictionary()
    return b"".join(answer(dictionary, command) for command in connection.receive(data))


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        (b"H4\t0\t0\t\tmetadata\n", b""),
        (b"Lkey\tbob\n", b"Oof\x01tbob\n"),
        (b"Lother\tbob\n", b"N\n"),
        (b"Lbroken\tbob\n", b"Finternal error\n"),
        (b"I0\t0\tpath\tbob\n", b"\n"),
        (b"B1\tbob\t0\nS1\tk\tv\nC1\n", b"O1\n"),
        (b"B1\tbob\t0\nS1\tk\tv\nD1\n", b"AO1\n"),
        (b"B1\tbob\t0\nS1\tno\tv\nC1\n", b"F1\n"),
        (b"B1\tbob\t0\nA1\tk\t3\nC1\n", b"F1\n"),
        (b"B1\tbob\t0\nR1\nC1\n", b"F1\n"),
        (b"C9\n", b"F9\n"),
        (b"B1\tbob\t0\nT1\t3\t4\nV1\t1\nS1\tk\tv\nC1\n", b"O1\n"),
    ],
)
def test_each_command_gets_its_reply(request_, reply):
    assert talk(request_) == reply


def test_transactions_of_one_connection_are_kept_apart():
    dictionary = Dictionary()
    talk(b"B1\ta\nB2\tb\nS1\tk\t1\nS2\tk\t2\nU2\tx\nC2\nC1\n", dictionary)
    assert dictionary.committed == [("b", [("k", "2"), ("x", None)]), ("a", [("k", "1")])]


def test_an_id_may_be_used_again_after_its_commit():
    dictionary = Dictionary()
    assert talk(b"B1\ta\nS1\tk\t1\nC1\nB1\tb\nC1\n", dictionary) == b"O1\nO1\n"
    assert dictionary.committed[1] == ("b", [])


def test_too_many_changes_fail_the_transaction():
    sets = b"S1\tk\tv\n" * (dictproxy.MAX_CHANGES + 1)
    dictionary = Dictionary()
    assert talk(b"B1\ta\n" + sets + b"C1\n", dictionary) == b"F1\n"
    assert dictionary.committed == []


@pytest.mark.parametrize(
    "data",
    [
        b"L" + b"x" * (dictproxy.MAX_LINE + 1),
        b"L" + b"x" * dictproxy.MAX_LINE + b"\n",
        b"".join(b"B%d\ta\n" % number for number in range(dictproxy.MAX_TRANSACTIONS + 1)),
        b"H9\t0\n",
        b"?\n",
    ],
)
def test_beyond_the_bounds_the_connection_ends(data):
    with pytest.raises(ProtocolError):
        list(Connection().receive(data))


@settings(deadline=None)
@given(st.text())
def test_a_field_survives_escaping(text):
    escaped = dictproxy.escape(text)
    assert dictproxy.unescape(escaped) == text
    assert not set("\t\n\r\0") & set(escaped)


def test_unknown_and_cut_escapes_are_read_as_dovecot_does():
    assert dictproxy.unescape("a\x01xb\x01") == "axb"
    assert dictproxy.unescape("\x011t\x01t\x01n\x01r\x010") == "\x01t\t\n\r\0"


LINES = st.lists(
    st.tuples(
        st.sampled_from("HLIBSUACDRTV?"), st.lists(st.sampled_from(["1", "2", "k", "", "\x01t"]))
    ).map(lambda line: line[0] + "\t".join(line[1])),
    max_size=30,
)


@settings(deadline=None)
@given(
    st.one_of(st.binary(), LINES.map(lambda lines: "\n".join(lines).encode())), st.integers(1, 9)
)
def test_any_bytes_in_any_pieces_give_the_same_commands_or_a_protocol_error(data, size):
    def commands(pieces):
        connection, found = Connection(), []
        with contextlib.suppress(ProtocolError):
            for piece in pieces:
                found += connection.receive(piece)
        return found

    whole = commands([data[index : index + 1] for index in range(len(data))])
    assert commands([data[index : index + size] for index in range(0, len(data), size)]) == whole
    for command in whole:
        assert isinstance(command, Lookup | Iterate | Commit)
        assert answer(Dictionary(), command).endswith(b"\n")


@contextlib.asynccontextmanager
async def served(path):
    """A server on a socket at *path*, and a function that connects to it without waiting for it."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket(socket.AF_UNIX))
        listening.bind(str(path))
        threads = stack.enter_context(ThreadPoolExecutor(1))

        def connect(clients):
            client = clients.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            client.connect(str(path))  # BlockingIOError when nobody more may wait
            return client

        async with await dictproxy.start_server(Dictionary(), listening, threads):
            with contextlib.ExitStack() as clients:  # a server ends after its connections
                yield functools.partial(connect, clients)


def test_while_the_service_is_busy_a_thousand_connections_wait(tmp_path):
    async def scenario():
        loop = asyncio.get_running_loop()
        async with served(tmp_path / "s") as connect:
            clients = [connect() for _ in range(dictproxy.BACKLOG)]  # nothing is accepted meanwhile
            for client in clients:
                await loop.sock_sendall(client, b"Lkey\tu\n")
            return [await loop.sock_recv(client, 99) for client in clients]

    assert set(asyncio.run(scenario())) == {b"Oof\x01tu\n"}


def test_a_connection_beyond_the_bound_is_closed_until_another_one_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(dictproxy, "MAX_CONNECTIONS", 3)

    async def ask(client):
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            await loop.sock_sendall(client, b"Lkey\tu\n")
            return await loop.sock_recv(client, 99)
        return b""

    async def scenario():
        async with served(tmp_path / "s") as connect:
            clients = [connect() for _ in range(3)]
            first = [await ask(client) for client in clients]
            beyond = await ask(connect())
            clients[0].close()
            async with asyncio.timeout(10):
                while not (later := await ask(connect())):
                    pass
            return first, beyond, later

    well = b"Oof\x01tu\n"
    assert asyncio.run(scenario()) == ([well] * 3, b"", well)
