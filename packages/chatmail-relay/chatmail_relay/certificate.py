# SPDX-License-Identifier: MIT
"""The certificate that is served: a copy of the newest good pair of the way that `tls` names.

Daemons read one place, LIVE_CERT and LIVE_KEY, whatever the way. So a new certificate, another way or a
file that is half written is never more than a reload: what does not work is not taken over, and what was
served before goes on.

LIVE is a link to a folder that holds one pair and is named after its content: both files change at once.
"""

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from chatmaild.config import LIVE_CERT, LIVE_KEY, SELF_SIGNED_CERT, SELF_SIGNED_KEY, Config
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from .errors import CertificateError
from .paths import Paths
from .transaction import Change, write_file

_FOLDER = "pair."
_DER = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


@dataclass(frozen=True)
class Pair:
    """A certificate chain, the end entity first, and its private key, both PEM."""

    chain: bytes
    key: bytes

    @property
    def certificate(self) -> x509.Certificate:
        """The end entity's."""
        return x509.load_pem_x509_certificate(self.chain)

    @property
    def names(self) -> list[str]:
        """The DNS names and IP addresses it is valid for (RFC 5280 4.2.1.6)."""
        try:
            extension = self.certificate.extensions.get_extension_for_class(
                x509.SubjectAlternativeName
            )
        except x509.ExtensionNotFound:
            return []
        addresses = extension.value.get_values_for_type(x509.IPAddress)
        return [*extension.value.get_values_for_type(x509.DNSName), *map(str, addresses)]

    def is_for(self, host: str) -> bool:
        """Whether it names *host*, itself or by a wildcard."""
        return host in self.names or f"*.{host.partition('.')[2]}" in self.names


def read_pair(paths: Paths, cert: str, key: str) -> Pair:
    """The pair in two files; raises CertificateError if it could not be served."""
    files = []
    for path in (cert, key):
        try:
            files.append(paths.real(path).read_bytes())
        except OSError as error:
            raise CertificateError(f"{path}: {error.strerror}") from None
    pair = Pair(*files)
    try:
        public = pair.certificate.public_key()
    except ValueError as error:
        raise CertificateError(f"{cert}: not a PEM certificate: {error}") from None
    try:
        private = serialization.load_pem_private_key(pair.key, None)
    except (ValueError, TypeError) as error:
        raise CertificateError(f"{key}: not a PEM key without password: {error}") from None
    if public.public_bytes(*_DER) != private.public_key().public_bytes(*_DER):
        raise CertificateError(f"{key}: is not the key of the certificate in {cert}")
    return pair


def live(paths: Paths) -> Pair | None:
    """What is served now."""
    try:
        return read_pair(paths, LIVE_CERT, LIVE_KEY)
    except CertificateError:
        return None


def self_signed(paths: Paths) -> Pair:
    """The relay's own, which every relay has once it is applied."""
    return read_pair(paths, SELF_SIGNED_CERT, SELF_SIGNED_KEY)


def wanted(paths: Paths, config: Config) -> Pair:
    """What should be served: the pair of `tls`; without it what is served now, else our own for a time.

    Raises CertificateError if the administrator's own files cannot be used.
    """
    try:
        return read_pair(paths, *config.certificate_source)
    except CertificateError:
        if config.tls != "acme":
            raise
    now = live(paths)
    if now is not None and now.is_for(config.mail_host):
        return now
    return self_signed(paths)


def install(paths: Paths, pair: Pair) -> bool:
    """Serve *pair* from the next reload on; false if it is in place already."""
    if live(paths) == pair:
        return False
    link = paths.real(LIVE_CERT).parent
    name = _FOLDER + hashlib.sha256(pair.chain + pair.key).hexdigest()[:16]
    folder = link.with_name(name)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_file(Change(folder / Path(LIVE_CERT).name, pair.chain, 0o644))
    write_file(Change(folder / Path(LIVE_KEY).name, pair.key, 0o600))
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(name)
    os.replace(new, link)
    for old in link.parent.glob(f"{_FOLDER}*"):
        if old.name != name:
            shutil.rmtree(old)
    return True
