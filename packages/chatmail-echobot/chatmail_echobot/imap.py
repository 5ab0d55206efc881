# SPDX-License-Identifier: MIT
"""Just enough of IMAP (RFC 3501, RFC 2177) for one inbox that is emptied: Python 3.13's has no IDLE.

The server is the relay's own Dovecot on loopback and trusted; its lines and literals are bounded all
the same. Any trouble is an ImapError or an OSError, after which the session is of no more use.
"""

from __future__ import annotations

import re
import select
import socket
from types import TracebackType
from typing import IO

from chatmail_echobot import openpgp

PORT = 143
TIMEOUT = 60.0  # seconds for the next octets of an answer
MAX_LINE = 65536  # octets
CHUNK = 65536

_LITERAL = re.compile(rb"\{(\d{1,12})\}\r\n\Z")


class ImapError(Exception):
    """The server refused, or says what we do not understand."""


class Refused(ImapError):
    """The login was refused."""


class Session:
    """One connection: login(), select(), then unseen work by uids(), fetch(), delete(), idle()."""

    def __init__(self, host: str, port: int = PORT) -> None:
        self._socket = socket.create_connection((host, port), TIMEOUT)
        self._buffer = b""
        self._number = 0
        self._news = True  # something may have arrived since the last uids()
        if not self._line().startswith(b"* OK"):
            raise ImapError("no greeting")

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def login(self, user: str, password: str) -> None:
        """Raises Refused. Neither word may have a quote, a backslash or a line end in it."""
        try:
            self._command(f'LOGIN "{user}" "{password}"')
        except ImapError as error:
            raise Refused("the login was refused") from error

    def select(self) -> None:
        """Open the inbox."""
        self._command("SELECT INBOX")

    def uids(self) -> list[int]:
        """The messages in the inbox, oldest first."""
        found = []
        self._news = False
        for line in self._command("UID SEARCH NOT DELETED"):
            if line.startswith(b"* SEARCH"):
                found += [int(word) for word in line.split()[2:]]
        return sorted(found)

    def fetch(self, uid: int, limit: int) -> IO[bytes] | None:
        """A whole message as a file; None if it is gone, or longer than *limit* octets."""
        tag = self._send(f"UID FETCH {uid} BODY.PEEK[]")
        message: IO[bytes] | None = None
        while not (line := self._line()).startswith(tag):
            literal = _LITERAL.search(line)
            if literal and b" FETCH (" in line and message is None:
                message = self._literal(int(literal[1]), limit)
            elif literal:
                raise ImapError("unexpected literal")
        self._check(line)
        return message

    def _literal(self, left: int, limit: int) -> IO[bytes] | None:
        message = openpgp.temporary() if left <= limit else None
        while left:
            data = self._buffer or self._receive()
            self._buffer = data[left:]
            if message is not None:
                message.write(data[:left])
            left -= min(len(data), left)
        if message is not None:
            message.seek(0)
        return message

    def delete(self, uid: int) -> None:
        """Remove a message."""
        self._command(f"UID STORE {uid} +FLAGS.SILENT (\\Deleted)")
        self._command("EXPUNGE")

    def idle(self, seconds: float) -> None:
        """Wait until something arrived since the last uids(), at most *seconds*."""
        if self._news:
            return
        tag = self._send("IDLE")
        while not (line := self._line()).startswith(b"+"):
            if line.startswith(tag):
                raise ImapError("IDLE refused")
        if not self._news and not self._buffer:
            select.select([self._socket], [], [], seconds)
        self._socket.sendall(b"DONE\r\n")
        while not (line := self._line()).startswith(tag):
            pass
        self._check(line)

    def _command(self, text: str) -> list[bytes]:
        """Send a command; the untagged lines of its answer."""
        tag = self._send(text)
        lines = []
        while not (line := self._line()).startswith(tag):
            lines.append(line)
        self._check(line)
        return lines

    def _send(self, text: str) -> bytes:
        self._number += 1
        tag = f"a{self._number} "
        self._socket.sendall(f"{tag}{text}\r\n".encode("ascii"))
        return tag.encode("ascii")

    def _line(self) -> bytes:
        while b"\n" not in self._buffer:
            if len(self._buffer) > MAX_LINE:
                raise ImapError("line too long")
            self._buffer += self._receive()
        line, _, self._buffer = self._buffer.partition(b"\n")
        self._news |= line.endswith(b" EXISTS\r")
        return line + b"\n"

    def _receive(self) -> bytes:
        data = self._socket.recv(CHUNK)
        if not data:
            raise ImapError("connection closed")
        return data

    @staticmethod
    def _check(line: bytes) -> None:
        if line.split()[1:2] != [b"OK"]:
            raise ImapError("command refused")
