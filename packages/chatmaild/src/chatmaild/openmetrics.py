# SPDX-License-Identifier: MIT
"""Several expositions into one. No I/O: texts in, text out.

Reads OpenMetrics 1.0 and the older Prometheus text, and keeps only what fits both (families and
samples, no timestamps, no exemplars). Promises valid OpenMetrics whatever comes in: each family once, its
samples together and each once, only the sample names its type allows. What does not fit is left
out: Dovecot 2.4 for one writes a "_count" into counters, which strict readers refuse. Cost is linear in
the bytes read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

# type -> what the names of its samples add to that of the family (OpenMetrics 1.0 section 5)
SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_count", "_sum"),
    "summary": ("", "_count", "_sum"),
    "info": ("_info",),
    "unknown": ("",),
}

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_META = re.compile(rf"# (TYPE|HELP|UNIT) ({_NAME}) (.*)\Z")
_SAMPLE = re.compile(
    rf"({_NAME})"
    r'(\{(?:[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\.)*",?)*\})?'
    r" ([+-]?(?:[0-9.eE+-]+|Inf|NaN))(?: [0-9.]+)?\Z"
)


@dataclass
class Family:
    """One metric: its type, help text, and samples by name and labels."""

    kind: str = "unknown"
    help: str = ""
    samples: dict[str, str] = field(default_factory=dict)


def merge(texts: Iterable[tuple[str, str]]) -> str:
    """One exposition of all *texts*, pairs of a prefix and a text.

    Only families whose names begin with the prefix are taken from a text. Of two families with one
    name and different types the first stays.
    """
    families: dict[str, Family] = {}
    for prefix, text in texts:
        for name, family in _families(text).items():
            if not name.startswith(prefix):
                continue
            known = families.setdefault(name, Family(family.kind, family.help))
            if known.kind == family.kind:
                for key, value in family.samples.items():
                    known.samples.setdefault(key, value)
    lines = []
    for name, family in families.items():
        lines.append(f"# TYPE {name} {family.kind}")
        if family.help:
            lines.append(f"# HELP {name} {family.help}")
        lines += [f"{key} {value}" for key, value in family.samples.items()]
    return "\n".join([*lines, "# EOF"]) + "\n"


def _families(text: str) -> dict[str, Family]:
    types = {}
    for line in text.splitlines():
        meta = _META.match(line)
        if meta and meta[1] == "TYPE" and meta[3] in SUFFIXES:
            types[meta[2]] = meta[3]
    families: dict[str, Family] = {}
    current = ""
    for line in text.splitlines():
        meta = _META.match(line)
        if meta:
            # in the older format the name of a counter has the suffix of its samples
            kind = types.get(meta[2], "unknown")
            current = meta[2].removesuffix("_total") if kind == "counter" else meta[2]
            family = families.setdefault(current, Family(kind))
            if meta[1] == "HELP":
                family.help = meta[3]
            continue
        sample = _SAMPLE.match(line)
        if sample and current and sample[1] in _names(current, families[current].kind):
            families[current].samples.setdefault(sample[1] + (sample[2] or ""), sample[3])
    return families


def _names(family: str, kind: str) -> list[str]:
    return [family + suffix for suffix in SUFFIXES[kind]]
