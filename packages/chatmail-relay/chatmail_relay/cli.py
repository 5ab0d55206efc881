# SPDX-License-Identifier: MIT
"""The command chatmail-relay(8). Exit status: 0 well, 1 not, 2 wrong usage."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from chatmaild.config import FIELDS, ConfigError, read_settings

from . import backup, bench, dns, image, importing, selftest, store
from .accounts import AccountError, add_commands
from .apply import (
    NotConfigured,
    Refused,
    apply,
    diff,
    is_configured,
    make_plan,
    recover,
    shown_changes,
    take_certificate,
    unapply,
)
from .backup.errors import BackupError
from .component import ComponentError
from .errors import RenderError, StateError
from .ledger import LedgerError
from .paths import Paths
from .postfix import PostfixError
from .preview import Pages, Preview
from .settings import change_settings
from .status import Finding, check, status
from .transaction import TransactionError

HOW_TO_GO_ON = (
    "chatmail-relay: not configured yet. Run 'dpkg-reconfigure chatmail-relay', "
    "or 'chatmail-relay set mail_domain=NAME' and 'chatmail-relay apply'."
)
#: Commands for which a relay without a mail domain is no failure.
_WELL_UNCONFIGURED = ("apply", "certificate", "configure", "recover", "unapply")
QUIET_SECONDS = 1.0  # for all files of a certificate to be in place
INTERRUPTED = 130  # exit status of who is ended by Ctrl-C, as of a shell
ERRORS = (
    ConfigError,
    Refused,
    ComponentError,
    RenderError,
    PostfixError,
    LedgerError,
    StateError,
    TransactionError,
    AccountError,
    BackupError,
    bench.BenchError,
    importing.ImportProblem,
    OSError,
)


def main(argv: list[str] | None = None, *, root: str = "/") -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in store.COMMANDS:
        return store.run(argv[0], argv[1:])
    options = _parser().parse_args(argv)
    paths = Paths(Path(root))
    try:
        return int(options.run(paths, options))
    except KeyboardInterrupt:
        return INTERRUPTED
    except NotConfigured:
        if options.json:
            print(json.dumps({"configured": False}))
        else:
            print(HOW_TO_GO_ON)
        return 0 if options.command in _WELL_UNCONFIGURED else 1
    except ERRORS as error:
        for line in str(error).splitlines():
            print(f"chatmail-relay: {line}", file=sys.stderr)
        if getattr(options, "lenient", False) and not isinstance(error, StateError):
            print(
                "chatmail-relay: warning: the configuration in force stays; "
                "run 'chatmail-relay apply' when this is mended",
                file=sys.stderr,
            )
            return 0
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chatmail-relay", description="Configure and watch a chatmail relay."
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, parents=[common])
        sub.set_defaults(run=run)
        return sub

    get = command("get", _get, "print settings in force")
    get.add_argument("key", nargs="?", help="one setting; all of them if left out")
    put = command("set", _set, "change settings in the file; apply makes them take effect")
    put.add_argument("setting", nargs="+", metavar="KEY=VALUE")
    put_apply = command("apply", _apply, "make the machine as the settings say")
    put_apply.add_argument(
        "--check-all", action="store_true", help="ask the checkers of unchanged components too"
    )
    put_apply.add_argument(
        "--lenient",
        action="store_true",
        help="exit 0 if the new configuration is refused: the old one is in force",
    )
    command("diff", _diff, "show what apply would change")
    command("check", _check, "validate settings, files on disk, checkers and kernel limits")
    command("status", _status, "say whether the running relay is well")
    for name, help in store.COMMANDS.items():
        commands.add_parser(name, help=help, add_help=False)
    add_commands(commands, common)
    dns.add_command(commands, common)
    selftest.add_command(commands, common)
    bench.add_command(commands, common)
    backup.add_commands(commands, common)
    importing.add_command(commands, common)
    command("certificate", _certificate, "serve the newest certificate (run when it changes)")
    command("unapply", _unapply, "put back what was there before the relay")
    command("configure", _configure, "take settings from the environment (run at boot of an image)")
    command("recover", _recover, "repair what an interrupted apply left (run at boot)")
    web_pages = command("web", _web, "list the web pages' files and where each comes from")
    web_pages.add_argument(
        "--serve", action="store_true", help="show them on loopback, and changes as they are made"
    )
    web_pages.add_argument("--port", type=int, default=8080, help="for --serve (8080)")
    return parser


def _print(options: argparse.Namespace, data: object, lines: list[str]) -> None:
    if options.json:
        print(json.dumps(data, indent=1, sort_keys=True))
    else:
        for line in lines:
            print(line)


def _version() -> str:
    from .version import VERSION

    return VERSION


def _get(paths: Paths, options: argparse.Namespace) -> int:
    if options.key is not None and options.key not in FIELDS:
        known = ", ".join(FIELDS)
        print(f"chatmail-relay: {options.key}: unknown setting; known: {known}", file=sys.stderr)
        return 1
    if not is_configured(paths):
        raise NotConfigured
    config, _warnings = read_settings(paths.ini)
    values = {key: getattr(config, key) for key in FIELDS}
    if options.key is not None:
        values = {options.key: values[options.key]}
    lines = [_shown(value) for value in values.values()]
    if options.key is None:
        lines = [f"{key} = {line}".rstrip() for key, line in zip(values, lines, strict=True)]
    _print(options, values, lines)
    return 0


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value)


def _set(paths: Paths, options: argparse.Namespace) -> int:
    changes = {}
    for item in options.setting:
        key, separator, value = item.partition("=")
        if not separator:
            print(f"chatmail-relay: {item}: write KEY=VALUE", file=sys.stderr)
            return 2
        changes[key.strip()] = value.strip()
    changed, warnings = change_settings(paths, changes)
    for problem in warnings:
        print(f"chatmail-relay: warning: {problem}", file=sys.stderr)
    _print(options, {"changed": sorted(changed)}, [f"{key} = {changed[key]}" for key in changed])
    return 0


def _apply(paths: Paths, options: argparse.Namespace) -> int:
    plan = apply(paths, _version(), check_all=options.check_all)
    changed = [component.name for component in plan.changed_components]
    text = f"changed: {', '.join(changed)}" if changed else "nothing to change"
    _print(options, {"changed": changed}, [f"chatmail-relay: {text}"])
    return 0


def _diff(paths: Paths, options: argparse.Namespace) -> int:
    plan = make_plan(paths, _version())
    lines = diff(plan)
    data = {
        "secrets": [str(change.dest) for change in plan.secrets],
        "changes": [str(change.dest) for change in shown_changes(plan)],
        "pending": plan.ledger.pending,
    }
    _print(options, data, lines)
    return 1 if lines else 0


def _report(options: argparse.Namespace, findings: list[Finding]) -> int:
    _print(options, [dataclasses.asdict(item) for item in findings], [str(i) for i in findings])
    return 0 if all(item.well for item in findings) else 1


def _check(paths: Paths, options: argparse.Namespace) -> int:
    if not is_configured(paths):
        raise NotConfigured
    return _report(options, check(paths, _version()))


def _status(paths: Paths, options: argparse.Namespace) -> int:
    if not is_configured(paths):
        raise NotConfigured
    return _report(options, status(paths, _version()))


def _certificate(paths: Paths, options: argparse.Namespace) -> int:
    # chatmail-certificate.path starts this with the first of several changes, and systemd forgets those that
    # come while it runs: hence the pause, and another look after each reload, which may take seconds
    time.sleep(QUIET_SECONDS)
    new = again = take_certificate(paths)
    while again:
        again = take_certificate(paths)
    text = "a new certificate is served" if new else "the newest certificate is served already"
    _print(options, {"new": new}, [f"chatmail-relay: {text}"])
    return 0


def _unapply(paths: Paths, options: argparse.Namespace) -> int:
    names = unapply(paths)
    text = f"undone: {', '.join(names)}" if names else "nothing to undo"
    _print(options, {"undone": names}, [f"chatmail-relay: {text}"])
    return 0


def _configure(paths: Paths, options: argparse.Namespace) -> int:
    settings, plan = image.configure(paths, _version(), os.environ)
    changed = [component.name for component in plan.changed_components]
    lines = [f"chatmail-relay: set {', '.join(settings)}"] if settings else []
    lines += [f"chatmail-relay: changed: {', '.join(changed)}"] if changed else []
    _print(options, {"settings": settings, "changed": changed}, lines)
    return 0


def _recover(paths: Paths, options: argparse.Namespace) -> int:
    state = recover(paths)
    text = "nothing to repair" if state is None else f"repaired an interrupted apply ({state})"
    _print(options, {"found": state}, [f"chatmail-relay: {text}"])
    return 0


def _web(paths: Paths, options: argparse.Namespace) -> int:
    if not is_configured(paths):
        raise NotConfigured
    pages = Pages(paths, _version())
    built = pages.build()
    if options.serve:
        with Preview(pages, options.port) as server, contextlib.suppress(KeyboardInterrupt):
            print(f"{server.url}  (end with Ctrl-C)", flush=True)
            server.serve_forever()
        return 0
    origin = {name: str(path) for name, path in pages.sources().items() if name in built}
    _print(options, origin, [f"/{name}  {path}" for name, path in sorted(origin.items())])
    return 0
