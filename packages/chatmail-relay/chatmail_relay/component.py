# SPDX-License-Identifier: MIT
"""Reads component.toml: what a component renders, who checks it, which units it concerns.

A component is a folder of data. The brain knows none of them by name; docs/components.md describes
the format for whoever adds one.
"""

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ACTIVATIONS = ("reload", "restart")  # in the order of strength
PROTOCOLS = ("tcp", "udp")


class ComponentError(Exception):
    """A component.toml that is wrong: a defect of the package, not of the settings."""


@dataclass(frozen=True)
class File:
    """One rendered file. *when* is a jinja2 expression; false means the file must not exist."""

    template: str
    dest: str
    mode: int
    activate: str
    when: str | None
    units: list[str] | None  # the units concerned, if not all of the component


@dataclass(frozen=True)
class Listen:
    """A port that *unit* must answer on; *address* is "*" or a loopback address.

    *exclusive*: another unit of ours on this port is a conflict too (other sites of nginx on 443).
    """

    port: int
    protocol: str  # tcp | udp
    address: str
    what: str
    unit: str
    exclusive: bool


@dataclass(frozen=True)
class Limit:
    """A kernel limit the component needs; *at_least* is a jinja2 expression giving an integer."""

    sysctl: str
    at_least: str
    remedy: str


@dataclass(frozen=True)
class Site:
    """Web pages: the component's folder, with that of the operator over it, rendered to *dest*."""

    dest: str
    overrides: str


@dataclass(frozen=True)
class Component:
    """One component as its folder describes it."""

    name: str
    folder: Path
    order: int
    units: list[str]
    activate: str
    check: list[list[str]]
    check_ignore: list[re.Pattern[str]]
    files: list[File]
    postconf: dict[str, str] = field(default_factory=dict)
    master: dict[str, str] = field(default_factory=dict)
    listen: list[Listen] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)
    certificate: list[str] = field(default_factory=list)  # units to reload for a new one
    findings: list[list[str]] = field(default_factory=list)  # commands of `status`
    site: Site | None = None


# the keys of the file, "?" for those only the package build reads (tools/debian-components)
_KEYS = {
    "name",
    "order",
    "units",
    "activate",
    "check",
    "check_ignore",
    "file",
    "postconf",
    "master",
    "listen",
    "limit",
    "certificate",
    "findings",
    "site",
}
_BUILD_KEYS = {"triggers", "dropin", "install"}


def load_component(path: Path) -> Component:
    """Read one component.toml; raises ComponentError with the path and the key."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ComponentError(f"{path}: {error}") from error
    unknown = set(data) - _KEYS - _BUILD_KEYS
    if unknown:
        raise ComponentError(f"{path}: unknown key {', '.join(sorted(unknown))}")
    try:
        return _component(path, data)
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise ComponentError(f"{path}: {type(error).__name__}: {error}") from error


def _component(path: Path, data: dict[str, Any]) -> Component:
    default = _activation(data.get("activate", "restart"))
    units = list(data.get("units", []))
    return Component(
        name=str(data["name"]),
        folder=path.parent,
        order=int(data["order"]),
        units=units,
        activate=default,
        check=[list(map(str, command)) for command in data.get("check", [])],
        check_ignore=[re.compile(pattern) for pattern in data.get("check_ignore", [])],
        files=[
            File(
                template=item["template"],
                dest=item["dest"],
                mode=int(item.get("mode", "0644"), 8),
                activate=_activation(item.get("activate", default)),
                when=item.get("when"),
                units=item.get("units"),
            )
            for item in data.get("file", [])
        ],
        postconf=dict(data.get("postconf", {})),
        master=dict(data.get("master", {})),
        listen=[
            Listen(
                port=int(item["port"]),
                protocol=_protocol(item.get("protocol", "tcp")),
                address=item.get("address", "*"),
                what=item.get("what", ""),
                unit=item.get("unit", units[0] if units else ""),
                exclusive=bool(item.get("exclusive", False)),
            )
            for item in data.get("listen", [])
        ],
        limits=[
            Limit(item["sysctl"], str(item["at_least"]), item.get("remedy", ""))
            for item in data.get("limit", [])
        ],
        certificate=list(data.get("certificate", [])),
        findings=[list(map(str, command)) for command in data.get("findings", [])],
        site=Site(**data["site"]) if "site" in data else None,
    )


def _activation(value: str) -> str:
    if value not in ACTIVATIONS:
        raise ValueError(f"activate = {value}: write reload or restart")
    return value


def _protocol(value: str) -> str:
    if value not in PROTOCOLS:
        raise ValueError(f"protocol = {value}: write tcp or udp")
    return value


def load_components(folder: Path) -> list[Component]:
    """All components below *folder*, in the order they are applied."""
    found = [load_component(path) for path in folder.glob("*/component.toml")]
    return sorted(found, key=lambda component: (component.order, component.name))
