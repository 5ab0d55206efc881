# SPDX-License-Identifier: MIT
"""A booted Debian 13 container: systemd in systemd-nspawn, on an overlay of the minimal tree.

What makes it work without systemd, dbus or KVM on the machine below: a cgroup of its own (else all
containers share one), a view of the cgroup2 hierarchy alone, CAP_NET_ADMIN together with a network
namespace (else systemd inside silently ignores PrivateNetwork=), and nsenter in place of machinectl.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from . import image
from .cleanup import Run, kill_and_wait
from .memory import Bound
from .network import Namespace
from .shell import LabError, Result, run

ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "TERM": "dumb",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}
#: What runs on every relay.
RELAY_UNITS = (
    "unbound.service",
    "chatmail-doveauth.service",
    "chatmail-metadata.service",
    "chatmail-filtermail.service",
    "dovecot.service",
    "postfix.service",
    "nginx.service",
    "chatmail-front.service",
    "chatmail-turn.service",
    "systemd-journald@chatmail.service",
)
BOOT_SECONDS = 60
STOP_SECONDS = 20
POWEROFF = signal.SIGRTMIN + 4  # to a systemd manager (systemd(1), Signals); needs no dbus

#: A plain tree in which programs run without systemd, as whoever makes an image has it.
_CHROOT = """
cd "$1"
mount -t proc proc proc
mount --bind /dev dev
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mkdir -p ".$2" && mount --bind "$3" ".$2"
mount --bind "$4" var/cache/apt/archives
script=$5
shift 5
exec env -i "$@" chroot . sh -euc "$script"
"""

# `exec` keeps the process id through unshare, sh and systemd-nspawn.
_BOOT = """
mount --make-rprivate / &&
for group in $1; do echo $$ >"$group/cgroup.procs" || exit 1; done
umount -R /sys/fs/cgroup &&
mount -t cgroup2 cgroup2 /sys/fs/cgroup || exit 1
shift
exec systemd-nspawn "$@"
"""

#: What a process does in the kernel, and which sockets have something that nobody has read or accepted.
LOOK = r"""
{ ps -eo pid,ppid,etimes,stat,wchan:20,args | grep -v '[]]$' | cut -c-110
systemctl list-units --all --plain --no-legend 'chatmail*' dovecot* postfix* nginx*
ss -xlp | awk '$3 > 0'; ss -xp | grep -E 'smtpd|tlsmgr|"master"|chatmail'
ss -tnap | grep -v TIME-WAIT; cat /proc/locks; } | tr -s ' ' | sed 's/users:((//; s/))//'
"""


class Host:
    """One container; `start` boots it, `exec` runs commands in it, `stop` ends and removes it."""

    def __init__(
        self, state: Run, name: str, namespace: Namespace, tree: Path, disk: int = 0
    ) -> None:
        self.name = name
        self.namespace = namespace
        self.boot_seconds = 0.0
        self.arguments: tuple[str, ...] = ()  # more of systemd-nspawn's, for the next boot
        self.memory_bound: Bound | None = None  # for the next boot
        self.largest: dict[str, tuple[float, float]] = {}  # (PSS, RSS) in MiB by unit, see memory()
        self._state = state
        self._tree = tree
        self._disk = disk  # MiB; 0 is as much as there is
        self._folder = state.directory / "hosts" / name
        self.root = self._folder / "root"
        self._archives = self._folder / "archives"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0

    @property
    def address(self) -> str:
        """Its IPv4 address on the lab's bridge."""
        return self.namespace.ipv4

    # -- life ----------------------------------------------------------------------------------

    def start(self, failed: Sequence[str] = ()) -> None:
        """Boot and wait until systemd has started everything; raises LabError with the console.

        The first start makes the disk; a later one, after power_off or kill, keeps it. *failed* are the
        units, and the only ones, that must fail.
        """
        begin = time.monotonic()
        self.prepare()
        self._boot()
        state = self.exec("systemctl", "is-system-running", check=False).out.strip()
        units = self.exec("systemctl", "--failed", "--plain", "--no-legend").out
        if [line.split()[0] for line in units.splitlines()] != list(failed):
            raise LabError(f"{self.name} is {state}: {units}")
        self.boot_seconds = time.monotonic() - begin

    def prepare(self) -> None:
        """Make the disk, unless there is one."""
        if not self.root.exists():
            if self._disk:
                self._folder.mkdir()
                options = f"mode=755,size={self._disk}m"
                run(["mount", "-t", "tmpfs", "-o", options, f"lab-{self.name}", self._folder])
            self._overlay(self._tree, self.root)
            # A view of its own, so that apt's lock on the cache is this host's alone.
            self._overlay(image.ARCHIVES, self._archives)
            self._identify()

    def chroot(self, script: str, timeout: float = 60) -> Result:
        """Run a shell script on the disk of a host that is not booted; its processes end with it."""
        pairs = [f"{key}={value}" for key, value in ENVIRONMENT.items()]
        isolated = [
            "--mount",
            "--propagation",
            "private",
            "--pid",
            "--fork",
            "--kill-child",
            "--net",
        ]
        places = (self.root, image.INSIDE_REPO, image.REPO.resolve(), self._archives)
        return run(
            ["unshare", *isolated, "sh", "-euc", _CHROOT, "sh", *places, script, *pairs],
            timeout=timeout,
        )

    def _identify(self) -> None:
        """What makes a machine one of its own."""
        for name, text in (
            ("hostname", f"{self.name}\n"),
            ("hosts", f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n"),
            ("resolv.conf", "# the lab's hosts have no resolver but the relay's\n"),
            ("machine-id", os.urandom(16).hex() + "\n"),
        ):
            path = self.root / "etc" / name
            path.unlink(missing_ok=True)
            path.write_text(text)

    def _overlay(self, lower: Path, target: Path) -> None:
        """Mount *lower* at *target*, with what is written kept beside it."""
        upper, work = (target.with_suffix(suffix) for suffix in (".upper", ".work"))
        for folder in (upper, work, target):
            folder.mkdir(parents=True, exist_ok=True)
        layers = f"lowerdir={lower},upperdir={upper},workdir={work}"
        run(["mount", "-t", "overlay", "-o", layers, f"lab-{self.name}", target])

    def _boot(self) -> None:
        address, console = self._folder / "notify", self._folder / "console.log"
        address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(address))
            nspawn = (
                *("-q", "-D", str(self.root), "--boot", "-M", f"{self.name}-{self._state.id}"),
                *("--register=no", "--keep-unit", "--notify-ready=yes", "--console=passive"),
                f"--network-namespace-path={self.namespace.path}",
                *("--capability=CAP_NET_ADMIN", "--resolv-conf=off", "--link-journal=no"),
                "--system-call-filter=pidfd_getfd",  # as on a machine; dovecot-stop
                f"--bind-ro={image.REPO.resolve()}:{image.INSIDE_REPO}",
                f"--bind={self._archives}:/var/cache/apt/archives",
                *self.arguments,
            )
            cgroup = str(self._state.new_cgroup(self.name))
            if self.memory_bound is not None:
                cgroup = self.memory_bound.join(cgroup)
            with console.open("ab") as out:
                self._nspawn = subprocess.Popen(
                    ["unshare", "--mount", "sh", "-c", _BOOT, "boot", cgroup, *nspawn],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    env={"PATH": ENVIRONMENT["PATH"], "NOTIFY_SOCKET": str(address)},
                    start_new_session=True,
                )
            self._state.record_process(self._nspawn.pid)
            try:
                self._wait_ready(notify)
            except LabError as error:
                self.kill()
                raise LabError(f"{error}\n{console.read_text(errors='replace')}") from None
            except BaseException:
                self.kill()
                raise

    def _wait_ready(self, notify: socket.socket) -> None:
        """Read what nspawn passes on of sd_notify(3) until the start is finished."""
        assert self._nspawn is not None
        deadline = time.monotonic() + BOOT_SECONDS
        died = os.pidfd_open(self._nspawn.pid)
        try:
            while True:
                left = max(deadline - time.monotonic(), 0)
                ready = select.select([notify.fileno(), died], [], [], left)[0]
                if notify.fileno() in ready:
                    message = notify.recv(65536).decode(errors="replace")
                    if match := re.search(r"^X_NSPAWN_LEADER_PID=(\d+)", message, re.MULTILINE):
                        self._leader = int(match[1])
                    if re.search(r"^READY=1", message, re.MULTILINE) and self._leader:
                        return
                elif died in ready:
                    raise LabError(f"{self.name} ended while it booted")
                else:
                    raise LabError(f"{self.name} did not boot within {BOOT_SECONDS} s")
        finally:
            os.close(died)

    @property
    def running(self) -> bool:
        """Whether the container runs."""
        return self._nspawn is not None and self._nspawn.poll() is None

    def power_off(self) -> None:
        """An orderly shutdown, by force after STOP_SECONDS; the disk stays."""
        if self._nspawn is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._leader, POWEROFF)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._nspawn.wait(STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End the container at once, as if the power failed; the disk stays."""
        if self._nspawn is None:
            return
        if self._leader and self.running:
            kill_and_wait(self._leader, signal.SIGKILL, STOP_SECONDS)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._nspawn.wait(1 if self._leader else 0)
        if self.running:
            self._nspawn.kill()
        self._nspawn.wait(STOP_SECONDS)
        self._nspawn, self._leader = None, 0

    def stop(self) -> None:
        """Power off, and remove the disk."""
        self.power_off()
        for target in (self.root, self._archives, self._folder):
            if os.path.ismount(target):
                run(["umount", target])
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextlib.contextmanager
    def full_disk(self, left: int) -> Iterator[None]:
        """So many bytes may still be written to a disk of limited size, until the body ends."""
        assert self._disk, f"{self.name} has no disk of its own"

        def resize(size: int | str) -> None:
            run(["mount", "-o", f"remount,size={size}", self._folder])

        info = os.statvfs(self._folder)
        resize((info.f_blocks - info.f_bfree) * info.f_frsize + left)
        try:
            yield
        finally:
            resize(f"{self._disk}m")

    # -- snapshots -----------------------------------------------------------------------------

    def snapshot(self, name: str) -> Path:
        """Copy what was written to the disk so far (power_off first for consistent files)."""
        copy = self._state.directory / "hosts" / f"{self.name}.{name}"
        copy.mkdir()
        run(["cp", "-a", f"{self.root.with_suffix('.upper')}/.", copy], timeout=300)
        return copy

    def restore(self, snapshot: Path) -> None:
        """Back to a snapshot, of this host or another one of the same tree: kill, replace, boot."""
        self.kill()
        run(["umount", self.root])
        upper, work = self.root.with_suffix(".upper"), self.root.with_suffix(".work")
        shutil.rmtree(upper)
        shutil.rmtree(work)
        self._overlay(self._tree, self.root)
        run(["umount", self.root])  # the copy must not be made below a mounted overlay
        run(["cp", "-a", f"{snapshot}/.", upper], timeout=300)
        self._overlay(self._tree, self.root)
        self._boot()

    # -- commands, files, log --------------------------------------------------------------------

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

    def state(self, since: float) -> str:
        """For who wants to know what went wrong: who waits for what, sockets, the log since a time.time()."""
        parts = [self.sh(LOOK, check=False).out[:16000]]
        for namespace in ("chatmail", ""):
            log = self.journal(namespace, f"--since=@{since:.6f}")
            parts.append(f"log of {namespace or 'the host'}:\n{log[-6000:]}")
        return "\n".join(parts)

    def wait_log(
        self, pattern: str, since: float, namespace: str = "*", timeout: float = 20
    ) -> str:
        """Follow the journal until a line of it matches; *since* is a time.time(). Returns the line."""
        words = ("journalctl", "-q", "-o", "cat", f"--namespace={namespace}", "-f", "--no-tail")
        follow = subprocess.Popen(
            self.command(*words, f"--since=@{since:.6f}"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert follow.stdout is not None
        seen: list[str] = []
        try:
            for line in _lines_until(follow.stdout.fileno(), time.monotonic() + timeout):
                if re.search(pattern, line):
                    return line
                seen.append(line)
        finally:
            os.killpg(follow.pid, signal.SIGKILL)
            follow.wait()
            follow.stdout.close()
        last = "\n".join(seen[-15:])
        raise LabError(
            f"{self.name}: no {pattern!r} in the log within {timeout:g} s; last:\n{last}"
        )

    def files(self, *folders: str) -> set[str]:
        """The names of all files below *folders*."""
        return set(self.exec("find", *folders, "-xdev", "!", "-type", "d").out.splitlines())

    def memory(self) -> dict[str, float]:
        """Proportional set size in MiB by unit, of all processes inside; `largest` remembers the most."""
        script = (
            "for p in /proc/[0-9]*; do u=$(sed -n 's/^0::.*\\///p' $p/cgroup 2>/dev/null) &&"
            " k=$(sed -n 's/^[PR]ss: *\\([0-9]*\\).*/\\1/p' $p/smaps_rollup 2>/dev/null) &&"
            ' [ -n "$k" ] && echo "$u" $k; done; true'
        )
        total: dict[str, tuple[float, float]] = {}
        for line in self.sh(script, check=False).out.splitlines():
            unit, rss, pss = line.rsplit(" ", 2)  # in the order of smaps_rollup, proc(5)
            before = total.get(unit, (0.0, 0.0))
            total[unit] = (before[0] + int(pss) / 1024, before[1] + int(rss) / 1024)
        for unit, sizes in total.items():
            self.largest[unit] = max(sizes, self.largest.get(unit, sizes))
        return {unit: pss for unit, (pss, _) in total.items()}

    def use_repository(self) -> None:
        """Let apt know our signed repository."""
        self.sh(f"cp {image.INSIDE_REPO}/{image.KEYRING_NAME} /usr/share/keyrings/")
        self.write("/etc/apt/sources.list.d/chatmail.sources", image.SOURCES)
        self.sh(image.UPDATE)

    def install_relay(
        self, domain: str, answers: Mapping[str, str] | None = None, timeout: float = 300
    ) -> float:
        """apt-get install chatmail-relay and what it recommends of ours; seconds it took.

        *answers* to debconf's other questions: name -> "TYPE VALUE".
        """
        self.use_repository()
        given = {**(answers or {})}
        if domain:
            given["mail_domain"] = f"string {domain}"
        lines = [f"chatmail-relay chatmail-relay/{name} {given[name]}\n" for name in given]
        self.exec("debconf-set-selections", input="".join(lines))
        begin = time.monotonic()
        packages = "chatmail-relay dovecot-chatmail"
        self.sh(f"apt-get install -q --yes --no-install-recommends {packages}", timeout=timeout)
        return time.monotonic() - begin


def _lines_until(fd: int, deadline: float) -> Iterator[str]:
    """Lines of a pipe as they come, until its end or the deadline."""
    rest = b""
    while select.select([fd], [], [], max(deadline - time.monotonic(), 0))[0]:
        data = os.read(fd, 65536)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
