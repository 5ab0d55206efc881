# SPDX-License-Identifier: MIT
"""The Debian mirror this host uses, taken from apt itself.

`apt-get indextargets` reads deb822 and one-line files alike, so no file is parsed here and no mirror
is named in this repository. CHATMAIL_MIRROR and CHATMAIL_SECURITY_MIRROR override it.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


class NoMirror(Exception):
    """The host's apt names no Debian mirror; the text says what to set."""


@dataclass(frozen=True)
class Target:
    """One `Packages` index of the host's apt."""

    uri: str
    release: str
    component: str
    origin: str


@dataclass(frozen=True)
class Mirrors:
    """Base URIs of the Debian archive and of its security archive."""

    main: str
    security: str

    def sources(self, suite: str) -> list[str]:
        """One-line entries for a suite with its updates and security updates."""
        signed = f"deb [signed-by={KEYRING}]"
        return [
            f"{signed} {self.main} {suite} main",
            f"{signed} {self.main} {suite}-updates main",
            f"{signed} {self.security} {suite}-security main",
        ]


def choose(targets: list[Target], codename: str) -> Mirrors:
    """Pick the mirrors out of the host's indices.

    A third party may also offer `CODENAME main`; Debian's is the one with the origin, or (before the
    first `apt-get update`, when origins are unknown) the one that has CODENAME-updates too.
    """

    def find(releases: set[str], what: str, variable: str) -> str:
        given = os.environ.get(variable)
        if given:
            return given
        found = [t for t in targets if t.release in releases and t.component == "main"]
        found = [t for t in found if re.match(r"(https?|file|mirror\+\S+?|ftp):", t.uri)]
        updates = {t.uri for t in targets if t.release == f"{codename}-updates"}
        found.sort(key=lambda t: (t.origin != "Debian", t.uri not in updates))
        if not found:
            raise NoMirror(f"apt of this host names no {what} of Debian {codename}: set {variable}")
        return found[0].uri

    return Mirrors(
        find({codename}, "mirror", "CHATMAIL_MIRROR"),
        find({f"{codename}-security"}, "security mirror", "CHATMAIL_SECURITY_MIRROR"),
    )


def host_mirrors() -> Mirrors:
    """Ask the host's apt. Raises NoMirror."""
    fields = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)"
    text = subprocess.run(
        ["apt-get", "indextargets", "--format", fields, "Created-By: Packages"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    targets = [Target(*line.split("|")) for line in text.splitlines() if line.count("|") == 3]
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    return choose(targets, codename)


def host_options() -> list[str]:
    """How this host fetches: proxies, certificates, retries, clock checks; as apt.conf lines.

    Only `Acquire::` keys that say how to reach or trust a mirror's transport; none weakens signatures.
    """
    dump = subprocess.run(
        ["apt-config", "dump"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    wanted = re.compile(
        r'Acquire::(https?::|ftp::|Check-Valid-Until|Check-Date|Retries)\S* "[^"]+";'
    )
    lines = [line for line in dump.splitlines() if wanted.match(line)]
    lines.append('Acquire::Languages "none";')
    if not any(line.startswith("Acquire::Retries") for line in lines):
        lines.append('Acquire::Retries "3";')
    return sorted(lines)
