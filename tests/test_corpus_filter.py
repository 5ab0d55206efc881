# SPDX-License-Identifier: MIT
"""The filter's verdicts on messages of the real client, recorded at a submission server.

The corpus (shared/corpus beside the project, README.md there; or $CHATMAIL_CORPUS) is required:
without it these tests fail.
"""

import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORPUS = Path(os.environ.get("CHATMAIL_CORPUS", ROOT.parent / "shared" / "corpus"))
sys.path[:0] = [
    str(ROOT / "packages" / "chatmaild" / folder) for folder in ("src", "tests/filtermail")
]

from filtermail_mta import Mta  # noqa: E402
from filtermail_relay import NOW, public, rsa_pem  # noqa: E402
from filtermail_samples import split  # noqa: E402

from chatmaild.filtermail import dkim, policy  # noqa: E402
from chatmaild.filtermail.limiter import Limiter  # noqa: E402
from chatmaild.users import MailStore  # noqa: E402

DOMAIN = "_r7.test"
KEY_NAME = f"chatmail._domainkey.{DOMAIN}"
CLEARTEXT = {"0066", "0067"}
SECUREJOIN = {"0005"}
NOT_ENCRYPTED = "523 Encryption Needed: Invalid Unencrypted Mail"

NUMBERS = sorted(path.stem.removeprefix("msg-") for path in CORPUS.glob("msg-*.eml"))


def read(number):
    """The message, its envelope sender and recipients."""
    mail = (CORPUS / f"msg-{number}.eml").read_bytes()
    envelope = (CORPUS / f"msg-{number}.env").read_text()
    (sender,) = re.findall(r"^MAIL FROM:<([^>]*)>", envelope, re.MULTILINE)
    return mail, sender, re.findall(r"^RCPT TO:<([^>]*)>", envelope, re.MULTILINE)


@pytest.fixture
def shared(tmp_path):
    for number in NUMBERS:
        for recipient in read(number)[2]:
            folder = tmp_path / recipient
            folder.mkdir(exist_ok=True)
            (folder / "password").write_text("x")
            (folder / "enforceE2EEincoming").touch()
    return policy.Policy(
        domain=DOMAIN,
        mailboxes=MailStore(tmp_path),
        limiter=Limiter(60, 10),
        signing_keys=[dkim.SigningKey(rsa_pem(), DOMAIN, "chatmail")],
        clock=lambda: NOW,
    )


def test_the_corpus_is_complete():
    assert len(NUMBERS) == 66, f"no corpus in {CORPUS}"


@pytest.mark.parametrize("number", NUMBERS or ["missing"])
def test_outgoing_and_then_incoming(number, shared):
    """What passes submission arrives at another relay with a valid signature, and passes there."""
    mail, sender, recipients = read(number)
    outcome = Mta(policy.OutgoingHandler(shared)).send(mail, sender, recipients, login=sender)
    if number in CLEARTEXT:
        assert outcome.reply == NOT_ENCRYPTED
    else:
        assert outcome.reply == ""
        assert bool(outcome.changed) == (number in SECUREJOIN)

    queued = mail
    for _, name, value in outcome.changed:
        queued = re.sub(rb"(?m)^%s:.*\r$" % name, name + b":" + value + b"\r", queued)
    for _, name, value in outcome.inserted:
        queued = name + b":" + value.replace(b"\n", b"\r\n") + b"\r\n" + queued
    incoming = Mta(policy.IncomingHandler(shared), {KEY_NAME: [public(rsa_pem())]})
    received = incoming.send(queued, sender, recipients)
    assert received.reply == outcome.reply
    assert received.sender is None


@pytest.mark.parametrize("number", sorted(set(NUMBERS) - CLEARTEXT) or ["missing"])
def test_nothing_can_be_taken_from_a_message_without_being_noticed(number, shared):
    """Each of these cuts makes cleartext or garbage of it."""
    mail, sender, recipients = read(number)
    _, body = split(mail)
    end = len(mail) - len(body)
    cuts = [mail[:end], mail[: end + len(body) // 2], mail[:-20], mail + b"cleartext\r\n"]
    handler = policy.OutgoingHandler(shared)
    for cut in cuts:
        shared.limiter._full_at.clear()
        assert Mta(handler).send(cut, sender, recipients, login=sender).reply == NOT_ENCRYPTED


def test_pieces_do_not_matter(shared):
    for number in NUMBERS:
        mail, sender, recipients = read(number)
        if len(mail) < 10_000:
            for size in (1, 61, 1000):
                shared.limiter._full_at.clear()
                mta = Mta(policy.OutgoingHandler(shared))
                outcome = mta.send(mail, sender, recipients, login=sender, size=size)
                assert (outcome.reply == "") == (number not in CLEARTEXT)
