# SPDX-License-Identifier: MIT
"""A relay in a temporary directory: mail store, keys, policy, and signed mail from elsewhere."""

import functools

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from chatmaild.filtermail import dkim, policy
from chatmaild.filtermail.limiter import Limiter
from chatmaild.users import MailStore
from filtermail_mta import Mta
from filtermail_samples import ALICE, BOB, DOMAIN, REMOTE, split

NOW = 1_750_000_000.0


@functools.cache
def rsa_pem():
    return _pem(rsa.generate_private_key(public_exponent=65537, key_size=2048))


@functools.cache
def ed25519_pem():
    return _pem(ed25519.Ed25519PrivateKey.from_private_bytes(b"\x07" * 32))


def _pem(key):
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


@functools.cache
def signing_key():
    return dkim.SigningKey(rsa_pem(), DOMAIN, "chatmail")


@functools.cache
def public(pem):
    """The KeyRecord that belongs to a private key."""
    key = serialization.load_pem_private_key(pem, None)
    return dkim.KeyRecord(key.public_key(), False)


def signed(mail, domain="other.example", selector="s", pem=None):
    """*mail* as the relay of *domain* sends it."""
    fields, body = split(mail)
    signer = dkim.Signer([dkim.SigningKey(pem or ed25519_pem(), domain, selector)], fields)
    signer.body(body)
    (value,) = signer.finish(NOW)
    return b"DKIM-Signature:" + value.replace(b"\n", b"\r\n") + b"\r\n" + mail


def key_name(domain="other.example", selector="s"):
    return f"{selector}._domainkey.{domain}"


class Relay:
    def __init__(self, path, **options):
        self.path = path
        self.now = 0.0  # of the monotonic clock
        options.setdefault("limiter", Limiter(60, 10))
        options.setdefault("signing_keys", [signing_key()])
        self.policy = policy.Policy(
            domain=DOMAIN,
            mailboxes=MailStore(path),
            clock=lambda: NOW,
            monotonic=lambda: self.now,
            **options,
        )
        self.keys = {key_name(): [public(ed25519_pem())]}

    def add(self, user, *flags, password="{SHA512-CRYPT}$6$x", encrypted_only=True):
        folder = self.path / f"{user}@{DOMAIN}"
        folder.mkdir()
        (folder / "password").write_text(password)
        for flag in (*flags, *(["enforceE2EEincoming"] if encrypted_only else [])):
            (folder / flag).touch()

    def outgoing(self):
        return Mta(policy.OutgoingHandler(self.policy))

    def incoming(self, client="192.0.2.1"):
        mta = Mta(policy.IncomingHandler(self.policy), self.keys)
        mta.session._handler.connect(client)
        return mta

    def sign(self):
        return Mta(policy.SignHandler(self.policy))

    def submit(self, mail, sender=ALICE, recipients=(REMOTE,), **more):
        more.setdefault("login", sender)
        return self.outgoing().send(mail, sender, recipients, **more)

    def receive(self, mail, sender=REMOTE, recipients=(BOB,), **more):
        client = more.pop("client", "192.0.2.1")
        return self.incoming(client).send(mail, sender, recipients, **more)
