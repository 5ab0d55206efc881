# SPDX-License-Identifier: MIT
"""Build our source packages into .debs, in the build tree, without network, as a normal user."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

from . import cache, export, sandbox, trees
from .paths import BUILD, CACHE, DEBS, ROOT

KEYRING_SOURCE = ROOT / "reprepro/keyring"


class BuildError(Exception):
    """The build failed; the text says what, its log was printed."""


@dataclass(frozen=True)
class Changelog:
    """First entry of debian/changelog (deb-changelog(5))."""

    source: str
    version: str
    distribution: str
    epoch: int

    @classmethod
    def read(cls, top: Path) -> Changelog:
        """Raises BuildError if the file is not as dpkg wants it."""
        text = (top / "debian/changelog").read_text()
        head = re.match(r"(\S+) \((\S+)\) (\S+);", text)
        date = re.search(r"^ -- .* <.*>  (.*)$", text, re.MULTILINE)
        if not head or not date:
            raise BuildError(f"{top}/debian/changelog: no valid first entry")
        return cls(head[1], head[2], head[3], int(parsedate_to_datetime(date[1]).timestamp()))


@dataclass(frozen=True)
class Variation:
    """Circumstances that must not show in a package; for the reproducibility check."""

    directory: str = "/build"
    umask: str = "022"
    env: tuple[tuple[str, str], ...] = (("TZ", "UTC"),)
    options: str = ""


NORMAL = Variation()
#: Of what was tested when it was new.
QUICK = Variation(options="nocheck")
OTHER = Variation(
    "/srv/another/place", "002", (("TZ", "Asia/Kathmandu"), ("LC_ALL", "C")), "nocheck"
)


def prepare(top: Path, work: Path, extra: Mapping[str, bytes]) -> tuple[Changelog, str]:
    """Export `top` plus the `extra` files to WORK/SOURCE-VERSION; returns its digest too."""
    changelog = Changelog.read(top)
    tree = work / f"{changelog.source}-{changelog.version}"
    export.export(top, tree)
    for name, content in extra.items():
        (tree / name).write_bytes(content)
        (tree / name).chmod(0o644)
    digest = cache.tree_digest(tree)
    export.set_times(tree, changelog.epoch)
    return changelog, digest


def build(tree: Path, work: Path, changelog: Changelog, how: Variation = NORMAL) -> None:
    """Run dpkg-buildpackage on the exported source in `work`; results appear beside it."""
    for path in (work, *work.rglob("*")):
        os.chown(path, sandbox.BUILDER, sandbox.BUILDER, follow_symlinks=False)
    script = f'umask {how.umask} && exec dpkg-buildpackage --no-sign --build=full "$@"'
    options = f"parallel={os.cpu_count()} {how.options} {os.environ.get('DEB_BUILD_OPTIONS', '')}"
    result = sandbox.run(
        tree,
        ["sh", "-euc", script, "sh", "--sanitize-env"],
        binds=[sandbox.Bind(str(work), how.directory, writable=True)],
        cwd=f"{how.directory}/{changelog.source}-{changelog.version}",
        env={"DEB_BUILD_OPTIONS": options, "HOME": "/nonexistent", **dict(how.env)},
        uid=sandbox.BUILDER,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if result.returncode:
        raise BuildError(f"{changelog.source} {changelog.version}: dpkg-buildpackage failed")


@contextlib.contextmanager
def _work() -> Iterator[Path]:
    """The directory in which sources are built, one at a time; empty at first, gone at the end."""
    with cache.locked(CACHE / "work.lock"):
        work = CACHE / "work"
        if work.exists():
            cache.remove_tree(work)
        work.mkdir(parents=True)
        try:
            yield work
        finally:
            cache.remove_tree(work)


def _take(work: Path, results: Path) -> None:
    """Copy what a build made."""
    for path in sorted(work.iterdir()):
        if path.is_file():
            shutil.copyfile(path, results / path.name)


def build_source(top: Path, extra: Mapping[str, bytes]) -> Path:
    """Build one source package unless its result is there already; returns its directory."""
    with trees.tree("build") as tree, _work() as work:
        changelog, digest = prepare(top, work, extra)
        results = BUILD / "sources" / changelog.source
        key = cache.digest(digest, tree.name)
        stamp = cache.Stamp(BUILD / "stamps" / changelog.source, key, [results])
        if stamp.fresh():
            print(f"{changelog.source} {changelog.version}: nothing changed", flush=True)
            return results
        stamp.invalidate()
        build(tree, work, changelog)
        with cache.new_directory(results) as new:
            _take(work, new)
        stamp.write()
        return results


def build_into(results: Path, top: Path, how: Variation) -> str:
    """Build one source package into an empty directory; returns its version."""
    with trees.tree("build") as tree, _work() as work:
        changelog, _digest = prepare(top, work, {})
        build(tree, work, changelog, how)
        _take(work, results)
        return changelog.version


def collect(directories: list[Path]) -> Path:
    """Put the results of all sources into build/debs (hard links, so it costs nothing)."""
    with cache.locked(BUILD / "debs.lock"), cache.new_directory(DEBS) as new:
        for directory in directories:
            for path in directory.iterdir():
                os.link(path, new / path.name)
    return DEBS


def differences(top: Path, extra: Mapping[str, bytes]) -> list[str]:
    """Build the finished source package again, elsewhere, with another umask, time zone and locale.

    Returns the names of packages that differ from what `build_source` made; diffoscope tells on stdout
    how. Tests are not run again: they leave nothing in a package.
    """
    built = build_source(top, extra)
    with trees.tree("build") as tree, trees.tree("tools") as tools, _work() as work:
        with tarfile.open(next(built.glob("*.tar.xz"))) as archive:
            if hasattr(tarfile, "data_filter"):
                archive.extractall(work, filter="data")
            else:  # Debian 12's Python knows no filters; this archive is our own
                archive.extractall(work)
        changelog = Changelog.read(next(path for path in work.iterdir() if path.is_dir()))
        build(tree, work, changelog, OTHER)
        different = []
        for path in sorted([*work.glob("*.deb"), *work.glob("*.tar.*")]):
            if path.read_bytes() == (built / path.name).read_bytes():
                continue
            different.append(path.name)
            sandbox.run(
                tools,
                ["timeout", "60", "diffoscope", f"/built/{path.name}", f"/again/{path.name}"],
                binds=[sandbox.Bind(str(built), "/built"), sandbox.Bind(str(work), "/again")],
                check=False,
            )
        verdict = "differs: " + " ".join(different) if different else "bit for bit the same"
        print(f"{changelog.source} {changelog.version} built again: {verdict}", flush=True)
        return different
