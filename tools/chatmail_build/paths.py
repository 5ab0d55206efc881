# SPDX-License-Identifier: MIT
"""Where things are. Nothing here is created; the users of a path create it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
LOGS = BUILD / "log"
DEBS = BUILD / "debs"
REPO = BUILD / "repo"

CACHE = Path(os.environ.get("CHATMAIL_CACHE") or "/var/cache/chatmail-relay-build")

SUITE = "trixie"


def key_home() -> Path:
    """GnuPG home of the repository's signing key; outside the work tree on purpose."""
    given = os.environ.get("CHATMAIL_KEY_HOME")
    if given:
        return Path(given)
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local/share")
    return Path(data) / "chatmail-relay" / "gnupg"
