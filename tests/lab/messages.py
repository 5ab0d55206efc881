# SPDX-License-Identifier: MIT
"""Messages for raw SMTP: the least that is a cleartext mail, and a PGP/MIME one (RFC 3156)."""

from __future__ import annotations

import base64
import time


def cleartext(sender: str, recipient: str, subject: str = "hi") -> bytes:
    """A message that no relay may pass."""
    return (
        f"From: <{sender}>\r\nTo: <{recipient}>\r\nSubject: {subject}\r\n"
        f"Message-ID: <{time.monotonic_ns()}@x>\r\n\r\nnot encrypted\r\n"
    ).encode()


def encrypted(
    sender: str, recipient: str, subject: str = "[...]", marker: bytes = b"", content: int = 40
) -> bytes:
    """A syntactically valid PGP/MIME message: one PKESK, one SEIPD of *content* bytes (RFC 9580)."""
    length = bytes([0xFF]) + content.to_bytes(4, "big")
    packets = (
        bytes([0xC1, 3]) + b"abc" + bytes([0xD2]) + length + marker.ljust(content, b"\0")[:content]
    )
    armor = base64.encodebytes(packets).decode().rstrip("\n").replace("\n", "\r\n")
    return (
        f"From: <{sender}>\r\nTo: <{recipient}>\r\nSubject: {subject}\r\n"
        f"Message-ID: <{time.monotonic_ns()}@x>\r\nMIME-Version: 1.0\r\n"
        'Content-Type: multipart/encrypted; protocol="application/pgp-encrypted"; boundary="b"\r\n\r\n'
        "--b\r\nContent-Type: application/pgp-encrypted\r\n\r\nVersion: 1\r\n\r\n"
        "--b\r\nContent-Type: application/octet-stream\r\n\r\n"
        f"-----BEGIN PGP MESSAGE-----\r\n\r\n{armor}\r\n-----END PGP MESSAGE-----\r\n\r\n--b--\r\n"
    ).encode()
