# SPDX-License-Identifier: MIT
"""One run of the lab: network, name server, hosts, clients; everything is gone when it ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from . import image
from .cleanup import Run
from .dns import NameServer
from .host import Host
from .network import Namespace, Network, inside
from .shell import LabError

NAME_SERVER = 1  # last number of its address
CLIENT = 2

#: unbound of a lab host: no root servers here, so no DNSSEC either; all else is the relay's own.
UNBOUND = """\
server:
    module-config: "iterator"
    do-not-query-localhost: no
forward-zone:
    name: "."
    forward-addr: {address}
"""


class Lab:
    """`with Lab("tests") as lab: host = lab.host("alpha", 11)`."""

    def __init__(self, purpose: str) -> None:
        self._stack = contextlib.ExitStack()
        self.tree = self._stack.enter_context(image.host_tree())
        image.download(self.tree)
        self.state = Run.create(purpose)
        self._hosts: list[Host] = []
        try:
            self.network = Network(self.state)
            self.dns = NameServer(self.network.attach("dns", NAME_SERVER))
            self.client = self.network.attach("client", CLIENT)
        except BaseException:
            self.state.destroy()
            raise

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def host(self, name: str, number: int, *, names: tuple[str, ...] = ()) -> Host:
        """Boot a new host at 10.77.0.*number*; *names* get A records that point to it."""
        namespace = self.network.attach(name, number)
        host = Host(self.state, name, namespace, self.tree)
        self._hosts.append(host)
        for item in names:
            self.dns.set(item, "A", namespace.ipv4)
        host.start()
        host.write("/etc/unbound/unbound.conf.d/lab.conf", UNBOUND.format(address=self.dns.address))
        return host

    def remove(self, host: Host) -> None:
        """Stop a host and forget it."""
        host.stop()
        self.network.detach(host.namespace)
        self._hosts.remove(host)

    @contextlib.contextmanager
    def at_client(self) -> Iterator[Namespace]:
        """Inside, this thread's new sockets are the client's."""
        with inside(self.client):
            yield self.client

    def rpc_server(self, folder: Path, program: Path) -> Path:
        """A wrapper of deltachat-rpc-server that runs it at the client, with the lab's names."""
        (folder / "resolv.conf").write_text(f"nameserver {self.dns.address}\n")
        (folder / "hosts").write_text("127.0.0.1 localhost\n")
        wrapper = folder / "rpc-server"
        inner = (
            "mount --make-rprivate / && "
            f"mount --bind {folder}/resolv.conf /etc/resolv.conf && "
            f"mount --bind {folder}/hosts /etc/hosts && exec {program}"
        )
        wrapper.write_text(
            f"#!/bin/sh\nexec nsenter --net={self.client.path} unshare --mount sh -c '{inner}'\n"
        )
        wrapper.chmod(0o755)
        return wrapper

    def close(self) -> None:
        """Stop everything in order, then make sure that nothing is left; raises LabError if it is."""
        try:
            for host in reversed(self._hosts):
                host.stop()
            self.dns.close()
            # processes are found by their namespaces, so before these go
            left = [line for line in self.state.leftovers() if line.startswith("process")]
            for name in self.state.recorded("netns"):
                if os.path.exists(f"/run/netns/{name}"):
                    self.network.detach(Namespace(name))
            self.state._remove_cgroups()
            left += self.state.leftovers()
        finally:
            self.state.destroy()
            self._stack.close()
        if left:
            raise LabError("left behind by the lab:\n" + "\n".join(left))
