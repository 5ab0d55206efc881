# SPDX-License-Identifier: MIT
"""A host with little memory: a cgroup that bounds it without swap, and what the host believes to have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .cleanup import Run, cgroup_root

if TYPE_CHECKING:
    from .host import Host

V1 = Path("/sys/fs/cgroup/memory")  # of a hybrid machine


class Bound:
    """The bound of one host, before it boots: `host.memory_bound = Bound(run, name, 2**30)`."""

    def __init__(self, state: Run, name: str, size: int) -> None:
        self.size = size
        self._v1 = (V1 / "memory.limit_in_bytes").exists()
        if self._v1:
            self.cgroup = V1 / "chatmail-lab" / state.id / name
            state.record("cgroup", str(self.cgroup.parent))
            self.cgroup.mkdir(parents=True)
            (self.cgroup / "memory.limit_in_bytes").write_text(str(size))
            swap = self.cgroup / "memory.memsw.limit_in_bytes"
            if swap.exists():
                swap.write_text(str(size))
        else:
            self.cgroup = state.new_cgroup(f"{name}-memory")
            for folder in (cgroup_root(), state.cgroup.parent, state.cgroup):
                (folder / "cgroup.subtree_control").write_text("+memory")
            (self.cgroup / "memory.max").write_text(str(size))
            (self.cgroup / "memory.swap.max").write_text("0")

    def join(self, cgroup: str) -> str:
        """The cgroups, separated by spaces, that a host must be in; *cgroup* is the one it has anyway."""
        return f"{cgroup} {self.cgroup}" if self._v1 else str(self.cgroup)

    @property
    def kills(self) -> int:
        """Processes that the kernel killed because there was no memory left."""
        name = "memory.oom_control" if self._v1 else "memory.events"
        words = [line.split() for line in (self.cgroup / name).read_text().splitlines()]
        return int({key: value for key, value in words}["oom_kill"])

    @property
    def highest(self) -> int:
        """The most memory that was in use, page cache included; bytes."""
        name = "memory.max_usage_in_bytes" if self._v1 else "memory.peak"
        return int((self.cgroup / name).read_text())

    def tell(self, host: Host) -> None:
        """Show the bound in /proc/meminfo of the running *host*, as lxcfs(1) does."""
        total = self.size // 1024
        text = f"MemTotal: {total:14} kB\nMemFree: {total // 2:15} kB\nMemAvailable: {total // 2:10} kB\n"
        host.write(
            "/root/meminfo", text + "SwapTotal:             0 kB\nSwapFree:              0 kB\n"
        )
        host.exec("mount", "--bind", "/root/meminfo", "/proc/meminfo")
