# SPDX-License-Identifier: MIT
"""The command chatmail-echobot(8). Exit status: 0 well, 1 not, 2 wrong usage."""

from __future__ import annotations

import argparse
import json
import os
import sys

from chatmail_echobot import openpgp, state
from chatmail_echobot.settings import Settings, SettingsError, read_settings


def _invite(settings: Settings, options: argparse.Namespace) -> None:
    identity = state.load(state.directory(), settings.address)
    _print(options, "invite", identity.invite_link)


def _vcard(settings: Settings, options: argparse.Namespace) -> None:
    identity = state.load(state.directory(), settings.address)
    _print(options, "vcard", identity.vcard)


def _print(options: argparse.Namespace, name: str, text: str) -> None:
    if options.json:
        print(json.dumps({name: text}))
    else:
        sys.stdout.write(text if text.endswith("\n") else f"{text}\n")


def _prepare(settings: Settings, options: argparse.Namespace) -> None:
    os.umask(0o077)
    state.make(state.directory(), settings.address)


def _account(settings: Settings, options: argparse.Namespace) -> None:
    from chatmaild.users import MailStore

    from chatmail_echobot import account

    password = account.read_password(state.directory())
    account.become_owner()
    if account.make_account(MailStore(settings.mailboxes_dir), settings.address, password):
        print("chatmail-echobot: made the account", file=sys.stderr)


def _run(settings: Settings, options: argparse.Namespace) -> None:
    from chatmaild.activation import setup_logging

    from chatmail_echobot.service import Service

    setup_logging()
    Service(settings, state.load(state.directory(), settings.address)).run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chatmail-echobot", description="the relay's echo bot")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, help in (
        ("invite", _invite, "print the link by which clients add the bot"),
        ("vcard", _vcard, "print the bot as a contact that clients import"),
    ):
        shown = commands.add_parser(name, help=help, description=help)
        shown.add_argument("--json", action="store_true", help="for programs")
        shown.set_defaults(run=run)
    for name, run, help in (
        ("prepare", _prepare, "for the unit: make keys"),
        ("account", _account, "for the unit, as root: make the account"),
        ("run", _run, "for the unit: answer messages"),
    ):
        commands.add_parser(name, help=help, description=help).set_defaults(run=run)
    return parser


def main() -> int:
    """Run one command."""
    from chatmail_echobot.account import AccountError

    options = _parser().parse_args()
    try:
        options.run(read_settings(), options)
    except (
        SettingsError,
        state.StateError,
        openpgp.OpenPGPError,
        AccountError,
        OSError,
    ) as error:
        print(f"chatmail-echobot: {error}", file=sys.stderr)
        return 1
    return 0
