# SPDX-License-Identifier: MIT
"""The Autocrypt and Autocrypt-Gossip header fields (https://autocrypt.org/level1.html)."""

from __future__ import annotations

import base64

from chatmail_echobot import openpgp

MAX_KEY = 32768  # octets of a certificate; those of clients have 400 to 3000


def parse(value: str, address: str) -> bytes | None:
    """The certificate in a field's *value*, if it is for *address* (lower case); else None."""
    if len(value) > 2 * MAX_KEY:
        return None
    attributes = dict[str, str]()
    for item in value.split(";"):
        name, separator, text = item.partition("=")
        name = name.strip().lower()
        # an unknown attribute is critical unless its name begins with "_"
        if not name.startswith("_") and name not in ("addr", "prefer-encrypt", "keydata"):
            return None
        attributes[name] = text.strip()
    if attributes.get("addr", "").lower() != address:
        return None
    try:
        cert = openpgp.from_base64(attributes.get("keydata", ""))
    except openpgp.OpenPGPError:
        return None
    return cert if 0 < len(cert) <= MAX_KEY else None


def field(address: str, cert: bytes, *, gossip: bool = False) -> str:
    """A field, folded at 76 columns, with its name and without its line end."""
    data = base64.b64encode(cert).decode("ascii")
    lines = [data[at : at + 76] for at in range(0, len(data), 76)]
    name = "Autocrypt-Gossip" if gossip else "Autocrypt"
    preference = "" if gossip else " prefer-encrypt=mutual;"
    return f"{name}: addr={address};{preference} keydata=\r\n " + "\r\n ".join(lines)
