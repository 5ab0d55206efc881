# SPDX-License-Identifier: MIT
"""Run a command in a tree: own mounts, processes, IPC and (by default) no network.

The tree is the read-only lower layer of an overlay whose upper layer is a tmpfs, so a run changes
nothing, and the kernel removes mounts and processes when the run ends, also after SIGKILL.

This file is a module and a program: `run()` starts `unshare ... python3 -I sandbox.py SPEC`, which
mounts and enters. Needs root and overlayfs.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: The unprivileged user that every tree has (made by trees.py).
BUILDER = 2952

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Bind:
    """A host directory or file shown inside. Read-only unless said otherwise."""

    source: str
    target: str
    writable: bool = False


@dataclass
class Spec:
    """What to run and with what around it."""

    tree: str
    argv: list[str]
    binds: list[Bind] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    cwd: str = "/"
    uid: int = 0
    #: An empty host directory; the tmpfs with the overlay's upper layer is mounted there.
    scratch: str = ""


def command(spec: Spec, *, network: bool = False) -> list[str]:
    """The host command that carries out `spec`."""
    namespaces = ["--mount", "--pid", "--ipc", "--uts"] + ([] if network else ["--net"])
    return [
        "unshare",
        *namespaces,
        *("--propagation", "private", "--fork", "--kill-child"),
        *("/usr/bin/python3", "-I", __file__, json.dumps(asdict(spec))),
    ]


def run(
    tree: Path,
    argv: Sequence[str],
    *,
    binds: Sequence[Bind] = (),
    env: Mapping[str, str] | None = None,
    cwd: str = "/",
    uid: int = 0,
    network: bool = False,
    check: bool = True,
    **popen: Any,
) -> subprocess.CompletedProcess[Any]:
    """Like subprocess.run(), inside `tree`. Raises CalledProcessError if `check`."""
    from .paths import CACHE  # here, because inside the namespaces this file is no module

    scratch = CACHE / "mnt"
    scratch.mkdir(parents=True, exist_ok=True)
    spec = Spec(str(tree), list(argv), list(binds), dict(env or {}), cwd, uid, str(scratch))
    return subprocess.run(command(spec, network=network), check=check, **popen)


# ---- inside the new namespaces --------------------------------------------------------------------


def _mount(*args: str) -> None:
    subprocess.run(["mount", *args], check=True)


def _devices(root: Path) -> None:
    """A /dev with the harmless devices only."""
    _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", f"{root}/dev")
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        (root / "dev" / name).touch()
        _mount("--bind", f"/dev/{name}", f"{root}/dev/{name}")
    for name in ("pts", "shm"):
        (root / "dev" / name).mkdir()
    _mount("-t", "devpts", "-o", "newinstance,ptmxmode=666,mode=620", "devpts", f"{root}/dev/pts")
    _mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", f"{root}/dev/shm")
    (root / "dev/ptmx").symlink_to("pts/ptmx")
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        (root / "dev" / name).symlink_to(f"/proc/self/{target}")


def _loopback_up() -> None:
    """Raise `lo` (SIOCSIFFLAGS, netdevice(7)); tests of network code need it. No-op when shared."""
    siocgifflags, siocsifflags, up = 0x8913, 0x8914, 0x1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(sock, siocgifflags, request))[1]
        if not flags & up:
            fcntl.ioctl(sock, siocsifflags, struct.pack("16sH14x", b"lo", flags | up))


def _enter(spec: Spec) -> None:
    """Mount the overlay and what a program expects around it, then make it the root."""
    scratch = Path(spec.scratch)
    _mount("-t", "tmpfs", "-o", "mode=755,size=75%", "tmpfs", str(scratch))
    upper, work, root = scratch / "upper", scratch / "work", scratch / "root"
    for directory in (upper, work, root):
        directory.mkdir(mode=0o755)
    layers = f"lowerdir={spec.tree},upperdir={upper},workdir={work}"
    _mount("-t", "overlay", "-o", layers, "overlay", str(root))
    _mount("-t", "proc", "proc", f"{root}/proc")
    _mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", f"{root}/tmp")
    _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", f"{root}/run")
    _devices(root)
    for bind in spec.binds:
        target = root / bind.target.lstrip("/")
        if Path(bind.source).is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        _mount("--bind", bind.source, str(target))
        if not bind.writable:
            _mount("-o", "remount,bind,ro", str(target))
    os.chdir(root)
    (root / "run/host").mkdir()
    subprocess.run(["pivot_root", ".", "run/host"], check=True)
    os.chroot(".")
    subprocess.run(["umount", "--lazy", "/run/host"], check=True, env={"PATH": PATH})


def _drop_to(uid: int) -> None:
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


def main(argument: str) -> int:
    """Entered as process 1 of the new pid namespace; its end is the end of all processes inside."""
    data = json.loads(argument)
    data["binds"] = [Bind(**bind) for bind in data["binds"]]
    spec = Spec(**data)
    _loopback_up()
    _enter(spec)
    env = {"PATH": PATH, "LANG": "C.UTF-8", "HOME": "/root" if spec.uid == 0 else "/tmp"}
    env |= {"DEBIAN_FRONTEND": "noninteractive", **spec.env}
    os.umask(0o022)
    pid = os.fork()
    if pid == 0:
        if spec.uid:
            _drop_to(spec.uid)
        os.chdir(spec.cwd)
        try:
            os.execvpe(spec.argv[0], spec.argv, env)
        except OSError as error:
            print(f"{spec.argv[0]}: {error.strerror}", file=sys.stderr)
            os._exit(127)
    # Terminal signals reach the command too; process 1 only waits for it, and for orphans.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        child, status = os.wait()
        if child == pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
