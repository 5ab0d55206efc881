# SPDX-License-Identifier: MIT
"""`chatmail-relay bench`: what this relay does in a second, measured on itself while it is in use.

The parts of `make bench` that need no lab. Like the self-test it uses throw-away accounts, which are gone
at the end, and the ports that clients use; it changes no settings and opens no way in. It is bounded in
time and in number, keeps within the relay's own limits, and says which of them has stopped it.

* `frame` is what all measurements have in common: rounds, figures, what has gone wrong;
* `mail`, `accounts` and `machine` measure; `limits` waits for, and names, the relay's limits;
* `usage` reads processor time and memory of the relay's units;
* `command` puts them together.
"""

import argparse
from collections.abc import Callable
from typing import Any

from ..selftest import add_timeout

SECONDS = 300
ROUNDS, MOST_ROUNDS = 5, 20
MESSAGES, MOST_MESSAGES = 10, 100  # a round

PARTS = {
    "delivery": "from SMTP's 250 to an idling client",
    "submission": "messages one after the other, and what one costs",
    "logins": "of addresses that are there, and of new ones",
    "new": "addresses and passwords made up by /new",
    "memory": "of the relay's units",
    "storage": "expire and fsreport as dry run, beside a plain walk",
    "apply": "with nothing to do",
}


class BenchError(Exception):
    """Why nothing can be measured here, and what to do."""


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `bench` to the command line's parser; the rest is loaded when it runs."""
    text = "measure this relay, with accounts that are deleted afterwards"
    sub = commands.add_parser(
        "bench",
        help=text,
        description=text,
        parents=[common],
        epilog="parts:\n" + "\n".join(f"  {name:11} {what}" for name, what in PARTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("part", nargs="*", type=_part, metavar="PART", help="see below; else all")
    for name, usual, most, what in (
        ("rounds", ROUNDS, MOST_ROUNDS, "rounds of everything, whose median counts"),
        ("messages", MESSAGES, MOST_MESSAGES, "messages of a round"),
    ):
        text = f"{what} ({usual}, at most {most})"
        sub.add_argument(f"--{name}", type=_up_to(most), default=usual, metavar="N", help=text)
    add_timeout(sub, SECONDS)
    sub.set_defaults(run=_run)


def _part(text: str) -> str:
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"no such part: {text}; known: {', '.join(PARTS)}")
    return text


def _up_to(most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"a number from 1 to {most}")
        return int(text)

    return number


def _run(paths: Any, options: argparse.Namespace) -> int:
    from .command import run

    return run(paths, options)
