# SPDX-License-Identifier: MIT
"""From smtp(8) to peers: a small SMTP server on loopback that posts what it gets.

One session may bring several messages; each has the recipients of one domain. The body passes through:
nothing of a message is held but its first HOLD octets, and only until they are sent.

    450  the domain is not known to take HTTPS     451  it did not take this one: try the next destination
    250  it did

and never a 5xx for what a peer said: the peer says it again by SMTP, and that is what the sender is told.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import NamedTuple

from chatmaild import metrics
from chatmaild.filtermail.address import AddressError, parse_address
from chatmaild.transport import link
from chatmaild.transport.link import Answer, Contexts, Link, LinkError
from chatmaild.transport.locate import Locator, NoHost
from chatmaild.transport.peers import Peers
from chatmaild.transport.smtp import DataReader, LineReader, ProtocolError, parse_path

HOLD = 64 << 10  # octets; what is larger is sent in chunks, over a connection of its own
READ_SIZE = 64 << 10
MAX_SESSIONS = 256  # Postfix' default_process_limit is 100
MAX_RECIPIENTS = 1000
SESSION_SECONDS = 300.0  # without a word of smtp(8)
LOCATE_SECONDS = 20.0  # for all hosts of a domain together
PROBE_PATIENCE = 2.0  # a message waits for the answer to the first question
MAX_PROBES = 64  # at a time
MAX_IDLE = 64  # connections kept open
IDLE_SECONDS = 20.0  # less than nginx' keepalive_timeout

SENT = metrics.Counter(
    "chatmail_https_sent", "Messages offered to other relays by HTTPS.", ("result",)
)
SENT_SECONDS = metrics.Histogram(
    "chatmail_https_sent_seconds",
    "From the message's first octet to the other relay's 200.",
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 60),
)
PROBES = metrics.Counter(
    "chatmail_https_probes", "Relays asked whether they take HTTPS.", ("result",)
)

log = logging.getLogger("transport")


class Envelope(NamedTuple):
    """Sender ("" is the null sender) and recipients, all of *domain*."""

    sender: str
    recipients: list[str]
    domain: str


class Client:
    """Knows the peers, keeps connections to them, and posts messages."""

    def __init__(
        self,
        locator: Locator,
        contexts: Contexts,
        peers: Peers | None = None,
        port: int = link.PORT,
    ) -> None:
        self.peers = Peers() if peers is None else peers
        self._locator = locator
        self._contexts = contexts
        self._port = port
        self._probes: dict[str, asyncio.Task[bool]] = {}
        self._idle: OrderedDict[Link, tuple[str, asyncio.TimerHandle]] = OrderedDict()

    @property
    def busy(self) -> bool:
        """Whether a question to a peer is under way."""
        return bool(self._probes)

    async def takes_https(self, domain: str) -> bool:
        """Whether *domain* does; asks it if need be, and waits PROBE_PATIENCE at most."""
        known = self.peers.takes_https(domain)
        if known is not None:
            return known
        probe = self._probes.get(domain)
        if probe is None:
            if len(self._probes) >= MAX_PROBES:
                return False
            probe = asyncio.ensure_future(self._probe(domain))
            self._probes[domain] = probe
            probe.add_done_callback(lambda _: self._probes.pop(domain, None))
        done, _ = await asyncio.wait([probe], timeout=PROBE_PATIENCE)
        return bool(done) and probe.result()

    async def post(self, envelope: Envelope, body: Body) -> Answer:
        """Post a message. Raises LinkError if no host of the domain gave an answer."""
        fields = [("Content-Type", "application/octet-stream")]
        if envelope.sender:
            fields.append(("X-MAIL-FROM", envelope.sender))
        fields += [("X-MAIL-TO", recipient) for recipient in envelope.recipients]
        if body.whole:
            fields.append(("Content-Length", str(len(body.first))))
        else:
            fields.append(("Transfer-Encoding", "chunked"))
        kept = self._take(envelope.domain) if body.whole else None
        if kept is not None:
            try:
                return await self._ask(kept, envelope.domain, "POST", fields, body)
            except LinkError:
                pass  # the peer had closed it
        return await self._ask(
            await self._open(envelope.domain), envelope.domain, "POST", fields, body
        )

    async def _probe(self, domain: str) -> bool:
        try:
            answer = await self._ask(await self._open(domain), domain, "GET")
            takes = answer.status == 405
            why = f"status {answer.status}"
        except LinkError as error:
            takes, why = False, str(error)
        except Exception as error:  # a bug; SMTP delivers
            log.error("probe: %s", type(error).__name__)
            takes, why = False, "error"
        self.peers.learn(domain, takes)
        PROBES.inc("yes" if takes else "no")
        log.info("a relay %s", "takes HTTPS" if takes else f"does not take HTTPS: {why}")
        return takes

    async def _open(self, domain: str) -> Link:
        """A new connection to the first host of *domain* that has one. Raises LinkError."""
        why = "no connection in time"
        try:
            async with asyncio.timeout(LOCATE_SECONDS):
                for host in await self._locator.hosts(domain):
                    try:
                        for address in await self._locator.addresses(host):
                            try:
                                return await Link.open(host, address, self._port, self._contexts)
                            except LinkError as error:
                                why = str(error)
                    except NoHost as error:
                        why = str(error)
        except NoHost as error:
            why = str(error)
        except TimeoutError:
            pass
        raise LinkError(why)

    async def _ask(
        self,
        connection: Link,
        domain: str,
        method: str,
        fields: list[tuple[str, str]] | None = None,
        body: Body | None = None,
    ) -> Answer:
        answer = None
        try:
            pieces = body.pieces() if body is not None else None
            answer = await connection.request(method, fields or [], pieces)
            return answer
        finally:
            if answer is not None and connection.usable:
                self._keep(connection, domain)
            else:
                connection.close()

    # connections that wait for the next message

    def _keep(self, connection: Link, domain: str) -> None:
        timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._drop, connection)
        self._idle[connection] = domain, timer
        if len(self._idle) > MAX_IDLE:
            self._drop(next(iter(self._idle)))

    def _drop(self, connection: Link) -> None:
        _, timer = self._idle.pop(connection)
        timer.cancel()
        connection.close()

    def _take(self, domain: str) -> Link | None:
        for connection, (kept_for, timer) in reversed(self._idle.items()):
            if kept_for == domain:
                del self._idle[connection]
                timer.cancel()
                if connection.usable:
                    return connection
                connection.close()
                return None
        return None

    def close(self) -> None:
        """End all connections."""
        for connection in list(self._idle):
            self._drop(connection)


class Body:
    """The mail data of one message on its way."""

    def __init__(self, source: AsyncIterator[bytes]) -> None:
        self._source = source
        self.first = b""
        self.whole = False  # it is all in *first*

    async def begin(self) -> None:
        """Take in what decides how it is sent."""
        first = bytearray()
        async for piece in self._source:
            first += piece
            if len(first) > HOLD:
                break
        else:
            self.whole = True
        self.first = bytes(first)

    async def pieces(self) -> AsyncIterator[bytes]:
        """All of it; once only if it is not whole."""
        yield self.first
        if not self.whole:
            async for piece in self._source:
                yield piece

    async def skip(self) -> None:
        """Read what nobody wanted."""
        async for _ in self._source:
            pass


class Server:
    """The SMTP server for smtp(8)."""

    def __init__(self, client: Client, domain: str) -> None:
        """*domain* is the relay's own, for the greeting."""
        self.client = client
        self.sessions = 0
        self.name = domain

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        self.sessions += 1
        try:
            if self.sessions > MAX_SESSIONS:
                writer.write(b"421 4.3.2 too many sessions\r\n")
                return
            await _Session(self, reader, writer).run()
        except (TimeoutError, ConnectionError):
            pass
        except ProtocolError as error:
            writer.write(f"421 4.5.0 {error}\r\n".encode())
        finally:
            self.sessions -= 1
            writer.close()

    async def deliver(self, envelope: Envelope, body: Body) -> str:
        """Post one message; the SMTP reply for smtp(8)."""
        begin = time.monotonic()
        await body.begin()
        try:
            answer = await self.client.post(envelope, body)
        except LinkError as error:
            self.client.peers.learn(envelope.domain, False)
            SENT.inc("failed")
            log.warning("not sent by HTTPS: %s", error)
            return f"451 4.4.2 not sent by HTTPS: {error}"
        if answer.status == 200:
            SENT.inc("sent")
            SENT_SECONDS.observe(time.monotonic() - begin)
            log.info("sent by HTTPS")
            return "250 2.0.0 OK (HTTPS)"
        # a refusal with an SMTP reply, and what is too large, or too much, is about this message
        if not answer.smtp_code and answer.status not in (413, 429):
            self.client.peers.learn(envelope.domain, False)
        why = f"status {answer.status} {answer.smtp_code}".strip()
        SENT.inc("refused")
        log.info("refused by HTTPS: %s", why)
        return f"451 4.4.2 refused by HTTPS: {why}"


class _Session:
    """One connection of smtp(8)."""

    def __init__(
        self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._server = server
        self._reader = reader
        self._writer = writer
        self._lines = LineReader()
        self._reset()

    def _reset(self) -> None:
        self._sender: str | None = None
        self._recipients: list[str] = []
        self._domain = ""

    async def run(self) -> None:
        self._say(f"220 {self._server.name} HTTPS delivery")
        while True:
            line = self._lines.next_line()
            if line is None:
                # answers leave together: smtp(8) sends its commands together
                await self._writer.drain()
                self._lines.receive(await self._read())
                continue
            verb, _, argument = line.decode("latin-1").partition(" ")
            verb = verb.upper()
            if verb == "QUIT":
                self._say("221 2.0.0 bye")
                await self._writer.drain()
                return
            if verb == "DATA":
                await self._data()
            else:
                self._say(await self._command(verb, argument))

    async def _command(self, verb: str, argument: str) -> str:
        if verb in ("EHLO", "HELO"):
            self._reset()
            if verb == "HELO":
                return f"250 {self._server.name}"
            return f"250-{self._server.name}\r\n250-PIPELINING\r\n250-ENHANCEDSTATUSCODES\r\n250 8BITMIME"
        if verb == "RSET":
            self._reset()
            return "250 2.0.0 OK"
        if verb == "NOOP":
            return "250 2.0.0 OK"
        if verb not in ("MAIL", "RCPT"):
            return "502 5.5.1 not implemented"
        try:
            word, address = parse_path(argument)
            if word != {"MAIL": "FROM", "RCPT": "TO"}[verb]:
                raise ProtocolError("not a path")
            if address or verb == "RCPT":
                parse_address(address)
        except (ProtocolError, AddressError):
            return "450 4.1.0 not an address that HTTPS takes"
        return self._mail(address) if verb == "MAIL" else await self._rcpt(address)

    def _mail(self, address: str) -> str:
        self._reset()
        self._sender = address
        return "250 2.1.0 OK"

    async def _rcpt(self, address: str) -> str:
        domain = address.rpartition("@")[2].lower()
        if self._sender is None:
            return "503 5.5.1 MAIL first"
        if self._domain and domain != self._domain or len(self._recipients) >= MAX_RECIPIENTS:
            return "452 4.5.3 one domain at a time"
        if not await self._server.client.takes_https(domain):
            return "450 4.4.1 not known to take HTTPS"
        self._domain = domain
        self._recipients.append(address)
        return "250 2.1.5 OK"

    async def _data(self) -> None:
        if self._sender is None or not self._recipients:
            self._say("503 5.5.1 no valid recipients")
            return
        self._say("354 go ahead")
        await self._writer.drain()
        data = DataReader()
        body = Body(self._content(data))
        envelope = Envelope(self._sender, self._recipients, self._domain)
        self._reset()
        reply = await self._server.deliver(envelope, body)
        await body.skip()
        self._lines.receive(data.rest)
        self._say(reply)

    async def _content(self, data: DataReader) -> AsyncIterator[bytes]:
        received = self._lines.take_rest()
        while not data.ended:
            piece = data.receive(received or await self._read())
            received = b""
            if piece:
                yield piece

    async def _read(self) -> bytes:
        async with asyncio.timeout(SESSION_SECONDS):
            data = await self._reader.read(READ_SIZE)
        if not data:
            raise ConnectionResetError("closed by the peer")
        return data

    def _say(self, reply: str) -> None:
        self._writer.write(reply.encode("ascii", "replace") + b"\r\n")
