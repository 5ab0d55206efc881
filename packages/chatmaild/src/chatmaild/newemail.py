# SPDX-License-Identifier: MIT
"""POST /new: a fresh address and password, as JSON. Nothing is created until their first login.

What Delta Chat does with a "dcaccount:https://DOMAIN/new" code. It posts an empty body, wants 200
with "email" and "password", and shows the "reason" of any other answer to its user. A browser that
follows the printed link comes with GET and is sent into the app, by a redirect to "dcaccount:".
With a self-signed certificate only new clients take such a code, and only if the domain begins with
an underscore: there both methods answer with JSON, and "dclogin_url" is a code for all clients, which
holds everything and accepts the certificate.

With `registration = token` the query must have a token (see tokens): `/new?token=...`; the answer
may be created within an hour, and a browser is sent into the app with the token.

GET /invite: the same for people, a page with QR code and button. Its frame is one of the relay's web
pages, rendered by chatmail-relay.

Refuses what a login would refuse (closed, a busy or full machine, too many new addresses for one
source), while there is still somebody to read the reason.
"""

from __future__ import annotations

import asyncio
import html
import json
import logging
import math
import secrets
import string
import time
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qs, quote

from chatmaild import qr
from chatmaild.config import Config
from chatmaild.http1 import BadRequest, Request, RequestReader, Response
from chatmaild.invite import invite as invite  # for the web pages
from chatmaild.invite import new_url
from chatmaild.sources import SourceLimiter
from chatmaild.tokens import Invalid, TokenStore
from chatmaild.users import MailStore

PATHS = ("/new", "/cgi-bin/newemail.py")  # the second is on old printed codes
CLIENT_FIELD = "x-real-ip"  # the web server in front sets it, whatever the client said
INVITE_PATHS = ("/invite", "/invite.html")
INVITE_PAGE = Path("/var/lib/chatmail/www/invite.html")
INVITE_MARK = "@INVITE@"  # stands in the page for the code as text, and QR_MARK for the picture
QR_MARK = "@QR@"
READ_SIZE = 4096
MAX_CONNECTIONS = 512
MAX_REQUESTS_IN_DISK = 4  # threads that wait for the disk
MAX_FIELDS = 8  # of the query
REQUEST_SECONDS = 10.0  # from the first byte of a request to its last
IDLE_SECONDS = 65.0  # a little more than nginx' keepalive_timeout to upstreams
MACHINE_SECONDS = 0.5  # how long it is known whether the machine is at its limits

_USERNAME = string.ascii_lowercase + string.digits
_PASSWORD = string.ascii_letters + string.digits + string.punctuation
_TRIES = 16

log = logging.getLogger("newemail")


class Gate(Protocol):
    """Says whether the relay takes new accounts at all (doveauth.Policy)."""

    def check_open(self) -> None:
        """Raise if the admin closed it; the text is for the user."""

    def check_machine(self) -> None:
        """Raise if the machine is at its limits; the text is for the user."""


class NewEmail:
    """Makes up accounts and answers requests for them; safe to call from several threads."""

    def __init__(self, config: Config, gate: Gate, store: MailStore, tokens: TokenStore) -> None:
        self.config = config
        self.gate = gate
        self.store = store
        self.tokens = tokens
        self.sources = SourceLimiter(config.max_new_addresses_per_hour)
        self._machine = -math.inf, True  # until when it is known whether it takes accounts

    def is_quick(self, request: Request) -> bool:
        """Whether the answer needs no file: the only look at the disk is for a name that nobody has."""
        return (
            request.method == "POST"
            and request.path in PATHS
            and self.config.registration != "token"
        )

    def respond(self, request: Request) -> Response:
        """The answer to a request. Blocks for the disk; never raises."""
        if request.path not in PATHS + INVITE_PATHS:
            return _error(HTTPStatus.NOT_FOUND, "there is nothing here")
        try:
            token = _token(request.query)
            reading = request.method in ("GET", "HEAD")
            if reading and request.path in INVITE_PATHS:
                return self._page(token, request.fields.get(CLIENT_FIELD, ""))
            if request.method == "POST" or self._self_signed and reading:
                return self._account(token, request.fields.get(CLIENT_FIELD, ""))
            if reading:
                return self._redirect(token)
        except ValueError:
            return _error(HTTPStatus.BAD_REQUEST, "malformed query")
        except Exception as error:
            # no traceback and no text: both may hold the token
            log.error("cannot make up an account: %s", type(error).__name__)
            return _error(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error, try again")
        response = _error(HTTPStatus.METHOD_NOT_ALLOWED, "use POST")
        response.headers.append(("Allow", "GET, HEAD, POST"))
        return response

    @property
    def _self_signed(self) -> bool:
        return self.config.tls == "self"

    def _redirect(self, token: str) -> Response:
        link = f"dcaccount:{new_url(self.config, quote(token, safe=''))}"
        headers = [("Location", link), ("Cache-Control", "no-store")]
        return Response(HTTPStatus.MOVED_PERMANENTLY, headers)

    def _page(self, token: str, client: str) -> Response:
        """The page of an invitation; with a self-signed certificate each view is a new address."""
        if self._self_signed:
            account = self._account(token, client)
            if account.status != HTTPStatus.OK:
                return account
            code = json.loads(account.body)["dclogin_url"]
        else:
            if self.config.registration == "token":
                try:
                    self.tokens.check(token, time.time())
                except Invalid as error:
                    return _error(HTTPStatus.FORBIDDEN, str(error))
            code = invite(self.config, quote(token, safe=""))
            if not code:
                return _error(HTTPStatus.FORBIDDEN, "this relay takes no new accounts")
        page = INVITE_PAGE.read_text(encoding="utf-8")
        page = page.replace(QR_MARK, qr.svg(code)).replace(INVITE_MARK, html.escape(code))
        headers = [("Content-Type", "text/html; charset=utf-8"), ("Cache-Control", "no-store")]
        return Response(HTTPStatus.OK, headers, page.encode())

    def _account(self, token: str, client: str) -> Response:
        try:
            self.gate.check_open()
        except Exception:
            return _error(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "this relay does not take new accounts at the moment",
            )
        if not self._machine_is_well():
            return _error(
                HTTPStatus.SERVICE_UNAVAILABLE, "this relay is too busy for new accounts, try later"
            )
        by_token = self.config.registration == "token"
        if by_token and not token:
            return _error(HTTPStatus.FORBIDDEN, "this relay takes new accounts by invitation only")
        if not self.sources.take(client, time.monotonic()):
            return _error(
                HTTPStatus.TOO_MANY_REQUESTS,
                "too many new accounts from your network, try again in an hour",
            )
        address = self._free_address()
        if address is None:
            return _error(HTTPStatus.SERVICE_UNAVAILABLE, "no free address found, try again")
        password = random_text(_PASSWORD, self.config.password_min_length + 3)
        if by_token:
            try:
                self.tokens.reserve(token, address, password, time.time())
            except Invalid as error:
                self.sources.give_back(client)
                return _error(HTTPStatus.FORBIDDEN, str(error))
        account = {"email": address, "password": password}
        if self._self_signed:
            account["dclogin_url"] = login_url(address, password)
        return _json(HTTPStatus.OK, account)

    def _machine_is_well(self) -> bool:
        now = time.monotonic()
        until, well = self._machine
        if now >= until:
            try:
                self.gate.check_machine()
                well = True
            except Exception:
                well = False
            self._machine = now + MACHINE_SECONDS, well
        return well

    def _free_address(self) -> str | None:
        """An address nobody has; None if there is hardly any left (very short names)."""
        for _ in range(_TRIES):
            user = random_text(_USERNAME, self.config.username_max_length)
            address = f"{user}@{self.config.mail_domain}"
            if not self.store.mailbox_path(address).exists():
                return address
        return None


def random_text(alphabet: str, length: int) -> str:
    """Characters of *alphabet* (at most 256), each as likely as any other, from the system's generator."""
    size = len(alphabet)
    fair = 256 - 256 % size  # an octet beyond would favour the first ones
    text = ""
    while len(text) < length:
        octets = secrets.token_bytes(2 * length)
        text += "".join(alphabet[octet % size] for octet in octets if octet < fair)
    return text[:length]


def _token(query: str) -> str:
    """The token of a query, "" without one; raises ValueError for what is no query."""
    return parse_qs(query, max_num_fields=MAX_FIELDS).get("token", [""])[0]


def login_url(address: str, password: str) -> str:
    """The "dclogin:" code of an account on a relay with a self-signed certificate (ic=3)."""
    domain = address.partition("@")[2]
    hosts = ""
    if domain.startswith("["):  # no name to guess hosts from
        host = domain.strip("[]")
        hosts = f"&ih={host}&sh={host}"
    return f"dclogin:{address}?p={quote(password, safe='')}&v=1{hosts}&ic=3"


def _json(status: HTTPStatus, value: dict[str, str]) -> Response:
    headers = [("Content-Type", "application/json"), ("Cache-Control", "no-store")]
    return Response(status, headers, json.dumps(value).encode("ascii") + b"\n")


def _error(status: HTTPStatus, reason: str) -> Response:
    return _json(status, {"reason": reason})


class Server:
    """The asyncio shell of the socket `new`."""

    def __init__(self, service: NewEmail) -> None:
        self.service = service
        self.connections = 0
        self.executor = ThreadPoolExecutor(MAX_REQUESTS_IN_DISK, thread_name_prefix="new")

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection of nginx to its end."""
        self.connections += 1
        try:
            if self.connections > MAX_CONNECTIONS:
                busy = _error(HTTPStatus.SERVICE_UNAVAILABLE, "this relay is too busy, try later")
                writer.write(busy.render(keep_alive=False))
                return
            await self._serve(reader, writer)
        except (TimeoutError, ConnectionError):
            pass
        finally:
            self.connections -= 1
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests = RequestReader()
        loop = asyncio.get_running_loop()
        while True:
            async with asyncio.timeout(IDLE_SECONDS):
                requests.receive(await _some(reader))
            async with asyncio.timeout(REQUEST_SECONDS):
                while True:
                    try:
                        request = requests.next()
                    except BadRequest as error:
                        response = _error(error.status, str(error))
                        writer.write(response.render(keep_alive=False))
                        return
                    if request is not None:
                        if self.service.is_quick(request):  # quicker than a thread takes it up
                            response = self.service.respond(request)
                        else:
                            response = await loop.run_in_executor(
                                self.executor, self.service.respond, request
                            )
                        writer.write(
                            response.render(
                                keep_alive=request.keep_alive, with_body=request.method != "HEAD"
                            )
                        )
                        await writer.drain()
                        if not request.keep_alive:
                            return
                    elif requests.idle:
                        break
                    else:
                        requests.receive(await _some(reader))


async def _some(reader: asyncio.StreamReader) -> bytes:
    data = await reader.read(READ_SIZE)
    if not data:
        raise ConnectionResetError("closed by the peer")
    return data
