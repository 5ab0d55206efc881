# SPDX-License-Identifier: MIT
"""The real client with servers of ordinary names, whose certificate authority it does not know.

It takes no authority but the public ones. But it remembers the keys of servers whose certificate was good
once (its table tls_spki), and then looks at the key and the name alone: these keys are written there.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import deltachat_rpc_server
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from deltachat_rpc_client import Account, DeltaChat, Rpc

from .host import Host
from .inet import Internet

SPKI = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
CERTIFICATE = "/var/lib/chatmail/tls/live/fullchain.pem"


def rpc_program() -> Path:
    """The client's core, as its wheel installed it."""
    program = Path(deltachat_rpc_server.__file__).parent / "deltachat-rpc-server"
    return program if program.exists() else Path(shutil.which(program.name) or "")


@contextlib.contextmanager
def clients(
    internet: Internet, folder: Path, program: Path, relays: Mapping[str, Host], number: int
) -> Iterator[list[Account]]:
    """*number* accounts of the real client, not yet configured, that trust *relays*, by domain."""
    wrapper = str(internet.lab.rpc_server(folder, program, internet.resolver))
    accounts = folder / "accounts"
    with Rpc(accounts_dir=str(accounts), rpc_server_path=wrapper) as rpc:
        for _ in range(number):
            DeltaChat(rpc).add_account()
    certificates = {
        domain: x509.load_pem_x509_certificate(host.read(CERTIFICATE).encode())
        for domain, host in relays.items()
    }
    remember_keys(accounts, certificates)
    with Rpc(accounts_dir=str(accounts), rpc_server_path=wrapper) as rpc:
        yield DeltaChat(rpc).get_all_accounts()


def remember_keys(accounts: Path, certificates: Mapping[str, x509.Certificate]) -> None:
    """Let every account below *accounts* trust the keys of *certificates*, by host name.

    The client must not be running.
    """
    now = int(time.time())
    rows = []
    for host, certificate in certificates.items():
        digest = hashlib.sha256(certificate.public_key().public_bytes(*SPKI)).digest()
        rows.append((host, base64.b64encode(digest).decode(), now))
    for path in accounts.glob("*/dc.db"):
        with sqlite3.connect(path) as database:
            database.executemany(
                "INSERT OR REPLACE INTO tls_spki (host, spki_hash, timestamp) VALUES (?, ?, ?)",
                rows,
            )
        database.close()
