# SPDX-License-Identifier: MIT
"""OpenPGP by rsop(1), which speaks the Stateless OpenPGP CLI (draft-dkg-openpgp-stateless-cli).

Each call is a process of its own with bounded memory, output and time: a message made to crash or to
inflate a parser ends that process, not the bot.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from typing import IO

PROGRAM = "/usr/bin/rsop"
SECONDS = 120.0  # of one call; 30 MB take two
MAX_MEMORY = 448 << 20  # octets of address space; 30 MB take 180 MB
MAX_OUTPUT = 256 << 20  # octets

# on disk: /tmp is memory in Debian 13
TEMPORARY = "/var/tmp"

_PUBLIC_KEY = 6  # packet tag, RFC 9580 section 5
_OLD_LENGTHS = (1, 2, 4)  # octets of the length by the two low bits of an old-format tag


class OpenPGPError(Exception):
    """rsop refused, or its input is no OpenPGP; the text quotes nothing of a message."""


def temporary() -> IO[bytes]:
    """A new file without a name, on disk."""
    return tempfile.TemporaryFile(dir=TEMPORARY)


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_OUTPUT, MAX_OUTPUT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _run(arguments: list[str], source: IO[bytes], *pass_fds: int) -> IO[bytes]:
    """Run rsop from where *source* stands; its output, rewound. Raises OpenPGPError."""
    output = temporary()
    try:
        # the child reads the descriptor, not Python's buffer
        os.lseek(source.fileno(), source.tell(), os.SEEK_SET)
        done = subprocess.run(
            [PROGRAM, *arguments],
            stdin=source,
            stdout=output,
            stderr=subprocess.DEVNULL,
            pass_fds=pass_fds,
            timeout=SECONDS,
            preexec_fn=_limit,
            env={"LANG": "C.UTF-8"},
        )
    except subprocess.TimeoutExpired as error:
        output.close()
        raise OpenPGPError(f"rsop {arguments[0]}: no end within {SECONDS:g} s") from error
    if done.returncode:
        output.close()
        raise OpenPGPError(f"rsop {arguments[0]}: status {done.returncode}")
    output.seek(0)
    return output


@contextlib.contextmanager
def _passed(*contents: bytes) -> Iterator[list[int]]:
    """Descriptors from which a child reads *contents*; nothing of it gets a name on disk."""
    files = [os.memfd_create("openpgp", 0) for _ in contents]
    try:
        for file, content in zip(files, contents, strict=True):
            os.pwrite(file, content, 0)
        yield files
    finally:
        for file in files:
            os.close(file)


def generate(user_id: str) -> bytes:
    """A new secret key, armored: version 4, EdDSA and ECDH on Curve25519, without features.

    Its primary key both certifies and signs, because clients verify with that one alone; as it does
    not claim SEIPD version 2, clients use version 1, which every OpenPGP program of Debian reads.
    """
    profile = "--profile=draft-koch-eddsa-for-openpgp-00"
    with temporary() as nothing, _run(["generate-key", profile, user_id], nothing) as out:
        return out.read()


def extract_cert(key: bytes) -> bytes:
    """The certificate (public key) of a secret key, binary."""
    with temporary() as source:
        source.write(key)
        source.seek(0)
        with _run(["extract-cert", "--no-armor"], source) as out:
            return out.read()


def encrypt(plain: IO[bytes], key: bytes, cert: bytes) -> IO[bytes]:
    """*plain*, signed with *key* and encrypted for *cert*, as a file of ASCII armor."""
    with _passed(key, cert) as (signer, recipient):
        words = ["encrypt", f"--sign-with=@FD:{signer}", f"@FD:{recipient}"]
        return _run(words, plain, signer, recipient)


def decrypt(message: IO[bytes], key: bytes, cert: bytes | None = None) -> IO[bytes]:
    """The content of an armored *message* for *key*.

    With *cert* raises OpenPGPError unless it has a valid signature by that.
    """
    if cert is None:
        with _passed(key) as (own,):
            return _run(["decrypt", f"@FD:{own}"], message, own)
    with _passed(key, cert, b"") as (own, peer, verified):
        words = ["decrypt", f"--verify-with=@FD:{peer}", f"--verifications-out=@FD:{verified}"]
        plain = _run([*words, f"@FD:{own}"], message, own, peer, verified)
        # without a valid signature the exit status is 0 all the same
        if not os.fstat(verified).st_size:
            plain.close()
            raise OpenPGPError("no valid signature")
        return plain


def fingerprint(cert: bytes) -> str:
    """The fingerprint of a binary certificate, 40 upper-case hex digits (RFC 9580 section 5.5.4.2).

    Raises OpenPGPError for anything but a version 4 key.
    """
    try:
        head, rest = cert[0], cert[1:]
        if head & 0xC0 == 0x80 and head & 3 != 3:
            tag, size = head >> 2 & 15, _OLD_LENGTHS[head & 3]
            length, rest = int.from_bytes(rest[:size], "big"), rest[size:]
        elif head & 0xC0 == 0xC0 and rest[0] < 192:
            tag, length, rest = head & 63, rest[0], rest[1:]
        elif head & 0xC0 == 0xC0 and rest[0] < 224:
            tag, length, rest = head & 63, (rest[0] - 192 << 8) + rest[1] + 192, rest[2:]
        else:
            raise OpenPGPError("not a certificate")
        body = rest[:length]
        if tag != _PUBLIC_KEY or len(body) != length or body[0] != 4:
            raise OpenPGPError("not a certificate of version 4")
    except IndexError as error:
        raise OpenPGPError("not a certificate") from error
    return hashlib.sha1(b"\x99" + length.to_bytes(2, "big") + body).hexdigest().upper()


def from_base64(text: str) -> bytes:
    """A certificate as Autocrypt headers carry it; raises OpenPGPError."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise OpenPGPError("not base64") from error
