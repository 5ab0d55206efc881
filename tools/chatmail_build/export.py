# SPDX-License-Identifier: MIT
"""A clean copy of the work tree: what git tracks or would track, with normal modes and times."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path


def files(top: Path) -> list[str]:
    """Relative names below `top`: tracked and new files, without ignored or deleted ones.

    In an unpacked source package, which has no .git, all files but those of build/.
    """
    inside = subprocess.run(
        ["git", "-C", str(top), "rev-parse", "--is-inside-work-tree"], capture_output=True
    )
    if inside.returncode == 0:
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=top,
            check=True,
            stdout=subprocess.PIPE,
        ).stdout
        names = {os.fsdecode(name) for name in listing.split(b"\0") if name}
    else:
        names = {
            str(path.relative_to(top))
            for path in top.rglob("*")
            if path.parts[len(top.parts)] != "build"
        }
    return sorted(name for name in names if (top / name).is_symlink() or (top / name).is_file())


def export(top: Path, target: Path, *, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Copy to `target`: files 0644 or 0755, as git knows them, whatever the umask was."""
    for name in files(top):
        if not wanted(name):
            continue
        source, copy = top / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            copy.symlink_to(os.readlink(source))
        else:
            shutil.copyfile(source, copy)
            copy.chmod(0o755 if source.stat().st_mode & 0o100 else 0o644)
    for path in (target, *target.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


def set_times(top: Path, seconds: int) -> None:
    """Give everything below `top` the same time stamp, so that no tarball carries the build's hour."""
    for path in (*top.rglob("*"), top):
        os.utime(path, (seconds, seconds), follow_symlinks=False)
