# SPDX-License-Identifier: MIT
"""The signed apt repository: all packages of both sources, made by reprepro in the tools tree."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from . import cache, debs, sandbox, signing, trees
from .paths import BUILD, REPO, ROOT, SUITE

KEYRING_NAME = "chatmail-archive-keyring.pgp"

_INCLUDE = """
cd /repo
for changes in /debs/*.changes; do
	reprepro --silent --ignore=surprisingarch --basedir /repo --confdir /conf include "$1" "$changes"
done
reprepro --silent --basedir /repo --confdir /conf export
gpgconf --kill all
"""


def sources_file(uri: str) -> bytes:
    """The deb822 source (sources.list(5)) that chatmail-apt-source installs."""
    return f"""\
# Installed by chatmail-apt-source: the packages of the chatmail relay.
Types: deb
URIs: {uri}
Suites: {SUITE}
Components: main
Signed-By: /usr/share/keyrings/{KEYRING_NAME}
""".encode()


def _sources(uri: str) -> list[tuple[Path, dict[str, bytes]]]:
    """Our source packages, each with the files that are put into its copy."""
    uri = uri or f"file:{REPO}"
    key = signing.public_key(signing.ensure_key())
    extra = {KEYRING_NAME: key, "chatmail.sources": sources_file(uri)}
    return [(debs.KEYRING_SOURCE, extra), (ROOT, {})]


def build_all(uri: str) -> Path:
    """Build both sources; *uri* is where the repository will be. Returns build/debs."""
    return debs.collect([debs.build_source(top, extra) for top, extra in _sources(uri)])


def differences(uri: str) -> list[str]:
    """Files that come out differently when both sources are built again (debs.differences)."""
    return [name for top, extra in _sources(uri) for name in debs.differences(top, extra)]


def make(uri: str = "") -> Path:
    """Make build/repo anew, beside the old one, and put it in place when it is complete."""
    uri = uri or f"file:{REPO}"
    built = build_all(uri)
    home = signing.ensure_key()
    stamp = cache.Stamp(
        BUILD / "stamps/repo",
        cache.digest(cache.tree_digest(built), cache.tree_digest(ROOT / "reprepro/conf"), uri),
        [REPO],
    )
    if stamp.fresh():
        print("repository: nothing changed", flush=True)
        return REPO
    stamp.invalidate()
    with cache.locked(BUILD / "repo.lock"), cache.new_directory(REPO) as new:
        with trees.tree("tools") as tree:
            sandbox.run(
                tree,
                ["sh", "-euc", _INCLUDE, "sh", SUITE],
                binds=[
                    sandbox.Bind(str(new), "/repo", writable=True),
                    sandbox.Bind(str(built), "/debs"),
                    sandbox.Bind(str(ROOT / "reprepro/conf"), "/conf"),
                    *signing.binds(home),
                ],
                env=signing.environment(),
                stdin=subprocess.DEVNULL,
            )
        shutil.rmtree(new / "db")  # reprepro's own; the whole repository is made anew each time
        (new / KEYRING_NAME).write_bytes(signing.public_key(home))
    stamp.write()
    return REPO
