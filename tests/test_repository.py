# SPDX-License-Identifier: MIT
"""The signed repository as apt sees it: accepted with our key, refused when anything was changed.

apt is Debian 13's, in a throw-away copy of a tree, without any network but its own loopback.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from chatmail_build import paths, sandbox, signing, trees  # noqa: E402

KEY = "chatmail-archive-keyring.pgp"

#: $1 URI. Only our repository is asked; what Debian has, apt knows from the tree's lists.
UPDATE = """
cat >/etc/apt/sources.list.d/chatmail.sources <<EOF
Types: deb
URIs: $1
Suites: trixie
Components: main
Signed-By: /etc/apt/keyrings/repository.pgp
EOF
only="-o Dir::Etc::sourcelist=/etc/apt/sources.list.d/chatmail.sources -o Dir::Etc::sourceparts=-"
apt-get update $only -o APT::Get::List-Cleanup=0 --error-on=any
"""
DOWNLOAD = """
apt-get install --yes --no-install-recommends --download-only chatmail-archive-keyring chatmail-apt-source
"""
RESOLVE = "apt-get install --simulate --no-install-recommends chatmail-relay\n"
SERVE = """
python3 -m http.server --bind 127.0.0.1 --directory /repo 8099 >/dev/null 2>&1 &
for try in $(seq 100); do
    python3 -c 'import socket; socket.create_connection(("127.0.0.1", 8099))' 2>/dev/null && break
done
"""


@pytest.fixture(scope="module")
def tree():
    with trees.tree("tools") as path:
        yield path


@pytest.fixture
def repository(tmp_path):
    """A copy of the built repository that a test may damage."""
    return shutil.copytree(paths.REPO, tmp_path / "repo")


def apt(tree, repository, script, uri="file:/repo", key=None):
    """Run the script with the repository at /repo; (exit status, output)."""
    key = key or repository / KEY
    result = sandbox.run(
        tree,
        ["sh", "-euc", script, "sh", uri],
        binds=[
            sandbox.Bind(str(repository), "/repo"),
            sandbox.Bind(str(key), "/etc/apt/keyrings/repository.pgp"),
        ],
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return result.returncode, result.stdout


def test_apt_installs_from_the_directory(tree, repository):
    status, output = apt(tree, repository, UPDATE + DOWNLOAD + RESOLVE)
    assert status == 0, output
    assert "Inst chatmail-relay " in output, output


def test_apt_downloads_over_http(tree, repository):
    status, output = apt(tree, repository, SERVE + UPDATE + DOWNLOAD, "http://127.0.0.1:8099/")
    assert status == 0, output
    assert "http://127.0.0.1:8099 trixie/main amd64 chatmail-apt-source" in output, output


def test_installed_source_and_origin_work(tree, repository):
    """What chatmail-apt-source installs is read by apt, and names the repository's origin."""
    script = UPDATE + (
        "apt-get install --yes --no-install-recommends chatmail-apt-source\n"
        "apt-config dump Unattended-Upgrade::Origins-Pattern\n"
        "grep -hE '^(Suites|Signed-By):' /etc/apt/sources.list.d/chatmail.sources\n"
        "apt-cache policy\n"
    )
    # The package brings its own chatmail.sources: write ours under another name.
    script = script.replace("sources.list.d/chatmail.sources <<", "sources.list.d/test.sources <<")
    script = script.replace(
        "sourcelist=/etc/apt/sources.list.d/chatmail", "sourcelist=/etc/apt/sources.list.d/test"
    )
    status, output = apt(tree, repository, script)
    assert status == 0, output
    assert "origin=Chatmail,codename=${distro_codename},label=Chatmail" in output, output
    assert "o=Chatmail" in output and "l=Chatmail" in output and "n=trixie" in output, output
    assert "Signed-By: /usr/share/keyrings/chatmail-archive-keyring.pgp" in output, output


@pytest.mark.parametrize("name", ["InRelease", "Release"])
def test_changed_release_is_refused(tree, repository, name):
    inrelease = repository / "dists/trixie/InRelease"
    if name == "Release":
        inrelease.unlink()
    path = repository / "dists/trixie" / name
    path.write_text(path.read_text().replace("Label: Chatmail", "Label: Chatmall"))
    status, output = apt(tree, repository, UPDATE)
    assert status != 0, output
    assert "signature" in output.lower() or "not signed" in output, output


def test_changed_package_list_is_refused(tree, repository):
    for path in (repository / "dists/trixie/main/binary-amd64").glob("Packages*"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    status, output = apt(tree, repository, UPDATE)
    assert status != 0, output


def test_changed_package_is_refused(tree, repository):
    deb = next(repository.rglob("chatmail-apt-source_*.deb"))
    data = bytearray(deb.read_bytes())
    data[-1] ^= 1
    deb.write_bytes(data)
    status, output = apt(tree, repository, SERVE + UPDATE + DOWNLOAD, "http://127.0.0.1:8099/")
    assert status != 0, output
    assert "Hash Sum mismatch" in output, output


def test_another_key_is_refused(tree, repository, tmp_path):
    other = tmp_path / "other.pgp"
    other.write_bytes(signing.public_key(signing.ensure_key(tmp_path / "gnupg")))
    status, output = apt(tree, repository, UPDATE, key=other)
    assert status != 0, output


def test_repository_holds_every_built_package_and_no_secret(repository):
    pool = {path.name for path in repository.rglob("*.deb")}
    assert pool == {path.name for path in paths.DEBS.glob("*.deb")}
    assert not (repository / "db").exists()
    for path in repository.rglob("*"):
        if path.is_file():
            assert b"PRIVATE KEY BLOCK" not in path.read_bytes()


def test_signing_key_is_outside_the_work_tree_and_private():
    home = paths.key_home()
    assert not home.is_relative_to(paths.ROOT)
    assert home.stat().st_mode & 0o077 == 0


def test_only_the_apt_source_has_conffiles(tmp_path):
    for deb in paths.DEBS.glob("*.deb"):
        listing = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", str(deb)], check=True, stdout=subprocess.PIPE
        ).stdout
        names = subprocess.run(
            ["tar", "-t"], input=listing, check=True, stdout=subprocess.PIPE
        ).stdout.decode()
        in_etc = [n for n in names.splitlines() if n.startswith("./etc/") and not n.endswith("/")]
        expected = (
            [
                "./etc/apt/apt.conf.d/52unattended-upgrades-chatmail",
                "./etc/apt/sources.list.d/chatmail.sources",
            ]
            if deb.name.startswith("chatmail-apt-source_")
            else []
        )
        assert sorted(in_etc) == expected, deb.name
