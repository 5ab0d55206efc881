# SPDX-License-Identifier: MIT
"""Packages as they may be one day: repacked with a higher version, in a repository on a host."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from .host import Host
from .shell import run

#: Every suite has one file of sources, so that one can be read anew without the others.
_SOURCES = """\
Types: deb
URIs: file:/srv/{name}
Suites: ./
Trusted: yes
"""
_RELEASE = """\
Origin: {origin}
Label: {label}
Suite: {suite}
Codename: {suite}
"""


class Unpacked:
    """A .deb that can be packed again and again, each time with another version."""

    def __init__(self, deb: Path, folder: Path) -> None:
        self.tree = folder / deb.name.removesuffix(".deb")
        run(["dpkg-deb", "-R", deb, self.tree])
        self._control = (self.tree / "DEBIAN/control").read_text()
        self.name = self._field("Package")
        self.version = self._field("Version")

    def _field(self, name: str) -> str:
        found = re.search(rf"^{name}: (.*)$", self._control, re.MULTILINE)
        assert found, name
        return found[1]

    def conffiles(self) -> list[str]:
        """Their paths."""
        path = self.tree / "DEBIAN/conffiles"
        return path.read_text().split() if path.exists() else []

    def pack(self, version: str, folder: Path) -> Path:
        """Build it as *version*, which also takes the old one's place in relations."""
        control = self._control.replace(self.version, version)
        (self.tree / "DEBIAN/control").write_text(control)
        sums = self.tree / "DEBIAN/md5sums"
        if sums.exists():
            names = [line.split(maxsplit=1)[1] for line in sums.read_text().splitlines()]
            lines = [f"{_md5(self.tree / name)}  {name}\n" for name in names]
            sums.write_text("".join(lines))
        named = f"{self.name}_{version.replace(':', '%3a')}_{self._field('Architecture')}.deb"
        target = folder / named
        run(["dpkg-deb", "-Znone", "--root-owner-group", "-b", self.tree, target])
        return target


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


class Repository:
    """A repository in /srv/NAME of a host, of what `offer` gave last; not signed, but trusted."""

    def __init__(self, host: Host, name: str, *, origin: str, label: str, suite: str) -> None:
        self.host, self.name = host, name
        self._release = _RELEASE.format(origin=origin, label=label, suite=suite)
        sources = f"/etc/apt/sources.list.d/{name}.sources"
        host.write(sources, _SOURCES.format(name=name))
        #: For apt-get: nothing but this; it need not read Debian's lists, which takes seconds.
        self.only = (
            *("-o", f"Dir::Etc::sourcelist={sources}", "-o", "Dir::Etc::sourceparts=-"),
            *("-o", "APT::Get::List-Cleanup=0"),
        )

    def offer(self, debs: Iterable[Path]) -> None:
        """Let apt know of these packages instead of those before."""
        folder = self.host.root / "srv" / self.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for deb in debs:
            shutil.copyfile(deb, folder / deb.name)
        (folder / "release.head").write_text(self._release)
        self.host.sh(
            f"cd /srv/{self.name}; apt-ftparchive packages . >Packages;"
            " apt-ftparchive release . >release.tail;"
            " cat release.head release.tail >Release; rm release.*;"
            f" apt-get update -qq {' '.join(self.only)}"
        )


def append(tree: Path, pattern: str, line: str) -> None:
    """Add a line to every file of an unpacked package that matches."""
    found = [path for path in tree.glob(pattern) if path.is_file() and not path.is_symlink()]
    for path in found:
        mode = path.stat().st_mode
        path.write_text(f"{path.read_text()}{line}\n")
        os.chmod(path, mode)


def replace(path: Path, pattern: str, by: str | Callable[[re.Match[str]], str]) -> None:
    """Change a file of an unpacked package; raises AssertionError if there is nothing to change."""
    text, count = re.subn(pattern, by, path.read_text(), flags=re.MULTILINE)
    assert count, f"{path}: no {pattern!r}"
    path.write_text(text)
