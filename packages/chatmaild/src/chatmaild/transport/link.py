# SPDX-License-Identifier: MIT
"""One HTTPS connection to a peer: HTTP/1.1 by h11, TLS 1.2 or newer, on asyncio's streams.

Bounded: CONNECT_SECONDS for one address, STALL_SECONDS for a piece of the body, ANSWER_SECONDS for the
answer, MAX_TEXT octets of it. An answer may come before the whole request was sent; then the rest is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import ssl
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

import h11

from chatmaild.transport.locate import Host

PATH = "/mxdeliv"
PORT = 443
CA_PATH = (
    "/etc/ssl/certs"  # a directory: OpenSSL reads what it needs, which saves the memory of all
)
CONNECT_SECONDS = 5.0
STALL_SECONDS = 30.0
ANSWER_SECONDS = 60.0  # as the reference system waits
MAX_TEXT = 2048  # octets of an answer's body
READ_SIZE = 1 << 14

_SMTP_CODE = re.compile(r"[45][0-9][0-9](?= |\Z)")


class LinkError(Exception):
    """No answer; the text is fit for the log. The peer may have got the request all the same."""


class Answer(NamedTuple):
    """The status, and the beginning of the body."""

    status: int
    text: str

    @property
    def smtp_code(self) -> str:
        """The code of the SMTP reply in the text, "" if there is none."""
        match = _SMTP_CODE.match(self.text)
        return match[0] if match else ""


class Contexts:
    """The two ways to look at a peer's certificate."""

    def __init__(self, ca_path: str = CA_PATH) -> None:
        """*ca_path* is a directory as openssl-rehash(1) makes it, or a file of certificates."""
        self._verifying = _context()
        self._verifying.load_verify_locations(
            **{"cafile" if os.path.isfile(ca_path) else "capath": ca_path}
        )
        self._trusting = _context()
        self._trusting.check_hostname = False
        self._trusting.verify_mode = ssl.CERT_NONE

    def for_host(self, host: Host) -> ssl.SSLContext:
        """The context for a connection to *host*."""
        return self._verifying if host.verify else self._trusting


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


class Link:
    """An open connection; one request at a time."""

    def __init__(
        self, host: Host, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.host = host
        self.used = False  # has had an answer: the peer may close it at any time
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.CLIENT)

    @classmethod
    async def open(cls, host: Host, address: str, port: int, contexts: Contexts) -> Link:
        """Connect to *host* at *address*. Raises LinkError."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(
                    address,
                    port,
                    ssl=contexts.for_host(host),
                    server_hostname=host.name,
                    ssl_shutdown_timeout=1.0,
                )
        except TimeoutError:
            raise LinkError("no connection in time") from None
        except ssl.SSLCertVerificationError as error:
            raise LinkError(f"certificate: {error.verify_message}") from None
        except OSError as error:
            # not asyncio's own words, which name the address
            why = os.strerror(error.errno) if error.errno else type(error).__name__
            raise LinkError(f"no connection: {why}") from None
        return cls(host, reader, writer)

    @property
    def usable(self) -> bool:
        """Whether it may take another request."""
        return (
            self._http.our_state is h11.IDLE
            and not self._reader.at_eof()
            and not self._writer.is_closing()
        )

    def close(self) -> None:
        """End it."""
        self._writer.close()

    async def request(
        self,
        method: str,
        fields: Sequence[tuple[str, str]] = (),
        body: AsyncIterator[bytes] | None = None,
    ) -> Answer:
        """Send a request for PATH and return the answer. Raises LinkError."""
        name = f"[{self.host.name}]" if ":" in self.host.name else self.host.name
        head = [("Host", name), ("User-Agent", "chatmail-relay"), *fields]
        answer = asyncio.ensure_future(self._answer())
        try:
            # whoever stops reading may have answered before
            if await self._send(h11.Request(method=method, target=PATH, headers=head)):
                if body is not None:
                    async for piece in body:
                        if answer.done() or not await self._send(h11.Data(data=piece)):
                            break
                if not answer.done():
                    await self._send(h11.EndOfMessage())
            found = await asyncio.wait_for(answer, ANSWER_SECONDS)
        except TimeoutError:
            raise LinkError("no answer in time") from None
        except h11.ProtocolError:
            raise LinkError("no HTTP") from None
        finally:
            answer.cancel()
        if found is None:
            raise LinkError("connection lost")
        self.used = True
        with contextlib.suppress(h11.ProtocolError):
            self._http.start_next_cycle()
        return found

    async def _send(self, event: h11.Event) -> bool:
        """Send a part of the request; False if the connection is lost. Raises LinkError."""
        data = self._http.send(event)
        if not data:
            return True
        try:
            self._writer.write(data)
            async with asyncio.timeout(STALL_SECONDS):
                await self._writer.drain()
        except TimeoutError:
            raise LinkError("the peer stopped reading") from None
        except OSError:
            return False
        return True

    async def _answer(self) -> Answer | None:
        """The answer, None if the connection is lost before there is one."""
        status, text = 0, b""
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                try:
                    data = await self._reader.read(READ_SIZE)
                except OSError:
                    return None
                if not data and not status:
                    return None
                self._http.receive_data(data)
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                text += bytes(event.data)
                if len(text) > MAX_TEXT:  # the rest is not worth waiting for
                    self.close()
                    break
            elif not isinstance(event, h11.InformationalResponse):
                break
        return Answer(status, text[:MAX_TEXT].decode("latin-1").strip())
