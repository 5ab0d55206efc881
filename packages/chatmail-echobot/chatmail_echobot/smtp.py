# SPDX-License-Identifier: MIT
"""Hands one message to the relay's own Postfix, as any client does (RFC 6409)."""

from __future__ import annotations

import smtplib
import ssl
from typing import IO

PORT = 465
BLOCK = 65536  # octets that are sent at once, about
TIMEOUT = 120.0  # seconds
NAME = "[127.0.0.1]"  # in EHLO, as clients say it


class Temporary(Exception):
    """The relay takes no message of ours now: its rate limit, a full disk, a restart."""


class Refused(Exception):
    """The relay takes this message never."""


def _context() -> ssl.SSLContext:
    # The peer is this host: port 465 of loopback is Postfix' own, and no stranger's to listen on. Its
    # certificate is for another name, and may be self-signed.
    made = ssl.create_default_context()
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    return made


class Sender:
    """Submits messages from one account."""

    def __init__(self, host: str, address: str, password: str) -> None:
        self._host, self._address, self._password = host, address, password

    def send(self, recipient: str, message: IO[bytes]) -> None:
        """Submit *message*, a file of CRLF lines. Raises Temporary, Refused."""
        try:
            with smtplib.SMTP_SSL(
                self._host, PORT, NAME, timeout=TIMEOUT, context=_context()
            ) as session:
                session.login(self._address, self._password)
                _check(session.mail(self._address))
                _check(session.rcpt(recipient))
                _check(session.docmd("DATA"), 354)
                message.seek(0)
                for block in iter(lambda: message.readlines(BLOCK), []):
                    # RFC 5321 section 4.5.2
                    session.send(b"".join(b"." * line.startswith(b".") + line for line in block))
                session.send(b".\r\n")
                _check(session.getreply())
        except smtplib.SMTPResponseException as error:
            # of the greeting, EHLO or the login
            raise Temporary(f"status {error.smtp_code}") from error
        except (OSError, smtplib.SMTPException) as error:
            raise Temporary(type(error).__name__) from error


def _check(reply: tuple[int, bytes], wanted: int = 250) -> None:
    code, _text = reply
    if 400 <= code < 500:
        raise Temporary(f"status {code}")
    if code != wanted:
        raise Refused(f"status {code}")
