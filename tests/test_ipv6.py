# SPDX-License-Identifier: MIT
"""Every port over IPv6; the other tests use IPv4."""

import http.client
import uuid

import pytest
from conftest import DOMAIN
from lab.mail import Mail
from lab.messages import encrypted


@pytest.fixture(scope="module")
def mail6(lab, relay):
    return Mail(lab, relay.namespace.ipv6, DOMAIN)


@pytest.mark.parametrize("port", [465, 587, 443])
def test_submission(mail6, port):
    account = mail6.account()
    subject = uuid.uuid4().hex
    with mail6.smtp(account, port) as session:
        message = encrypted(account.address, account.address, subject=subject)
        code, text = mail6.send(session, account.address, [account.address], message)
    assert code == 250, text


@pytest.mark.parametrize("port", [993, 143, 443])
def test_imap(mail6, port):
    session = mail6.imap(mail6.account(), port)
    assert session.select("INBOX")[0] == "OK"
    session.logout()


def test_port_25_judges(mail6):
    account = mail6.account()
    with mail6.smtp(None, 25) as session:
        code, _text = mail6.send(
            session, "x@other.example", [account.address], encrypted("x@other.example", "y")
        )
    assert code == 554


def test_the_web_site(mail6, lab):
    with lab.at_client():
        connection = http.client.HTTPConnection(mail6.host, 80, timeout=20)
        connection.request("GET", "/", headers={"Host": DOMAIN})
        answer = connection.getresponse()
        answer.read()
    assert answer.status in (200, 301, 302, 308)
