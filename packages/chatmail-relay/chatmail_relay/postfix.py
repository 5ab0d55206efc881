# SPDX-License-Identifier: MIT
"""Postfix' settings by Postfix' own program: postconf(1) on a copy of main.cf and master.cf.

The edited copies become ordinary files of the transaction, so that Postfix rolls back with the rest.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .paths import Paths
from .transaction import Change

CONFIG_DIR = "/etc/postfix"
FILES = ("main.cf", "master.cf")
AGE = 3  # seconds: each process that starts reads a file of the last two again and again until it has settled


class PostfixError(Exception):
    """postconf refused; its own words say why."""


class Staging:
    """A private copy of Postfix' configuration that postconf edits."""

    def __init__(self, paths: Paths):
        self.source = paths.real(CONFIG_DIR)
        self.folder = Path(tempfile.mkdtemp(prefix="chatmail-postfix."))
        for name in FILES:
            source = self.source / name
            if not source.exists():
                # debconf's "No configuration": Debian ships the defaults it would have copied
                source = paths.real(f"/usr/share/postfix/{name}.debian")
            if not source.exists():
                source = paths.real(f"/usr/share/postfix/{name}.dist")
            shutil.copyfile(source, self.folder / name)

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self.folder)

    def _postconf(self, *arguments: str) -> str:
        done = subprocess.run(
            ["postconf", "-c", str(self.folder), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise PostfixError(f"postconf {' '.join(arguments[:2])}: {done.stderr.strip()}")
        return done.stdout

    def main_values(self) -> dict[str, str]:
        """Every key that main.cf sets, as written."""
        lines = self._postconf("-n").splitlines()
        pairs = (line.partition(" =") for line in lines if " =" in line)
        return {key: value.strip() for key, _, value in pairs}

    def master_lines(self) -> dict[str, str]:
        """Every service of master.cf as "name/type": one line, single blanks."""
        found = {}
        for line in self._postconf("-M").splitlines():
            words = line.split()
            found[f"{words[0]}/{words[1]}"] = " ".join(words)
        return found

    def set_main(self, wanted: Mapping[str, str | None]) -> None:
        """Set keys of main.cf; None removes a key."""
        have = self.main_values()
        changed = [f"{k}={v}" for k, v in wanted.items() if v is not None and have.get(k) != v]
        gone = [k for k, v in wanted.items() if v is None and k in have]
        if changed:
            self._postconf("-e", *changed)
        if gone:
            self._postconf("-X", *gone)

    def set_master(self, wanted: Mapping[str, str | None]) -> None:
        """Set services of master.cf; None removes a service."""
        have = self.master_lines()
        for service, line in wanted.items():
            if line is None:
                if service in have:
                    self._postconf("-MX", service)
            elif have.get(service) != " ".join(line.split()):
                self._postconf("-M", f"{service}={line}")

    def changes(self) -> list[Change]:
        """The edited files as wanted by the transaction, owner and mode kept."""
        changes = []
        for name in FILES:
            dest = self.source / name
            try:
                info = dest.stat()
                mode, uid, gid = info.st_mode & 0o7777, info.st_uid, info.st_gid
            except FileNotFoundError:
                mode, uid, gid = 0o644, 0, 0
            content = (self.folder / name).read_bytes()
            changes.append(Change(dest, content, mode, uid, gid, AGE))
        return changes


def ports(master_lines: Mapping[str, str | None]) -> dict[str, list[str]]:
    """Services of master.cf that listen on the network, each as its first eight words, without options.

    A line that is None is that of no service.
    """
    return {
        service: line.split()[:8]
        for service, line in master_lines.items()
        if line is not None and service.endswith("/inet")
    }


def is_installed(paths: Paths) -> bool:
    """Whether there is a Postfix to configure (it may have been purged before us)."""
    return shutil.which("postconf") is not None and os.path.isdir(paths.real(CONFIG_DIR))
