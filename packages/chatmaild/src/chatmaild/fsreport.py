# SPDX-License-Identifier: MIT
"""chatmail-fsreport: how much the mailboxes hold, and how many accounts are in use.

Text, JSON, and a file for the textfile collector of a Prometheus node exporter, with the metrics of
existing relays. Sizes are those on disk. Names of CI accounts begin with "ci-". One pass, one stat a
file; only reads; memory does not depend on the size of the store. No addresses are in the report.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatmaild.config import DEFAULT_PATH, ConfigError, read_config
from chatmaild.maildir import (
    MESSAGE_FOLDERS,
    files,
    folders,
    mailboxes,
    open_directory,
    open_store,
    status_of,
)
from chatmaild.progress import Progress
from chatmaild.users import DAY

# lower bounds of the sizes that messages are counted by, bytes
SIZES = (0, 100 * 1024, 512 * 1024, 2**20, 2 * 2**20, 5 * 2**20, 10 * 2**20)
LOGIN_DAYS = (1, 10, 30, 40, 80, 100, 150)
TEXTFILE_NAME = "fsreport.prom"

log = logging.getLogger("fsreport")


@dataclass
class Report:
    """What a pass has found; a list's items belong to SIZES or LOGIN_DAYS and are cumulative."""

    message_bytes: int = 0
    extra_bytes: int = 0
    size_bytes: list[int] = field(default_factory=lambda: [0] * len(SIZES))
    size_counts: list[int] = field(default_factory=lambda: [0] * len(SIZES))
    accounts: int = 0
    ci_accounts: int = 0
    active: list[int] = field(default_factory=lambda: [0] * len(LOGIN_DAYS))
    ci_active: list[int] = field(default_factory=lambda: [0] * len(LOGIN_DAYS))
    errors: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Selection:
    """What is counted, as seen at *now*, seconds since 1970.

    Messages only of accounts without login for *min_login_age* days, only in the folder *mdir* (cur,
    new or tmp), and only of the first *maxnum* mailboxes.
    """

    now: float
    min_login_age: int = 0
    mdir: str | None = None
    maxnum: int | None = None


def make_report(
    store: int, selection: Selection, tick: Callable[[Report], None] = lambda report: None
) -> Report:
    """Read the whole store; what fails for a mailbox is logged and counted."""
    begin = time.monotonic()
    report = Report()
    for number, name in enumerate(mailboxes(store)):
        if number == selection.maxnum:
            break
        try:
            _add_mailbox(report, store, name, selection)
        except OSError as error:
            report.errors += 1
            log.error("%s: %s", ascii(name), error)
        tick(report)
    report.size_bytes = _cumulative(report.size_bytes)
    report.size_counts = _cumulative(report.size_counts)
    report.message_bytes = report.size_bytes[0]
    report.seconds = time.monotonic() - begin
    return report


def _cumulative(counts: list[int]) -> list[int]:
    """From counts of each range to counts of what is at least as big as its lower bound."""
    return [sum(counts[index:]) for index in range(len(counts))]


def _add_mailbox(report: Report, store: int, name: str, selection: Selection) -> None:
    with open_directory(name, store) as mailbox:
        if mailbox is None:
            return
        password = status_of("password", mailbox)
        age = 0.0
        if password is not None and password.st_size:
            age = selection.now - password.st_mtime
            _add_account(report, name.startswith("ci-"), age)
        if age >= selection.min_login_age * DAY:
            _add_files(report, mailbox, selection.mdir)


def _add_account(report: Report, is_ci: bool, age: float) -> None:
    report.accounts += 1
    report.ci_accounts += is_ci
    for index, days in enumerate(LOGIN_DAYS):
        # the time of the last login is the beginning of its day
        if age <= days * DAY:
            report.active[index] += 1
            report.ci_active[index] += is_ci


def _add_files(report: Report, mailbox: int, mdir: str | None) -> None:
    def add_extra(entry: os.DirEntry[str]) -> None:
        try:
            report.extra_bytes += entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            pass

    size_bytes, size_counts = report.size_bytes, report.size_counts
    top = range(len(SIZES) - 1, 0, -1)
    for folder, directory in folders(mailbox, add_extra):
        if mdir and not folder.endswith(mdir):
            continue
        for _name, status in files(directory):
            size = status.st_size
            index = 0
            if size >= SIZES[1]:
                index = next(item for item in top if size >= SIZES[item])
            size_bytes[index] += size
            size_counts[index] += 1


def as_text(report: Report) -> str:
    """For people."""
    total = report.message_bytes + report.extra_bytes
    share = 100 * report.extra_bytes / total if total else 0.0
    lines = [
        "## Mailbox storage use analysis",
        f"Mailbox storage total: {_human(total)}",
        f"Messages: {_human(report.message_bytes)}",
        f"Extra files: {_human(report.extra_bytes)} ({share:.2f} %)",
        "",
        "## Messages by size",
    ]
    for index, low in enumerate(SIZES):
        lines.append(
            f"at least {_human(low):>8}: {_human(report.size_bytes[index]):>8} "
            f"in {report.size_counts[index]} messages"
        )
    for title, accounts, active in _groups(report):
        lines += ["", f"## Login stats: {title}", f"accounts: {accounts}"]
        for days, count in zip(LOGIN_DAYS, active, strict=True):
            share = 100 * count / accounts if accounts else 0.0
            lines.append(f"active in last {days:>3} days: {count} ({share:.2f} %)")
    failed = f", {report.errors} mailboxes could not be read" if report.errors else ""
    lines += ["", f"Read in {report.seconds:.2f} seconds{failed}"]
    return "\n".join(lines) + "\n"


def _groups(report: Report) -> list[tuple[str, int, list[int]]]:
    people = [a - c for a, c in zip(report.active, report.ci_active, strict=True)]
    return [
        ("all accounts", report.accounts, report.active),
        ("non-CI accounts", report.accounts - report.ci_accounts, people),
        ("CI accounts", report.ci_accounts, report.ci_active),
    ]


def _human(size: float) -> str:
    """*size* bytes in the unit that keeps it short."""
    for unit in ("B", "K", "M", "G"):
        if size < 1024:
            return f"{size:.0f}{unit}" if unit == "B" else f"{size:.1f}{unit}"
        size /= 1024
    return f"{size:.1f}T"


def as_data(report: Report) -> dict[str, Any]:
    """For --json: numbers by name, bytes and days as keys."""
    return {
        "storage_bytes": {
            "total": report.message_bytes + report.extra_bytes,
            "messages": report.message_bytes,
            "extra": report.extra_bytes,
        },
        "messages_bytes": dict(zip(SIZES, report.size_bytes, strict=True)),
        "messages_count": dict(zip(SIZES, report.size_counts, strict=True)),
        "accounts": {
            "all": report.accounts,
            "ci": report.ci_accounts,
            "user": report.accounts - report.ci_accounts,
        },
        "accounts_active": dict(zip(LOGIN_DAYS, report.active, strict=True)),
        "errors": report.errors,
        "seconds": round(report.seconds, 3),
    }


# key of as_data -> label, help
_METRICS = {
    "storage_bytes": ("kind", "Bytes on disk in mailboxes."),
    "messages_bytes": ("min_size", "Bytes of messages of at least min_size bytes."),
    "messages_count": ("min_size", "Messages of at least min_size bytes."),
    "accounts": ("kind", "Accounts that can log in."),
    "accounts_active": ("days", "Accounts with a login in the last days."),
}


def as_textfile(report: Report) -> str:
    """For Prometheus, text format 0.0.4: gauges chatmail_storage_bytes{kind="total"} and so on."""
    data = as_data(report)
    lines = []
    for key, (label, text) in _METRICS.items():
        lines += [f"# HELP chatmail_{key} {text}", f"# TYPE chatmail_{key} gauge"]
        for value, number in data[key].items():
            lines.append(f'chatmail_{key}{{{label}="{value}"}} {number}')
    return "\n".join(lines) + "\n"


def write_textfile(path: Path, text: str) -> None:
    """Replace the file, or TEXTFILE_NAME in the directory *path*, in one step; everybody may read it."""
    if path.is_dir():
        path /= TEXTFILE_NAME
    # the collector reads *.prom
    new = path.with_name(f".{path.name}.new")
    try:
        with open(new, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(text)
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description="Report what the mailboxes hold and how many accounts are in use."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--textfile",
        type=Path,
        metavar="PATH",
        help=f"also write metrics to this file, or as {TEXTFILE_NAME} into this directory",
    )
    parser.add_argument(
        "--days", type=int, default=0, metavar="N", help="count days as if it were N days later"
    )
    parser.add_argument(
        "--min-login-age",
        type=int,
        default=0,
        metavar="DAYS",
        help="count only files of accounts without login for that long",
    )
    parser.add_argument("--mdir", choices=MESSAGE_FOLDERS, help="count only messages in there")
    parser.add_argument("--maxnum", type=int, metavar="N", help="look at N mailboxes only")
    parser.add_argument("--config", default=DEFAULT_PATH, metavar="FILE", help="other settings")
    return parser


def main(arguments: list[str], prog: str = "fsreport") -> int:
    """Run the command; 0 well, 1 something could not be read, 2 wrong usage, 78 settings."""
    options = _parser(prog).parse_args(arguments)
    progress = Progress()
    logging.basicConfig(level=logging.WARNING, format=f"{progress.clear}%(message)s")
    selection = Selection(
        time.time() + options.days * DAY, options.min_login_age, options.mdir, options.maxnum
    )

    def tick(report: Report) -> None:
        progress.show(f"{report.accounts:,} accounts, {sum(report.size_counts):,} messages")

    try:
        with open_store(read_config(options.config).mailboxes_dir) as store:
            report = Report() if store is None else make_report(store, selection, tick)
        progress.end()
        if options.textfile:
            write_textfile(options.textfile, as_textfile(report))
    except ConfigError as error:
        log.error("%s", error)
        return 78  # EX_CONFIG, sysexits(3)
    except OSError as error:
        log.error("%s: %s", prog, error)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(as_data(report), indent=1) if options.json else as_text(report), end="")
    if options.json:
        print()
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
