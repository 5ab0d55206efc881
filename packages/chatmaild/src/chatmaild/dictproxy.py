# SPDX-License-Identifier: MIT
"""The server's half of Dovecot's dict proxy protocol, as spoken by Dovecot 2.4.

One command a line, fields separated by tabs, in each field 001 escapes what would break the line:

    H <major> <minor> <type> <user> <name>  hello; no answer
    L <key> <user>                          lookup: O<value>, N (not found) or F<error>
    I <flags> <max> <path>... <user>        iterate: one O<key><TAB><value> a hit, then an empty line
    B <id> <user> <expiry>                  begin a transaction; ids are those of this connection
    S <id> <key> <value>                    set in it
    U <id> <key>                            unset in it
    A <id> <key> <difference>               add to a number in it: we refuse
    T, V <id> ...                           timestamp, "do not log the values": no answer, no effect
    R <id>                                  roll back: no answer
    C <id>                                  commit: O<id> or F<id>; D: the same, AO<id> or AF<id>

`Connection` has no I/O: bytes in, commands out. It promises to stay in step whatever comes: a line
over MAX_LINE, a transaction over its bounds or any refused command makes that transaction fail at
its commit, since only then does Dovecot listen. Memory is bounded by MAX_LINE plus MAX_TRANSACTIONS *
MAX_CHANGES * MAX_LINE; cost is linear in the bytes received. `serve` is the asyncio shell.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

MAX_LINE = 16384  # bytes; Dovecot's own limit is 64 KiB, our longest value is a token of 4 KiB
MAX_TRANSACTIONS = 16  # open at a time in one connection; Dovecot 2.4 uses one or two
MAX_CHANGES = 16  # in one transaction
MAX_CONNECTIONS = 4096  # at a time; each process of Dovecot holds one for each dictionary
BACKLOG = 1024  # as in the socket units; asyncio would make it 100, and the 101st is refused
READ_SIZE = 65536
MAJOR_VERSIONS = (2, 3, 4)

log = logging.getLogger("dictproxy")

_ESCAPES = {"\x01": "\x011", "\t": "\x01t", "\r": "\x01r", "\n": "\x01n", "\0": "\x010"}
_UNESCAPES = {escaped[1]: char for char, escaped in _ESCAPES.items()}
_ESCAPED = re.compile("\x01(.?)", re.DOTALL)


def escape(text: str) -> str:
    """*text* as a field (Dovecot's str_tabescape)."""
    return "".join(_ESCAPES.get(char, char) for char in text)


def unescape(text: str) -> str:
    """The text of a field; like Dovecot, an unknown escape stands for its second character."""
    return _ESCAPED.sub(lambda match: _UNESCAPES.get(match[1], match[1]), text)


@dataclass
class Transaction:
    """What one transaction is going to change: (key, value), the value None for unset."""

    user: str
    changes: list[tuple[str, str | None]] = field(default_factory=list)
    failure: str | None = None  # why it must not be committed


class Lookup(NamedTuple):
    """Asks for the value of *key*; answer with `lookup_reply` or `failure_reply`."""

    key: str
    user: str


class Iterate(NamedTuple):
    """Asks for all keys below some paths; none of our dictionaries has any: answer `END`."""

    user: str


class Commit(NamedTuple):
    """Asks to carry out a transaction; answer with `commit_reply`."""

    number: str
    transaction: Transaction
    is_async: bool


Command = Lookup | Iterate | Commit
END = b"\n"  # of an iteration


def lookup_reply(value: str | None) -> bytes:
    """The answer to a Lookup; None is "not found"."""
    return b"N\n" if value is None else f"O{escape(value)}\n".encode()


def failure_reply(error: str) -> bytes:
    """The answer to a Lookup that could not be made."""
    return f"F{escape(error)}\n".encode()


def commit_reply(commit: Commit, ok: bool) -> bytes:
    """The answer to a Commit."""
    return f"{'A' if commit.is_async else ''}{'O' if ok else 'F'}{commit.number}\n".encode()


class ProtocolError(Exception):
    """The peer does not speak this protocol; the connection cannot be used any further."""


class Connection:
    """The state of one connection: `receive` bytes, get the commands that want an answer."""

    def __init__(self) -> None:
        self._buffer = b""
        self._transactions: dict[str, Transaction] = {}

    def receive(self, data: bytes) -> Iterator[Command]:
        """The commands that are complete with *data*; raises ProtocolError at an endless line."""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            command = self._line(line)
            if command is not None:
                yield command
        if len(self._buffer) > MAX_LINE:
            raise ProtocolError(f"line longer than {MAX_LINE} bytes")

    def _line(self, line: bytes) -> Command | None:
        if len(line) > MAX_LINE:
            raise ProtocolError(f"line longer than {MAX_LINE} bytes")
        letter = line[:1].decode("latin-1")
        fields = [unescape(item) for item in line[1:].decode("utf-8", "replace").split("\t")]
        first = fields[0]
        second = fields[1] if len(fields) > 1 else ""
        if letter == "H":
            if not first.isdecimal() or int(first) not in MAJOR_VERSIONS:
                raise ProtocolError(f"protocol version {first!r} is not known")
        elif letter == "L":
            return Lookup(first, second)
        elif letter == "I":
            return Iterate(fields[-1])
        elif letter == "B":
            self._begin(first, second)
        elif letter == "S":
            self._change(first, second, fields[2] if len(fields) > 2 else "")
        elif letter == "U":
            self._change(first, second, None)
        elif letter == "A":
            self._fail(first, "numbers are not supported")
        elif letter == "R":
            self._transactions.pop(first, None)
        elif letter in ("C", "D"):
            missing = Transaction("", failure="no such transaction")
            return Commit(first, self._transactions.pop(first, missing), letter == "D")
        elif letter not in ("T", "V", ""):
            raise ProtocolError(f"unknown command {letter!r}")
        return None

    def _begin(self, number: str, user: str) -> None:
        if number not in self._transactions and len(self._transactions) >= MAX_TRANSACTIONS:
            raise ProtocolError(f"more than {MAX_TRANSACTIONS} transactions")
        self._transactions[number] = Transaction(user)

    def _change(self, number: str, key: str, value: str | None) -> None:
        transaction = self._transactions.get(number)
        if transaction is None:
            return  # its commit fails
        if len(transaction.changes) >= MAX_CHANGES:
            transaction.failure = f"more than {MAX_CHANGES} changes"
        else:
            transaction.changes.append((key, value))

    def _fail(self, number: str, reason: str) -> None:
        transaction = self._transactions.get(number)
        if transaction is not None:
            transaction.failure = reason


class Dictionary(Protocol):
    """What a service has to offer. Both are called in threads and may wait for the disk; what one
    connection asks is done one after the other."""

    def lookup(self, key: str, user: str) -> str | None:
        """The value of *key*, None for "not found"; an exception is a failure."""

    def commit(self, user: str, changes: list[tuple[str, str | None]]) -> None:
        """Carry out all changes; an exception refuses them. Its text goes to the log."""


class Refused(Exception):
    """A dictionary does not carry out a change."""


def answer(dictionary: Dictionary, command: Command) -> bytes:
    """The reply to one command; never raises."""
    if isinstance(command, Iterate):
        return END
    if isinstance(command, Lookup):
        try:
            return lookup_reply(dictionary.lookup(command.key, command.user))
        except Exception:
            log.exception("look-up failed")
            return failure_reply("internal error")
    transaction = command.transaction
    try:
        if transaction.failure is not None:
            raise Refused(transaction.failure)
        dictionary.commit(transaction.user, transaction.changes)
    except Refused as error:
        log.warning("refused: %s", error)
        return commit_reply(command, False)
    except Exception:
        log.exception("commit failed")
        return commit_reply(command, False)
    return commit_reply(command, True)


async def start_server(
    dictionary: Dictionary, sock: socket.socket, executor: Executor
) -> asyncio.Server:
    """Serve *dictionary* on a listening unix socket; *executor* has the threads it is called in.

    Dovecot holds its connections as it likes; one beyond MAX_CONNECTIONS is closed at once.
    """
    loop = asyncio.get_running_loop()
    connections: set[asyncio.StreamWriter] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection()
        connections.add(writer)
        try:
            if len(connections) > MAX_CONNECTIONS:
                log.warning("closing a connection: there are %d", MAX_CONNECTIONS)
                return
            while data := await reader.read(READ_SIZE):
                for command in connection.receive(data):
                    reply = await loop.run_in_executor(executor, answer, dictionary, command)
                    writer.write(reply)
                await writer.drain()
        except ProtocolError as error:
            log.warning("closing a connection: %s", error)
        except ConnectionError:
            pass
        finally:
            connections.discard(writer)
            writer.close()

    return await asyncio.start_server(connected, sock=sock, backlog=BACKLOG)
