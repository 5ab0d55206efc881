# SPDX-License-Identifier: MIT
"""Python environments with pinned packages from PyPI, kept in the cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from . import cache
from .paths import CACHE


def venv(name: str, requirements: Path) -> Path:
    """The environment's python; made on first use. pip refuses what has no pinned hash."""
    key = cache.digest(requirements.read_bytes(), sys.version)[:16]
    path = CACHE / "venvs" / f"{name}-{key}"
    complete = path / ".complete"
    with cache.locked(CACHE / "venvs" / f"{name}.lock"):
        if not complete.exists():
            cache.remove_tree(path)
            # Debian's interpreter, not one that happens to be first in PATH.
            subprocess.run(["/usr/bin/python3", "-m", "venv", str(path)], check=True)
            install = [
                str(path / "bin/python"),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--require-hashes",
            ]
            subprocess.run([*install, "-r", str(requirements)], check=True)
            complete.touch()
    return path / "bin/python"
