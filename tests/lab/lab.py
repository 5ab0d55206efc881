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
from .shell import LabError, WaitTimeout, run, wait_for

NAME_SERVER = 1  # last number of its address
CLIENT = 2
ENOUGH_MEMORY = 4 * 2**30  # bytes

#: unbound of a lab host: no root servers here, so no DNSSEC either; all else is the relay's own.
UNBOUND = """\
server:
    module-config: "iterator"
    do-not-query-localhost: no
    # one name server for everything: that it was slow once, on a busy machine, is soon forgotten
    infra-host-ttl: 1
    infra-keep-probing: yes
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
        self.hosts: list[Host] = []
        try:
            self._mount_memory()
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

    def _mount_memory(self) -> None:
        """Keep the disks of hosts in memory where there is enough: dpkg's fsync costs nothing."""
        folder = self.state.directory / "hosts"
        folder.mkdir()
        self.in_memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") > ENOUGH_MEMORY
        if self.in_memory:
            run(["mount", "-t", "tmpfs", "-o", "mode=755,size=75%", "lab-hosts", folder])

    def host(self, name: str, number: int, *, names: tuple[str, ...] = (), disk: int = 0) -> Host:
        """Boot a new host at 10.77.0.*number*; *names* get A records that point to it.

        *disk*: MiB that it may write, which `full_disk` then can take away.
        """
        host = self.boot(name, number, disk)
        for item in names:
            self.dns.set(item, "A", host.address)
        host.write("/etc/unbound/unbound.conf.d/lab.conf", UNBOUND.format(address=self.dns.address))
        return host

    def boot(self, name: str, number: int, disk: int = 0) -> Host:
        """A new host at 10.77.0.*number* and fd77::*number* that knows no name server."""
        host = self.disk(name, number, disk)
        host.start()
        return host

    def disk(self, name: str, number: int, size: int = 0) -> Host:
        """The same, not booted."""
        host = Host(self.state, name, self.network.attach(name, number), self.tree, size)
        self.hosts.append(host)
        host.prepare()
        return host

    def publish_key(self, relay: Host, domain: str) -> None:
        """Let the name server know the DKIM key of the relay of *domain*."""
        path = "/var/lib/chatmail/keys/dkim/rsa.pem"
        key = relay.sh(f"openssl pkey -in {path} -pubout -outform DER | base64 -w0").out.strip()
        text = f"v=DKIM1; k=rsa; p={key}"
        self.dns.set(f"chatmail._domainkey.{domain}", "TXT", f'"{text[:200]}" "{text[200:]}"')

    def remove(self, host: Host) -> None:
        """Stop a host and forget it."""
        host.stop()
        self.network.detach(host.namespace)
        self.hosts.remove(host)

    @contextlib.contextmanager
    def at_client(self) -> Iterator[Namespace]:
        """Inside, this thread's new sockets are the client's."""
        with inside(self.client):
            yield self.client

    def place(self, name: str, number: int) -> Namespace:
        """Another client at 10.77.0.*number*; it reaches the hosts, but no client of this kind."""
        return self.network.attach(name, number, isolated=True)

    def rpc_server(self, folder: Path, program: Path, resolver: str = "") -> Path:
        """A wrapper of deltachat-rpc-server that runs it at the client."""
        return self.wrapper(folder, program, resolver=resolver)

    def wrapper(
        self, folder: Path, program: Path, place: Namespace | None = None, resolver: str = ""
    ) -> Path:
        """A program that runs *program* at a client; made in *folder*.

        It asks the name server *resolver*, or the lab's own.
        """
        (folder / "resolv.conf").write_text(f"nameserver {resolver or self.dns.address}\n")
        (folder / "hosts").write_text("127.0.0.1 localhost\n")
        wrapper = folder / f"at-client-{program.name}"
        cgroup = self.state.new_cgroup("client")
        inner = (
            f"echo $$ >{cgroup}/cgroup.procs && mount --make-rprivate / && "
            f"mount --bind {folder}/resolv.conf /etc/resolv.conf && "
            f'mount --bind {folder}/hosts /etc/hosts && exec {program} "$@"'
        )
        net = (place or self.client).path
        wrapper.write_text(
            f"#!/bin/sh\nexec nsenter --net={net} unshare --mount sh -c '{inner}' sh \"$@\"\n"
        )
        wrapper.chmod(0o755)
        return wrapper

    def close(self) -> None:
        """Stop everything in order, then make sure that nothing is left; raises LabError if it is."""
        left: list[str] = []
        try:
            for host in reversed(self.hosts):
                host.kill()  # nobody looks at these disks again
                host.stop()
            self.dns.close()
            # Asked first: once a namespace has lost its name, nothing tells who is inside.
            left += self.state.describe_processes()
            self.state.kill_processes()
            for name in self.state.recorded("netns"):
                if os.path.exists(f"/run/netns/{name}"):
                    self.network.detach(Namespace(name))
            if self.in_memory:
                run(["umount", self.state.directory / "hosts"])
            with contextlib.suppress(WaitTimeout):  # a killed container's processes end a bit later
                wait_for(self.state.remove_cgroups, 5)
            left += self.state.leftovers()
        finally:
            self.state.destroy()
            self._stack.close()
        if left:
            raise LabError("left behind by the lab:\n" + "\n".join(left))
