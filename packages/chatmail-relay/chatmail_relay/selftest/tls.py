# SPDX-License-Identifier: MIT
"""Is a certificate one that clients and other relays take? Names, time, and who vouches for it."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import ssl

from cryptography import x509

from .net import Target, dial, is_ip
from .report import Wrong

DAYS = 14  # fewer days left than this is not well, as for `status`
RENEW = "see chatmail-relay status"


def judge(der: bytes, host: str, now: datetime.datetime) -> str:
    """Names and time of a certificate; returns what is well about it, raises Wrong."""
    certificate = x509.load_der_x509_certificate(der)
    if not names_host(certificate, host):
        raise Wrong(f"does not name {host}", "get a certificate that does")
    if now < certificate.not_valid_before_utc:
        raise Wrong("is not valid yet", "set the clock of the relay, or of this machine")
    days = (certificate.not_valid_after_utc - now).days
    if days < 0:
        raise Wrong(f"has expired {-days} days ago", RENEW)
    if days < DAYS:
        raise Wrong(f"expires in {days} days", RENEW)
    return f"names {host}, valid for {days} days"


def names_host(certificate: x509.Certificate, host: str) -> bool:
    """Whether *host* is among the subject's alternative names (RFC 6125, RFC 5280 4.2.1.6)."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return False
    if is_ip(host):
        return ipaddress.ip_address(host) in names.get_values_for_type(x509.IPAddress)
    wildcard = "*." + host.partition(".")[2]
    found = {name.lower() for name in names.get_values_for_type(x509.DNSName)}
    return bool({host, wildcard} & found)


def vouched(target: Target) -> str:
    """Whether an authority this machine trusts vouches for the certificate on 443; raises Wrong."""
    if target.is_exempt:
        return "needs no authority"
    plain = dial(target.addresses, 443)
    with plain:
        try:
            with ssl.create_default_context().wrap_socket(plain, server_hostname=target.host):
                return "vouched for by an authority"
        except ssl.SSLCertVerificationError as error:
            raise Wrong(
                f"is not trusted: {error.verify_message}",
                "get one of an authority, with its chain",
            ) from error


def fingerprint(der: bytes) -> str:
    """A certificate in short."""
    return hashlib.sha256(der).hexdigest()[:16]


def peer(connection: ssl.SSLSocket) -> bytes:
    """The certificate of the other side, DER."""
    der = connection.getpeercert(binary_form=True)
    if der is None:
        raise Wrong("no certificate")
    return der
