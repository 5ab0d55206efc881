# SPDX-License-Identifier: MIT
"""POST /new: a fresh address and password, as JSON. Nothing is created until their first login.

What Delta Chat does with a "DCACCOUNT:https://DOMAIN/new" code. It posts an empty body, wants 200
with "email" and "password", and shows the "reason" of any other answer to its user. A browser that
follows the printed link comes with GET and is sent into the app, by a redirect to "dcaccount:".
A relay with a self-signed certificate can not be reached by such a code: there both methods answer
with JSON, and "dclogin_url" is a code that holds everything and accepts the certificate.

Refuses what a login would refuse (chatmail-nocreate, a busy or full machine), while there is still
somebody to read the reason.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import string
from http import HTTPStatus
from typing import Protocol
from urllib.parse import quote

from chatmaild.config import Config
from chatmaild.http1 import BadRequest, Request, RequestReader, Response
from chatmaild.users import MailStore

PATHS = ("/new", "/cgi-bin/newemail.py")  # the second is on old printed codes
READ_SIZE = 4096
MAX_CONNECTIONS = 512
REQUEST_SECONDS = 10.0  # from the first byte of a request to its last
IDLE_SECONDS = 65.0  # a little more than nginx' keepalive_timeout to upstreams

_USERNAME = string.ascii_lowercase + string.digits
_PASSWORD = string.ascii_letters + string.digits + string.punctuation
_TRIES = 16


class Gate(Protocol):
    """Says whether the relay takes new accounts at all (doveauth.Policy)."""

    def check_open(self) -> None:
        """Raise if the admin closed it; the text is for the user."""

    def check_machine(self) -> None:
        """Raise if the machine is at its limits; the text is for the user."""


class NewEmail:
    """Makes up accounts and answers requests for them."""

    def __init__(self, config: Config, gate: Gate, store: MailStore) -> None:
        self.config = config
        self.gate = gate
        self.store = store

    def respond(self, request: Request) -> Response:
        """The answer to a request."""
        if request.path not in PATHS:
            return _error(HTTPStatus.NOT_FOUND, "there is nothing here")
        if request.method == "POST" or self._self_signed and request.method in ("GET", "HEAD"):
            return self._account()
        if request.method in ("GET", "HEAD"):
            link = f"dcaccount:https://{self.config.mail_domain}/new"
            return Response(HTTPStatus.MOVED_PERMANENTLY, [("Location", link)])
        response = _error(HTTPStatus.METHOD_NOT_ALLOWED, "use POST")
        response.headers.append(("Allow", "GET, HEAD, POST"))
        return response

    @property
    def _self_signed(self) -> bool:
        return self.config.tls == "self"

    def _account(self) -> Response:
        try:
            self.gate.check_open()
        except Exception:
            return _error(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "this relay does not take new accounts at the moment",
            )
        try:
            self.gate.check_machine()
        except Exception:
            return _error(
                HTTPStatus.SERVICE_UNAVAILABLE, "this relay is too busy for new accounts, try later"
            )
        address = self._free_address()
        if address is None:
            return _error(HTTPStatus.SERVICE_UNAVAILABLE, "no free address found, try again")
        password = "".join(
            secrets.choice(_PASSWORD) for _ in range(self.config.password_min_length + 3)
        )
        account = {"email": address, "password": password}
        if self._self_signed:
            account["dclogin_url"] = login_url(address, password)
        return _json(HTTPStatus.OK, account)

    def _free_address(self) -> str | None:
        """An address nobody has; None if there is hardly any left (very short names)."""
        for _ in range(_TRIES):
            user = "".join(
                secrets.choice(_USERNAME) for _ in range(self.config.username_max_length)
            )
            address = f"{user}@{self.config.mail_domain}"
            if not self.store.mailbox_path(address).exists():
                return address
        return None


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
                        response = self.service.respond(request)
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
