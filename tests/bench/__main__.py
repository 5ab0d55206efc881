# SPDX-License-Identifier: MIT
"""Measure a relay of the lab: what it costs, against a floor that is measured side by side.

usage: tools/bench [--short] [--budgets] [--json FILE] [--document] [NAME...]    (called by make bench)

Exit status 1 if a measurement failed, and with --budgets also if a budget is missed.
"""

from __future__ import annotations

import argparse
import functools
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import document, frame
from . import mailpath, latency, accounts, memory, services, dovecot  # noqa: F401  # in this order
from .relay import Bench


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = frame.MEASUREMENTS.values()
    names = "\n".join(
        f"  {item.name:13} {item.title}{' (only by name)' if item.by_name_only else ''}"
        for item in found
    )
    made = argparse.ArgumentParser(
        prog="tools/bench",
        description=(__doc__ or "").splitlines()[0],
        epilog=f"measurements:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--short", action="store_true", help="few rounds: tests the program only")
    made.add_argument("--budgets", action="store_true", help="a missed budget fails the run")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    made.add_argument("--document", action="store_true", help="update docs/benchmarks.md")
    made.add_argument("name", nargs="*", help="of a measurement; all if there is none")
    return made


def main(arguments: Sequence[str]) -> int:
    """Measure what was asked for."""
    options = parser().parse_args(arguments)
    unknown = set(options.name) - set(frame.MEASUREMENTS)
    if unknown:
        parser().error(f"no such measurement: {', '.join(sorted(unknown))}; see --help")
    if options.short and options.document:
        parser().error("the figures of a short run are for no document")
    wanted = [
        item
        for item in frame.MEASUREMENTS.values()
        if (item.name in options.name if options.name else not item.by_name_only)
    ]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # the lab leaves nothing
    with Bench(short=options.short) as bench:
        measured = frame.run(bench, wanted, functools.partial(save, options))
    return finish(options, measured)


def save(options: argparse.Namespace, measured: dict[str, Any]) -> None:
    """Write what was asked for."""
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1) + "\n")
    if options.document:
        document.update(measured)


def finish(options: argparse.Namespace, measured: dict[str, Any]) -> int:
    """Say what went wrong; the exit status."""
    failed, missed = frame.failures(measured), frame.missed(measured)
    for kind, lines in (("measurement failed", failed), ("budget missed", missed)):
        for line in lines:
            print(f"bench: {kind}: {line}", file=sys.stderr)
    return int(bool(failed or options.budgets and missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
