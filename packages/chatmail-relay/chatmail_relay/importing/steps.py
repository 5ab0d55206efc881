# SPDX-License-Identifier: MIT
"""What an import does, step by step.

Nothing is deleted: what has to go away moves to a folder beside, with its path. Each finished step is noted
so that an import that was ended half-way goes on where it was; what is done twice is done once.
"""

from __future__ import annotations

import functools
import json
import os
import pwd
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chatmaild.config import SELF_SIGNED_CERT, SELF_SIGNED_KEY, read_settings
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ..apply import apply
from ..backup.errors import BackupError
from ..backup.restore import exchange, give
from ..backup.snapshot import Snapshot
from ..paths import Paths
from ..secrets import DKIM_RSA
from ..settings import change_settings
from ..transaction import Change, write_file
from . import legacy
from .legacy import ImportProblem, Legacy

ATTIC = "/var/lib/chatmail/imported"
STAGING = "/var/lib/chatmail/import.partial"
SECONDS = 600


@dataclass(frozen=True)
class Step:
    """One thing that is done. *name* is noted when it is; *says* is printed before anything is done."""

    name: str
    says: list[str]
    run: Callable[[], None] = field(compare=False)


def _run(*words: str) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ImportProblem(f"{' '.join(words[:3])}: {error}") from None
    if done.returncode:
        raise ImportProblem(f"{' '.join(words[:3])}: {done.stderr.strip() or done.stdout.strip()}")


class Import:
    """The import of one relay; *here* is whether it is that of this machine itself."""

    def __init__(self, paths: Paths, old: Legacy, version: str) -> None:
        self.paths = paths
        self.old = old
        self.version = version
        self.here = old.root == paths.root
        self.attic = paths.real(ATTIC)
        self.journal = paths.state / "import.json"

    # --- the steps -------------------------------------------------------------------------------

    def steps(self) -> list[Step]:
        """All that is to do, in order."""
        made = [
            Step("settings", self._says_settings(), self._check_settings),
            *(self._steps_here() if self.here else []),
            Step(
                "mailboxes",
                [f"link or copy the mailboxes of {self.old.store}, with their times"],
                self._mailboxes,
            ),
            Step("keys", self._says_keys(), self._keys),
        ]
        if not self.here:
            made += [
                Step("acme", [f"copy {legacy.ACME}"], self._acme),
                Step("queue", [f"copy the mail that waits in {legacy.QUEUE}"], self._queue),
            ]
        return [
            *made,
            Step("file", ["write /etc/chatmail/chatmail.ini"], self._write_settings),
            Step("apply", ["render everything and start the relay"], self._apply),
        ]

    def _says_settings(self) -> list[str]:
        values = self.old.settings
        lines = [f"take over from {self.old.ini}:"]
        lines += [f"  {key} = {values[key]}".rstrip() for key in values]
        lines += [f"  not {key}: {why}" for key, why in self.old.not_taken]
        return lines

    def _steps_here(self) -> list[Step]:
        there = self.old.there
        folder = legacy.UNIT_FOLDER
        units = there(*(f"{folder}/{name}" for name in (*legacy.UNITS, *legacy.DROPINS)))
        units += self.old.links()
        overrides = there(*legacy.OVERRIDES)
        conffiles = {
            package: there(*files) for package, files in legacy.CONFFILES.items() if there(*files)
        }
        programs = there(*legacy.PROGRAMS)
        stop = [*(name for name in legacy.UNITS if f"{folder}/{name}" in units), *legacy.DAEMONS]

        def move_units() -> None:
            self._move(units)
            if self.paths.is_live:
                _run("systemctl", "daemon-reload")
                self._enable_packaged()

        return [
            *(
                [Step("stop", ["stop " + " ".join(stop)], lambda: self._stop(stop))]
                if self.paths.is_live
                else []
            ),
            Step("units", _moved(units), move_units),
            Step("overrides", _moved(overrides), lambda: self._move(overrides)),
            Step(
                "postfix",
                [f"give {path} back to Debian" for path in there(*legacy.POSTFIX)],
                self._postfix,
            ),
            *(
                Step(
                    f"conffiles of {package}",
                    [*_moved(files), f"install the ones of {package} again"],
                    functools.partial(self._conffiles, package, files),
                )
                for package, files in conffiles.items()
                if self.paths.is_live and self._is_installed(package)
            ),
            Step("programs", _moved(programs), lambda: self._move(programs)),
            Step(
                "left",
                [f"leave {path}: {why}" for path, why in legacy.LEFT.items() if there(path)],
                lambda: None,
            ),
        ]

    def finished(self) -> list[str]:
        """The names of the steps that are done."""
        try:
            return list(json.loads(self.journal.read_text()))
        except FileNotFoundError:
            return []

    def run(self, steps: Sequence[Step], say: Callable[[Step], None]) -> None:
        """Do those steps that are not done. Raises ImportProblem, and what apply raises."""
        os.makedirs(self.paths.state, 0o700, exist_ok=True)
        done = self.finished()
        # its settings are needed to the end, and move away with the other programs
        kept = self.paths.state / "import.ini"
        if not kept.exists():
            write_file(Change(kept, self.old.ini.read_bytes(), 0o600))
        for step in steps:
            if step.name in done:
                continue
            say(step)
            try:
                step.run()
            except (OSError, BackupError, ImportProblem) as error:
                raise ImportProblem(
                    f"{step.name}: {error}. Mend it and run the import again: it goes on from here"
                ) from error
            done.append(step.name)
            write_file(Change(self.journal, json.dumps(done).encode(), 0o600))

    # --- what each does ------------------------------------------------------------------------

    def _check_settings(self) -> None:
        """Whether they are valid as ours; raises ConfigError, before anything is done."""
        lines = [f"{key} = {value}" for key, value in self.old.settings.items()]
        text = "[params]\n" + "\n".join(line.replace("\n", "\n    ") for line in lines) + "\n"
        read_settings(self.old.ini, text)

    def _stop(self, units: Sequence[str]) -> None:
        for unit in units:
            # one that is not there is stopped
            subprocess.run(["systemctl", "stop", unit], capture_output=True, timeout=SECONDS)

    def _enable_packaged(self) -> None:
        """Units of ours that were masked by ones of the same name: their links led there."""
        folder = self.paths.real("/usr/lib/systemd/system")
        names = [name for name in legacy.UNITS if name.startswith("chatmail-")]
        for name in names:
            path = folder / name
            if path.exists() and "[Install]" in path.read_text():
                _run("systemctl", "enable", name)

    def _move(self, paths: Sequence[str]) -> None:
        for path in paths:
            source, target = self.old.real(path), self.attic / path.lstrip("/")
            if not os.path.lexists(source):
                continue  # moved by a run before
            os.makedirs(self.attic, 0o700, exist_ok=True)
            os.makedirs(target.parent, 0o755, exist_ok=True)
            shutil.move(source, target)

    def _postfix(self) -> None:
        for path, default in legacy.POSTFIX.items():
            target = self.attic / path.lstrip("/")
            if target.exists() or not self.old.real(path).exists():
                continue
            os.makedirs(self.attic, 0o700, exist_ok=True)
            os.makedirs(target.parent, 0o755, exist_ok=True)
            shutil.copy2(self.old.real(path), target)
            write_file(Change(self.old.real(path), self.paths.real(default).read_bytes()))

    def _is_installed(self, package: str) -> bool:
        return self.paths.real(f"/var/lib/dpkg/info/{package}.list").exists()

    def _conffiles(self, package: str, files: Sequence[str]) -> None:
        """Debian's own again: nginx's has the folder for sites, without which there is no web site."""
        self._move(files)
        if package == "dovecot-core":  # kept by ucf(1)
            _run(
                "env", "UCF_FORCE_CONFFMISS=1", "dpkg-reconfigure", "-f", "noninteractive", package
            )
            return
        options = (
            "-o",
            "Dpkg::Options::=--force-confmiss",
            "-o",
            "Dpkg::Options::=--force-confold",
        )
        _run("apt-get", "install", "--reinstall", "--yes", "-q", *options, package)

    def _mailboxes(self) -> None:
        ini = self.paths.state / "import.ini"
        config = read_settings(ini, f"[params]\nmail_domain = {self.old.mail_domain}\n")[0]
        store = self.paths.real(config.mailboxes_dir)
        staging = self.paths.real(STAGING)
        ready = staging / "ready"  # the place was free then
        taken = store.exists() and any("@" in name for name in os.listdir(store))
        if ready.exists() and taken:
            return  # done, but not noted; _apply clears up
        if staging.exists():
            shutil.rmtree(staging)
        if taken:
            raise ImportProblem(f"{store}: there are mailboxes already; move it away")
        source = self.old.real(self.old.store)
        if not source.is_dir():
            raise ImportProblem(f"{source}: no mailboxes there")
        tree = staging / "store"
        os.makedirs(staging, 0o700)
        snapshot = Snapshot(self.paths, config, staging, link=True)
        snapshot.store(source, tree, None)
        if snapshot.counts.problems:
            raise ImportProblem("; ".join(snapshot.counts.problems))
        give(tree, self.paths)
        os.makedirs(store.parent, 0o755, exist_ok=True)
        write_file(Change(ready, b"", 0o600))
        if store.exists():
            exchange(tree, store)
        else:
            shutil.move(tree, store)
            if os.geteuid() == 0 and self.paths.root == Path("/"):
                owner = pwd.getpwnam("_chatmail")
                os.chown(store, owner.pw_uid, owner.pw_gid)
        shutil.rmtree(staging)

    def _says_keys(self) -> list[str]:
        lines = []
        if self.old.there(legacy.DKIM_KEY):
            lines.append(f"copy the DKIM key {legacy.DKIM_KEY}, selector {legacy.DKIM_SELECTOR}")
        if self._own_certificate():
            lines.append(f"copy the self-signed certificate {legacy.SELF_SIGNED[0]} and its key")
        if self.old.there(legacy.NO_CREATE) and not self.here:
            lines.append(f"make {legacy.NO_CREATE}: no new addresses")
        return lines

    def _own_certificate(self) -> bool:
        """Whether it has one of the kind that ours are."""
        if len(self.old.there(*legacy.SELF_SIGNED)) != 2:
            return False
        data = self.old.real(legacy.SELF_SIGNED[1]).read_bytes()
        try:
            key = serialization.load_pem_private_key(data, None)
        except (ValueError, TypeError):
            return False
        return isinstance(key, ec.EllipticCurvePrivateKey)

    def _keys(self) -> None:
        pairs = [(legacy.DKIM_KEY, DKIM_RSA, 0o600)] if self.old.there(legacy.DKIM_KEY) else []
        if self._own_certificate():
            cert, key = legacy.SELF_SIGNED
            pairs += [(cert, SELF_SIGNED_CERT, 0o644), (key, SELF_SIGNED_KEY, 0o600)]
        if self.old.there(legacy.NO_CREATE):
            pairs.append((legacy.NO_CREATE, legacy.NO_CREATE, 0o644))
        for source, dest, mode in pairs:
            target = self.paths.real(dest)
            os.makedirs(target.parent, 0o700, exist_ok=True)
            write_file(Change(target, self.old.real(source).read_bytes(), mode))

    def _acme(self) -> None:
        source, target = self.old.real(legacy.ACME), self.paths.real(legacy.ACME)
        for folder, folders, files in os.walk(source) if source.is_dir() else ():
            for name in (*files, *(n for n in folders if (Path(folder) / n).is_symlink())):
                path = Path(folder) / name
                dest = target / path.relative_to(source)
                if not os.path.lexists(dest) and path.parts[-2] != "conf":
                    os.makedirs(dest.parent, 0o755, exist_ok=True)
                    shutil.copy2(path, dest, follow_symlinks=False)

    def _queue(self) -> None:
        """Queue files keep their names; postsuper(1) gives them the right ones for their new inodes."""
        owner = pwd.getpwnam("postfix") if self.paths.root == Path("/") else None
        for name in legacy.QUEUES:
            source, target = (
                self.old.real(legacy.QUEUE) / name,
                self.paths.real(legacy.QUEUE) / name,
            )
            for path in sorted(source.rglob("*")) if source.is_dir() else ():
                dest = target / path.relative_to(source)
                if not path.is_file() or path.is_symlink() or dest.exists():
                    continue
                os.makedirs(dest.parent, 0o700, exist_ok=True)
                shutil.copy2(path, dest)
                if owner:
                    os.chown(dest.parent, owner.pw_uid, -1)
                    os.chown(dest, owner.pw_uid, owner.pw_gid)
        if owner:
            _run("postsuper", "-s")

    def _write_settings(self) -> None:
        change_settings(self.paths, self.old.settings)

    def _apply(self) -> None:
        apply(self.paths, self.version, restart_all=True)
        shutil.rmtree(self.paths.real(STAGING), ignore_errors=True)


def _moved(paths: Sequence[str]) -> list[str]:
    return [f"move {path} to {ATTIC}" for path in paths]
