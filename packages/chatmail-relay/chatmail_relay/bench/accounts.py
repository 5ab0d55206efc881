# SPDX-License-Identifier: MIT
"""Logins by IMAP on 993, each with a TLS connection of its own, and requests for /new on 443."""

from __future__ import annotations

import contextlib
import imaplib
import time
from collections.abc import Iterable

from ..selftest import web
from ..selftest.accounts import Account
from ..selftest.net import ask, http_connection
from ..selftest.report import Wrong
from .frame import Bench, Measurement, Round
from .limits import SETTINGS, Allowance, limited, refusals, refused

# of a round; five rounds of new addresses and of /new are below the usual 60 of an hour
LOGINS, NEW_ADDRESSES, REQUESTS = 20, 5, 5
#: What the web server takes of one client for /new while the certificate is self-signed.
WEB_INTERVAL, WEB_BURST = 0.5, 5


def _rate(accounts: Iterable[Account]) -> float:
    """Log in and out, one account after the other; how many of that in a second."""
    begin = time.monotonic()
    number = 0
    for account in accounts:
        account.login().logout()
        number += 1
    return number / (time.monotonic() - begin)


def _existing(bench: Bench) -> Round:
    account = bench.accounts.by_root()
    _rate([account])  # the first login makes the mailbox's folders
    return lambda: {"existing address": [_rate([account] * LOGINS)]}


def _first(bench: Bench) -> Round:
    _must_be_open(bench)
    before = refusals()

    def measure() -> dict[str, list[float]]:
        accounts = [bench.accounts.by_first_login() for _ in range(NEW_ADDRESSES)]
        try:
            return {"new address": [_rate(accounts)]}
        except imaplib.IMAP4.abort:
            raise
        except imaplib.IMAP4.error as error:
            raise refused(before, bench.relay.config) from error

    return measure


def _new(bench: Bench) -> Round:
    _must_be_open(bench)
    allowance = Allowance(WEB_INTERVAL, WEB_BURST)
    path = web.new_path(bench.accounts.token())

    def measure() -> dict[str, list[float]]:
        time.sleep(allowance.wait(REQUESTS, time.monotonic()))
        with contextlib.closing(http_connection(bench.target, 443)) as connection:
            begin = time.monotonic()
            for _ in range(REQUESTS):
                answer = ask(connection, bench.target, path, "POST")
                allowance.take(time.monotonic())
                if answer.status == 429 and answer.kind == "application/json":
                    raise limited(SETTINGS["source"], bench.relay.config)
                if answer.status == 429:
                    raise Wrong("limited by the web server", "try again in a minute")
                web.made_up(answer, bench.target.domain)
            seconds = time.monotonic() - begin
        return {"one after the other": [REQUESTS / seconds]}

    return measure


def _must_be_open(bench: Bench) -> None:
    if bench.relay.config.registration == "closed":
        raise Wrong("registration is closed")


MEASUREMENTS = (
    Measurement("logins", {"existing address": "logins/s"}, _existing),
    Measurement("logins", {"new address": "logins/s"}, _first),
    Measurement("new", {"one after the other": "requests/s"}, _new),
)
