# SPDX-License-Identifier: MIT
"""What the bot keeps in its StateDirectory: a secret key, a password, two invitation codes.

All are made at its first start and never changed, so an invite link stays good; 0600, and each file
has its name only when it is complete. Nothing about peers is in here.
"""

from __future__ import annotations

import base64
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from chatmail_echobot import openpgp

#: As the administrator's command finds it; the service itself is told by systemd.
DIRECTORY = Path("/var/lib/chatmail-echobot")
NAME = "Echo"


class StateError(Exception):
    """The state is not there or not readable; the text says what to do."""


@dataclass(frozen=True)
class Identity:
    """The bot as others see it, and its secrets. *key* is armored, *cert* binary."""

    address: str
    key: bytes
    cert: bytes
    invite_number: str
    auth: str
    password: str

    @property
    def invite_link(self) -> str:
        """The link a client joins by: SecureJoin without version 3, whose answers no SOP can write.

        https://securejoin.delta.chat/en/latest/new.html, "Setup Contact protocol".
        """
        return (
            f"https://i.delta.chat/#{openpgp.fingerprint(self.cert)}&i={self.invite_number}"
            f"&s={self.auth}&a={quote(self.address)}&n={quote(NAME)}"
        )

    @property
    def vcard(self) -> str:
        """A contact with its key (RFC 6350) that clients import; ends with CRLF."""
        key = base64.b64encode(self.cert).decode("ascii")
        lines = (
            "BEGIN:VCARD",
            "VERSION:4.0",
            f"EMAIL:{self.address}",
            f"FN:{NAME}",
            f"KEY:data:application/pgp-keys;base64\\,{key}",
            "END:VCARD",
        )
        return "".join(f"{line}\r\n" for line in lines)


def directory() -> Path:
    """Where the state is."""
    return Path(os.environ.get("STATE_DIRECTORY") or DIRECTORY)


def make(folder: Path, address: str) -> None:
    """Make what is missing. Raises OSError, OpenPGPError."""
    makers: dict[str, Callable[[], bytes]] = {
        "key.asc": lambda: openpgp.generate(f"<{address}>"),
        "password": lambda: secrets.token_urlsafe(24).encode(),
        "invite-number": lambda: secrets.token_urlsafe(18).encode(),
        "auth": lambda: secrets.token_urlsafe(18).encode(),
    }
    for name, maker in makers.items():
        if not (folder / name).exists():
            _write(folder, name, maker())


def _write(folder: Path, name: str, content: bytes) -> None:
    new = folder / f".{name}.new"
    with open(new, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.rename(folder / name)


def load(folder: Path, address: str) -> Identity:
    """Read the state. Raises StateError, OpenPGPError."""
    try:
        key = (folder / "key.asc").read_bytes()
        texts = [(folder / name).read_text() for name in ("invite-number", "auth", "password")]
    except FileNotFoundError as error:
        raise StateError(
            f"{error.filename} does not exist: the bot makes it when it starts, see "
            "systemctl status chatmail-echobot.service"
        ) from error
    except OSError as error:
        raise StateError(f"{error.filename}: {error.strerror}; run this as root") from error
    return Identity(address, key, openpgp.extract_cert(key), *texts)
