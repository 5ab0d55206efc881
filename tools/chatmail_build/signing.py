# SPDX-License-Identifier: MIT
"""The repository's signing key: made on first use, outside the work tree, never copied out of there.

An ed25519 primary key that only certifies, and a subkey that signs: whoever publishes for real can
move the primary key to a safe place and leave the subkey on the machine that signs. GnuPG runs in the
tools tree without network; its home directory is the only thing it can write.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from . import cache, sandbox, trees
from .paths import key_home

USER_ID = "Chatmail relay Debian repository (signing key)"

#: Where the home directory appears inside; short, as the agent's socket path is limited to 107 bytes.
INSIDE = "/gnupg"

_GENERATE = f"""
gpg --batch --quiet --pinentry-mode loopback --passphrase-file "$1" \\
    --quick-generate-key '{USER_ID}' ed25519 cert never
fingerprint=$(gpg --batch --with-colons --list-keys | sed -n 's/^fpr:::::::::\\([^:]*\\):/\\1/p')
gpg --batch --quiet --pinentry-mode loopback --passphrase-file "$1" \\
    --quick-add-key "$fingerprint" ed25519 sign never
gpgconf --kill all
"""


def passphrase_file() -> Path:
    """File with the key's passphrase: CHATMAIL_KEY_PASSPHRASE_FILE, or an empty one."""
    return Path(os.environ.get("CHATMAIL_KEY_PASSPHRASE_FILE") or "/dev/null")


def binds(home: Path) -> list[sandbox.Bind]:
    """What a command needs to see to sign with the key."""
    found = [sandbox.Bind(str(home), INSIDE, writable=True)]
    if passphrase_file() != Path("/dev/null"):
        found.append(sandbox.Bind(str(passphrase_file()), "/passphrase"))
    return found


def environment() -> dict[str, str]:
    """The variables for such a command; reprepro/conf/sign reads PASSPHRASE_FILE."""
    inside = "/dev/null" if passphrase_file() == Path("/dev/null") else "/passphrase"
    return {"GNUPGHOME": INSIDE, "PASSPHRASE_FILE": inside}


def ensure_key(home: Path | None = None) -> Path:
    """Make the key if there is none; returns its home directory."""
    home = home or key_home()
    with cache.locked(home.parent / f"{home.name}.lock"):
        if (home / "pubring.kbx").exists():
            return home
        with cache.new_directory(home) as new, trees.tree("tools") as tree:
            new.chmod(0o700)
            sandbox.run(
                tree,
                ["sh", "-euc", _GENERATE, "sh", environment()["PASSPHRASE_FILE"]],
                binds=binds(new),
                env=environment(),
                stdin=subprocess.DEVNULL,
            )
        print(f"made a new signing key in {home}", flush=True)
    return home


def public_key(home: Path) -> bytes:
    """The certificate in binary form, as apt wants it in a .pgp file."""
    with trees.tree("tools") as tree:
        result = sandbox.run(
            tree,
            ["gpg", "--batch", "--export", "--export-options", "export-minimal"],
            binds=binds(home),
            env=environment(),
            stdout=subprocess.PIPE,
        )
    if not result.stdout:
        raise ValueError(f"{home}: no public key there")
    return bytes(result.stdout)
