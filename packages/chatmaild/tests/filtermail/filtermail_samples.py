# SPDX-License-Identifier: MIT
"""Messages the way clients, GnuPG and attackers write them; made here, no recorded mail needed."""

import base64
import hashlib
import re

DOMAIN = "chat.example"
ALICE = "alice@chat.example"
BOB = "bob@chat.example"
REMOTE = "carol@other.example"

PKESK, SKESK, SEIPD, LITERAL = 1, 3, 18, 11


def noise(size, seed=b""):
    """*size* octets that look encrypted, always the same."""
    return hashlib.shake_128(seed).digest(size)


def length(size):
    """A new-format packet length in its shortest form."""
    if size < 192:
        return bytes([size])
    if size < 8384:
        return bytes([((size - 192) >> 8) + 192, (size - 192) & 0xFF])
    return b"\xff" + size.to_bytes(4, "big")


def packet(tag, body=b""):
    return bytes([0xC0 | tag]) + length(len(body)) + body


def old_packet(tag, body):
    """With an old-format header and a two-octet length, as GnuPG writes session keys."""
    return bytes([0x80 | tag << 2 | 1]) + len(body).to_bytes(2, "big") + body


def partial_packet(tag, body, power=9):
    """With partial lengths of 2**power octets."""
    size = 1 << power
    out = bytes([0xC0 | tag])
    while len(body) >= size:
        out += bytes([0xE0 | power]) + body[:size]
        body = body[size:]
    return out + length(len(body)) + body


def encrypted(size=800, keys=2):
    """The packets of an ordinary encrypted message."""
    return b"".join(packet(PKESK, noise(90)) for _ in range(keys)) + packet(SEIPD, noise(size))


def crc24(data):
    crc = 0xB704CE
    for octet in data:
        crc ^= octet << 16
        for _ in range(8):
            crc <<= 1
            if crc & 0x1000000:
                crc ^= 0x1864CFB
    return crc.to_bytes(3, "big")


def armor(packets, headers=b"", checksum=None, width=64):
    text = base64.b64encode(packets)
    lines = b"".join(text[at : at + width] + b"\r\n" for at in range(0, len(text), width))
    if checksum is None:
        checksum = b"=" + base64.b64encode(crc24(packets)) + b"\r\n"
    return (
        b"-----BEGIN PGP MESSAGE-----\r\n"
        + headers
        + b"\r\n"
        + lines
        + checksum
        + b"-----END PGP MESSAGE-----\r\n"
    )


VERSION_PART = (
    b'Content-Type: application/pgp-encrypted; charset="utf-8"\r\n'
    b"Content-Transfer-Encoding: 7bit\r\n\r\nVersion: 1\r\n\r\n"
)
DATA_HEADER = (
    b'Content-Type: application/octet-stream; charset="utf-8"\r\n'
    b"Content-Transfer-Encoding: 7bit\r\n\r\n"
)
BOUNDARY = b"18ea5d976b5587c0_e175ffa0ccff8d44_79a84e60a69b0323"


def multipart(*parts, boundary=BOUNDARY, preamble=b"\r\n", epilogue=b"\r\n"):
    text = preamble
    for part in parts:
        text += b"--" + boundary + b"\r\n" + part
        if not part.endswith(b"\r\n"):
            text += b"\r\n"
    return text + b"--" + boundary + b"--\r\n" + epilogue


def header(sender=ALICE, subject="[...]", extra=b"", content_type=None):
    if content_type is None:
        content_type = (
            b'multipart/encrypted; protocol="application/pgp-encrypted";\r\n boundary="%s"'
            % BOUNDARY
        )
    return (
        b"From: <%s>\r\n"
        b"Date: Wed, 18 Nov 2026 13:04:52 +0000\r\n"
        b"Message-ID: <2cc65cd6-ed00-4308-9f2e-98aa229c0cbb@localhost>\r\n"
        b"MIME-Version: 1.0\r\n"
        b'To: "hidden-recipients": ;\r\n'
        b"Subject: %s\r\n"
        b"%s"
        b"Content-Type: %s\r\n\r\n" % (sender.encode(), subject.encode(), extra, content_type)
    )


def encrypted_body(text=None, **options):
    if text is None:
        text = armor(encrypted())
    return multipart(VERSION_PART, DATA_HEADER + text, **options)


def encrypted_mail(sender=ALICE, text=None, subject="[...]", extra=b"", **options):
    return header(sender, subject, extra) + encrypted_body(text, **options)


def plain_mail(sender=ALICE, subject="hello", extra=b"", body=b"plain text\r\n"):
    return header(sender, subject, extra, b'text/plain; charset="utf-8"') + body


def securejoin_mail(sender=ALICE, step=b"vc-request", text=None, parts=None, extra=b""):
    if text is None:
        text = b"Secure-Join: " + step
    part = (
        b'Content-Type: text/plain; charset="utf-8"\r\nContent-Transfer-Encoding: 7bit\r\n\r\n'
        + text
    )
    return header(
        sender,
        "Message from x",
        b"Secure-Join: %s\r\nSecure-Join-Invitenumber: x\r\n" % step + extra,
        b'multipart/mixed;\r\n boundary="%s"' % BOUNDARY,
    ) + multipart(*([part] if parts is None else parts))


def setup_mail(sender=ALICE):
    return header(
        sender, "Autocrypt Setup Message", b"", b'multipart/mixed; boundary="%s"' % BOUNDARY
    ) + multipart(b"Content-Type: text/plain\r\n\r\nThis is the Autocrypt Setup Message")


def report_mail(sender="MAILER-DAEMON@other.example", automatic=b"auto-replied"):
    return header(
        sender,
        "Undelivered Mail Returned to Sender",
        b"Auto-Submitted: %s\r\n" % automatic if automatic is not None else b"",
        b'multipart/report; report-type=delivery-status; boundary="%s"' % BOUNDARY,
    ) + multipart(b"Content-Type: text/plain\r\n\r\nYour mail was lost.")


_NAME = re.compile(rb"([!-9;-~]+)[ \t]*:")


def split(mail):
    """Header fields and body of *mail*, the way Postfix reads it and tells a milter.

    A line that is no field ends the header and begins the body; of blanks before the colon the
    first one is taken for the colon.
    """
    fields = []
    at = 0
    while at < len(mail):
        end = mail.find(b"\r\n", at)
        end = len(mail) if end < 0 else end
        line = mail[at:end]
        if not line:
            return fields, mail[end + 2 :]
        name = _NAME.match(line)
        if name:
            fields.append((name[1], line[len(name[1]) + 1 :]))
        elif fields and line[:1] in (b" ", b"\t"):
            fields[-1] = (fields[-1][0], fields[-1][1] + b"\n" + line)
        else:
            return fields, mail[at:]
        at = end + 2
    return fields, b""


def normalized(mail):
    """*mail* as Postfix takes it from the network: line ends CRLF, no other control of lines."""
    lines = mail.replace(b"\r\n", b"\n").replace(b"\r", b" ").replace(b"\0", b" ")
    return lines.replace(b"\n", b"\r\n")
