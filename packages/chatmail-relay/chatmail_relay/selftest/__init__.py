# SPDX-License-Identifier: MIT
"""`chatmail-relay test`: does a relay do for its users what it promises? Asked from outside, as clients do.

Two throw-away accounts are made by the public way, used, and removed. What is looked at, in this order: the
name and its ports (net, tls), the web site (web), accounts (accounts), mail (mail) and calls (turn, on stun);
command puts them together and bounds the time. Nothing here reads the relay's files, except to make accounts
where nobody else may, and to remove them.
"""

import argparse
from typing import Any

SECONDS = 120


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `test` to the command line's parser; the rest is loaded when it runs."""
    text = "try all that a client needs of this relay, or of another one"
    sub = commands.add_parser("test", help=text, description=text, parents=[common])
    sub.add_argument(
        "other",
        nargs="?",
        metavar="OTHER-DOMAIN",
        help="exchange mail with this relay as well, in both directions",
    )
    sub.add_argument("--domain", metavar="DOMAIN", help="the relay to test (this one)")
    sub.add_argument(
        "--address",
        action="append",
        metavar="ADDRESS",
        help="connect to this address, whatever the DNS says; may be repeated",
    )
    add_timeout(sub, SECONDS)
    sub.set_defaults(run=_run)


def add_timeout(sub: argparse.ArgumentParser, default: float) -> None:
    """Add `--timeout`, for what makes accounts and removes them in any case."""
    sub.add_argument(
        "--timeout",
        type=_seconds,
        default=default,
        metavar="SECONDS",
        help=f"end after this time ({default}), cleaning up not included",
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 86400:
        raise argparse.ArgumentTypeError("a number of seconds above 0")
    return value


def _run(paths: Any, options: argparse.Namespace) -> int:
    from .command import run

    return run(paths, options)
