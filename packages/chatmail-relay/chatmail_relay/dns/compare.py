# SPDX-License-Identifier: MIT
"""Does what is published mean what is wanted? Order, splitting of texts, spaces and upper case do not count.

Each function takes the values one server gave and returns "" if all is well, or what is wrong, to be read
after "NAME KIND: ".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import dns.rdata
import dns.rdataclass
import dns.rdatatype

from .records import ABSENT, Record

Values = Sequence[Any]  # dns.rdata.Rdata of one type


def compare(record: Record, values: Values) -> str:
    """What is wrong with *values* for *record*; "" if nothing is."""
    if record.value == ABSENT:
        return _other(value.to_text() for value in values) if values else ""
    wanted = rdata(record.kind, record.value) if record.value else None
    if wanted is None:
        return "" if values else "is missing"
    return _COMPARE[record.kind](record, wanted, values)


def rdata(kind: str, value: str) -> Any:
    """One value from its presentation form."""
    return dns.rdata.from_text(dns.rdataclass.IN, dns.rdatatype.from_text(kind), value)


def _address(record: Record, wanted: Any, values: Values) -> str:
    found = {value.address for value in values}
    if wanted.address not in found:
        return _other(found)
    extra = sorted(found - {wanted.address})
    return f"also points to {', '.join(extra)}, which is not this machine" if extra else ""


def _mx(record: Record, wanted: Any, values: Values) -> str:
    if not any(value.exchange == wanted.exchange for value in values):
        return _other(value.to_text() for value in values)
    best = min(values, key=lambda value: int(value.preference))
    if best.exchange != wanted.exchange:
        return f"{best.to_text()} is preferred to this relay"
    return ""


def _name(record: Record, wanted: Any, values: Values) -> str:
    if not any(value.target == wanted.target for value in values):
        return _other(value.to_text() for value in values)
    return ""


def _srv(record: Record, wanted: Any, values: Values) -> str:
    if not any((value.target, value.port) == (wanted.target, wanted.port) for value in values):
        return _other(value.to_text() for value in values)
    return ""


def _txt(record: Record, wanted: Any, values: Values) -> str:
    """TXT records of one purpose, told by their beginning: there must be one, and it must mean the same."""
    want = text(wanted)
    version = want.replace(" ", "").split(";")[0].lower()
    for start, check in _TEXTS.items():
        if version.startswith(start):
            same = [
                found
                for found in map(text, values)
                if found.replace(" ", "").lower().startswith(start)
            ]
            if not same:
                return "is missing" if not values else _other(value.to_text() for value in values)
            if len(same) > 1:
                return (
                    f"there are {len(same)} records that begin with {start}: others ignore them all"
                )
            return check(want, same[0])
    raise ValueError(f"{record.value}: unknown kind of text")


def _dkim(want: str, found: str) -> str:
    wanted, published = tags(want), tags(found)
    if published.get("p", "").replace(" ", "") != wanted["p"]:
        return "holds another key" if published.get("p") else "is a revoked key (p= is empty)"
    if published.get("k", "rsa") != wanted["k"]:
        return f"k={published.get('k', 'rsa')} is not the kind of this key, {wanted['k']}"
    if "y" in published.get("t", "").split(":"):
        return "t=y says that it is a test: others ignore it"
    services = published.get("s", "*").split(":")
    if not {"*", "email"} & set(services):
        return f"s={published['s']} does not include mail"
    return ""


def _spf(want: str, found: str) -> str:
    """RFC 7208: the relay's own address must pass, by "a" or "mx" or a network, and others must not."""
    terms = found.lower().split()[1:]
    if not any(
        re.fullmatch(r"\+?(a|mx|(a|mx|ip4|ip6|include|exists)[:/].+)", term) for term in terms
    ):
        return f"names no sender: {found!r}"
    if not any(term in ("~all", "-all") or term.startswith("redirect=") for term in terms):
        return f"lets everybody send: {found!r} does not end with ~all or -all"
    return ""


def _dmarc(want: str, found: str) -> str:
    wanted, published = tags(want), tags(found)
    for tag, value in wanted.items():
        if published.get(tag, "r" if tag.startswith("a") else "none").lower() != value.lower():
            return f"{tag}={published.get(tag, 'not set')}, wanted {tag}={value}"
    return ""


def _sts(want: str, found: str) -> str:
    identifier = tags(found).get("id", "")
    return (
        "" if re.fullmatch(r"[A-Za-z0-9]{1,32}", identifier) else f"id={identifier!r} is not valid"
    )


_TEXTS: dict[str, Callable[[str, str], str]] = {
    "v=dkim1": _dkim,
    "v=spf1": _spf,
    "v=dmarc1": _dmarc,
    "v=stsv1": _sts,
}


def _caa(record: Record, wanted: Any, values: Values) -> str:
    issuers = [value for value in values if value.tag == b"issue"]
    if not issuers:
        return "is missing"
    want = _issuer(wanted.value)
    others = [value for value in issuers if _issuer(value.value) != want]
    if len(others) == len(issuers):
        return _other(value.to_text() for value in others)
    return f"also allows {others[0].to_text()}" if others else ""


def _issuer(value: bytes) -> tuple[str, frozenset[str]]:
    """Domain and parameters of a CAA value (RFC 8659 4.2)."""
    name, *parameters = [part.strip() for part in value.decode("ascii", "replace").split(";")]
    return name.lower().rstrip("."), frozenset(filter(None, parameters))


def _tlsa(record: Record, wanted: Any, values: Values) -> str:
    if not any(value.to_text() == wanted.to_text() for value in values):
        return _other(value.to_text() for value in values)
    return ""


_COMPARE: dict[str, Callable[[Record, Any, Values], str]] = {
    "A": _address,
    "AAAA": _address,
    "MX": _mx,
    "TXT": _txt,
    "CNAME": _name,
    "SRV": _srv,
    "PTR": _name,
    "CAA": _caa,
    "TLSA": _tlsa,
}


def text(value: Any) -> str:
    """The character-strings of a TXT record put together (RFC 7208 3.3, RFC 6376 3.6.2.2)."""
    return b"".join(value.strings).decode("utf-8", "replace")


def tags(record: str) -> dict[str, str]:
    """A list of tag=value (RFC 6376 3.2), without white space around either."""
    pairs = (item.partition("=") for item in record.split(";"))
    return {name.strip(): value.strip() for name, _equals, value in pairs if name.strip()}


def _other(found: Collection[str] | Any) -> str:
    shown = ", ".join(sorted(found))
    return f"says {shown}" if shown else "is missing"
