# SPDX-License-Identifier: MIT
"""Who listens where: Linux' /proc/net/{tcp,udp} and the control group of the owning process."""

import ipaddress
import os
import re
import sys
from dataclasses import dataclass

from . import systemd
from .component import Component

# see proc_net(5): TCP_LISTEN, and TCP_CLOSE, which is what a UDP socket without a peer has
_STATE = {"tcp": "0A", "udp": "07"}
Port = tuple[str, int]  # protocol, number


@dataclass(frozen=True)
class Listener:
    """A listening socket; *unit* is "" where no service owns it."""

    port: Port
    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    unit: str
    process: str


def listeners(ports: set[Port]) -> list[Listener]:
    """The listening sockets of this network namespace on any of *ports*."""
    inodes = {}
    for name in ("tcp", "tcp6", "udp", "udp6"):
        protocol = name[:3]
        try:
            with open(f"/proc/net/{name}", encoding="ascii") as table:
                lines = table.readlines()[1:]
        except FileNotFoundError:
            continue
        for line in lines:
            words = line.split()
            host, port = words[1].split(":")
            held = (protocol, int(port, 16))
            if words[3] == _STATE[protocol] and held in ports:
                inodes[words[9]] = (held, _address(host))
    owners = _owners(set(inodes)) if inodes else {}
    return [
        Listener(port, address, *owners.get(inode, ("", "an unknown process")))
        for inode, (port, address) in inodes.items()
    ]


def foreign_listeners(components: list[Component]) -> list[str]:
    """One line, with the remedy, for every port of ours that somebody else holds."""
    wanted = {
        (item.protocol, item.port): item for component in components for item in component.listen
    }
    ours = {unit for component in components for unit in component.units}
    problems = set()
    for listener in listeners(set(wanted)):
        item = wanted[listener.port]
        if listener.unit == item.unit or (listener.unit in ours and not item.exclusive):
            continue
        if not collides(item.address, listener.address):
            continue
        if listener.process.endswith("(pid 1)") and _is_kept_for(item.unit):
            continue
        problems.add(
            f"port {item.port} ({item.what}) is in use by {listener.unit or listener.process}: "
            "stop it, or make it listen elsewhere, then run chatmail-relay apply"
        )
    return sorted(problems)


def _is_kept_for(unit: str) -> bool:
    """Whether systemd holds sockets for *unit* between two of its starts (FileDescriptorStoreMax=)."""
    kept = systemd.properties([unit], "NFileDescriptorStore").get(unit, {})
    return kept.get("NFileDescriptorStore", "0") != "0"


def collides(wanted: str, held: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether binding *wanted* fails while *held* is bound: a wildcard collides with everything."""
    return wanted == "*" or held.is_unspecified or str(held) == wanted


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    # 32-bit words in host byte order
    words = [bytes.fromhex(text[i : i + 8]) for i in range(0, len(text), 8)]
    if sys.byteorder == "little":
        words = [word[::-1] for word in words]
    return ipaddress.ip_address(b"".join(words))


def _owners(inodes: set[str]) -> dict[str, tuple[str, str]]:
    owners = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                match = re.match(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{descriptor}"))
                if match and match[1] in inodes and (pid != "1" or match[1] not in owners):
                    owners[match[1]] = (_unit(pid), _name(pid))
        except OSError:
            continue  # gone, or not ours to see
    return owners


def _unit(pid: str) -> str:
    with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
        for line in file:
            for part in reversed(line.strip().split("/")):
                if part.endswith(".service"):
                    return part
    return ""


def _name(pid: str) -> str:
    with open(f"/proc/{pid}/comm", encoding="utf-8") as file:
        return f"{file.read().strip()} (pid {pid})"
