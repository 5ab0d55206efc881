# SPDX-License-Identifier: MIT
"""A booted Debian 13 container: systemd in systemd-nspawn, on an overlay of the minimal tree.

What makes it work without systemd, dbus or KVM on the machine below: a cgroup of its own (else all
containers share one), a view of the cgroup2 hierarchy alone, CAP_NET_ADMIN together with a network
namespace (else systemd inside silently ignores PrivateNetwork=), and nsenter in place of machinectl.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import time
from pathlib import Path

from . import image
from .cleanup import Run
from .network import Namespace
from .shell import CommandFailed, LabError, Result, run, wait_for

ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "TERM": "dumb",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}
BOOT_SECONDS = 60

_BOOT = """
set -e
mount --make-rprivate /
echo $$ >{cgroup}/cgroup.procs
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec systemd-nspawn -q -D {root} --boot -M {machine} --register=no --keep-unit \
    --network-namespace-path={netns} --capability=CAP_NET_ADMIN,CAP_SYS_RESOURCE \
    --resolv-conf=off --link-journal=no --console=passive \
    --bind-ro={repo}:{inside_repo} --bind={archives}:/var/cache/apt/archives
"""


class Host:
    """One container; `start` boots it, `exec` runs commands in it, `stop` ends it."""

    def __init__(self, state: Run, name: str, namespace: Namespace, tree: Path) -> None:
        self.name = name
        self.namespace = namespace
        self._state = state
        self._tree = tree
        self._folder = state.directory / "hosts" / name
        self.root = self._folder / "root"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0

    @property
    def address(self) -> str:
        """Its IPv4 address on the lab's bridge."""
        return self.namespace.ipv4

    def start(self) -> None:
        """Boot and wait until systemd has started everything; raises LabError with the console."""
        for name in ("upper", "work", "root"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        layers = f"lowerdir={self._tree},upperdir={self._folder}/upper,workdir={self._folder}/work"
        run(["mount", "-t", "overlay", "-o", layers, f"lab-{self.name}", self.root])
        (self.root / "etc/hostname").write_text(f"{self.name}\n")
        (self.root / "etc/hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")
        resolv_conf = self.root / "etc/resolv.conf"
        resolv_conf.unlink(missing_ok=True)
        resolv_conf.write_text("# the lab's hosts have no resolver but the relay's\n")
        script = _BOOT.format(
            cgroup=shlex.quote(str(self._state.new_cgroup(self.name))),
            root=self.root,
            machine=self.name,
            netns=self.namespace.path,
            repo=image.REPO,
            inside_repo=image.INSIDE_REPO,
            archives=image.ARCHIVES,
        )
        console = (self._folder / "console.log").open("wb")
        self._nspawn = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            start_new_session=True,
        )
        self._state.record_process(self._nspawn.pid)
        try:
            self._leader = wait_for(self._find_leader, BOOT_SECONDS, f"boot of {self.name}")
            state = wait_for(self._system_state, BOOT_SECONDS, f"systemd of {self.name}")
        except AssertionError as error:
            text = (self._folder / "console.log").read_text(errors="replace")
            raise LabError(f"{error}\n{text}") from None
        if state != "running":
            raise LabError(self.exec("systemctl", "--failed", "--no-pager").out)

    def _find_leader(self) -> int:
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            raise LabError((self._folder / "console.log").read_text(errors="replace"))
        pid = self._nspawn.pid
        ours = os.readlink("/proc/self/ns/pid")
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            # before nspawn there are short-lived children of the script, in our own namespace
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{child}/ns/pid") != ours:
                    return int(child)
        return 0

    def _system_state(self) -> str:
        said = self.exec("systemctl", "is-system-running", check=False).out.strip()
        return said if said in ("running", "degraded") else ""

    def command(self, *argv: str) -> list[str]:
        """The host machine's command line that runs *argv* inside."""
        pairs = [f"{key}={value}" for key, value in ENVIRONMENT.items()]
        enter = ["nsenter", "-t", str(self._leader), "-m", "-u", "-i", "-n", "-p", "-C", "--"]
        return [*enter, "/usr/bin/env", "-i", *pairs, *argv]

    def exec(
        self,
        *argv: str,
        check: bool = True,
        input: str | None = None,
        timeout: float = 60,
    ) -> Result:
        """Run a command inside as root; raises CommandFailed unless *check* is false."""
        return run(self.command(*argv), check=check, input=input, timeout=timeout)

    def sh(self, script: str, check: bool = True, timeout: float = 60) -> Result:
        """Run a shell script inside, stopping at the first error."""
        return self.exec("sh", "-euc", script, check=check, timeout=timeout)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file inside."""
        self.exec("install", "-D", "-m", f"{mode:o}", "/dev/stdin", path, input=text)

    def read(self, path: str) -> str:
        """Read a file inside."""
        return self.exec("cat", path).out

    def journal(self, namespace: str = "chatmail", *arguments: str) -> str:
        """The log of a journal namespace; "" for the system's own."""
        where = [f"--namespace={namespace}"] if namespace else []
        return self.exec("journalctl", "--no-pager", "-o", "short", *where, *arguments).out

    def files(self, *folders: str) -> set[str]:
        """The names of all files below *folders*."""
        return set(self.exec("find", *folders, "-xdev", "!", "-type", "d").out.splitlines())

    def memory(self) -> dict[str, float]:
        """Proportional set size in MiB by unit, of all processes inside."""
        script = (
            "for p in /proc/[0-9]*; do u=$(sed -n 's/^0::.*\\///p' $p/cgroup 2>/dev/null) &&"
            " k=$(sed -n 's/^Pss: *\\([0-9]*\\).*/\\1/p' $p/smaps_rollup 2>/dev/null) &&"
            ' [ -n "$k" ] && echo "$u $k"; done; true'
        )
        total: dict[str, float] = {}
        for line in self.sh(script, check=False).out.splitlines():
            unit, _, size = line.rpartition(" ")
            total[unit] = total.get(unit, 0) + int(size) / 1024
        return total

    def stop(self) -> None:
        """Power off, by force after 15 seconds, and unmount."""
        if self._nspawn is None:
            return
        if self._leader:
            try:
                self.exec("systemctl", "poweroff", check=False, timeout=10)
            except CommandFailed:
                pass
        try:
            self._nspawn.wait(15)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._leader, 9)
            self._nspawn.kill()
            self._nspawn.wait(15)
        self._nspawn = None
        run(["umount", self.root])

    def install_relay(self, domain: str, timeout: float = 300) -> float:
        """apt-get install chatmail-relay from the signed repository; seconds it took."""
        self.sh(f"cp {image.INSIDE_REPO}/{image.KEYRING_NAME} /usr/share/keyrings/")
        self.write("/etc/apt/sources.list.d/chatmail.sources", image.SOURCES)
        self.sh(image.UPDATE)
        if domain:
            answer = f"chatmail-relay chatmail-relay/mail_domain string {domain}\n"
            self.exec("debconf-set-selections", input=answer)
        begin = time.monotonic()
        self.sh("apt-get install -q --yes --no-install-recommends chatmail-relay", timeout=timeout)
        return time.monotonic() - begin
