# SPDX-License-Identifier: MIT
"""The loop and its IMAP client against a scripted server."""

import socket
import threading

import pytest
from chatmail_echobot import imap, service, smtp
from chatmail_echobot.bot import Ignored
from chatmail_echobot.settings import Settings
from conftest import BOT
from hypothesis import given, settings
from hypothesis import strategies as st


class Server:
    """Says *script*, and keeps what it is told."""

    def __init__(self, script: bytes) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._script = script
        self.heard = b""
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.sendall(self._script)
            connection.shutdown(socket.SHUT_WR)
            while data := connection.recv(65536):
                self.heard += data

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._thread.join(10)
        self._listener.close()


def test_an_inbox_is_listed_read_and_emptied():
    script = (
        b"* OK hi\r\na1 OK [CAPABILITY X] in\r\n* 2 EXISTS\r\na2 OK selected\r\n"
        b"* SEARCH 7 5\r\na3 OK done\r\n"
        b"* 1 FETCH (UID 5 BODY[] {6}\r\nab\r\ncd)\r\na4 OK\r\n"
        b"a5 OK stored\r\n* 1 EXPUNGE\r\na6 OK gone\r\n* SEARCH\r\na7 OK done\r\n"
        b"+ idling\r\n* 1 EXISTS\r\na8 OK idled\r\n"
    )
    with Server(script) as server, imap.Session("127.0.0.1", server.port) as session:
        session.login("me", "secret")
        session.select()
        assert session.uids() == [5, 7]
        with session.fetch(5, 100) as message:
            assert message.read() == b"ab\r\ncd"
        session.delete(5)
        assert session.uids() == []
        session.idle(10)
    assert server.heard.splitlines() == [
        b'a1 LOGIN "me" "secret"',
        b"a2 SELECT INBOX",
        b"a3 UID SEARCH NOT DELETED",
        b"a4 UID FETCH 5 BODY.PEEK[]",
        rb"a5 UID STORE 5 +FLAGS.SILENT (\Deleted)",
        b"a6 EXPUNGE",
        b"a7 UID SEARCH NOT DELETED",
        b"a8 IDLE",
        b"DONE",
    ]


def test_what_arrives_during_the_search_is_not_slept_through():
    script = b"* OK hi\r\n* SEARCH\r\n* 1 EXISTS\r\na1 OK done\r\n"
    with Server(script) as server, imap.Session("127.0.0.1", server.port) as session:
        assert session.uids() == []
        session.idle(10)
    assert b"IDLE" not in server.heard


def test_a_message_that_is_too_long_is_not_kept():
    script = b"* OK hi\r\n* 1 FETCH (UID 5 BODY[] {100000}\r\n" + bytes(100000) + b")\r\na1 OK\r\n"
    with Server(script) as server, imap.Session("127.0.0.1", server.port) as session:
        assert session.fetch(5, 99999) is None


def test_a_refused_login_says_so():
    with Server(b"* OK hi\r\na1 NO wrong\r\n") as server:
        with imap.Session("127.0.0.1", server.port) as session, pytest.raises(imap.Refused):
            session.login("me", "secret")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [b"* OK\r\n", b"a1 OK\r\n", b"+\r\n", b"{9}\r\n", b"* 1 FETCH (", b"a1 \r\n"]
        )
        | st.binary(max_size=20),
        max_size=8,
    ).map(b"".join)
)
def test_any_server_is_understood_or_left(script):
    with Server(script) as server:
        try:
            with imap.Session("127.0.0.1", server.port) as session:
                session.fetch(1, 100)
        except (imap.ImapError, OSError) as error:
            assert str(error)


class Inbox:
    """An imap.Session with one message, that stops the service when it is to wait."""

    class Empty(Exception):
        pass

    def __init__(self, message) -> None:
        self.messages = {1: message}

    def uids(self):
        return list(self.messages)

    def fetch(self, uid, limit):
        return self.messages[uid]

    def delete(self, uid):
        del self.messages[uid]

    def idle(self, seconds):
        raise self.Empty


@pytest.mark.parametrize(
    ("outcomes", "pauses"),
    [
        (["done"], []),
        ([Ignored("x")], []),
        ([smtp.Refused("550")], []),
        ([ValueError("secret")], []),
        ([smtp.Temporary("450"), smtp.Temporary("450"), "done"], [1, 2]),
        ([smtp.Temporary("450")] * service.TRIES, [1, 2, 4, 8, 16, 32, 60, 60]),
    ],
)
def test_a_message_is_removed_after_its_answer_whatever_happens(
    me, tmp_path, monkeypatch, caplog, outcomes, pauses
):
    slept = []
    monkeypatch.setattr(service.time, "sleep", slept.append)
    served = service.Service(Settings(BOT, tmp_path, 1000), me)
    done = []

    def handle(message):
        outcome = outcomes[len(done)]
        done.append(message.read())
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(served._bot, "handle", handle)
    message = open(tmp_path / "message", "w+b")
    message.write(b"whole")
    message.seek(0)
    inbox = Inbox(message)
    with pytest.raises(Inbox.Empty):
        served._serve(inbox)
    assert done == [b"whole"] * len(outcomes) and inbox.messages == {}
    assert slept == pauses
    assert "secret" not in caplog.text


def test_the_service_logs_in_again_after_trouble_with_growing_pauses(me, tmp_path, monkeypatch):
    slept = []

    class Stop(BaseException):
        pass

    def session(host):
        if len(slept) == 3:
            raise Stop
        raise ConnectionRefusedError

    monkeypatch.setattr(service.imap, "Session", session)
    monkeypatch.setattr(service.time, "sleep", slept.append)
    with pytest.raises(Stop):
        service.Service(Settings(BOT, tmp_path, 1000), me).run()
    assert slept == [1.0, 2.0, 4.0]
