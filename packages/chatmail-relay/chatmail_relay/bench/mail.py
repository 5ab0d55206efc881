# SPDX-License-Identifier: MIT
"""Messages from one throw-away account to another, by submission on 465 and IMAP on 993.

They are about 1 kB and, like all that passes the filter, look encrypted. Addresses that send change before
the limit on what one may send is reached.
"""

from __future__ import annotations

import contextlib
import time

from ..selftest import message
from ..selftest.command import DELIVERY
from ..selftest.mail import DELIVERY_SECONDS, Idle, send
from ..selftest.net import Imap, Smtp
from ..selftest.report import Wrong
from . import usage
from .frame import Bench, Measurement, Round
from .limits import Sender

LOOK_SECONDS = 1.0  # between two IDLE


def _submit(session: Smtp, sender: Sender, recipient: str) -> None:
    """One message; raises Wrong if it is not taken."""
    _name, text = message.encrypted(sender.account.address, recipient)
    code, said = send(session, sender.account.address, recipient, text)
    sender.allowance.take(time.monotonic())
    if code != 250:
        raise Wrong(f"a message is refused: {code} {said}")


def _late() -> Wrong:
    return Wrong(f"a message is not there after {DELIVERY_SECONDS:.0f} s", DELIVERY)


def _delivery(bench: Bench) -> Round:
    recipient = bench.accounts.by_root()

    def measure() -> dict[str, list[float]]:
        waited = []
        inbox = recipient.imap()
        try:
            for sender, count in bench.senders.shares(bench.messages):
                with contextlib.closing(sender.account.smtp()) as session:
                    for _ in range(count):
                        waiting = Idle(inbox)
                        _submit(session, sender, recipient.address)
                        accepted = time.monotonic()
                        if not waiting.for_mail(DELIVERY_SECONDS):
                            raise _late()
                        waited.append(1000 * (time.monotonic() - accepted))
                        waiting.end()
        finally:
            inbox.shutdown()
        return {"250 to EXISTS": waited}

    return measure


def _submission(bench: Bench) -> Round:
    recipient = bench.accounts.by_root()

    def measure() -> dict[str, list[float]]:
        inbox = recipient.imap()
        try:
            there = int(inbox.response("EXISTS")[1][0])
            waiting = Idle(inbox)
            seconds = 0.0
            before = usage.cpu_seconds(bench.units)
            for sender, count in bench.senders.shares(bench.messages):
                with contextlib.closing(sender.account.smtp()) as session:
                    begin = time.monotonic()
                    for _ in range(count):
                        _submit(session, sender, recipient.address)
                    seconds += time.monotonic() - begin
            _arrive(inbox, waiting, there + bench.messages)
            used = usage.spent(before, usage.cpu_seconds(bench.units))
        finally:
            inbox.shutdown()
        return {
            "one after the other": [bench.messages / seconds],
            "all services": [1000 * used / bench.messages],
        }

    return measure


def _arrive(inbox: Imap, waiting: Idle, messages: int) -> None:
    """Wait until there are so many; raises Wrong."""
    end = time.monotonic() + DELIVERY_SECONDS
    while (left := end - time.monotonic()) > 0:
        waiting.for_mail(min(left, LOOK_SECONDS))
        waiting.end()
        if waiting.exists >= messages:
            return
        waiting = Idle(inbox)
    raise _late()


MEASUREMENTS = (
    Measurement("delivery", {"250 to EXISTS": "ms"}, _delivery),
    Measurement(
        "submission",
        {"one after the other": "messages/s", "all services": "CPU ms a message"},
        _submission,
    ),
)
