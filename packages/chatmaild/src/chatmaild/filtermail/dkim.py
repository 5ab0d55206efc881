# SPDX-License-Identifier: MIT
"""DKIM signatures (RFC 6376, 8301, 8463): strict verifier and signer, streaming and sans-IO.

Both learn the header fields first, then the body in any pieces, and keep of either only hashes.
Header fields are (name, value) in octets as they stand in the message, value with its leading
blank; line ends within a value may be LF or CRLF.

The verifier asks one question: is there a valid signature of exactly the domain in header From? So
it looks only at signatures whose d= is that domain, at MAX_SIGNATURES of them. It names the keys it
needs; the caller fetches them. What the RFCs leave open is refused: l=, SHA-1, keys below 1024 bit,
repeated tags, a signing time in the future.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa, utils

from chatmaild.filtermail.address import is_domain

MAX_SIGNATURES = 4  # of the From domain
MAX_SIGNATURE_FIELD = 16384  # octets
MAX_KEY_RECORD = 8192
MIN_RSA_BITS, MAX_RSA_BITS = 1024, 8192
CLOCK_SKEW = 300  # seconds by which a signature may come from the future

Field = tuple[bytes, bytes]
PublicKey = rsa.RSAPublicKey | ed25519.Ed25519PublicKey

_FWS = re.compile(rb"[ \t\r\n]+")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_TAG = rb"[ \t\r\n]*([A-Za-z][A-Za-z0-9_]*)[ \t\r\n]*=([!-:<-~ \t\r\n]*)"
_TAGS = re.compile(rb"(?:(?:%s;)*%s)?\Z" % (_TAG, _TAG))
_ONE_TAG = re.compile(_TAG)
_CRLF = b"\r\n"
_PREHASHED = utils.Prehashed(hashes.SHA256())


class DkimError(ValueError):
    """A signature or key that does not count."""


def parse_tags(text: bytes) -> dict[str, bytes]:
    """A tag=value list (RFC 6376 section 3.2), values without blanks at their ends.

    Raises DkimError for syntax and for a tag that stands twice.
    """
    text = text.rstrip(b" \t\r\n").removesuffix(b";")
    if not _TAGS.match(text):
        raise DkimError("tag list syntax")
    found = _ONE_TAG.findall(text)
    tags = {name.decode("ascii"): value.strip(b" \t\r\n") for name, value in found}
    if len(tags) < len(found):
        raise DkimError("repeated tag")
    return tags


def _base64(text: bytes) -> bytes:
    try:
        return binascii.a2b_base64(_FWS.sub(b"", text), strict_mode=True)
    except binascii.Error:
        raise DkimError("base64") from None


def _words(text: bytes) -> list[bytes]:
    """A colon-separated list in lower case."""
    return [word.strip(b" \t\r\n").lower() for word in text.split(b":")]


# --- canonicalization (RFC 6376 section 3.4) ------------------------------------------------------


def canonical_field(name: bytes, value: bytes, relaxed: bool) -> bytes:
    """One header field without its final CRLF."""
    if relaxed:
        return name.strip(b" \t").lower() + b":" + _FWS.sub(b" ", value).strip(b" ")
    return name + b":" + _BARE_LF.sub(_CRLF, value)


class BodyHash:
    """SHA-256 of a canonicalized body. State: a count of empty lines, up to two octets."""

    __slots__ = ("_hash", "_relaxed", "_carry", "_empty_lines", "_has_content")

    def __init__(self, relaxed: bool) -> None:
        self._hash = hashlib.sha256()
        self._relaxed = relaxed
        self._carry = b""  # end of the last piece whose meaning the next one decides: blank, CR
        self._empty_lines = 0  # CRLFs that count only if something follows
        self._has_content = False

    def feed(self, data: bytes) -> None:
        if not data:
            return
        if self._carry:
            data = self._carry + data
        carry = b""
        if data[-1] == 0x0D:
            carry = b"\r"
            data = data[:-1]
        if self._relaxed and (b" " in data or b"\t" in data):
            text = data.rstrip(b" \t")
            if len(text) < len(data):
                carry = b" " + carry
            data = text.replace(b"\t", b" ")
            while b"  " in data:  # each pass halves the runs: no pattern matching, octet by octet
                data = data.replace(b"  ", b" ")
            data = data.replace(b" \r\n", _CRLF)
        self._carry = carry
        if data:
            self._hash_text(data)

    def _hash_text(self, data: bytes) -> None:
        content = len(data.rstrip(_CRLF))
        tail = data[content:]
        # the CRLFs at the end: where CR and LF alternate, without an LF that begins it
        start = max(tail.rfind(b"\n\n"), tail.rfind(b"\r\r")) + 1
        if not tail.endswith(b"\n"):
            start = len(tail)
        start += (len(tail) - start) & 1
        content += start
        if content:
            self._flush_empty_lines()
            self._has_content = True
            self._hash.update(data if start == len(tail) else data[:content])
        self._empty_lines += (len(tail) - start) // 2

    def _flush_empty_lines(self) -> None:
        while self._empty_lines:
            lines = min(self._empty_lines, 32768)
            self._hash.update(_CRLF * lines)
            self._empty_lines -= lines

    def digest(self) -> bytes:
        """The hash; call it once, after the last feed()."""
        rest, self._carry = self._carry, b""
        if self._relaxed:
            rest = rest.strip(b" ") if rest == b" " else rest
        if rest:
            self._hash_text(rest)
        if self._has_content or not self._relaxed:
            self._hash.update(_CRLF)
        return self._hash.digest()


# --- keys (RFC 6376 section 3.6.1) ----------------------------------------------------------------


@dataclass(frozen=True)
class KeyRecord:
    """A usable public key; *exact_domain* is flag t=s: i= must be of d= itself, no subdomain."""

    key: PublicKey
    exact_domain: bool


def parse_key_record(text: bytes) -> KeyRecord:
    """Parse the TXT record of a selector; raises DkimError without a key for SHA-256 mail."""
    if len(text) > MAX_KEY_RECORD:
        raise DkimError("key record too long")
    tags = parse_tags(text)
    if "v" in tags and (tags["v"] != b"DKIM1" or next(iter(tags)) != "v"):
        raise DkimError("not a DKIM1 key record")
    if "h" in tags and b"sha256" not in _words(tags["h"]):
        raise DkimError("key is not for sha256")
    if "s" in tags and not {b"*", b"email"} & set(_words(tags["s"])):
        raise DkimError("key is not for mail")
    if not tags.get("p"):
        raise DkimError("key revoked, or none")
    data = _base64(tags["p"])
    kind = tags.get("k", b"rsa").lower()
    key: rsa.RSAPublicKey | ed25519.Ed25519PublicKey
    try:
        if kind == b"rsa":
            loaded = serialization.load_der_public_key(data)
            if not isinstance(loaded, rsa.RSAPublicKey):
                raise DkimError("key is not RSA")
            key = loaded
            if not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
                raise DkimError("RSA key too small or too large")
        elif kind == b"ed25519":
            key = ed25519.Ed25519PublicKey.from_public_bytes(data)
        else:
            raise DkimError("unknown kind of key")
    except (ValueError, UnsupportedAlgorithm) as error:
        raise DkimError(str(error)) from None
    return KeyRecord(key, b"s" in _words(tags.get("t", b"")))


# --- verifier -------------------------------------------------------------------------------------


class Signature(NamedTuple):
    """The parts of a DKIM-Signature field that count."""

    algorithm: bytes
    signature: bytes
    body_hash: bytes
    domain: str  # d=, lower case
    selector: str
    identity_domain: str  # of i=, lower case
    signed: list[bytes]  # h=, lower case
    relaxed_header: bool
    relaxed_body: bool

    @property
    def key_name(self) -> str:
        """The domain name of the key record."""
        return f"{self.selector}._domainkey.{self.domain}"


def _number(text: bytes) -> int:
    if not text.isdigit() or len(text) > 12:
        raise DkimError("not a time")
    return int(text)


def parse_signature(value: bytes, now: float) -> Signature:
    """Parse and check a DKIM-Signature field; *now* is seconds since the epoch.

    Raises DkimError for a signature that this verifier does not accept whatever the keys.
    """
    if len(value) > MAX_SIGNATURE_FIELD:
        raise DkimError("signature field too long")
    tags = parse_tags(value)
    missing = {"v", "a", "b", "bh", "d", "h", "s"} - set(tags)
    if missing or tags["v"] != b"1":
        raise DkimError("required tag missing, or unknown version")
    if tags["a"] not in (b"rsa-sha256", b"ed25519-sha256"):
        raise DkimError("algorithm")
    if "l" in tags:
        raise DkimError("l=: anybody could append text")
    header_canon, _, body_canon = tags.get("c", b"simple").lower().partition(b"/")
    body_canon = body_canon or b"simple"
    if header_canon not in (b"simple", b"relaxed") or body_canon not in (b"simple", b"relaxed"):
        raise DkimError("canonicalization")
    signed = _words(tags["h"])
    if b"from" not in signed or b"" in signed:
        raise DkimError("From is not signed")
    try:
        domain = tags["d"].decode("ascii").lower()
        selector = tags["s"].decode("ascii").lower()
        identity = tags.get("i", b"@" + tags["d"]).decode("ascii").lower()
    except UnicodeDecodeError:
        raise DkimError("not ASCII") from None
    if not is_domain(f"{selector}._domainkey.{domain}"):
        raise DkimError("not a domain name")
    identity_domain = identity.rpartition("@")[2]
    if "@" not in identity or not (f".{identity_domain}").endswith(f".{domain}"):
        raise DkimError("i= is not within d=")
    if "q" in tags and b"dns/txt" not in _words(tags["q"]):
        raise DkimError("key is not in the DNS")
    signed_at = _number(tags["t"]) if "t" in tags else None
    if signed_at is not None and signed_at > now + CLOCK_SKEW:
        raise DkimError("signed in the future")
    if "x" in tags:
        expires = _number(tags["x"])
        if expires < now or (signed_at is not None and expires <= signed_at):
            raise DkimError("expired")
    body_hash = _base64(tags["bh"])
    signature = _base64(tags["b"])
    if len(body_hash) != 32 or not signature:
        raise DkimError("hash or signature length")
    return Signature(
        tags["a"],
        signature,
        body_hash,
        domain,
        selector,
        identity_domain,
        signed,
        header_canon == b"relaxed",
        body_canon == b"relaxed",
    )


def _without_signature(value: bytes) -> bytes:
    """The DKIM-Signature value with b= emptied (RFC 6376 section 3.7)."""
    specs = value.split(b";")
    for number, spec in enumerate(specs):
        name, _, _ = spec.partition(b"=")
        if name.strip(b" \t\r\n") == b"b":
            specs[number] = name + b"="
    return b";".join(specs)


def _header_hash(
    fields: Mapping[bytes, Sequence[Field]], signed: Iterable[bytes], relaxed: bool
) -> hashlib._Hash:
    """SHA-256 over the fields that *signed* selects: of equal names the last first, each once."""
    result = hashlib.sha256()
    taken: dict[bytes, int] = {}
    for name in signed:
        candidates = fields.get(name, ())
        number = taken.get(name, 0)
        if number < len(candidates):
            taken[name] = number + 1
            result.update(canonical_field(*candidates[-1 - number], relaxed) + _CRLF)
    return result


def _by_name(fields: Iterable[Field]) -> dict[bytes, list[Field]]:
    result: dict[bytes, list[Field]] = {}
    for name, value in fields:
        result.setdefault(name.strip(b" \t").lower(), []).append((name, value))
    return result


class Verifier:
    """Looks for one valid signature of *domain*.

    Verifier(fields, ...) at the end of the header, body() for every piece, key_names() at the end
    of the message, verify(keys) with what the DNS says.
    """

    def __init__(self, fields: Sequence[Field], domain: str, now: float) -> None:
        self._bodies: dict[bool, BodyHash] = {}
        self._signatures: list[tuple[Signature, bytes]] = []  # with the digest of the header
        by_name = _by_name(fields)
        for name, value in by_name.get(b"dkim-signature", ()):
            try:
                signature = parse_signature(value, now)
            except DkimError:
                continue
            if signature.domain != domain.lower():
                continue
            header = _header_hash(by_name, signature.signed, signature.relaxed_header)
            own = _without_signature(value)
            header.update(canonical_field(name, own, signature.relaxed_header))
            self._signatures.append((signature, header.digest()))
            if signature.relaxed_body not in self._bodies:
                self._bodies[signature.relaxed_body] = BodyHash(signature.relaxed_body)
            if len(self._signatures) == MAX_SIGNATURES:
                break

    def body(self, data: bytes) -> None:
        for body_hash in self._bodies.values():
            body_hash.feed(data)

    def key_names(self) -> tuple[str, ...]:
        """Domain names of the keys that could decide; none without a signature. Call once."""
        digests = {relaxed: body.digest() for relaxed, body in self._bodies.items()}
        self._signatures = [
            (signature, header)
            for signature, header in self._signatures
            if signature.body_hash == digests[signature.relaxed_body]
        ]
        return tuple(dict.fromkeys(signature.key_name for signature, _ in self._signatures))

    def verify(self, keys: Mapping[str, Sequence[KeyRecord]]) -> bool:
        """Whether a signature is valid with one of *keys*, key records by domain name."""
        return any(
            _is_valid(signature, header, record)
            for signature, header in self._signatures
            for record in keys.get(signature.key_name, ())
        )


def _is_valid(signature: Signature, header_digest: bytes, record: KeyRecord) -> bool:
    if record.exact_domain and signature.identity_domain != signature.domain:
        return False
    key = record.key
    try:
        if signature.algorithm == b"rsa-sha256" and isinstance(key, rsa.RSAPublicKey):
            key.verify(signature.signature, header_digest, padding.PKCS1v15(), _PREHASHED)
            return True
        if signature.algorithm == b"ed25519-sha256" and isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature.signature, header_digest)
            return True
    except (InvalidSignature, ValueError):
        pass
    return False


# --- signer ---------------------------------------------------------------------------------------

# Fields that change or disappear on the way, or must never have been there (RFC 6376 section 5.4.1)
_UNSIGNED = frozenset(
    b"return-path received comments keywords bcc resent-bcc dkim-signature authentication-results "
    b"arc-seal arc-message-signature arc-authentication-results x-spam-status".split()
)
# signed once more than they stand, so that nobody can add one
_OVERSIGNED = (
    b"from reply-to subject date to cc resent-date resent-from resent-sender resent-to resent-cc "
    b"in-reply-to references list-id list-help list-unsubscribe list-subscribe list-post "
    b"list-owner list-archive autocrypt content-type"
).split()
_MAX_SIGNED_NAME = 70  # octets: h= is folded between names


class SigningKey:
    """A private key in its PEM file, and the name its public key has in the DNS."""

    def __init__(self, pem: bytes, domain: str, selector: str) -> None:
        """Raises DkimError for a file that is no RSA (>= 1024 bit) or Ed25519 private key."""
        try:
            key = serialization.load_pem_private_key(pem, None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise DkimError("not an unencrypted private key in PEM") from None
        if isinstance(key, rsa.RSAPrivateKey):
            if key.key_size < MIN_RSA_BITS:
                raise DkimError("RSA key too small")
            self.algorithm = b"rsa-sha256"
        elif isinstance(key, ed25519.Ed25519PrivateKey):
            self.algorithm = b"ed25519-sha256"
        else:
            raise DkimError("neither an RSA nor an Ed25519 key")
        self._key = key
        self.domain = domain.encode("ascii")
        self.selector = selector.encode("ascii")

    def sign(self, digest: bytes) -> bytes:
        """The signature of the SHA-256 *digest* of the header."""
        if isinstance(self._key, rsa.RSAPrivateKey):
            return self._key.sign(digest, padding.PKCS1v15(), _PREHASHED)
        return self._key.sign(digest)


def _fold(items: Iterable[bytes], separator: bytes, first: int) -> bytes:
    """*items* joined, folded before column 72; *first* is the column of the first one."""
    result = []
    column = first
    for number, item in enumerate(items):
        text = item if number == 0 else separator + item
        if column + len(text) > 72 and number:
            text = separator + b"\n\t" + item
            column = 0
        column += len(text)
        result.append(text)
    return b"".join(result)


class Signer:
    """Signs one message, relaxed/simple, with each of *keys*.

    Signer(keys, fields) at the end of the header, body() for every piece, then finish().
    """

    def __init__(self, keys: Sequence[SigningKey], fields: Sequence[Field]) -> None:
        self._keys = keys
        by_name = _by_name(fields)
        names: list[bytes] = []
        for name, values in by_name.items():
            if name and name not in _UNSIGNED and len(name) <= _MAX_SIGNED_NAME:
                names += [name] * len(values)
        self._signed = names + _OVERSIGNED
        self._header = _header_hash(by_name, self._signed, relaxed=True)
        self._body = BodyHash(relaxed=False)

    def body(self, data: bytes) -> None:
        self._body.feed(data)

    def finish(self, now: float) -> list[bytes]:
        """The values of DKIM-Signature fields, one a key, lines ending with LF; call once."""
        body_hash = base64.b64encode(self._body.digest())
        signed = _fold(self._signed, b":", 4)
        result = []
        for key in self._keys:
            value = (
                b" v=1; a=%s; c=relaxed/simple; d=%s;\n\ts=%s; t=%d;\n\th=%s;\n\tbh=%s;\n\tb="
                % (
                    key.algorithm,
                    key.domain,
                    key.selector,
                    now,
                    signed,
                    body_hash,
                )
            )
            header = self._header.copy()
            header.update(canonical_field(b"DKIM-Signature", value, relaxed=True))
            signature = base64.b64encode(key.sign(header.digest()))
            lines = (signature[at : at + 70] for at in range(0, len(signature), 70))
            result.append(value + b"\n\t".join(lines))
        return result
