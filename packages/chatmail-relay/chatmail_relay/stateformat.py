# SPDX-License-Identifier: MIT
"""The format of all that the relay keeps below /var/lib/chatmail, as a number that only grows.

FORMAT goes up with every change after which an older version would misread or damage what is there:
the ledger, mailboxes, accounts, invitations, the notifier's queue. An older version then refuses to
touch anything, and names the oldest version that may. The file stays with mailboxes and keys when the
package is removed, and is part of every backup of that folder.
"""

from .errors import StateError
from .paths import Paths
from .transaction import Change

FORMAT = 1
NAME = "format"


def check(paths: Paths, version: str) -> None:
    """Raise StateError if what is there was made by a version that knows more than this one."""
    found, since = _read(paths)
    if found > FORMAT:
        raise StateError(
            f"{paths.format}: what is kept in {paths.format.parent} has format {found}, "
            f"and version {version} knows formats up to {FORMAT}: it would damage it.\n"
            f"Nothing was changed. Install version {since} or newer again, or restore a backup "
            "that was made with this version"
        )


def change(paths: Paths, version: str) -> Change | None:
    """What notes that *version* has been here, or None if a version of the same format was before."""
    if _read(paths)[0] == FORMAT:
        return None
    return Change(paths.format, f"{FORMAT} {version}\n".encode())


def _read(paths: Paths) -> tuple[int, str]:
    """The format, and the first version that wrote it; 0 where nothing was ever applied."""
    try:
        number, since = paths.format.read_text(encoding="utf-8").split()
        return int(number), since
    except FileNotFoundError:
        return 0, ""
    except ValueError as error:
        raise StateError(
            f"{paths.format}: not a number and a version. Restore it from a backup, or, if no newer "
            f"version was ever here, remove it"
        ) from error
