# SPDX-License-Identifier: MIT
"""What the relay changed on this machine and what was there before.

The ledger is one of the files of each transaction, so it always tells of the files that are on disk.
`pending` are units that must still be restarted or reloaded: it survives a kill between the commit
and the restart.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

LEDGER_NAME = "ledger.json"


class LedgerError(Exception):
    """The ledger is damaged."""


@dataclass
class Entry:
    """What one component owns. None means "was not there before"."""

    files: dict[str, dict[str, object] | None] = field(default_factory=dict)
    postconf: dict[str, str | None] = field(default_factory=dict)
    master: dict[str, str | None] = field(default_factory=dict)
    units: list[str] = field(default_factory=list)


@dataclass
class Ledger:
    """The whole ledger: one entry a component, and the units still to be activated."""

    components: dict[str, Entry] = field(default_factory=dict)
    pending: dict[str, str] = field(default_factory=dict)  # unit -> restart | reload

    def to_json(self) -> bytes:
        """The ledger as it stands in the file."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode()

    @property
    def files(self) -> dict[str, dict[str, object] | None]:
        """All files that are ours, whichever component's, and what was there before."""
        return {
            dest: before
            for entry in self.components.values()
            for dest, before in entry.files.items()
        }


def ledger_path(state: Path) -> Path:
    """The ledger below the state directory."""
    return state / LEDGER_NAME


def load_ledger(state: Path) -> Ledger:
    """Read the ledger; an empty one if nothing was ever applied."""
    path = ledger_path(state)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Ledger(
            {name: Entry(**entry) for name, entry in data["components"].items()},
            dict(data["pending"]),
        )
    except FileNotFoundError:
        return Ledger()
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(
            f"{path}: damaged ({error}); move it away and run chatmail-relay apply"
        ) from error


def remember(dest: Path) -> dict[str, object] | None:
    """What stands at *dest* before we take it: text and permissions, or where a link points."""
    if dest.is_symlink():
        return {"link": os.readlink(dest)}
    if not dest.exists():
        return None
    info = dest.stat()
    return {
        "text": dest.read_bytes().decode("utf-8", "surrogateescape"),
        "mode": info.st_mode & 0o7777,
        "uid": info.st_uid,
        "gid": info.st_gid,
    }
