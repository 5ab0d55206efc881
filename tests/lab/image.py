# SPDX-License-Identifier: MIT
"""What hosts boot from: a minimal Debian 13 tree, and the relay's dependencies as .deb files.

Both come from the mirror once and are cached; the containers themselves have no way out, so every
installation is one of packages that are already downloaded.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from chatmail_build import cache, sandbox, trees  # noqa: E402
from chatmail_build.paths import CACHE, REPO  # noqa: E402
from chatmail_build.repository import KEYRING_NAME  # noqa: E402

ARCHIVES = CACHE / "archives"

#: Our repository as a host sees it.
INSIDE_REPO = "/srv/repo"
SOURCES = f"""\
Types: deb
URIs: file:{INSIDE_REPO}
Suites: trixie
Components: main
Signed-By: /usr/share/keyrings/{KEYRING_NAME}
"""

#: apt asks only our repository: the lists of Debian's are those of the tree, and there is no network.
ONLY_OURS = "-o Dir::Etc::sourcelist=/etc/apt/sources.list.d/chatmail.sources"
UPDATE = f"apt-get update -qq {ONLY_OURS} -o Dir::Etc::sourceparts=- -o APT::Get::List-Cleanup=0"

_DOWNLOAD = f"""
install -m 0644 {INSIDE_REPO}/{KEYRING_NAME} /usr/share/keyrings/
cat >/etc/apt/sources.list.d/chatmail.sources
{UPDATE}
# our own packages come from the repository each time
# apt's own lock does not work between pid namespaces; the caller holds one
apt-get install -qq --yes --no-install-recommends --download-only -o Debug::NoLocking=1 \
    "$@" >/dev/null
cd /var/cache/apt/archives
rm -f chatmail-*.deb dovecot-chatmail_*.deb python3-chatmaild_*.deb
"""


@contextlib.contextmanager
def host_tree() -> Iterator[Path]:
    """The minimal Debian tree, to be used as the lower layer of an overlay."""
    with trees.tree("host") as tree:
        yield tree


def download(tree: Path, *extra: str, relay: bool = True) -> None:
    """Fetch all packages that chatmail-relay and *extra* need, unless they are cached.

    Without *relay* only *extra*: what is in conflict with it.
    """
    wanted = ("chatmail-relay", "dovecot-chatmail", *extra) if relay else extra
    (ARCHIVES / "partial").mkdir(parents=True, exist_ok=True)
    with cache.locked(CACHE / "archives.lock"):
        sandbox.run(
            tree,
            ["sh", "-euc", _DOWNLOAD, "sh", *wanted],
            binds=[
                sandbox.Bind(str(REPO), INSIDE_REPO),
                sandbox.Bind(str(ARCHIVES), "/var/cache/apt/archives", writable=True),
                sandbox.Bind("/etc/resolv.conf", "/etc/resolv.conf"),
                sandbox.Bind("/etc/hosts", "/etc/hosts"),
            ],
            network=True,
            input=SOURCES.encode(),
        )
