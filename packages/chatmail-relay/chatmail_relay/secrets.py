# SPDX-License-Identifier: MIT
"""Keys that are made once and never again: DKIM, the secret of TURN, the self-signed certificate.

They are not in the ledger: what they protect (DNS records, clients that remember a key) outlives a
removal of the package.
"""

import datetime
import ipaddress
import secrets
from pathlib import Path

from chatmaild.config import SELF_SIGNED_CERT, SELF_SIGNED_KEY, Config
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .paths import Paths
from .transaction import Change

DKIM_KEYS = "/var/lib/chatmail/keys/dkim"
DKIM_RSA = f"{DKIM_KEYS}/rsa.pem"
DKIM_ED25519 = f"{DKIM_KEYS}/ed25519.pem"  # in use once dkim_ed25519 is set
TURN_SECRET = "/var/lib/chatmail/keys/turn/secret"  # ASCII, no line end
RSA_BITS = 2048  # what every verifier takes and one DNS TXT record holds (RFC 8301)
VALID_DAYS = 36500


def missing_secrets(paths: Paths, config: Config) -> list[Change]:
    """The key files that must be made for *config*; existing ones are never replaced.

    The certificate is made anew for its old key when the domain changes: clients may know the key. It is made
    with `tls = acme` and `external` too: something must be served until theirs is there.
    """
    changes = []
    if not paths.real(DKIM_RSA).exists():
        key = rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS)
        changes.append(Change(paths.real(DKIM_RSA), _pem(key), 0o600))
    if not paths.real(DKIM_ED25519).exists():
        second = ed25519.Ed25519PrivateKey.generate()
        changes.append(Change(paths.real(DKIM_ED25519), _pem(second), 0o600))
    if not paths.real(TURN_SECRET).exists():
        changes.append(Change(paths.real(TURN_SECRET), secrets.token_urlsafe(32).encode(), 0o600))
    return changes + _self_signed(paths, config)


def _self_signed(paths: Paths, config: Config) -> list[Change]:
    cert_path, key_path = paths.real(SELF_SIGNED_CERT), paths.real(SELF_SIGNED_KEY)
    host = config.mail_host
    names = [host] if config.is_ip_relay else [host, f"www.{host}", f"mta-sts.{host}"]
    changes = []
    if key_path.exists():
        loaded = serialization.load_pem_private_key(key_path.read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey), f"{key_path} is not an EC key"
        key = loaded
    else:
        key = ec.generate_private_key(ec.SECP256R1())
        changes.append(Change(key_path, _pem(key), 0o600))
    if changes or _names(cert_path) != names:
        changes.append(Change(cert_path, _certificate(key, names), 0o644))
    return changes


def _names(path: Path) -> list[str]:
    if not path.exists():
        return []
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (ValueError, x509.ExtensionNotFound):
        return []
    addresses = extension.value.get_values_for_type(x509.IPAddress)
    return [*extension.value.get_values_for_type(x509.DNSName), *map(str, addresses)]


def _certificate(key: ec.EllipticCurvePrivateKey, names: list[str]) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    start = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1)
    usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    alternatives = x509.SubjectAlternativeName(list(map(_general_name, names)))
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=VALID_DAYS))
        # a client library refuses a CA certificate as an end entity
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
        .add_extension(alternatives, critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


def _general_name(name: str) -> x509.GeneralName:
    """RFC 5280 4.2.1.6: an address is not a name."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey,
) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
