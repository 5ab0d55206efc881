# SPDX-License-Identifier: MIT
"""piuparts: packages come, go and leave nothing, in a tree without systemd running and without network."""

import re
import subprocess
from pathlib import Path

import pytest
from chatmail_build import paths
from conftest import keep, measured
from lab import image
from lab.image import sandbox, trees

#: What it is installed from: packages that the lab has downloaded, and our repository.
SOURCES = """\
deb [trusted=yes] file:/srv/debs ./
deb [signed-by=/srv/repo/{key}] file:/srv/repo {suite} main
"""
SETUP = """
mkdir /tmp/chroot /tmp/over
mount -t tmpfs -o mode=755 tmpfs /tmp/over
mkdir /tmp/over/upper /tmp/over/work
layers=lowerdir=/srv/base,upperdir=/tmp/over/upper,workdir=/tmp/over/work
mount -t overlay -o $layers overlay /tmp/chroot
cp -r /srv/archives /srv/debs
(cd /srv/debs && apt-ftparchive packages . >Packages)
rm -rf /tmp/chroot/etc/apt/sources.list.d/* /tmp/chroot/var/lib/apt/lists/*
cat >/tmp/chroot/etc/apt/sources.list
exec piuparts --existing-chroot=/tmp/chroot --keep-sources-list \\
    --bindmount=/srv/debs --bindmount=/srv/repo --scriptsdir=/srv/hooks --log-level=info "$@"
"""
#: Left by dovecot-core on its own as well: its purge wants ucf, which is purged before it.
NOT_OURS = "--ignore-regex=/etc/dovecot(/.*)?"
ANSWERS = """\
#!/bin/sh
debconf-set-selections <<X
chatmail-relay chatmail-relay/mail_domain string piuparts.example
chatmail-relay chatmail-relay/tls select self
chatmail-relay chatmail-relay/purge_mail boolean true
X
"""
CONFIGURED = """\
#!/bin/sh
grep -q piuparts.example /etc/chatmail/dovecot/dovecot.conf
"""
INSTALL = ("--apt", "--no-upgrade-test")
#: Each package as a file: what apt knows is installed first, then these.
UPGRADE = ("--no-install-purge-test",)
OPTIONAL = ("chatmail-echobot", "chatmail-mtail-conf", "chatmail-opendkim-conf")


def piuparts(
    folder: Path, hooks: dict[str, str], *words: str, repo: Path = image.REPO, suite: str = "trixie"
) -> subprocess.CompletedProcess[str]:
    """Its report, with each of *hooks* run inside as the part of the name before "_" says."""
    for name, text in hooks.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    with image.host_tree() as host, trees.tree("piuparts") as tree:
        image.download(host, *OPTIONAL)
        binds = [
            sandbox.Bind(str(host), "/srv/base"),
            sandbox.Bind(str(image.ARCHIVES), "/srv/archives"),
            sandbox.Bind(str(repo), image.INSIDE_REPO),
            sandbox.Bind(str(paths.DEBS), "/srv/new"),
            sandbox.Bind(str(folder), "/srv/hooks"),
        ]
        return sandbox.run(
            tree,
            ["sh", "-euc", SETUP, "sh", *words],
            binds=binds,
            check=False,
            input=SOURCES.format(key=image.KEYRING_NAME, suite=suite),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def failures(report: str) -> str:
    """From the first failure on."""
    return report[report.find("FAIL") :] if "FAIL" in report else report[-2000:]


@pytest.mark.parametrize(
    "name, hooks, words",
    [
        ("unconfigured", {}, ("chatmail-relay",)),
        (
            "preseeded, with all that is optional",
            {"pre_install_answers": ANSWERS, "post_install_configured": CONFIGURED},
            ("chatmail-relay", *OPTIONAL),
        ),
        (
            "preseeded, removed and installed again",
            {"pre_install_answers": ANSWERS, "post_install_configured": CONFIGURED},
            ("--install-remove-install", "chatmail-relay"),
        ),
    ],
)
def test_packages_come_and_go_without_trace(tmp_path, name, hooks, words):
    done = piuparts(tmp_path, hooks, *INSTALL, NOT_OURS, *words)
    well(name, done)


def well(name: str, done: subprocess.CompletedProcess[str]) -> None:
    """It passed; its report is kept."""
    keep(f"piuparts, {name}", done.stdout)
    assert done.returncode == 0, failures(done.stdout)
    assert "PASS: All tests" in done.stdout
    seconds = re.findall(r"^(\d+)m([\d.]+)s", done.stdout, re.MULTILINE)[-1]
    measured[f"piuparts, {name}"] = (
        f"{int(seconds[0]) * 60 + float(seconds[1]):.0f} s, 0 files left"
    )


def test_an_upgrade_from_the_last_release_leaves_no_trace(tmp_path, releases):
    versions = f"{releases.previous} {releases.current} "
    hooks = {
        "pre_install_answers": ANSWERS,
        "post_install_configured": CONFIGURED,
        "post_install_version": "#!/bin/sh\ndpkg-query -W -f '${Version} ' chatmail-relay >>/tmp/seen\n",
        "post_purge_versions": f'#!/bin/sh\ntest "$(cat /tmp/seen)" = "{versions}"\n',
    }
    names = [f"/srv/new/{deb.name}" for deb in paths.DEBS.glob("*.deb") if is_of_the_relay(deb)]
    done = piuparts(
        *(tmp_path, hooks, *UPGRADE, NOT_OURS, *names),
        repo=releases.public,
        suite=f"trixie/snapshots/{releases.previous}",
    )
    well("upgrade from the last release", done)


def is_of_the_relay(deb: Path) -> bool:
    name = deb.name.split("_")[0]
    apart = ("chatmail-archive-keyring", "chatmail-apt-source", "dovecot-chatmail-dbgsym")
    return name not in (*OPTIONAL, *apart)


def test_a_package_that_leaves_a_file_is_found_out(tmp_path):
    careless = "#!/bin/sh\nmkdir -p /var/lib/careless && touch /var/lib/careless/file\n"
    done = piuparts(
        tmp_path, {"post_install_careless": careless}, *INSTALL, "chatmail-archive-keyring"
    )
    assert done.returncode == 1 and "/var/lib/careless/file" in failures(done.stdout)
