# SPDX-License-Identifier: MIT
"""Addresses: header From (RFC 5322 section 3.4) and the envelope (RFC 5321 section 4.1.2).

Stricter than the RFCs on purpose. Mail programs disagree about unusual From fields, and whoever
finds one that the filter and the recipient read differently has forged a sender. So: ASCII only,
one address, no group, no route, no quoted local part, no "@" outside the address but within
quotes.

Lengths are checked before anything is parsed; every pattern is linear.
"""

from __future__ import annotations

import ipaddress
import re

MAX_FROM = 998  # octets of a From field; also what an SMTP line holds, so nobody folds it later
MAX_ADDRESS = 254  # octets, RFC 5321 errata 1690
MAX_LOCAL_PART = 64

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_FOLD = re.compile(r"\r?\n(?=[ \t])")
_LOCAL_PART = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*\Z")
_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\Z")
_COMMENT = r"\([ !#-'*-;=?A-\[\]-~\t]*\)"  # not nested, without ()<>@"\ in it
# words, quoted strings and comments in any order; alternatives start with different characters
_PHRASE = re.compile(
    r"(?:[A-Za-z0-9!#$%&'*+/=?^_`{|}~. \t-]|\"(?:[ !#-\[\]-~\t]|\\[ -~])*\"|" + _COMMENT + r")*\Z"
)
_TRAILING_COMMENT = re.compile(r"[^ \t()<>\"]+[ \t]*(" + _COMMENT + r")\Z")
_SOURCE_ROUTE = re.compile(r"@[^:]*:")


class AddressError(ValueError):
    """Not exactly one plain address."""


def parse_from(value: str) -> str:
    """The address of a From field's *value*, lower case.

    Accepts `user@domain`, `<user@domain>`, `phrase <user@domain>` and `user@domain (comment)`.
    Raises AddressError for anything else.
    """
    if len(value) > MAX_FROM or not value.isascii():
        raise AddressError("too long or not ASCII")
    text = _FOLD.sub("", value).strip(" \t")
    if text.endswith(">"):
        phrase, bracket, spec = text[:-1].rpartition("<")
        if not bracket or not _PHRASE.match(phrase):
            raise AddressError("not one address")
    else:
        spec = text
        comment = _TRAILING_COMMENT.match(text)
        if comment:
            spec = text[: comment.start(1)].rstrip(" \t")
    return parse_address(spec)


def parse_address(spec: str) -> str:
    """*spec* (user@domain, no brackets) checked and in lower case; raises AddressError."""
    local, separator, domain = spec.rpartition("@")
    if not separator or len(spec) > MAX_ADDRESS or len(local) > MAX_LOCAL_PART:
        raise AddressError("no address, or too long")
    if not _LOCAL_PART.match(local):
        raise AddressError("unusual local part")
    if domain.startswith("["):
        if literal_of(domain) is None:
            raise AddressError("not an address literal")
    elif not is_domain(domain):
        raise AddressError("not a domain")
    return spec.lower()


def is_domain(name: str) -> bool:
    """Whether *name* is a domain name in the form hosts and DKIM use; underscores are allowed."""
    return len(name) <= 253 and all(_LABEL.match(label) for label in name.split("."))


def literal_of(domain: str) -> IPAddress | None:
    """The host of an address literal, `[192.0.2.1]` or `[IPv6:2001:db8::1]`; None if it is none."""
    if not (domain.startswith("[") and domain.endswith("]")):
        return None
    text = domain[1:-1]
    is_ipv6 = text[:5].lower() == "ipv6:"
    return parse_ip(text[5:], 6) if is_ipv6 else parse_ip(text, 4)


def parse_ip(text: str, version: int = 0) -> IPAddress | None:
    """The IP address *text* (an IPv4-mapped one as IPv4), or None; *version* 4 or 6 demands one."""
    if len(text) > 45 or "%" in text:  # "%": a zone has no place in mail
        return None
    try:
        ip = ipaddress.ip_address(text)
    except ValueError:
        return None
    if version and ip.version != version:
        return None
    return getattr(ip, "ipv4_mapped", None) or ip


def parse_envelope(path: str) -> str:
    """The address in *path* as a milter gets it of MAIL and RCPT, `<user@domain>`, in lower case.

    "" is the null sender. What SMTP allows and nobody uses is undone the way Postfix does it, so
    that both mean the same mailbox: source route, quoted local part, dot after the domain. The
    result is not checked further: it may still be no address at all.
    """
    text = path.strip(" ")
    if text.startswith("<") and text.endswith(">"):
        text = text[1:-1]
    text = _SOURCE_ROUTE.sub("", text, count=1) if text.startswith("@") else text
    local, separator, domain = text.rpartition("@")
    if not separator:
        local, domain = text, ""
    if len(local) > 1 and local.startswith('"') and local.endswith('"'):
        local = re.sub(r"\\(.)", r"\1", local[1:-1])
    return (local + separator + domain.rstrip(".")).lower()
