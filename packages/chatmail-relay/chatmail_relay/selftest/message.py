# SPDX-License-Identifier: MIT
"""What the self-test sends: one message that every relay must pass, and one that none may.

The encrypted one has the form of Delta Chat's (RFC 3156 around the packets of RFC 9580): a session key for
nobody and random bytes in place of the ciphertext. Nobody can tell it from a real one without the key.
"""

from __future__ import annotations

import base64
import os
import uuid
from email.utils import formatdate

_PAYLOAD = 200  # octets of "ciphertext"
_CRC24_INIT, _CRC24_POLYNOMIAL = 0xB704CE, 0x1864CFB
SUBJECT = "self-test"  # every relay must hide it


def encrypted(sender: str, recipient: str) -> tuple[str, bytes]:
    """A Message-ID that nobody else has, and the message."""
    name = f"<{uuid.uuid4()}@localhost>"
    # PKESK: version 3, no key named, X25519; SEIPD: version 1
    packets = _packet(1, b"\3" + bytes(8) + b"\x19" + os.urandom(73))
    packets += _packet(18, b"\1" + os.urandom(_PAYLOAD))
    boundary = uuid.uuid4().hex
    lines = [
        *_head(sender, recipient, name),
        'Content-Type: multipart/encrypted; protocol="application/pgp-encrypted";',
        f' boundary="{boundary}"',
        "",
        f"--{boundary}",
        "Content-Type: application/pgp-encrypted",
        "",
        "Version: 1",
        "",
        f"--{boundary}",
        "Content-Type: application/octet-stream",
        "",
        *_armored(packets),
        "",
        f"--{boundary}--",
        "",
    ]
    return name, "\r\n".join(lines).encode("ascii")


def cleartext(sender: str, recipient: str) -> bytes:
    """A message that is not encrypted."""
    head = _head(sender, recipient, f"<{uuid.uuid4()}@localhost>")
    lines = [*head, "Content-Type: text/plain; charset=us-ascii", "", "self-test", ""]
    return "\r\n".join(lines).encode("ascii")


def _head(sender: str, recipient: str, name: str) -> list[str]:
    return [
        f"From: <{sender}>",
        f"To: <{recipient}>",
        f"Date: {formatdate()}",
        f"Message-ID: {name}",
        f"Subject: {SUBJECT}",
        "MIME-Version: 1.0",
    ]


def _packet(tag: int, body: bytes) -> bytes:
    """One OpenPGP packet with a length of one or two octets (RFC 9580 section 4.2.1)."""
    size = len(body)
    if size < 192:
        return bytes((0xC0 | tag, size)) + body
    return bytes((0xC0 | tag, (size - 192 >> 8) + 192, size - 192 & 0xFF)) + body


def _armored(data: bytes) -> list[str]:
    """ASCII armor with a checksum, without which old relays take it for no message (RFC 4880 6.1)."""
    text = base64.b64encode(data).decode()
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    check = base64.b64encode(_crc24(data).to_bytes(3, "big")).decode()
    return ["-----BEGIN PGP MESSAGE-----", "", *lines, f"={check}", "-----END PGP MESSAGE-----"]


def _crc24(data: bytes) -> int:
    value = _CRC24_INIT
    for octet in data:
        value ^= octet << 16
        for _bit in range(8):
            value <<= 1
            if value & 0x1000000:
                value ^= _CRC24_POLYNOMIAL
    return value
