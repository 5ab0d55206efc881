# SPDX-License-Identifier: MIT
"""The records a relay needs, as a list and as a zone file."""

import base64
import hashlib
import ipaddress
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from chatmaild.config import Config
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from ..paths import Paths
from ..secrets import DKIM_ED25519, DKIM_RSA

TTL = 3600  # seconds
STRING_MAX = 255  # octets of one character-string (RFC 1035 3.3)
STS_ID = 1  # RFC 8461 3.1: changes when the policy does, and ours never does
# RFC 8659 4.2: who issues, by the host of the account; no CAA is better than one that locks out
ISSUERS = {"acme-v02.api.letsencrypt.org": "letsencrypt.org"}
ACMETOOL_SECONDS = 20
SERVICES = (("submission", 587), ("submissions", 465), ("imap", 143), ("imaps", 993))

# An address of documentation: asks the kernel for a route, nothing is sent (RFC 5737, RFC 3849).
_FAR = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))


ABSENT = "-"


@dataclass(frozen=True)
class Record:
    """One record: absolute *name* without the last dot, *kind* as in "MX", *value* in the presentation form
    of RFC 1035; *why* is for people.

    An empty *value* means that the name must have some record, ABSENT that it must have none. *if_signed*:
    only in a zone that is signed (DNSSEC).
    """

    name: str
    kind: str
    value: str
    required: bool
    why: str
    if_signed: bool = False

    def line(self) -> str:
        """As it stands in a zone file (RFC 1035 5.1)."""
        name = f"{self.name}."
        if self.value in ("", ABSENT):
            return f"; {name} {self.kind}: {'none' if self.value else 'the address of this relay'}"
        return f"{name:<40} {TTL:<6} IN  {self.kind:<5}  {self.value}"


def own_addresses() -> list[str]:
    """The public addresses from which this machine reaches the internet; behind NAT there are none."""
    found = []
    for family, far in _FAR:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((far, 53))
            except OSError:
                continue
            address = ipaddress.ip_address(probe.getsockname()[0])
            if address.is_global:
                found.append(str(address))
    return found


def wanted(
    config: Config,
    keys: dict[str, str],
    addresses: list[str],
    account: str | None = None,
    tlsa: str | None = None,
) -> list[Record]:
    """All records of the relay of *config*; none if an address stands in place of its name.

    *keys*: DKIM selector -> text of its record; *addresses*: the machine's, may be empty; *account*: URI of
    the ACME account that alone may have certificates issued (RFC 8657); *tlsa*: see `tlsa_text`.
    """
    if config.is_ip_relay:
        return []
    domain = config.mail_domain
    if config.disable_ipv6:
        addresses = [item for item in addresses if ":" not in item]
    records = [
        Record(domain, "A" if ":" not in item else "AAAA", item, True, "where the relay is")
        for item in addresses
    ]
    if not addresses:
        records.append(Record(domain, "A", "", True, "where the relay is"))
    if config.disable_ipv6:
        why = "the relay does not listen there: disable_ipv6 is set"
        records.append(Record(domain, "AAAA", ABSENT, True, why))
    # without one the address is asked (RFC 5321 5.1); relays with a "_" name have no other mail server
    must = not config.is_underscore_domain
    records.append(Record(domain, "MX", f"10 {domain}.", must, "where mail for it goes"))
    for selector, text in keys.items():
        # what only the second, newer algorithm needs cannot stop mail
        first = text.startswith("v=DKIM1;k=rsa")
        name = f"{selector}._domainkey.{domain}"
        records.append(Record(name, "TXT", quoted(text), first, "other relays verify with it"))
    records.append(Record(f"www.{domain}", "CNAME", f"{domain}.", False, "the web page"))
    if config.tls != "self":
        policy = quoted(f"v=STSv1; id={STS_ID}")
        records += [
            Record(f"mta-sts.{domain}", "CNAME", f"{domain}.", True, "its policy for incoming TLS"),
            Record(f"_mta-sts.{domain}", "TXT", policy, True, "announces that policy"),
        ]
    records += [
        Record(domain, "TXT", quoted("v=spf1 a ~all"), False, "who may send for it"),
        Record(
            f"_dmarc.{domain}",
            "TXT",
            quoted("v=DMARC1;p=reject;adkim=s;aspf=s"),
            False,
            "nobody else may use its addresses",
        ),
    ]
    issuer = ISSUERS.get(urlsplit(account or "").hostname or "")
    if issuer:
        value = f'0 issue "{issuer};accounturi={account}"'
        records.append(Record(domain, "CAA", value, False, "nobody else gets a certificate"))
    records += [
        Record(f"_{name}._tcp.{domain}", "SRV", f"0 1 {port} {domain}.", False, "for mail programs")
        for name, port in SERVICES
    ]
    records += [
        Record(
            ipaddress.ip_address(item).reverse_pointer,
            "PTR",
            f"{domain}.",
            False,
            "some mail servers ask for it; set by who rents you the address",
        )
        for item in addresses
    ]
    if tlsa:
        why = "pins the key of the certificate for mail; change it before the key"
        records.append(Record(f"_25._tcp.{domain}", "TLSA", tlsa, False, why, if_signed=True))
    return records


def quoted(text: str) -> str:
    """Character-strings of at most 255 octets each, in quotes."""
    parts = [text[at : at + STRING_MAX] for at in range(0, len(text), STRING_MAX)]
    return " ".join(f'"{part}"' for part in parts)


def dkim_texts(paths: Paths, config: Config) -> dict[str, str]:
    """Selector -> text of the TXT record (RFC 6376 3.6.1, RFC 8463), from the private keys.

    Raises OSError if there is no key yet: `chatmail-relay apply` makes them.
    """
    texts = {config.dkim_selector: _dkim_text(paths.real(DKIM_RSA))}
    if config.dkim_ed25519:
        texts[f"{config.dkim_selector}-ed25519"] = _dkim_text(paths.real(DKIM_ED25519))
    return texts


def _dkim_text(path: Path) -> str:
    key = serialization.load_pem_private_key(path.read_bytes(), None).public_key()
    if isinstance(key, ed25519.Ed25519PublicKey):
        raw = serialization.Encoding.Raw, serialization.PublicFormat.Raw
        return f"v=DKIM1;k=ed25519;p={_base64(key.public_bytes(*raw))};s=email;t=s"
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return f"v=DKIM1;k=rsa;p={_base64(der)};s=email;t=s"


def tlsa_text(paths: Paths, config: Config) -> str | None:
    """TLSA 3 1 1: the hash of the certificate's public key (RFC 7672 3.1.1).

    None where a renewal of the certificate comes with another key by itself, as with ACME: mail would stop.
    """
    if config.tls not in ("self", "external"):
        return None
    try:
        certificate = x509.load_pem_x509_certificate(
            paths.real(config.certificate_source[0]).read_bytes()
        )
    except (OSError, ValueError):
        return None
    key = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return f"3 1 1 {hashlib.sha256(key).hexdigest()}"


def account_uri(config: Config) -> str | None:
    """The URI of the ACME account, None if there is none (yet)."""
    if config.tls != "acme":
        return None
    try:
        done = subprocess.run(
            ["acmetool", "account-url"], capture_output=True, text=True, timeout=ACMETOOL_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def zone(records: list[Record]) -> str:
    """A zone file of all records, the required ones first."""
    lines = []
    for title, required in (("Required", True), ("Recommended", False)):
        group = [r.line() for r in records if r.required == required and not r.if_signed]
        lines += [f"; {title} DNS entries", *group, ""]
    signed = [f"; {r.line()}" for r in records if r.if_signed]
    if signed:
        lines += ["; Recommended if the zone is signed (DNSSEC), and only then", *signed, ""]
    return "\n".join(lines)
