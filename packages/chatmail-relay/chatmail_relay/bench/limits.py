# SPDX-License-Identifier: MIT
"""The relay's own limits: how to keep within them, and which of them it was that refused.

Nothing here asks for an exception. How much one address may send is counted along with the relay, and
waited for; what new addresses are refused for is looked up in the relay's own metrics.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from http import client as http_client

from chatmaild.config import Config

from ..selftest.accounts import NOT_NOW, Account, Accounts
from ..selftest.net import LOOPBACK, STEP_SECONDS
from ..selftest.report import Wrong, describe

MOST_SENDERS = 10
METRICS_PORT = 3905  # chatmail-metrics.socket
METRICS_MAX = 1 << 20  # octets
SETTINGS = {
    "source": "max_new_addresses_per_hour",
    "load": "max_load_1m",
    "memory": "min_available_memory",
    "disk": "min_free_disk_space",
}
_REFUSED = re.compile(r'^chatmail_accounts_refused_total\{reason="(\w+)"\} (\d+)', re.MULTILINE)
_ROUNDING = 1e-6  # seconds


class Allowance:
    """What a limiter lets pass, *burst* at once and then one each *interval* seconds.

    Counts as chatmaild.filtermail.limiter does, a little later than the relay and so never too little.
    """

    def __init__(self, interval: float, burst: int) -> None:
        self._interval = interval
        self.burst = burst
        self._full_at = 0.0

    def wait(self, count: int, now: float) -> float:
        """Seconds from *now*, of a monotonic clock, until *count* may come at once; at most *burst*."""
        assert count <= self.burst
        full_at = max(self._full_at, now) + self._interval * count
        seconds = full_at - now - self._interval * self.burst
        return seconds if seconds > _ROUNDING else 0.0

    def take(self, now: float) -> None:
        """Count one that came at *now*."""
        self._full_at = max(self._full_at, now) + self._interval


class Sender:
    """An account, and what it may send."""

    def __init__(self, account: Account, config: Config) -> None:
        self.account = account
        self.allowance = Allowance(
            60 / config.max_user_send_per_minute, config.max_user_send_burst_size
        )


class Senders:
    """Accounts that send: a new one while there are few, else the one that may do so first."""

    def __init__(self, accounts: Accounts, config: Config) -> None:
        self._accounts = accounts
        self._config = config
        self._senders: list[Sender] = []

    def shares(self, messages: int) -> Iterator[tuple[Sender, int]]:
        """Who sends how many at once, together *messages*; may wait before each."""
        while messages:
            count = min(messages, self._config.max_user_send_burst_size)
            yield self._ready(count), count
            messages -= count

    def _ready(self, count: int) -> Sender:
        now = time.monotonic()
        waits = [sender.allowance.wait(count, now) for sender in self._senders]
        least = min(waits, default=0.0)
        if waits and (not least or len(waits) == MOST_SENDERS):
            time.sleep(least)
            return self._senders[waits.index(least)]
        self._senders.append(Sender(self._accounts.by_root(), self._config))
        return self._senders[-1]


def refusals() -> dict[str, int]:
    """How many new addresses the relay has refused since it started, by reason. Raises Wrong."""
    connection = http_client.HTTPConnection(LOOPBACK[0], METRICS_PORT, timeout=STEP_SECONDS)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read(METRICS_MAX).decode("utf-8", "replace")
        except (OSError, http_client.HTTPException) as error:
            text = f"the metrics on port {METRICS_PORT} cannot be read: {describe(error)}"
            raise Wrong(text, "see systemctl status chatmail-metrics.socket") from error
    return {reason: int(count) for reason, count in _REFUSED.findall(text)}


def refused(before: Mapping[str, int], config: Config) -> Wrong:
    """Why the relay refuses a new address now, by what it counts since *before*."""
    risen = [reason for reason, count in refusals().items() if count > before.get(reason, 0)]
    known = [reason for reason in risen if reason in SETTINGS]
    return limited(SETTINGS[known[0]], config) if known else Wrong("refused", NOT_NOW)


def limited(setting: str, config: Config) -> Wrong:
    """What is raised when the relay's limit *setting* has put an end to a measurement."""
    remedy = "try again in an hour" if setting == SETTINGS["source"] else "try again later"
    return Wrong(f"limited by {setting} = {getattr(config, setting)}", remedy)
