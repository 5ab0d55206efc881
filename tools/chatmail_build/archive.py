# SPDX-License-Identifier: MIT
"""What is in a repository of several releases: read, checked and compared by python-debian.

Runs in the tools tree, where Debian's python3-debian is:

    python3 -m chatmail_build.archive REPOSITORY TEMPLATE URI

prints the repository as JSON, writes its index.html, and exits with 1 if something is wrong with it.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jinja2
from debian.changelog import Changelog, Version
from debian.deb822 import Packages, Release
from debian.debfile import DebFile

SUITE = "trixie"
SOURCE = "chatmail-relay"
KEYRING = "chatmail-archive-keyring.pgp"

#: The only files of ours that dpkg asks an administrator about. Everything else below /etc is rendered.
CONFFILES = {
    "chatmail-apt-source": [
        "/etc/apt/apt.conf.d/52unattended-upgrades-chatmail",
        "/etc/apt/sources.list.d/chatmail.sources",
    ]
}

_RELATIONS = ("Pre-Depends", "Depends", "Recommends", "Suggests", "Conflicts", "Breaks", "Replaces")

_SCRIPTS = ("config", "preinst", "postinst", "prerm", "postrm", "triggers")


@dataclass
class Package:
    """One .deb: what its index says of it, and what is in it."""

    name: str
    version: str
    source: str
    description: str
    filename: str
    size: int
    sha256: str
    relations: dict[str, str]
    conffiles: list[str] = field(default_factory=list)
    scripts: dict[str, str] = field(default_factory=dict)  # maintainer scripts: name -> SHA-256
    files: dict[str, str] = field(default_factory=dict)  # path -> mode and SHA-256


@dataclass
class ReleaseOf:
    """One release: a suite of the repository that never changes."""

    version: str
    date: str
    changes: list[str]
    packages: dict[str, Package]
    differences: dict[str, list[str]] = field(default_factory=dict)  # package -> lines


def _members(archive: tarfile.TarFile) -> dict[str, tuple[str, bytes]]:
    """Files and links of a part of a .deb: path -> mode and content; of a link, where it points."""
    found = {}
    for entry in archive:
        path = f"/{entry.name.removeprefix('./')}"
        if entry.issym():
            found[path] = ("link", entry.linkname.encode())
        elif file := archive.extractfile(entry):
            found[path] = (f"{entry.mode:04o}", file.read())
    return found


def _package(top: Path, stanza: Packages, wrong: list[str]) -> Package:
    """Read a .deb; what does not agree with the index goes to *wrong*."""
    path = top / stanza["Filename"]
    package = Package(
        name=stanza["Package"],
        version=stanza["Version"],
        source=stanza.get("Source", stanza["Package"]).split()[0],
        description=stanza["Description"].split("\n")[0],
        filename=stanza["Filename"],
        size=int(stanza["Size"]),
        sha256=stanza["SHA256"],
        relations={name: stanza[name] for name in _RELATIONS if name in stanza},
    )
    content = path.read_bytes()
    if (len(content), hashlib.sha256(content).hexdigest()) != (package.size, package.sha256):
        wrong.append(f"{package.filename}: is not what the index says; restore it from a backup")
        return package
    with DebFile(filename=str(path)) as deb:
        control = deb.debcontrol()
        for name in ("Package", "Version"):
            if control[name] != stanza[name]:
                wrong.append(f"{package.filename}: {name} is {control[name]}, not {stanza[name]}")
        for name, (_mode, data) in _members(deb.control.tgz()).items():
            if name == "/conffiles":
                package.conffiles = sorted(data.decode().split())
            elif name[1:] in _SCRIPTS:
                package.scripts[name[1:]] = hashlib.sha256(data).hexdigest()
        for name, (mode, data) in _members(deb.data.tgz()).items():
            package.files[name] = f"{mode} {hashlib.sha256(data).hexdigest()}"
    return package


def _changelog(top: Path, package: Package) -> Changelog:
    with DebFile(filename=str(top / package.filename)) as deb:
        return deb.changelog() or Changelog()


def read(top: Path, wrong: list[str]) -> list[ReleaseOf]:
    """All releases, the newest first; findings go to *wrong*."""
    releases = []
    for folder in (top / "dists" / SUITE / "snapshots").iterdir():
        packages = _packages(top, folder, wrong)
        with (folder / "Release").open() as file:
            date = Release(file)["Date"]
        changes: list[str] = []
        for block in list(_changelog(top, packages[SOURCE]))[:1] if SOURCE in packages else []:
            changes = _paragraphs(block.changes())
            if (str(block.version), block.distributions) != (folder.name, SUITE):
                wrong.append(
                    f"{folder.name}: its changelog is of {block.version} for {block.distributions}"
                )
        releases.append(ReleaseOf(folder.name, date, changes, packages))
    releases.sort(key=lambda release: Version(release.version), reverse=True)
    for newer, older in zip(releases, releases[1:], strict=False):
        newer.differences = compare(older, newer)
    return releases


def _packages(top: Path, folder: Path, wrong: list[str]) -> dict[str, Package]:
    with (folder / "main/binary-amd64/Packages").open() as file:
        stanzas = list(Packages.iter_paragraphs(file, use_apt_pkg=False))
    return {stanza["Package"]: _package(top, stanza, wrong) for stanza in stanzas}


def _paragraphs(lines: list[str]) -> list[str]:
    """The bullets of a changelog entry, each in one line."""
    found: list[str] = []
    for line in lines:
        if line.startswith("  * "):
            found.append(line[4:])
        elif line.strip() and found:
            found[-1] += f" {line.strip()}"
    return found


def check(top: Path, releases: list[ReleaseOf]) -> list[str]:
    """What is wrong with the releases as a whole: versions, conffiles, the current suite."""
    wrong = []
    if not releases:
        return [f"{top}: there is no release; run make release"]
    for release in releases:
        ours = {name: item for name, item in release.packages.items() if item.source == SOURCE}
        if SOURCE not in ours:
            wrong.append(f"{release.version}: the package {SOURCE} is missing")
        wrong += [
            f"{release.version}: {item.name} has version {item.version}; all of a release have one"
            for item in ours.values()
            if item.version != release.version
        ]
        for item in release.packages.values():
            if item.conffiles != CONFFILES.get(item.name, []):
                wrong.append(
                    f"{release.version}: {item.name} has conffiles {item.conffiles}, expected "
                    f"{CONFFILES.get(item.name, [])}: render files instead, or amend CONFFILES"
                )
    current = _packages(top, top / "dists" / SUITE, wrong)
    if current != releases[0].packages:
        wrong.append(f"{SUITE}: is not the newest release, {releases[0].version}")
    for newer, older in zip(releases, releases[1:], strict=False):
        for name, item in newer.packages.items():
            before = older.packages.get(name)
            if before and Version(item.version) < Version(before.version):
                wrong.append(f"{newer.version}: {name} is older than in {older.version}")
    return wrong


def compare(old: ReleaseOf, new: ReleaseOf) -> dict[str, list[str]]:
    """What changed from one release to another: package -> lines, of changed packages only.

    Of versions in relations, which differ in every release, is not told, nor of the changelog.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(old.packages.keys() | new.packages.keys()):
        before, after = old.packages.get(name), new.packages.get(name)
        if before is None or after is None:
            found[name] = ["new package" if after else "is gone"]
            continue
        lines = []
        for relation in _RELATIONS:
            pair = [
                item.relations.get(relation, "").replace(item.version, "VERSION")
                for item in (before, after)
            ]
            if pair[0] != pair[1]:
                lines.append(f"{relation}: {pair[0] or 'none'} became {pair[1] or 'none'}")
        for what, one, two in (
            ("conffile", dict.fromkeys(before.conffiles), dict.fromkeys(after.conffiles)),
            ("maintainer script", before.scripts, after.scripts),
            ("file", before.files, after.files),
        ):
            for path in sorted(one.keys() | two.keys()):
                if path.startswith("/usr/share/doc/") and path.endswith("/changelog.gz"):
                    continue
                if path not in one:
                    lines.append(f"{what} {path} is new")
                elif path not in two:
                    lines.append(f"{what} {path} is gone")
                elif one[path] != two[path]:
                    lines.append(f"{what} {path} changed")
        if lines:
            found[name] = lines
    return found


def page(releases: list[ReleaseOf], template: Path, uri: str, fingerprint: str) -> str:
    """The repository as HTML."""
    env = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return env.from_string(template.read_text()).render(
        releases=releases, uri=uri, suite=SUITE, keyring=KEYRING, fingerprint=fingerprint
    )


def _fingerprint(key: Path) -> str:
    words = ["gpg", "--batch", "--quiet", "--with-colons", "--show-keys", str(key)]
    shown = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    fields = [line.split(":") for line in shown.splitlines()]
    return next(items[9] for items in fields if items[0] == "fpr")


def main() -> int:
    """See the top of this file."""
    top, template, uri = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    wrong: list[str] = []
    releases = read(top, wrong)
    wrong += check(top, releases)
    text = page(releases, template, uri, _fingerprint(top / KEYRING))
    (top / "index.html").write_text(text, encoding="utf-8")
    print(json.dumps({"wrong": wrong, "releases": [asdict(item) for item in releases]}, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
