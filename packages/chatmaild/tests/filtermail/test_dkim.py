# SPDX-License-Identifier: MIT
"""DKIM: against dkimpy both ways, the vectors of RFC 8463, every rule of the verifier."""

import base64
import functools
import hashlib
import re
import time

import dkim as dkimpy
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from dkim.canonicalization import CanonicalizationPolicy
from hypothesis import given, settings
from hypothesis import strategies as st

from chatmaild.filtermail import dkim
from chatmaild.filtermail.dkim import (
    BodyHash,
    DkimError,
    Signer,
    SigningKey,
    Verifier,
    parse_key_record,
    parse_signature,
    parse_tags,
)
from filtermail_samples import split

NOW = 1_800_000_000


@functools.cache
def rsa_key(bits=2048):
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


ED25519 = ed25519.Ed25519PrivateKey.from_private_bytes(b"\x07" * 32)


def pem(key, form=serialization.PrivateFormat.PKCS8):
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def record_of(key, extra=b""):
    public = key.public_key()
    if isinstance(public, ed25519.Ed25519PublicKey):
        data = public.public_bytes_raw()
        return b"v=DKIM1; k=ed25519; " + extra + b"p=" + base64.b64encode(data)
    data = public.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return b"v=DKIM1; k=rsa; " + extra + b"p=" + base64.b64encode(data)


MAIL = (
    b"From: Joe <joe@a.example>\r\n"
    b"To: Suzie <suzie@b.example>,\r\n\tBob <bob@b.example>\r\n"
    b"Subject:  Is  dinner\tready? \r\n"
    b"Date: Fri, 11 Jul 2003 21:00:37 -0700\r\n"
    b"Message-ID: <2003@a.example>\r\n"
    b"\r\n"
    b"Hi.  \r\n\r\nWe lost  the \tgame.\r\n.\r\n\r\nJoe. \t\r\n\r\n\r\n"
)


def dkimpy_sign(mail=MAIL, key=None, selector=b"s", domain=b"a.example", **options):
    key = key or rsa_key()
    if isinstance(key, ed25519.Ed25519PrivateKey):
        options["signature_algorithm"] = b"ed25519-sha256"
        secret = base64.b64encode(key.private_bytes_raw())
    else:
        secret = pem(key, serialization.PrivateFormat.TraditionalOpenSSL)
    return dkimpy.sign(mail, selector, domain, secret, **options) + mail


def verify(mail, keys=None, domain="a.example", now=None, chunk=None):
    """Whether our verifier is satisfied; *keys*: key records by domain name."""
    fields, body = split(mail)
    if now is None:
        now = time.time()
    verifier = Verifier(fields, domain, now)
    chunk = chunk or max(1, len(body))
    for at in range(0, len(body), chunk):
        verifier.body(body[at : at + chunk])
    names = verifier.key_names()
    if keys is None:
        keys = {"s._domainkey.a.example": record_of(rsa_key())}
    parsed = {}
    for name in names:
        try:
            parsed[name] = [parse_key_record(keys[name])] if name in keys else []
        except DkimError:
            parsed[name] = []
    return verifier.verify(parsed)


def sign(mail=MAIL, keys=None, chunk=None):
    """*mail* with our signatures in front."""
    keys = keys or [SigningKey(pem(rsa_key()), "a.example", "s")]
    fields, body = split(mail)
    signer = Signer(keys, fields)
    chunk = chunk or max(1, len(body))
    for at in range(0, len(body), chunk):
        signer.body(body[at : at + chunk])
    values = signer.finish(time.time())
    return (
        b"".join(b"DKIM-Signature:" + value.replace(b"\n", b"\r\n") + b"\r\n" for value in values)
        + mail
    )


def dkimpy_verify(mail, record, count=1):
    checker = dkimpy.DKIM(mail)
    return all(checker.verify(index, dnsfunc=lambda *_, **__: record) for index in range(count))


# --- against dkimpy -------------------------------------------------------------------------------

CANONICALIZATIONS = [(a, b) for a in (b"simple", b"relaxed") for b in (b"simple", b"relaxed")]
BODIES = {
    "ordinary": MAIL.partition(b"\r\n\r\n")[2],
    "empty": b"",
    "one line end": b"\r\n",
    "line ends only": b"\r\n" * 5,
    "blanks only": b" \t \r\n \r\n",
    "no line end": b"no line end",
    "blank at the very end": b"text \t",
    "lone CR": b"a\rb\r\r\nc\r\r\n\r\n",
    "lone CR at the end": b"text\r\n\r",
    "lone LF": b"a\nb\n\n\r\n\r\n",
    "long": b"0123456789 \t\r\n\r\n" * 5000 + b"\r\n" * 300,
}


@pytest.mark.parametrize("canonicalize", CANONICALIZATIONS)
@pytest.mark.parametrize("key", [rsa_key(), ED25519], ids=["rsa", "ed25519"])
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_what_dkimpy_signs_is_valid(canonicalize, key, chunk):
    mail = dkimpy_sign(key=key, canonicalize=canonicalize)
    keys = {"s._domainkey.a.example": record_of(key)}
    assert verify(mail, keys, chunk=chunk)
    assert not verify(mail.replace(b"lost", b"won!"), keys, chunk=chunk)
    assert not verify(mail.replace(b"dinner", b"supper"), keys, chunk=chunk)
    assert not verify(mail, {"s._domainkey.a.example": record_of(rsa_key(1024))})


@pytest.mark.parametrize("name", [n for n in BODIES if "lone" not in n and "very end" not in n])
@pytest.mark.parametrize("canonicalize", CANONICALIZATIONS)
def test_bodies_signed_by_dkimpy_are_valid(name, canonicalize):
    head = MAIL.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    mail = dkimpy_sign(head + BODIES[name], canonicalize=canonicalize)
    for chunk in (1, 3, 4096, None):
        assert verify(mail, chunk=chunk)


@pytest.mark.parametrize("name", BODIES)
def test_our_signatures_are_valid_for_dkimpy_and_for_us(name):
    mail = MAIL.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" + BODIES[name]
    for chunk in (1, None):
        signed = sign(mail, chunk=chunk)
        assert verify(signed)
        if "lone" not in name:  # dkimpy reads lone CR and LF as line ends
            assert dkimpy_verify(signed, record_of(rsa_key()))


def test_our_ed25519_signature_stands_beside_the_rsa_one():
    keys = [
        SigningKey(pem(rsa_key()), "a.example", "s"),
        SigningKey(pem(ED25519), "a.example", "e"),
    ]
    signed = sign(keys=keys)
    records = {b"s._domainkey.a.example.": record_of(rsa_key())}
    records[b"e._domainkey.a.example."] = record_of(ED25519)
    checker = dkimpy.DKIM(signed)
    lookup = lambda name, timeout=5: records[name]  # noqa: E731
    assert checker.verify(0, dnsfunc=lookup) and checker.verify(1, dnsfunc=lookup)
    for name in ("s", "e"):
        full = f"{name}._domainkey.a.example"
        assert verify(signed, {full: records[full.encode() + b"."]})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from([b"\r\n", b" ", b"\t", b"a", b".", b"\r\n\r\n", b"  x\t"]), max_size=60
    ),
    st.integers(1, 9),
    st.sampled_from(CANONICALIZATIONS),
)
def test_any_body_gives_the_hash_that_dkimpy_computes(pieces, chunk, canonicalize):
    body = b"".join([*pieces, b"\r\n"] if pieces else [])  # SMTP has no lines without end
    ours = BodyHash(relaxed=canonicalize[1] == b"relaxed")
    for at in range(0, len(body), chunk):
        ours.feed(body[at : at + chunk])
    policy = CanonicalizationPolicy.from_c_value(b"/".join(canonicalize))
    expected = policy.canonicalize_body(body)
    assert ours.digest() == hashlib.sha256(expected).digest()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([b"\r", b"\n", b" ", b"\t", b"a"]), max_size=80),
    st.integers(1, 9),
    st.booleans(),
)
def test_pieces_do_not_change_the_hash_of_a_body(pieces, chunk, relaxed):
    body = b"".join(pieces)
    whole, parts = BodyHash(relaxed), BodyHash(relaxed)
    whole.feed(body)
    for at in range(0, len(body), chunk):
        parts.feed(body[at : at + chunk])
    assert whole.digest() == parts.digest()


def test_a_body_of_line_ends_is_not_kept():
    body_hash = BodyHash(relaxed=True)
    for _ in range(200):
        body_hash.feed(b"\r\n" * 30_000)
    assert body_hash._empty_lines == 6_000_000 and len(body_hash._carry) <= 2
    body_hash.feed(b"x")
    expected = hashlib.sha256(b"\r\n" * 6_000_000 + b"x\r\n").digest()
    assert body_hash.digest() == expected


# --- RFC 8463, appendix A -------------------------------------------------------------------------

RFC8463 = (
    b"DKIM-Signature: v=1; a=ed25519-sha256; c=relaxed/relaxed;\r\n"
    b" d=football.example.com; i=@football.example.com;\r\n"
    b" q=dns/txt; s=brisbane; t=1528637909; h=from : to :\r\n"
    b" subject : date : message-id : from : subject : date;\r\n"
    b" bh=2jUSOH9NhtVGCQWNr9BrIAPreKQjO6Sn7XIkfJVOzv8=;\r\n"
    b" b=/gCrinpcQOoIfuHNQIbq4pgh9kyIK3AQUdt9OdqQehSwhEIug4D11Bus\r\n"
    b" Fa3bT3FY5OsU7ZbnKELq+eXdp1Q1Dw==\r\n"
    b"DKIM-Signature: v=1; a=rsa-sha256; c=relaxed/relaxed;\r\n"
    b" d=football.example.com; i=@football.example.com;\r\n"
    b" q=dns/txt; s=test; t=1528637909; h=from : to : subject :\r\n"
    b" date : message-id : from : subject : date;\r\n"
    b" bh=2jUSOH9NhtVGCQWNr9BrIAPreKQjO6Sn7XIkfJVOzv8=;\r\n"
    b" b=F45dVWDfMbQDGHJFlXUNB2HKfbCeLRyhDXgFpEL8GwpsRe0IeIixNTe3\r\n"
    b" DhCVlUrSjV4BwcVcOF6+FF3Zo9Rpo1tFOeS9mPYQTnGdaSGsgeefOsk2Jz\r\n"
    b" dA+L10TeYt9BgDfQNZtKdN1WO//KgIqXP7OdEFE4LjFYNcUxZQ4FADY+8=\r\n"
    b"From: Joe SixPack <joe@football.example.com>\r\n"
    b"To: Suzie Q <suzie@shopping.example.net>\r\n"
    b"Subject: Is dinner ready?\r\n"
    b"Date: Fri, 11 Jul 2003 21:00:37 -0700 (PDT)\r\n"
    b"Message-ID: <20030712040037.46341.5F8J@football.example.com>\r\n"
    b"\r\n"
    b"Hi.\r\n\r\nWe lost the game.  Are you hungry yet?\r\n\r\nJoe.\r\n"
)
RFC8463_ED25519 = b"v=DKIM1; k=ed25519; p=11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="
RFC8463_RSA = (
    b"v=DKIM1; k=rsa; p=MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQDkHlOQoBTzWR"
    b"iGs5V6NpP3idY6Wk08a5qhdR6wy5bdOKb2jLQiY/J16JYi0Qvx/byYzCNb3W91y3FutAC"
    b"DfzwQ/BC/e/8uBsCR+yz1Lxj+PL6lHvqMKrM3rG4hstT5QjvHO9PzoxZyVYLzBfO2EeC3"
    b"Ip3G+2kryOTIKT+l/K4w3QIDAQAB"
)


@pytest.mark.parametrize(
    "name, record", [("brisbane", RFC8463_ED25519), ("test", RFC8463_RSA)], ids=["ed25519", "rsa"]
)
def test_the_vectors_of_rfc8463_are_valid(name, record):
    keys = {f"{name}._domainkey.football.example.com": record}
    assert verify(RFC8463, keys, "football.example.com")
    assert not verify(RFC8463.replace(b"hungry", b"thirsty"), keys, "football.example.com")


# --- the rules of the verifier --------------------------------------------------------------------


def forge(mail=MAIL, key=None, **tags):
    """A DKIM signature with any tags, computed as a signer that disregards the rules would."""
    key = key or rsa_key()
    body_relaxed = tags.get("c", "relaxed/simple").endswith("relaxed")
    fields, body = split(mail)
    body_hash = BodyHash(body_relaxed)
    body_hash.feed(body)
    all_tags = {
        "v": "1",
        "a": "rsa-sha256",
        "c": "relaxed/simple",
        "d": "a.example",
        "s": "s",
        "h": "from:to:subject:from",
        "bh": base64.b64encode(body_hash.digest()).decode(),
    }
    order = tags.pop("order", None)
    all_tags |= tags
    text = "; ".join(f"{k}={v}" for k, v in all_tags.items() if v is not None)
    text = " " + (order(text) if order else text) + "; b="
    relaxed = all_tags["c"] is None or all_tags["c"].startswith("relaxed")
    signed = [name.strip() for name in (all_tags["h"] or "").lower().encode().split(b":")]
    header = dkim._header_hash(dkim._by_name(fields), signed, relaxed)
    header.update(dkim.canonical_field(b"DKIM-Signature", text.encode(), relaxed))
    secret = SigningKey(pem(key), "a.example", "s")
    return (
        b"DKIM-Signature:"
        + text.encode()
        + base64.b64encode(secret.sign(header.digest()))
        + b"\r\n"
        + mail
    )


VALID_TAGS = {
    "nothing special": {},
    "d= in capitals": {"d": "A.EXAMPLE"},
    "i= of the domain": {"i": "joe@a.example"},
    "i= of a subdomain": {"i": "@mail.a.example"},
    "q=dns/txt": {"q": "dns/txt"},
    "q= with others": {"q": "http/xml:dns/txt"},
    "signed just now": {"t": str(NOW)},
    "clock a little ahead": {"t": str(NOW + 200)},
    "not expired": {"t": str(NOW - 10), "x": str(NOW + 10)},
    "unknown tag": {"zz": "1"},
    "simple/simple": {"c": "simple/simple"},
    "h= names a missing field": {"h": "from:nosuchfield"},
    "blanks around names": {"h": " from : to "},
}
INVALID_TAGS = {
    "other domain": {"d": "b.example"},
    "parent domain": {"d": "example"},
    "subdomain": {"d": "x.a.example"},
    "no d=": {"d": None},
    "no s=": {"s": None},
    "no h=": {"h": None},
    "no bh=": {"bh": None},
    "no v=": {"v": None},
    "v=2": {"v": "2"},
    "From not signed": {"h": "to:subject"},
    "h= with an empty name": {"h": "from::to"},
    "sha1": {"a": "rsa-sha1"},
    "ed25519 claimed, RSA key": {"a": "ed25519-sha256"},
    "unknown canonicalization": {"c": "relaxed/nofws"},
    "l=": {"l": "10"},
    "l= of everything": {"l": "100000"},
    "i= of another domain": {"i": "@b.example"},
    "i= that only ends alike": {"i": "@xa.example"},
    "i= without @": {"i": "a.example"},
    "q= without dns/txt": {"q": "http/xml"},
    "signed in the future": {"t": str(NOW + 400)},
    "t= is no number": {"t": "now"},
    "t= too long": {"t": "1" * 13},
    "expired": {"x": str(NOW - 1)},
    "expired before it was signed": {"t": str(NOW), "x": str(NOW)},
    "other body hash": {"bh": base64.b64encode(b"x" * 32).decode()},
    "short body hash": {"bh": base64.b64encode(b"x" * 20).decode()},
    "bh= is not base64": {"bh": "!"},
    "selector with a blank": {"s": "s s"},
    "selector not a name": {"s": "s..s"},
    "selector too long": {"s": "s" * 64},
    "repeated tag": {"order": lambda text: text + "; d=a.example"},
    "tag without value": {"order": lambda text: text + "; zz"},
    "tag without name": {"order": lambda text: text + "; =zz"},
    "empty tag in the middle": {"order": lambda text: text + "; ; zz=1"},
}


@pytest.mark.parametrize("name", VALID_TAGS)
def test_signatures_within_the_rules_are_valid(name):
    keys = {"s._domainkey.a.example": record_of(rsa_key())}
    assert verify(forge(**VALID_TAGS[name]), keys, now=NOW)


@pytest.mark.parametrize("name", INVALID_TAGS)
def test_signatures_against_the_rules_are_not(name):
    domains = ("a.example", "b.example", "example", "x.a.example")
    keys = {f"s._domainkey.{domain}": record_of(rsa_key()) for domain in domains}
    assert not verify(forge(**INVALID_TAGS[name]), keys, now=NOW)


def test_a_field_too_many_breaks_an_oversigned_header():
    assert verify(sign())
    for field in (b"From: x@a.example", b"Subject: x", b"Content-Type: text/html", b"Cc: x"):
        assert not verify(field + b"\r\n" + sign())
        signed = sign()
        assert not verify(signed.replace(b"\r\n\r\n", b"\r\n" + field + b"\r\n\r\n", 1))


def test_every_field_is_signed_but_those_that_change_on_the_way():
    mail = b"Received: x\r\nX-Any: 1\r\nX-Any: 2\r\nReturn-Path: <x>\r\n" + MAIL
    value = re.search(rb"h=([^;]*);", sign(mail))[1]
    names = re.sub(rb"\s", b"", value).split(b":")
    assert names.count(b"x-any") == 2
    assert names.count(b"from") == names.count(b"subject") == 2
    assert b"received" not in names and b"return-path" not in names
    assert {b"autocrypt", b"content-type", b"list-id", b"resent-from"} <= set(names)
    assert all(len(line) <= 78 for line in sign(mail).partition(b"From:")[0].split(b"\r\n"))


def test_one_valid_signature_of_the_domain_is_enough_and_others_are_ignored():
    other = dkimpy_sign(domain=b"b.example")
    broken = sign().replace(b"bh=", b"bh=AAAA", 1)
    mail = broken[: broken.index(b"From:")] + other[: other.index(b"From:")] + sign()
    assert verify(mail)
    assert not verify(broken)
    assert not verify(other, {"s._domainkey.b.example": record_of(rsa_key())})


def test_only_so_many_signatures_are_looked_at():
    garbage = b"DKIM-Signature: v=1; a=rsa-sha256; d=a.example; s=x%d; h=from; bh=%s; b=AAAA\r\n"
    body_hash = base64.b64encode(b"x" * 32)
    front = b"".join(garbage % (number, body_hash) for number in range(dkim.MAX_SIGNATURES))
    assert not verify(front + sign())
    assert verify(front.partition(b"\r\n")[2] + sign())


def test_keys_are_asked_for_only_where_the_body_matches():
    fields, body = split(sign())
    verifier = Verifier(fields, "a.example", time.time())
    verifier.body(body + b"x")
    assert verifier.key_names() == ()


def test_a_signature_field_too_long_is_not_parsed():
    with pytest.raises(DkimError, match="too long"):
        parse_signature(b"v=1; " + b"x" * dkim.MAX_SIGNATURE_FIELD, NOW)


@pytest.mark.parametrize("text", [b"a=1;a=2", b"=1", b"a", b"a=\x80", b"1=a", b";a=1", b"a=1;;"])
def test_bad_tag_lists(text):
    with pytest.raises(DkimError):
        parse_tags(text)


def test_good_tag_lists():
    assert parse_tags(b" a = 1 ; b=x=y;\r\n c=; ") == {"a": b"1", "b": b"x=y", "c": b""}
    assert parse_tags(b"") == {}


# --- key records ----------------------------------------------------------------------------------

P = record_of(rsa_key()).partition(b"p=")[2]


@pytest.mark.parametrize(
    "text",
    [
        b"p=" + P,
        b"v=DKIM1; p=" + P,
        b"v=DKIM1; k=rsa; h=sha1:sha256; s=email; t=y; n=note; p=" + P + b";",
        b"v=DKIM1; s=*; p=" + P[:70] + b" \t" + P[70:],
        b"k=RSA; p=" + P,
        record_of(ED25519),
    ],
)
def test_key_records_within_the_rules(text):
    assert parse_key_record(text).exact_domain is False


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"v=DKIM1",
        b"v=DKIM1; p=",
        b"v=DKIM2; p=" + P,
        b"k=rsa; v=DKIM1; p=" + P,
        b"v=spf1 -all",
        b"h=sha1; p=" + P,
        b"s=tlsrpt; p=" + P,
        b"k=dsa; p=" + P,
        b"k=ed25519; p=" + P,
        b"k=rsa; p=" + record_of(ED25519).partition(b"p=")[2],
        b"p=AAAA",
        b"p=!",
        b"p=" + P + b"; p=" + P,
        b"p=" + P[:-8],
        b"x=" + b"x" * 9000 + b"; p=" + P,
    ],
)
def test_key_records_against_the_rules(text):
    with pytest.raises(DkimError):
        parse_key_record(text)


def test_rsa_keys_below_1024_bit_are_refused():
    small = (
        b"p=MFwwDQYJKoZIhvcNAQEBBQADSwAwSAJBALhmLXLGcHJTcIxlN9MpIWW0ahJpD1jE4SvRQZSHTrNjQCYhXwPe"
        b"kQXyQ+bZPwxqT/TOGVqQQvzXZMGJqNpnPn0CAwEAAQ=="
    )
    with pytest.raises(DkimError):
        parse_key_record(small)


def test_flag_s_demands_that_the_identity_is_the_domain_itself():
    keys = {"s._domainkey.a.example": record_of(rsa_key(), b"t=y:s; ")}
    assert verify(forge(), keys, now=NOW)
    assert verify(forge(i="joe@a.example"), keys, now=NOW)
    assert not verify(forge(i="joe@mail.a.example"), keys, now=NOW)


# --- private keys ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [b"", b"garbage", pem(ec.generate_private_key(ec.SECP256R1()))], ids=["", "x", "ec"]
)
def test_other_private_keys_are_errors(data):
    with pytest.raises(DkimError):
        SigningKey(data, "a.example", "s")


def test_an_encrypted_private_key_is_an_error():
    data = ED25519.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    with pytest.raises(DkimError):
        SigningKey(data, "a.example", "s")


def test_a_verifier_that_forgot_the_alignment_would_be_noticed(monkeypatch):
    """The tests above can fail: seed the defect they are there for."""
    mail = forge(d="b.example")
    keys = {"s._domainkey.b.example": record_of(rsa_key())}
    assert not verify(mail, keys, now=NOW)
    original = dkim.parse_signature

    class Aligned(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            return True

        def __ne__(self, other):
            return False

    monkeypatch.setattr(
        dkim,
        "parse_signature",
        lambda value, now: (s := original(value, now))._replace(domain=Aligned(s.domain)),
    )
    assert verify(mail, keys, now=NOW)
