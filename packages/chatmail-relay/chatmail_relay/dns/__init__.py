# SPDX-License-Identifier: MIT
"""The DNS records of a relay: which it needs (records), what is published (lookup), and whether that means
the same (compare). `chatmail-relay dns` (command) puts them together."""

import argparse
import ipaddress
from typing import Any


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `dns` to the command line's parser; its library is loaded when it runs."""
    text = "say which DNS records the relay needs, and check what is published"
    sub = commands.add_parser("dns", help=text, description=text, parents=[common])
    sub.add_argument("--zone", action="store_true", help="print a zone file; ask nobody")
    sub.add_argument(
        "--verbose", "-v", action="store_true", help="print what every server has answered"
    )
    sub.add_argument("--watch", action="store_true", help="go on until all required ones are there")
    sub.add_argument(
        "--resolver",
        action="append",
        metavar="ADDRESS",
        type=lambda text: str(ipaddress.ip_address(text)),
        help="ask this resolver as well, for instance a public one; may be repeated",
    )
    sub.set_defaults(run=_run)


def _run(paths: Any, options: argparse.Namespace) -> int:
    from .command import run

    return run(paths, options)
