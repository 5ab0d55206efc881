# SPDX-License-Identifier: MIT
"""The command `import`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..apply import is_configured
from ..paths import Paths
from ..version import VERSION
from .legacy import ImportProblem, Legacy
from .steps import Import, Step


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `import` to the command line's parser."""
    help = "take over a relay that the reference tool has deployed"
    parser = commands.add_parser("import", help=help, description=help, parents=[common])
    parser.set_defaults(run=_import)
    parser.add_argument(
        "root", nargs="?", default="/", help="a copy of another machine's files; else this machine"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument("--yes", action="store_true", help="do it without asking")


def _import(paths: Paths, options: argparse.Namespace) -> int:
    root = paths.root if options.root == "/" else Path(options.root)
    importing = Import(paths, _legacy(paths, root), VERSION)
    if is_configured(paths) and not importing.finished():
        raise ImportProblem(
            f"{paths.ini}: this relay has a mail domain already; import needs one that is not configured"
        )
    done = importing.finished()
    steps = [step for step in importing.steps() if step.name not in done and step.says]
    lines = [line for step in steps for line in step.says]
    if not steps:
        lines = [f"chatmail-relay: {importing.old.mail_domain} is imported already"]
    if not options.json:
        print("\n".join(lines))
    elif options.dry_run:
        print(json.dumps([{"step": step.name, "says": step.says} for step in steps], indent=1))
    if options.dry_run or not steps:
        return 0
    if not options.yes and not _agreed():
        return 1

    def say(step: Step) -> None:
        print(f"chatmail-relay: {step.name}", file=sys.stderr, flush=True)

    importing.run(steps, say)
    if options.json:
        print(json.dumps({"mail_domain": importing.old.mail_domain, "kept": str(importing.attic)}))
    else:
        print(f"chatmail-relay: {importing.old.mail_domain} is imported")
        print(
            f"chatmail-relay: nothing was deleted: see {importing.attic} and {importing.old.store}"
        )
    return 0


def _legacy(paths: Paths, root: Path) -> Legacy:
    """The relay; its settings are those kept of a run before, once its own file has moved."""
    kept = paths.state / "import.ini"
    return Legacy(root, kept if kept.exists() else None)


def _agreed() -> bool:
    print("Nothing has been changed. Type yes to do this: ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() == "yes":
        return True
    print("chatmail-relay: nothing was changed", file=sys.stderr)
    return False
