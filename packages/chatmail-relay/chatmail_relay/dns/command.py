# SPDX-License-Identifier: MIT
"""`chatmail-relay dns`: which records the relay needs, and which of them are published."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from chatmaild.config import read_settings

from ..apply import NotConfigured, is_configured
from ..paths import Paths
from .compare import compare
from .lookup import NO_RECORD, Answer, Lookup
from .records import (
    ABSENT,
    Record,
    account_uri,
    dkim_texts,
    own_addresses,
    tlsa_text,
    wanted,
    zone,
)

OWN_RESOLVER = "127.0.0.1"  # the relay's unbound; it has no negative cache
WATCH_SECONDS = 20
RECORDS_AT_ONCE = 4
SHOWN = 44  # characters of a value in the table
MISSING = {"NXDOMAIN", NO_RECORD}

OK, SPREADING, WRONG = "ok", "spreading", "wrong"


@dataclass(frozen=True)
class Verdict:
    """One record: *state* is OK; SPREADING when the zone's own servers have it and a resolver does not yet;
    or WRONG. *problems*: a line each, with the servers."""

    record: Record
    state: str
    problems: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def lines(self, width: int = 0, *, answers: bool = False) -> list[str]:
        """For people: a row of the table, with a name of at least *width*, and a line each for the problems,
        the remedy, and if wanted what every server has answered."""
        record = self.record
        mark = {OK: "ok ", SPREADING: "...", WRONG: "BAD" if record.required else "bad"}[self.state]
        need = "required" if record.required else "recommended"
        value = {"": "any", ABSENT: "none"}.get(record.value, record.value)
        if len(value) > SHOWN:
            value = value[: SHOWN - 3] + "..."
        lines = [f"{mark} {need:11} {record.kind:5} {record.name:{width}} {value}"]
        if self.state != OK:
            lines.append(f"      {record.why}")
        lines += [f"      {problem}" for problem in self.problems]
        if answers:
            for answer in self.answers:
                said = answer.error or ", ".join(answer.texts)
                lines.append(f"      {answer.server} answers: {said}")
        if self.state == WRONG and record.value == ABSENT:
            lines.append(f"      remove: {record.name}. {record.kind}")
        elif self.state == WRONG and record.value:
            lines.append(f"      set: {' '.join(record.line().split())}")
        return lines

    def data(self) -> dict[str, Any]:
        """For programs."""
        return {
            "name": self.record.name,
            "type": self.record.kind,
            "value": self.record.value,
            "required": self.record.required,
            "state": self.state,
            "problems": self.problems,
            "answers": [
                {
                    "server": str(answer.server),
                    "authoritative": answer.server.authoritative,
                    "values": answer.texts,
                    "error": answer.error,
                }
                for answer in self.answers
            ],
        }


def judge(record: Record, lookup: Lookup) -> Verdict:
    """Ask everybody for one record and compare."""
    answers = lookup.everybody(record.name, record.kind)
    said: dict[str, list[Answer]] = {}
    for answer in answers:
        said.setdefault(_problem(record, answer, lookup), []).append(answer)
    good = said.pop("", [])
    problems = [
        f"{text} at {', '.join(str(answer.server) for answer in group)}"
        for text, group in said.items()
    ]
    authoritative = [answer for answer in answers if answer.server.authoritative]
    # a resolver that does not believe the zone's own servers: others will not, either
    bogus = any(a.error == "SERVFAIL" for a in answers if not a.server.authoritative)
    if not authoritative:
        problems.insert(0, f"no name server is known for {record.name}")
    if bogus:
        problems.append("SERVFAIL is mostly a broken DNSSEC signature: see delv, or dnsviz.net")
    elif authoritative and all(answer in good for answer in authoritative):
        return Verdict(record, SPREADING if problems else OK, problems, answers)
    return Verdict(record, WRONG, problems, answers)


def judge_all(records: list[Record], lookup: Lookup, domain: str) -> list[Verdict]:
    """Judge all records that apply to the zone of *domain* as it is."""
    signed = lookup.is_signed(domain)
    asked = [record for record in records if signed or not record.if_signed]
    with ThreadPoolExecutor(RECORDS_AT_ONCE) as pool:
        return list(pool.map(lambda record: judge(record, lookup), asked))


def _problem(record: Record, answer: Answer, lookup: Lookup) -> str:
    if answer.error and answer.error not in MISSING:
        return answer.error
    problem = compare(record, answer.values)
    if problem and record.kind == "A" and not record.value:
        # it may be on IPv6 only
        return "" if lookup.ask(answer.server, record.name, "AAAA").values else problem
    if problem and record.kind == "CNAME":
        # an address in place of the alias is as good, if it is the relay's
        target = record.value.rstrip(".")
        same = {
            item
            for kind in ("A", "AAAA")
            for item in lookup.ask(answer.server, record.name, kind).texts
        }
        if same and same <= set(lookup.addresses(target)):
            return ""
    return problem


def run(paths: Paths, options: argparse.Namespace) -> int:
    """0 if every required record is published, 1 if not."""
    if not is_configured(paths):
        raise NotConfigured
    config, _warnings = read_settings(paths.ini)
    if config.is_ip_relay:
        text = "The mail domain is an address: it needs no DNS."
        print(json.dumps([]) if options.json else f"; {text}" if options.zone else text)
        return 0
    records = wanted(
        config,
        dkim_texts(paths, config),
        own_addresses(),
        account_uri(config),
        tlsa_text(paths, config),
    )
    if options.zone:
        print(zone(records), end="")
        return 0
    resolvers = [OWN_RESOLVER, *(options.resolver or ())]
    while True:
        lookup = Lookup(resolvers)  # made anew each time: servers may have changed
        verdicts = judge_all(records, lookup, config.mail_domain)
        report(verdicts, options.json, answers=options.verbose)
        left = [v for v in verdicts if v.record.required and v.state == WRONG]
        if not left or not options.watch:
            return 1 if left else 0
        print(f"chatmail-relay: {len(left)} to go; asking again", file=sys.stderr)
        pause(WATCH_SECONDS)


pause: Callable[[float], None] = time.sleep


def report(verdicts: list[Verdict], as_json: bool, *, answers: bool = False) -> None:
    """Print all verdicts, the required records first."""
    if as_json:
        print(json.dumps([verdict.data() for verdict in verdicts], indent=1))
        return
    width = max((len(verdict.record.name) for verdict in verdicts), default=0)
    for verdict in sorted(verdicts, key=lambda verdict: not verdict.record.required):
        print("\n".join(verdict.lines(width, answers=answers)))
    if all(verdict.state == OK for verdict in verdicts):
        print("All DNS records are as they should be.")
