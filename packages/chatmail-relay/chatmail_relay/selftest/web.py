# SPDX-License-Identifier: MIT
"""The web site: pages, what mail programs and other servers look up there, and fresh addresses."""

from __future__ import annotations

import dataclasses
import json
from xml.etree import ElementTree

from .net import Answer, Target, http, resolve
from .report import Report, Wrong

NGINX = "see systemctl status nginx, and chatmail-relay apply"
AUTOCONFIG = "/.well-known/autoconfig/mail/config-v1.1.xml"
SERVERS = {("imap", 993), ("smtp", 465)}  # the least a program must find


def check(report: Report, target: Target, own: bool) -> None:
    """Everything but /new; *own*: the name server to ask is the relay's."""
    report.check("web page", NGINX, lambda: _page(target))
    report.check("port 80", NGINX, lambda: _plain(target))
    report.check("autoconfig", NGINX, lambda: _autoconfig(target))
    if not target.is_exempt:
        report.check("MTA-STS policy", "see chatmail-relay dns", lambda: _policy(target, own))


def _page(target: Target) -> str:
    answer = http(target, "/")
    if answer.status != 200 or answer.kind != "text/html":
        raise Wrong(f"answers {answer.status} {answer.kind}")
    return f"{len(answer.body)} bytes"


def _plain(target: Target) -> str:
    answer = http(target, "/", port=80)
    if answer.status // 100 != 3 or not answer.location.startswith("https://"):
        raise Wrong(f"answers {answer.status}, and does not lead to https")
    return "leads to https"


def _autoconfig(target: Target) -> str:
    answer = http(target, AUTOCONFIG)
    if answer.status != 200:
        raise Wrong(f"answers {answer.status}")
    try:
        tree = ElementTree.fromstring(answer.body)
    except ElementTree.ParseError as error:
        raise Wrong(f"is not XML: {error}") from error
    found = {
        (server.get("type") or "", int(server.findtext("port") or 0))
        for server in tree.iter()
        if server.tag.endswith("Server") and server.findtext("hostname") == target.host
    }
    if not SERVERS <= found:
        raise Wrong(f"does not name {target.host} for IMAP on 993 and submission on 465")
    return f"{len(found)} servers"


def _policy(target: Target, own: bool) -> str:
    """RFC 8461 section 3.2."""
    name = f"mta-sts.{target.domain}"
    host = dataclasses.replace(target, host=name, addresses=resolve(name, own))
    answer = http(host, "/.well-known/mta-sts.txt")
    if answer.status != 200:
        raise Wrong(f"answers {answer.status}")
    pairs = [line.partition(":") for line in answer.body.decode("utf-8", "replace").splitlines()]
    policy = [(key.strip(), value.strip()) for key, _colon, value in pairs]
    if ("version", "STSv1") not in policy:
        raise Wrong("is not one of version STSv1")
    if ("mx", target.domain) not in policy:
        raise Wrong(f"does not name {target.domain} as mx")
    return dict(policy).get("mode", "without a mode")


def fresh(target: Target, token: str = "") -> tuple[str, str]:
    """Address and password that `/new` makes up; raises Wrong with the relay's reason."""
    return made_up(http(target, new_path(token), method="POST"), target.domain)


def new_path(token: str) -> str:
    """What to POST to for an account; *token* may be empty."""
    return f"/new?token={token}" if token else "/new"


def made_up(answer: Answer, domain: str) -> tuple[str, str]:
    """Address and password in an *answer* of /new; raises Wrong with the relay's reason."""
    try:
        said = json.loads(answer.body)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise Wrong(f"/new answers {answer.status} {answer.kind}, not JSON", NGINX)
    if answer.status != 200:
        raise Wrong(f"/new answers {answer.status}: {said.get('reason', 'no reason')}")
    address, password = said.get("email"), said.get("password")
    if not isinstance(address, str) or not isinstance(password, str):
        raise Wrong("/new answers without an address and a password")
    if not address.endswith(f"@{domain}"):
        raise Wrong(f"/new makes addresses of another domain than {domain}")
    return address, password
