# SPDX-License-Identifier: MIT
"""Things that are made once and then used: locks, atomic creation, content hashes, stamps.

A thing appears under its name only when it is complete (made beside, then renamed), so an interrupted
run leaves nothing that a later one could take for finished.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[int]:
    """Hold a flock(2) on `path`; waits. The kernel lets it go when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def remove_tree(path: Path) -> None:
    """`rm -rf`, for trees in which nothing is mounted (all our mounts live in private namespaces)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """Give a directory to fill; it becomes `final` (replacing an older one) if the body succeeds.

    The caller holds a lock, so a half-made directory found here is a dead run's and is removed.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for stale in final.parent.glob(f".{final.name}.new-*"):
        remove_tree(stale)
    work = Path(tempfile.mkdtemp(prefix=f".{final.name}.new-", dir=final.parent))
    work.chmod(0o755)
    try:
        yield work
        old = final.parent / f".{final.name}.new-old-{os.getpid()}"
        if final.exists():
            final.rename(old)
        work.rename(final)
        if old.exists():
            remove_tree(old)
    except BaseException:
        remove_tree(work)
        raise


def digest(*parts: str | bytes) -> str:
    """SHA-256 over the parts, each with its length, as 64 hex digits."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(f"{len(data)}:".encode())
        state.update(data)
    return state.hexdigest()


def tree_digest(top: Path) -> str:
    """SHA-256 of names, modes and contents below `top`, independent of times and owners."""
    parts: list[str | bytes] = []
    for path in sorted(top.rglob("*")):
        name = str(path.relative_to(top))
        if path.is_symlink():
            parts += [f"l {name}", os.readlink(path)]
        elif path.is_file():
            mode = "x" if path.stat().st_mode & 0o100 else "-"
            parts += [f"f{mode} {name}", hashlib.sha256(path.read_bytes()).digest()]
    return digest(*parts)


class Stamp:
    """`make`'s time stamp, but by content: remembers from which inputs an output was made."""

    def __init__(self, path: Path, key: str, outputs: list[Path]) -> None:
        self.path, self.key, self.outputs = path, key, outputs

    def fresh(self) -> bool:
        """True if the outputs exist and were made from these very inputs."""
        try:
            return self.path.read_text() == self.key and all(p.exists() for p in self.outputs)
        except FileNotFoundError:
            return False

    def invalidate(self) -> None:
        """Forget, before the outputs are touched."""
        self.path.unlink(missing_ok=True)

    def write(self) -> None:
        """Remember, after the outputs are complete."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self.key)
