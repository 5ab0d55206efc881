# SPDX-License-Identifier: MIT
"""What a run of the lab makes on the host, and how all of it goes away again.

A run owns one directory below STATE. Every process group (cgroup), process, network namespace and
mount is written to its `resources` file *before* it is made, so that a later run can remove what a
killed one left behind. Nothing is ever killed by name: only members of a cgroup that the run made,
or a process whose id and start time were recorded.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from .shell import LabError, run, wait_for

STATE = Path("/run/chatmail-lab")
NETNS = Path("/run/netns")

# Limits of the whole host that containers share. Dovecot uses one inotify instance for each idle
# session, and every service manager a few; the kernel's default of 128 ends at the second relay.
HOST_LIMITS = {
    "fs.inotify.max_user_instances": 65535,
    "fs.inotify.max_user_watches": 524288,
    "kernel.keys.maxkeys": 2000,
    "kernel.keys.maxbytes": 200000,
}


def start_time(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot (proc_pid_stat(5), field 22), or None."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return stat.rpartition(")")[2].split()[19]


def is_alive(pid: int, start: str) -> bool:
    """Whether exactly this process (not another one that got its number later) still runs."""
    return start_time(pid) == start


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def cgroup_root() -> Path:
    """Mount point of the cgroup2 hierarchy: all of it, or the `unified` part of a hybrid host."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[fields.index("-") + 1] == "cgroup2":
            return Path(fields[4])
    raise LabError("no cgroup2 hierarchy is mounted on this host")


def kill_and_wait(pid: int, sig: int, timeout: float) -> bool:
    """Send a signal and wait for the process to end, without polling. True if it is gone."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, sig)
        return bool(select.select([fd], [], [], timeout)[0])
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; waits for the other holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Run:
    """State of one run: its directory, the record of what it made, and the removal of all that."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.id = directory.name
        self.cgroup = cgroup_root() / "chatmail-lab" / self.id

    @classmethod
    def create(cls, purpose: str) -> Run:
        """A new run, owned by this process. Reaps what dead runs left first."""
        reap()
        me = os.getpid()
        self = cls(STATE / f"{me:x}{os.urandom(2).hex()}")
        owner = {"pid": me, "start": start_time(me), "boot": boot_id(), "purpose": purpose}
        with locked(STATE / "lock"):
            self.directory.mkdir(parents=True, mode=0o755)
            (self.directory / "owner").write_text(json.dumps(owner))
        raise_limits()
        return self

    @property
    def owner(self) -> dict[str, str | int]:
        try:
            data: dict[str, str | int] = json.loads((self.directory / "owner").read_text())
        except (FileNotFoundError, json.JSONDecodeError):  # killed while the run was being made
            return {"pid": 0, "start": "", "boot": "", "purpose": "unknown"}
        return data

    @property
    def owner_alive(self) -> bool:
        owner = self.owner
        return owner["boot"] == boot_id() and is_alive(int(owner["pid"]), str(owner["start"]))

    def adopt(self) -> None:
        """Make this process the owner (a daemon does so after its fork)."""
        owner = self.owner | {"pid": os.getpid(), "start": str(start_time(os.getpid()))}
        (self.directory / "owner").write_text(json.dumps(owner))

    # -- the record ----------------------------------------------------------------------------

    def record(self, kind: str, name: str) -> None:
        """Note a resource before it is made: kind is cgroup, netns or pid (`PID START`)."""
        with (self.directory / "resources").open("a") as file:
            file.write(json.dumps([kind, name]) + "\n")

    def recorded(self, kind: str) -> list[str]:
        try:
            lines = (self.directory / "resources").read_text().splitlines()
        except FileNotFoundError:
            return []
        pairs = (json.loads(line) for line in lines if line.endswith("]"))
        return [name for this, name in pairs if this == kind]

    def record_process(self, pid: int) -> None:
        start = start_time(pid)
        if start is not None:
            self.record("pid", f"{pid} {start}")

    def new_cgroup(self, name: str) -> Path:
        """Make and record the cgroup of one host or client."""
        path = self.cgroup / name
        self.record("cgroup", str(path))
        path.mkdir(parents=True, exist_ok=True)
        return path

    # -- what is there -------------------------------------------------------------------------

    def processes(self) -> list[int]:
        """Ids of all processes in a cgroup or a network namespace of this run, or recorded."""
        pids = {pid for path in self._cgroups() for pid in _members(path)}
        for item in self.recorded("pid"):
            pid, start = item.split()
            if is_alive(int(pid), start):
                pids.add(int(pid))
        inodes = {inode for name in self.recorded("netns") if (inode := _inode(NETNS / name))}
        for entry in os.listdir("/proc"):
            if entry.isdigit() and _inode(Path(f"/proc/{entry}/ns/net")) in inodes:
                pids.add(int(entry))
        return sorted(pids - {os.getpid()})

    def mounts(self) -> list[str]:
        """Mount points of this run in the host's mount namespace, outermost first."""
        prefix = str(self.directory) + "/"
        points = [line.split()[4] for line in Path("/proc/self/mountinfo").open()]
        return [point for point in points if point.startswith(prefix)]

    def describe_processes(self) -> list[str]:
        """One line for each process that is left, with its command line."""
        found = []
        for pid in self.processes():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                found.append(f"process {pid}: {b' '.join(words).decode(errors='replace').strip()}")
        return found

    def leftovers(self) -> list[str]:
        """One line for each thing that is still there; empty after an orderly end."""
        found = self.describe_processes()
        found += [f"mount {point}" for point in self.mounts()]
        found += [
            f"network namespace {name}"
            for name in self.recorded("netns")
            if (NETNS / name).exists()
        ]
        found += [f"cgroup {path}" for path in self._cgroups()]
        found += [
            f"link {name}"
            for name in os.listdir("/sys/class/net")
            if name.startswith(f"cml{self.id}"[:15])
        ]
        return found

    def _cgroups(self) -> list[Path]:
        """The run's cgroups that exist, innermost first (the order in which rmdir works)."""
        roots = [Path(name) for name in self.recorded("cgroup")] + [self.cgroup]
        paths = {
            path
            for root in roots
            if root.is_dir()
            for path in [root, *(p for p in root.rglob("*") if p.is_dir())]
        }
        return sorted(paths, key=lambda path: (-len(path.parts), path))

    # -- the end -------------------------------------------------------------------------------

    def destroy(self) -> None:
        """Remove everything of this run, by force; safe to call twice."""
        self.kill_processes()
        for point in reversed(self.mounts()):
            run(["umount", "-l", point], check=False)
        for name in self.recorded("netns"):
            if (NETNS / name).exists():
                run(["ip", "netns", "del", name], check=False)
        # the kernel takes 10 ms to close what a hibernated session of Dovecot has open
        wait_for(self.remove_cgroups, 120, f"removal of the cgroups of run {self.id}")
        if not self.mounts():
            shutil.rmtree(self.directory, ignore_errors=True)
        restore_limits()

    def kill_processes(self) -> None:
        """Kill all processes of this run; call it while its namespaces still have their names."""
        for path in self._cgroups():
            with contextlib.suppress(FileNotFoundError):
                if (path / "cgroup.kill").exists():
                    (path / "cgroup.kill").write_text("1")
                else:  # a cgroup v1 hierarchy (memory limits); its members are in ours as well
                    for pid in _members(path):
                        kill_and_wait(pid, signal.SIGKILL, 10)
        for item in self.recorded("pid"):
            number, start = item.split()
            if is_alive(int(number), start):
                kill_and_wait(int(number), signal.SIGKILL, 10)
        for member in self.processes():  # in a namespace of ours, but started outside our cgroups
            kill_and_wait(member, signal.SIGKILL, 10)

    def remove_cgroups(self) -> bool:
        """Remove the cgroups that have no process; whether all are gone."""
        for path in self._cgroups():
            with contextlib.suppress(OSError):
                path.rmdir()
        with contextlib.suppress(OSError):
            self.cgroup.parent.rmdir()
        return not self._cgroups()


def _members(cgroup: Path) -> list[int]:
    try:
        return [int(pid) for pid in (cgroup / "cgroup.procs").read_text().split() if pid != "0"]
    except OSError:
        return []


def _inode(path: Path) -> int | None:
    """Inode of a namespace file: the namespace's identity, or None if there is none."""
    try:
        return path.stat().st_ino
    except OSError:
        return None


def runs() -> list[Run]:
    """All runs with a state directory, dead or alive."""
    if not STATE.is_dir():
        return []
    return [Run(path) for path in sorted(STATE.iterdir()) if path.is_dir()]


def reap() -> list[str]:
    """Remove every run whose owner is gone. Returns their ids."""
    gone = []
    with locked(STATE / "lock"):
        dead = [stale for stale in runs() if not stale.owner_alive]
    for stale in dead:
        stale.destroy()
        gone.append(stale.id)
    return gone


# -- limits of the host -------------------------------------------------------------------------


def _sysctl(key: str) -> Path:
    return Path("/proc/sys") / key.replace(".", "/")


def raise_limits() -> None:
    """Raise the limits in HOST_LIMITS that are lower, and remember what they were."""
    saved = STATE / "limits.json"
    with locked(STATE / "lock"):
        before = json.loads(saved.read_text()) if saved.exists() else {}
        for key, wanted in HOST_LIMITS.items():
            value = int(_sysctl(key).read_text())
            if value < wanted:
                before.setdefault(key, value)
                saved.write_text(json.dumps(before))
                _sysctl(key).write_text(str(wanted))


def restore_limits() -> None:
    """Put the limits back once no run is alive any more."""
    saved = STATE / "limits.json"
    with locked(STATE / "lock"):
        if not saved.exists() or any(other.owner_alive for other in runs()):
            return
        for key, value in json.loads(saved.read_text()).items():
            _sysctl(key).write_text(str(value))
        saved.unlink()
