# SPDX-License-Identifier: MIT
"""chatmail-opendkim-conf: OpenDKIM signs and verifies while it is installed, with the filter's replies."""

import base64
import re
import smtplib

import dkim
import pytest
from conftest import DOMAIN, measured
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from lab import image
from lab.shell import wait_for
from test_mail_rules import ENCRYPTION_NEEDED, cleartext, encrypted, wait_received

PACKAGE = "chatmail-opendkim-conf"
UNITS = ("chatmail-opendkim-sign.service", "chatmail-opendkim-verify.service")
UNSIGNED = (554, "5.7.1 No valid DKIM signature found")
UNAVAILABLE = (451, "4.7.5 DKIM key temporarily unavailable, try again later")


@pytest.fixture(scope="module")
def opendkim(relay, lab):
    """The relay with the package; without it again at the end."""
    image.download(lab.tree, PACKAGE)
    relay.sh(f"apt-get install -q --yes --no-install-recommends {PACKAGE}", timeout=120)
    yield relay
    relay.sh(f"apt-get purge -q --yes {PACKAGE}", timeout=120)


@pytest.fixture(scope="module")
def bob(mail):
    return mail.account()


@pytest.fixture(scope="module")
def far(lab):
    """Domains of the lab's internet that sign: name -> PEM of the key."""
    keys = {}
    for name in ("far.example", "sub.far.example", "broken.example"):
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        public = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        keys[name] = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
        text = "v=DKIM1; k=rsa; p=" + base64.b64encode(public).decode()
        lab.dns.set(f"o._domainkey.{name}", "TXT", f'"{text[:200]}" "{text[200:]}"')
    lab.dns.broken.add("o._domainkey.broken.example")
    return keys


@pytest.fixture(scope="module")
def incoming(mail, bob, opendkim, far):
    """Send a message on port 25; the reply."""

    def sign(message, domain, **options):
        key = far[domain.lower()]
        return dkim.sign(message, b"o", domain.encode(), key, **options) + message

    def send(message, sender="x@far.example"):
        with mail.smtp(None, 25) as session:
            return mail.send(session, sender, [bob.address], message)

    send.sign = sign
    return send


def public_key(relay):
    """The relay's DKIM record, made from its private key as the documentation says."""
    key = serialization.load_pem_private_key(
        relay.read("/var/lib/chatmail/keys/dkim/rsa.pem").encode(), None
    )
    der = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return b"v=DKIM1; k=rsa; p=" + base64.b64encode(der)


def queued(relay, mail, alice):
    """What the relay sends to another one: held in the queue and read there."""
    relay.exec("postconf", "-e", "defer_transports=smtp")
    relay.exec("systemctl", "reload", "postfix.service")
    try:
        with mail.smtp(alice) as session:
            to = "y@elsewhere.example"
            code, text = mail.send(
                session, alice.address, [to], encrypted(alice.address, to, "Secret plans")
            )
        assert code == 250
        number = text.split()[-1]
        # as smtp(8) sends it: CRLF
        return relay.exec("postcat", "-hbq", number).out.replace("\n", "\r\n").encode()
    finally:
        relay.exec("postconf", "-X", "defer_transports")
        relay.exec("systemctl", "reload", "postfix.service")
        relay.exec("postsuper", "-d", "ALL")


def signatures(message):
    return re.findall(rb"^DKIM-Signature: (?:.*\r\n)(?:[ \t].*\r\n)*", message, re.MULTILINE)


def test_installing_the_package_switches_to_opendkim(opendkim):
    shown = opendkim.exec("postconf", "-h", "smtpd_milters", "non_smtpd_milters").out
    assert shown.count("unix:chatmail/opendkim/") == 2
    wait_for(lambda: opendkim.exec("chatmail-relay", "status", check=False).ok, 20, "status")
    state = opendkim.exec("systemctl", "is-active", "opendkim.service", check=False).out
    assert state == "inactive\n"  # Debian's own instance, which would do nothing
    used = opendkim.memory()
    measured["memory (PSS) of OpenDKIM, optional"] = f"{sum(used[unit] for unit in UNITS):.1f} MB"


@pytest.mark.parametrize("unit", UNITS)
def test_units_run_with_least_privilege(opendkim, unit):
    done = opendkim.exec(
        "systemd-analyze", "security", "--threshold=25", "--no-pager", unit, check=False
    )
    assert done.ok, done.out.splitlines()[-1]


def test_outgoing_mail_has_one_signature_which_dkimpy_accepts(opendkim, mail):
    message = queued(opendkim, mail, mail.account())
    assert b"Subject: [...]\r\n" in message
    (signature,) = signatures(message)
    assert f"d={DOMAIN}; s=chatmail".encode() in re.sub(rb"\s+", b" ", signature)
    record = public_key(opendkim)
    assert dkim.verify(message, dnsfunc=lambda name, timeout=5: record)
    added = message.replace(b"Subject: [...]\r\n", b"Subject: [...]\r\nSubject: again\r\n")
    assert not dkim.verify(added, dnsfunc=lambda name, timeout=5: record)


def test_unsigned_mail_gets_the_filters_reply(incoming, bob):
    assert incoming(encrypted("x@far.example", bob.address)) == UNSIGNED


def test_signed_mail_is_delivered(incoming, mail, bob):
    message = encrypted("x@far.example", bob.address)
    marker = re.search(rb"Message-ID: (<.*>)", message)[1]
    assert incoming(incoming.sign(message, "far.example"))[0] == 250
    got = wait_received(mail, bob, marker)
    assert b"DKIM-Signature" not in got and b"Authentication-Results" not in got


def test_upper_case_domains_count_as_well(incoming, bob):
    message = encrypted("x@FAR.example", bob.address)
    assert incoming(incoming.sign(message, "Far.Example"))[0] == 250


def test_what_is_not_a_valid_signature_of_the_domain_in_from_is_refused(incoming, bob):
    good = encrypted("x@far.example", bob.address)
    cases = {
        "tampered": incoming.sign(good, "far.example").replace(b"Subject: [...]", b"Subject: [.]"),
        "of a subdomain": incoming.sign(good, "sub.far.example"),
        "for a subdomain": incoming.sign(
            encrypted("x@sub.far.example", bob.address), "far.example"
        ),
        "with the length of the body": incoming.sign(good, "far.example", length=True),
        "another body": b"\r\n\r\n".join(
            [
                incoming.sign(good, "far.example").partition(b"\r\n\r\n")[0],
                encrypted("", "", marker=b"other").partition(b"\r\n\r\n")[2],
            ]
        ),
        "no such key": incoming.sign(good, "far.example").replace(b" s=o;", b" s=none;"),
        "SHA-1": incoming.sign(good, "far.example", signature_algorithm=b"rsa-sha1"),
        "expired": incoming.sign(good, "far.example").replace(b"; q=dns/txt;", b"; x=1;"),
    }
    assert {name: incoming(text) for name, text in cases.items()} == dict.fromkeys(cases, UNSIGNED)


def test_a_from_that_is_missing_double_or_strange_is_refused(incoming, bob):
    good = encrypted("x@far.example", bob.address)
    line = b"From: <x@far.example>\r\n"
    assert good.startswith(line)
    cases = (
        b"",
        line + line,
        b"From: <x@far.example>, <y@far.example>\r\n",
        b"From: x@far.example <y@evil.example>\r\n",
        b'From: "x@far.example" <"x y"@evil.example>\r\n',
        b"From: nobody\r\n",
    )
    for fields in cases:
        message = fields + good.removeprefix(line)
        # a signature that would be good if From were that of the first line
        signature = incoming.sign(good, "far.example")[: -len(good)]
        for text in (message, signature + message):
            assert incoming(text)[0] == 554, fields


def test_encryption_is_asked_for_first(incoming, bob):
    assert incoming(cleartext("x@far.example", bob.address)) == ENCRYPTION_NEEDED


def test_a_dns_failure_is_temporary_and_named(incoming, bob):
    message = encrypted("x@broken.example", bob.address)
    signed = incoming.sign(message, "broken.example")
    assert incoming(signed, "x@broken.example") == UNAVAILABLE


def test_a_bounce_is_signed(opendkim, mail):
    alice = mail.account()
    nobody = mail.new_address().address
    with mail.smtp(alice) as session:
        assert (
            mail.send(session, alice.address, [nobody], encrypted(alice.address, nobody))[0] == 250
        )
    wait_received(mail, alice, nobody.encode())
    log = opendkim.journal("chatmail", "-u", UNITS[0])
    assert log.count("DKIM-Signature field added") >= 2


def test_without_opendkim_no_mail_is_taken(opendkim, mail, bob):
    opendkim.exec("systemctl", "stop", *UNITS)
    try:
        message = encrypted("x@far.example", bob.address)
        try:
            with mail.smtp(None, 25) as session:
                code = mail.send(session, "x@far.example", [bob.address], message)[0]
        except smtplib.SMTPResponseException as error:
            code = error.smtp_code
        except smtplib.SMTPServerDisconnected:
            code = 421
        assert 400 <= code < 500
    finally:
        opendkim.exec("systemctl", "start", *UNITS)


def test_the_log_has_no_addresses(opendkim, lab):
    log = "".join(opendkim.journal("chatmail", "-u", unit) for unit in UNITS)
    assert lab.client.ipv4 not in log and "@" not in log


def test_removing_the_package_returns_to_the_filter(opendkim, mail, bob):
    opendkim.sh(f"apt-get remove -q --yes {PACKAGE}", timeout=120)
    assert opendkim.exec("systemctl", "is-active", *UNITS, check=False).out == "inactive\n" * 2
    assert "opendkim" not in opendkim.sh("postconf -n; ls /etc/chatmail").out
    wait_for(lambda: opendkim.exec("chatmail-relay", "status", check=False).ok, 20, "status")
    assert opendkim.exec("chatmail-relay", "diff").out == ""
    with mail.smtp(None, 25) as session:
        message = encrypted("x@far.example", bob.address)
        assert mail.send(session, "x@far.example", [bob.address], message) == UNSIGNED
    message = queued(opendkim, mail, mail.account())
    assert len(signatures(message)) == 1
    record = public_key(opendkim)
    assert dkim.verify(message, dnsfunc=lambda name, timeout=5: record)
