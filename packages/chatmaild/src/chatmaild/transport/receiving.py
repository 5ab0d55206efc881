# SPDX-License-Identifier: MIT
"""From nginx' /mxdeliv to a smtpd(8) of our own Postfix, which judges as on port 25.

One request a connection. The body passes through: an SMTP transaction is opened when the head is read,
so that a refused recipient costs no body in memory, and what Postfix says at the end is the answer. The
smtpd is told the address of the peer by PROXY protocol, for the rule about address literals.

    200  "250 OK"                          405  not POST
    400  the SMTP reply that refused it    413  "552 Message exceeds maximum size"
    429  this peer has too much            503  our Postfix does not answer

as the reference system says them; whoever is told anything but 200 comes again by SMTP.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import NamedTuple

import h11

from chatmaild import metrics
from chatmaild.filtermail.address import AddressError, parse_address, parse_ip
from chatmaild.transport.limits import Exceeded, Limits
from chatmaild.transport.link import PATH
from chatmaild.transport.smtp import BodyCheck, ProtocolError, Reply, ReplyReader

SMTPD = ("127.0.0.1", 10026)
CLIENT_FIELD = b"x-real-ip"  # nginx sets it, whatever the peer said
MAX_HEAD = 32 << 10  # octets, as nginx' large_client_header_buffers
MAX_RECIPIENTS = 1000
READ_SIZE = 64 << 10
STALL_SECONDS = 60.0  # without an octet of the peer, or a word of smtpd(8)
VERDICT_SECONDS = 310.0  # milter_content_timeout, and a little
TOTAL_SECONDS = 900.0  # for one request

RECEIVED = metrics.Counter(
    "chatmail_https_received", "Messages that other relays offered by HTTPS.", ("result",)
)

log = logging.getLogger("transport")

Deliver = Callable[[h11.Request, AsyncIterator[bytes]], Awaitable[None]]


class Refused(Exception):
    """The request gets this answer; *result* is the short form for log and statistics."""

    def __init__(self, status: HTTPStatus, text: str, result: str) -> None:
        super().__init__(text)
        self.status = status
        self.result = result


TOO_LARGE = (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "552 Message exceeds maximum size", "too large")
UNAVAILABLE = (HTTPStatus.SERVICE_UNAVAILABLE, "451 4.3.0 Temporary failure", "unavailable")


class Head(NamedTuple):
    """What the head of a request says."""

    client: str  # an IP address
    sender: str
    recipients: list[str]
    length: int | None  # of the body, if it is announced


def parse_head(request: h11.Request, max_size: int) -> Head:
    """Understand a request; raises Refused. Addresses are plain ones, and in lower case."""
    path = request.target.partition(b"?")[0]
    if path != PATH.encode() and not path.startswith(PATH.encode() + b"/"):
        raise Refused(HTTPStatus.NOT_FOUND, "Not Found", "not found")
    if request.method != b"POST":
        raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, "Method Not Allowed", "asked")
    client, senders, recipients, length = "", [], [], None
    for name, value in request.headers:
        if name == CLIENT_FIELD:
            client = value.decode("latin-1")
        elif name == b"x-mail-from":
            senders.append(value.decode("latin-1"))
        elif name == b"x-mail-to":
            recipients.append(value.decode("latin-1"))
        elif name == b"content-length":
            length = int(value)
    if length is not None and length > max_size:
        raise Refused(*TOO_LARGE)
    if parse_ip(client) is None:
        raise Refused(*UNAVAILABLE)
    if not recipients or len(recipients) > MAX_RECIPIENTS:
        text = "452 4.5.3 Too many recipients" if recipients else "554 5.5.1 No valid recipients"
        raise Refused(HTTPStatus.BAD_REQUEST, text, "recipients")
    try:
        sender = parse_address(senders[0]) if senders and senders[0] else ""
        if len(senders) > 1:
            raise AddressError("two senders")
    except AddressError:
        raise Refused(
            HTTPStatus.BAD_REQUEST, "501 5.1.7 Bad sender address syntax", "bad address"
        ) from None
    try:
        parsed = [parse_address(recipient) for recipient in recipients]
    except AddressError:
        raise Refused(
            HTTPStatus.BAD_REQUEST, "501 5.1.3 Bad recipient address syntax", "bad address"
        ) from None
    return Head(client, sender, parsed, length)


def proxy_line(client: str) -> bytes:
    """The PROXY protocol header, version 1, that names *client*, an IP address."""
    ip = ipaddress.ip_address(client)
    mapped = getattr(ip, "ipv4_mapped", None)
    if ip.version == 4 or mapped is not None:
        return f"PROXY TCP4 {mapped or ip} 127.0.0.1 443 25\r\n".encode()
    return f"PROXY TCP6 {ip} ::1 443 25\r\n".encode()


class Smtpd:
    """A session with smtpd(8), for one message."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._replies = ReplyReader()

    @classmethod
    async def open(cls, address: tuple[str, int], head: Head) -> Smtpd:
        """Up to the 354 for the message of *head*. Raises Refused."""
        try:
            async with asyncio.timeout(STALL_SECONDS):
                reader, writer = await asyncio.open_connection(*address)
        except OSError:
            raise Refused(*UNAVAILABLE) from None
        session = cls(reader, writer)
        try:
            writer.write(proxy_line(head.client))
            await session.expect(220)
            writer.write(b"EHLO [127.0.0.1]\r\n")
            await session.expect(250)
            size = f" SIZE={head.length}" if head.length else ""
            commands = [f"MAIL FROM:<{head.sender}>{size}"]
            commands += [f"RCPT TO:<{recipient}>" for recipient in head.recipients]
            writer.write("".join(f"{line}\r\n" for line in commands).encode("ascii"))
            for _ in commands:
                await session.expect(250)
            writer.write(b"DATA\r\n")
            await session.expect(354)
        except BaseException:
            session.close()
            raise
        return session

    async def expect(self, code: int, seconds: float = STALL_SECONDS) -> Reply:
        """The next reply, which must have *code*. Raises Refused."""
        try:
            async with asyncio.timeout(seconds):
                await self._writer.drain()
                while (reply := self._replies.next_reply()) is None:
                    data = await self._reader.read(READ_SIZE)
                    if not data:
                        raise ConnectionResetError
                    self._replies.receive(data)
        except (OSError, ProtocolError):  # TimeoutError is an OSError
            raise Refused(*UNAVAILABLE) from None
        if reply.code == code:
            return reply
        if reply.code == 552:
            raise Refused(*TOO_LARGE)
        if reply.code < 400:
            raise Refused(*UNAVAILABLE)
        # of ours only the code is counted: the text may have an address
        raise Refused(HTTPStatus.BAD_REQUEST, str(reply), f"reply {reply.code}")

    async def write(self, data: bytes) -> None:
        """Send mail data. Raises Refused."""
        try:
            self._writer.write(data)
            async with asyncio.timeout(STALL_SECONDS):
                await self._writer.drain()
        except OSError:
            raise Refused(*UNAVAILABLE) from None

    def quit(self) -> None:
        """The message is there."""
        self._writer.write(b"QUIT\r\n")
        self._writer.close()

    def close(self) -> None:
        """End it; a message whose end was not sent is thrown away."""
        self._writer.transport.abort()


class Server:
    """The HTTP server for nginx."""

    def __init__(
        self, max_size: int, limits: Limits | None = None, smtpd: tuple[str, int] = SMTPD
    ) -> None:
        """*max_size* is the largest message, octets."""
        self.requests = 0
        self._max_size = max_size
        self._limits = limits or Limits()
        self._smtpd = smtpd

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        self.requests += 1
        try:
            async with asyncio.timeout(TOTAL_SECONDS):
                await _Exchange(reader, writer).run(self.deliver)
        except (TimeoutError, ConnectionError):
            pass
        finally:
            self.requests -= 1
            writer.close()

    async def deliver(self, request: h11.Request, body: AsyncIterator[bytes]) -> None:
        """Hand a message over to Postfix; raises Refused if it does not take it."""
        head = parse_head(request, self._max_size)
        try:
            with self._limits.request(head.client, time.monotonic()):
                await self._hand_over(head, body)
        except Exceeded as error:
            raise Refused(
                HTTPStatus.TOO_MANY_REQUESTS, "450 4.7.1 Too much mail", f"too many {error}"
            ) from None

    async def _hand_over(self, head: Head, body: AsyncIterator[bytes]) -> None:
        session = await Smtpd.open(self._smtpd, head)
        try:
            check = BodyCheck()
            async for piece in body:
                if check.size + len(piece) > self._max_size:
                    raise Refused(*TOO_LARGE)
                if not check.receive(piece):
                    raise Refused(HTTPStatus.BAD_REQUEST, "500 Invalid DATA", "invalid data")
                await session.write(piece)
            if not check.end():
                raise Refused(HTTPStatus.BAD_REQUEST, "500 Invalid DATA", "invalid data")
            await session.write(b".\r\n")
            await session.expect(250, VERDICT_SECONDS)
        except BaseException:
            session.close()
            raise
        session.quit()


class _Exchange:
    """One request and its answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self._is_head = False

    async def run(self, deliver: Deliver) -> None:
        status, text = HTTPStatus.OK, "250 OK"
        try:
            request = await self._event()
            if not isinstance(request, h11.Request):
                return
            self._is_head = request.method == b"HEAD"
            body = self._body()
            try:
                await deliver(request, body)
                log.info("received by HTTPS")
                RECEIVED.inc("accepted")
            except Refused as refused:
                status, text = refused.status, str(refused)
                log.info("not received by HTTPS: %s", refused.result)
                RECEIVED.inc(refused.result)
                async for _ in body:  # nginx listens when it has sent everything
                    pass
        except h11.RemoteProtocolError as error:
            status = HTTPStatus(error.error_status_hint)
            text = status.phrase
            RECEIVED.inc("no HTTP")
        await self._answer(status, text)

    async def _event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            async with asyncio.timeout(STALL_SECONDS):
                data = await self._reader.read(READ_SIZE)
            self._http.receive_data(data)
            if not data and self._http.their_state is h11.IDLE:
                raise ConnectionResetError
        return event

    async def _body(self) -> AsyncIterator[bytes]:
        while isinstance(event := await self._event(), h11.Data):
            yield bytes(event.data)

    async def _answer(self, status: HTTPStatus, text: str) -> None:
        body = text.encode("latin-1", "replace")
        fields = [
            ("Content-Type", "text/plain"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            fields.append(("Allow", "POST"))
        if self._http.our_state is h11.ERROR:
            return
        parts: list[h11.Event] = [
            h11.Response(status_code=status, headers=fields, reason=status.phrase)
        ]
        if not self._is_head:
            parts.append(h11.Data(data=body))
        parts.append(h11.EndOfMessage())
        self._writer.write(b"".join(self._http.send(part) or b"" for part in parts))
        await self._writer.drain()
