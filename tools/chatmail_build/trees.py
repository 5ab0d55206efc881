# SPDX-License-Identifier: MIT
"""Debian trees (chroots) for building and checking, made by mmdebstrap and kept in the cache.

A tree's name carries a key over everything that determines it: suite, mirror, packages, this file's
hooks, and the ISO week, so that security updates arrive at least weekly. A tree is never changed
after it was made; programs run in it through sandbox.run(), which discards what they write.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import cache, hostapt
from .paths import CACHE, ROOT, SUITE
from .sandbox import BUILDER

TREES = CACHE / "trees"

#: Days after which a tree that nobody used is removed.
KEEP_DAYS = 21

#: What `make lint`, `make repo` and their tests call. With the libraries our Python imports, so that
#: mypy sees the very versions that users get.
TOOLS = """
    apt-utils autopkgtest bash-completion debhelper devscripts dh-debputy dh-python diffoscope-minimal
    dpkg-dev gettext git gnupg lintian man-db mypy po-debconf procps pybuild-plugin-pyproject python3
    python3-all python3-cryptography python3-debian python3-dkim python3-dnspython python3-h11
    python3-httpcore
    python3-hypothesis python3-jinja2 python3-levenshtein python3-lsprotocol python3-markdown
    python3-nacl python3-pygls python3-pytest python3-segno reprepro shellcheck systemd yamllint
""".split()


@dataclass(frozen=True)
class Recipe:
    """How a tree is made. `build_deps` are source directories whose Build-Depends are installed."""

    name: str
    variant: str
    packages: tuple[str, ...] = ()
    build_deps: tuple[Path, ...] = ()
    #: Whether programs run in it as the unprivileged user.
    builder: bool = True


#: What a small server has before the relay is installed on it; the lab boots it.
HOST = """
    apt-utils ca-certificates dbus debconf iproute2 libpam-systemd procps systemd systemd-sysv
""".split()

#: The browser that tests look at web pages with.
BROWSER = ["chromium", "fonts-liberation"]

#: What installs, upgrades and purges packages and looks what is left.
PIUPARTS = ["apt-utils", "piuparts"]

RECIPES = {
    "build": Recipe("build", "buildd", ("debhelper",), (ROOT, ROOT / "reprepro/keyring")),
    "tools": Recipe("tools", "apt", tuple(TOOLS)),
    "host": Recipe("host", "minbase", tuple(HOST), builder=False),
    "piuparts": Recipe("piuparts", "apt", tuple(PIUPARTS), builder=False),
    "browser": Recipe("browser", "minbase", tuple(BROWSER)),
}


def _build_dependencies(source: Path) -> str:
    """The Build-* fields of debian/control, or "" where there is no such file."""
    try:
        control = (source / "debian/control").read_text()
    except FileNotFoundError:
        return ""
    first = control.split("\n\n", 1)[0]
    fields = re.findall(r"^Build-\S+:.*(?:\n[ \t].*)*", first, re.MULTILINE)
    return "\n".join(fields)


def _install_build_dependencies(source: Path) -> str:
    """A hook for mmdebstrap; apt runs outside and installs into "$1", as mmdebstrap itself does."""
    return (
        'APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get build-dep --yes --no-install-recommends '
        f'-oDPkg::Chroot-Directory="$1" {source}/'
    )


def key(recipe: Recipe, mirrors: hostapt.Mirrors, options: list[str]) -> str:
    """16 hex digits that change whenever the tree has to be made anew."""
    return cache.digest(
        repr((recipe.name, recipe.variant, recipe.packages)),
        *(_build_dependencies(source) for source in recipe.build_deps),
        *mirrors.sources(SUITE),
        *options,
        time.strftime("%G-W%V", time.gmtime()),
        "layout 1",
    )[:16]


def _make(recipe: Recipe, mirrors: hostapt.Mirrors, options: list[str], target: Path) -> None:
    hooks = []
    if recipe.builder:
        hooks.append(f'chroot "$1" useradd --create-home --uid {BUILDER} builder')
    for source in recipe.build_deps:
        if (source / "debian/control").exists():
            hooks.append(_install_build_dependencies(source))
    command = ["mmdebstrap", "--mode=root", "--format=directory", f"--variant={recipe.variant}"]
    # The package lists stay: "does it resolve against Debian?" is asked later, without a network.
    command += ["--skip=cleanup/apt/lists"]
    command += [f"--aptopt={line}" for line in options]
    if recipe.packages:
        command += [f"--include={','.join(recipe.packages)}"]
    command += [f"--customize-hook={hook}" for hook in hooks]
    with tempfile.NamedTemporaryFile("w", suffix=".list") as sources:
        sources.write("\n".join(mirrors.sources(SUITE)) + "\n")
        sources.flush()
        # mmdebstrap mounts /proc and the like in the tree: in namespaces of its own these mounts, and
        # every process, go away with it even when it is killed.
        private = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        subprocess.run(
            [*private, *command, SUITE, str(target), sources.name],
            check=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C.UTF-8", "TMPDIR": "/tmp"},
        )


@contextlib.contextmanager
def tree(name: str) -> Iterator[Path]:
    """The tree `name` for as long as the body runs; made first if the cache has none."""
    recipe = RECIPES[name]
    mirrors, options = hostapt.host_mirrors(), hostapt.host_options()
    path = TREES / f"{name}-{key(recipe, mirrors, options)}"
    while not path.is_dir():
        with cache.locked(TREES / f"{name}.lock"):
            if not path.is_dir():
                print(f"making the {name} tree {path}", flush=True)
                start = time.monotonic()
                with cache.new_directory(path) as new:
                    _make(recipe, mirrors, options, new)
                print(f"made the {name} tree in {time.monotonic() - start:.0f} s", flush=True)
            _remove_unused(keep=path)
    with cache.locked(TREES / f"{path.name}.lock", shared=True):
        os.utime(TREES / f"{path.name}.lock")
        yield path


def _remove_unused(keep: Path) -> None:
    """Remove trees that nobody used for KEEP_DAYS."""
    oldest = time.time() - KEEP_DAYS * 86400
    for lock in TREES.glob("*-*.lock"):
        path = lock.with_suffix("")
        if path != keep and lock.stat().st_mtime < oldest:
            with cache.locked(lock):
                cache.remove_tree(path)
                lock.unlink(missing_ok=True)
