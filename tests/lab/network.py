# SPDX-License-Identifier: MIT
"""The lab's network: one bridge in a namespace of its own, no uplink, no way out.

Each host has a namespace with one veth `host0`, addressed before it boots, so that no service ever
races an address. Names carry the run's id; all links live inside namespaces, so the host's own list
of interfaces never changes and two runs may use the same addresses.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cleanup import NETNS, Run
from .shell import LabError, run

IPV4 = "10.77.0.{}"
IPV6 = "fd77::{}"
CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Namespace:
    """A network namespace and the addresses of its `host0`."""

    name: str
    ipv4: str = ""
    ipv6: str = ""
    path: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", NETNS / self.name)


def _setns(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, f"setns: {os.strerror(error)}")


def _ip(namespace: Namespace, family: str, *commands: str) -> None:
    """ip(8) for one protocol of the internet."""
    run(["ip", "-n", namespace.name, f"-{family}", "-batch", "-"], input="\n".join(commands))


Resolver = Callable[[str, int], list[tuple[socket.AddressFamily, str]]]
_names = threading.local()
_getaddrinfo = socket.getaddrinfo


def _lab_getaddrinfo(host: Any, port: Any, family: int = 0, *args: Any, **kw: Any) -> Any:
    """getaddrinfo(3) that asks the lab's names first, in a thread that is inside a namespace."""
    resolver: Resolver | None = getattr(_names, "resolver", None)
    if resolver is None or not isinstance(host, str):
        return _getaddrinfo(host, port, family, *args, **kw)
    answers = []
    for _, address in resolver(host, family):
        answers += _getaddrinfo(address, port, family, *args, **kw)
    return answers or _getaddrinfo(host, port, family, *args, **kw)


socket.getaddrinfo = _lab_getaddrinfo


@contextlib.contextmanager
def inside(namespace: Namespace, resolver: Resolver | None = None) -> Iterator[None]:
    """Let this thread (only) create sockets in `namespace`; they stay there afterwards."""
    before = getattr(_names, "resolver", None)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        target = os.open(namespace.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(target)
        finally:
            os.close(target)
        _names.resolver = resolver
        try:
            yield
        finally:
            _names.resolver = before
            _setns(home)
    finally:
        os.close(home)


class Network:
    """Bridge and namespaces of one run."""

    def __init__(self, state: Run) -> None:
        self._state = state
        self._attached: set[str | int] = set()
        self.switch = self._namespace("sw")
        ip = ["ip", "-n", self.switch.name, "link"]
        run([*ip, "add", "br0", "type", "bridge"])
        run([*ip, "set", "br0", "up"])

    def attach(self, name: str, number: int, *, isolated: bool = False) -> Namespace:
        """A namespace NAME with 10.77.0.`number`/24 and fd77::`number`/64 on the bridge.

        Those that are `isolated` reach all others, but not each other. Name and number are the
        run's only ones, else LabError.
        """
        if taken := self._attached & {name, number}:
            raise LabError(f"in use on the lab's network: {taken}")
        self._attached |= {name, number}
        namespace = self._namespace(name, IPV4.format(number), IPV6.format(number))
        port = f"p-{name}"[:15]
        run(
            ["ip", "-n", namespace.name, "-batch", "-"],
            input=f"""
            link set lo up
            link add host0 type veth peer name {port} netns {self.switch.name}
            addr add {namespace.ipv4}/24 dev host0
            addr add {namespace.ipv6}/64 dev host0 nodad
            link set host0 up
        """,
        )
        link = ["ip", "-n", self.switch.name, "link", "set", port]
        run([*link, "master", "br0", "up"])
        if isolated:
            run([*link, "type", "bridge_slave", "isolated", "on"])
        return namespace

    def detach(self, namespace: Namespace) -> None:
        """Delete a namespace; the kernel removes its veth pair with it."""
        run(["ip", "netns", "del", namespace.name])
        last = namespace.ipv4.rpartition(".")[2]
        self._attached -= {namespace.name.partition("-")[2], int(last or 0)}

    @contextlib.contextmanager
    def blocked(self, port: int, *namespaces: Namespace) -> Iterator[None]:
        """As by a provider: who connects to this TCP port of *namespaces* gets no answer at all."""
        rule = f"pref 1 iif host0 ipproto tcp dport {port} blackhole"
        try:
            for namespace in namespaces:
                for family in "46":
                    # the rule must come before the table of own addresses, which is always asked first
                    _ip(namespace, family, "rule add pref 2 lookup local", "rule del pref 0")
                    _ip(namespace, family, f"rule add {rule}")
            yield
        finally:
            for namespace in namespaces:
                for family in "46":
                    _ip(namespace, family, f"rule del {rule}")
                    _ip(namespace, family, "rule add pref 0 lookup local", "rule del pref 2")

    def close(self) -> None:
        self.detach(self.switch)

    def _namespace(self, name: str, ipv4: str = "", ipv6: str = "") -> Namespace:
        namespace = Namespace(f"cml{self._state.id}-{name}", ipv4, ipv6)
        self._state.record("netns", namespace.name)
        run(["ip", "netns", "add", namespace.name])
        # Duplicate address detection would keep link-local addresses unusable for a second.
        with inside(namespace):
            for scope in ("all", "default"):
                path = Path(f"/proc/sys/net/ipv6/conf/{scope}/accept_dad")
                if path.exists():
                    path.write_text("0")
        return namespace
