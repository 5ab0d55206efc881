# SPDX-License-Identifier: MIT
"""What the relay lets pass and what it says to the rest, over raw SMTP and IMAP."""

import base64
import contextlib
import hashlib
import imaplib
import re
import selectors
import smtplib
import socket
import ssl
import time
from pathlib import Path

import pytest
from conftest import DOMAIN
from lab.mail import context
from lab.messages import cleartext, encrypted
from lab.network import inside
from lab.shell import wait_for

CORPUS = Path(__file__).resolve().parents[2] / "shared/corpus"
REFUSED = {"msg-0066", "msg-0067"}
ENCRYPTION_NEEDED = (523, "Encryption Needed: Invalid Unencrypted Mail")
IDLE_CLIENTS = 200


@pytest.fixture(scope="module")
def alice(mail):
    return mail.account()


@pytest.fixture(scope="module")
def bob(mail):
    return mail.account()


def wait_received(mail, account, marker):
    def found():
        return [m for m in mail.received(account) if marker in m]

    return wait_for(found, 20, f"message with {marker!r}")[0]


@pytest.mark.parametrize("port", [465, 587, 443])
def test_cleartext_is_refused_on_every_submission_port(mail, alice, bob, port):
    with mail.smtp(alice, port) as session:
        reply = mail.send(
            session, alice.address, [bob.address], cleartext(alice.address, bob.address)
        )
    assert reply == ENCRYPTION_NEEDED


def test_cleartext_is_refused_on_port_25(mail, bob):
    with mail.smtp(None, 25) as session:
        reply = mail.send(
            session, "x@far.example", [bob.address], cleartext("x@far.example", bob.address)
        )
    assert reply == ENCRYPTION_NEEDED


@pytest.mark.parametrize("port", [465, 587, 443])
def test_encrypted_mail_is_delivered_without_a_trace_of_its_way(mail, alice, bob, port):
    message = encrypted(alice.address, bob.address, f"Subject of port {port}")
    marker = re.search(rb"Message-ID: (<.*>)", message)[1]
    with mail.smtp(alice, port) as session:
        assert mail.send(session, alice.address, [bob.address], message)[0] == 250
    got = wait_received(mail, bob, marker)
    assert b"Subject: [...]" in got
    for trace in (b"Received:", b"10.77.0.", b"DKIM-Signature:", b"Authentication-Results:"):
        assert trace not in got


@pytest.mark.parametrize("port", [25, 465, 587])
def test_no_session_ticket_keeps_the_first_reply_back(mail, port):
    """With one, the kernel keeps the reply until the client has acknowledged the ticket: 40 ms."""
    with mail.smtp(None, port) as session:
        assert session.sock.version() == "TLSv1.3"
        assert not session.sock.session.has_ticket


def test_mail_from_must_be_the_login(mail, alice, bob):
    with mail.smtp(alice) as session:
        code, text = mail.send(session, bob.address, [alice.address], b"")
    assert code == 553 and "5.7.1" in text


def test_header_from_must_be_the_login(mail, alice, bob):
    with mail.smtp(alice) as session:
        code, text = mail.send(
            session, alice.address, [bob.address], encrypted(bob.address, bob.address)
        )
    assert code >= 500, text
    assert code != 523


def test_nothing_is_submitted_without_a_login(mail, bob):
    with mail.smtp(None, 465) as session:
        assert mail.send(session, "a@b.example", [bob.address], b"")[0] in (530, 553, 554)


def test_unsigned_mail_of_other_relays_is_refused(mail, bob):
    with mail.smtp(None, 25) as session:
        reply = mail.send(
            session, "x@far.example", [bob.address], encrypted("x@far.example", bob.address)
        )
    assert reply == (554, "5.7.1 No valid DKIM signature found")


@pytest.fixture(scope="module")
def far(lab):
    """A signing domain of the lab's internet; returns the signer."""
    import dkim
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    text = "v=DKIM1; k=rsa; p=" + base64.b64encode(public).decode()
    lab.dns.set("s._domainkey.far.example", "TXT", f'"{text[:200]}" "{text[200:]}"')
    lab.dns.broken.add("s._domainkey.broken.example")
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )

    def sign(message, domain="far.example"):
        return dkim.sign(message, b"s", domain.encode(), pem) + message

    return sign


def test_signed_mail_of_other_relays_is_delivered(mail, bob, far):
    message = encrypted("x@far.example", bob.address)
    marker = re.search(rb"Message-ID: (<.*>)", message)[1]
    with mail.smtp(None, 25) as session:
        assert mail.send(session, "x@far.example", [bob.address], far(message))[0] == 250
    assert b"DKIM-Signature" not in wait_received(mail, bob, marker)


def test_a_signature_of_another_domain_or_over_other_bytes_does_not_count(mail, bob, far):
    message = encrypted("x@far.example", bob.address)
    other = encrypted("x@other.example", bob.address)
    with mail.smtp(None, 25) as session:
        tampered = far(message).replace(b"Subject: [...]", b"Subject: [..?]")
        for bad, sender in ((tampered, "x@far.example"), (far(other), "x@other.example")):
            reply = mail.send(session, sender, [bob.address], bad)
            assert reply == (554, "5.7.1 No valid DKIM signature found")


def test_a_dns_failure_is_temporary(mail, bob, far):
    message = encrypted("x@broken.example", bob.address)
    with mail.smtp(None, 25) as session:
        code, _text = mail.send(
            session, "x@broken.example", [bob.address], far(message, "broken.example")
        )
    assert 400 <= code < 500


def test_who_takes_cleartext_is_the_mailbox_s_choice_however_its_address_is_written(
    mail, relay, bob, far
):
    free = mail.account()
    relay.exec("rm", f"/var/lib/chatmail/mail/{DOMAIN}/{free.address}/enforceE2EEincoming")

    def offer(session, recipient):
        """The end of a signed cleartext's way, and its mark; *recipient* as it stands in RCPT."""
        message = cleartext("x@far.example", recipient)
        assert session.mail("x@far.example")[0] == 250
        assert session.docmd("RCPT", f"TO:<{recipient}>")[0] == 250
        return session.data(far(message))[0], re.search(rb"Message-ID: (<.*>)", message)[1]

    def forms(account):
        user = account.address.partition("@")[0]
        yield account.address
        yield f"{user}+ext@{DOMAIN}"
        yield f"{user.upper()}+Ext@{DOMAIN.upper()}"
        yield f'"{user}+ext"@{DOMAIN}'
        yield f'"\\{user[0].upper()}{user[1:]}+"@{DOMAIN}'

    with mail.smtp(None, 25) as session:
        assert [offer(session, form)[0] for form in forms(bob)] == [523] * 5
        taken = [offer(session, form) for form in forms(free)]
    assert [code for code, _mark in taken] == [250] * 5

    def all_are_delivered():
        got = b"".join(mail.received(free))
        sent = zip(forms(free), taken, strict=True)
        assert [form for form, (_code, mark) in sent if mark not in got] == []
        return True

    wait_for(all_are_delivered, 20)


def test_an_unknown_recipient_is_refused_on_port_25(mail):
    with mail.smtp(None, 25) as session:
        code, text = mail.send(session, "x@far.example", [mail.new_address().address], b"")
    assert code == 550 and text.startswith("5.1.1")


def test_nothing_is_relayed_to_other_domains_on_port_25(mail):
    with mail.smtp(None, 25) as session:
        code, text = mail.send(session, "x@far.example", ["y@elsewhere.example"], b"")
    assert code == 554 and "5.7.1" in text


def test_an_unknown_recipient_is_bounced_to_the_submitter(mail, alice):
    nobody = mail.new_address().address
    with mail.smtp(alice) as session:
        reply = mail.send(session, alice.address, [nobody], encrypted(alice.address, nobody))
    assert reply[0] == 250
    bounce = wait_received(mail, alice, nobody.encode())
    assert re.search(rf"^From: .*MAILER-DAEMON@{DOMAIN}".encode(), bounce, re.M | re.I)


def test_every_message_of_the_corpus_gets_its_verdict(mail, relay):
    files = sorted(CORPUS.glob("msg-*.eml"))
    assert len(files) == 66
    wrong = []
    for path in files:
        sender, recipient = mail.account(), mail.account()
        message = path.read_bytes()
        envelope = path.with_suffix(".env").read_text()
        old = re.search(r"MAIL FROM:<(.*?)>", envelope)[1].encode()
        head, separator, body = message.partition(b"\r\n\r\n")
        head = head.replace(old, sender.address.encode())
        to_self = f"RCPT TO:<{old.decode()}>" in envelope and envelope.count("RCPT TO") == 1
        target = sender if to_self else recipient
        with mail.smtp(sender) as session:
            reply = mail.send(session, sender.address, [target.address], head + separator + body)
        expected = ENCRYPTION_NEEDED if path.stem in REFUSED else 250
        if (reply if path.stem in REFUSED else reply[0]) != expected:
            wrong.append((path.name, reply))
    assert wrong == []


def test_too_much_mail_is_refused_for_now(mail, bob):
    sender = mail.account()
    with mail.smtp(sender) as session:
        replies = [session.mail(sender.address) for _ in range(1)]
        codes = []
        for _ in range(15):
            session.rset()
            codes.append(session.mail(sender.address))
    assert replies[0][0] == 250
    refused = [text for code, text in codes if code == 450]
    assert refused and refused[0].startswith(b"4.7.1")


def test_capabilities_and_metadata_are_what_clients_look_for(mail, alice):
    session = mail.imap(alice)
    offered = set(session.capability()[1][0].decode().split())
    assert {"XCHATMAIL", "XDELTAPUSH", "METADATA", "QUOTA", "IDLE"} <= offered
    assert "COMPRESS=DEFLATE" not in offered
    imaplib.Commands.setdefault("GETMETADATA", ("AUTH", "SELECTED"))
    imaplib.Commands.setdefault("SETMETADATA", ("AUTH", "SELECTED"))
    _status, _data = session._simple_command(
        "GETMETADATA", '""', "(/shared/vendor/deltachat/maxsmtprecipients)"
    )
    _status, data = session._untagged_response("OK", [None], "METADATA")
    assert b"1000" in b"".join(p if isinstance(p, bytes) else b"".join(p) for p in data)
    session.select("INBOX")
    for token in ("token1", "token2"):
        status, _ = session._simple_command(
            "SETMETADATA", "INBOX", f'(/private/devicetoken "{token}")'
        )
        assert status == "OK"
    session._simple_command("GETMETADATA", "INBOX", "(/private/devicetoken)")
    _status, data = session._untagged_response("OK", [None], "METADATA")
    assert b"token1 token2" in b"".join(p if isinstance(p, bytes) else b"".join(p) for p in data)
    assert session.getquotaroot("INBOX")[0] == "OK"
    session.logout()


@pytest.mark.parametrize("port", [993, 143, 443])
def test_imap_on_every_port(mail, alice, port):
    session = mail.imap(alice, port)
    assert session.select("INBOX")[0] == "OK"
    session.logout()


def test_a_wrong_password_and_a_foreign_domain_are_refused(mail, alice):
    from lab.mail import Account

    for account in (
        Account(alice.address, "wrong-password-of-22ch"),
        Account("someone12@elsewhere.example", alice.password),
        Account(f"ab@{DOMAIN}", alice.password),
        Account(f"UPPER/12@{DOMAIN}", alice.password),
    ):
        with pytest.raises(imaplib.IMAP4.error, match="AUTHENTICATIONFAILED|Authentication failed"):
            mail.imap(account)


def test_the_real_address_of_a_client_is_known_behind_the_front(mail, relay, alice):
    session = mail.imap(alice, 443)
    who = relay.exec("doveadm", "-c", "/etc/chatmail/dovecot/dovecot.conf", "who").out
    session.logout()
    assert mail.lab.client.ipv4 in who


def test_all_idle_clients_are_notified(mail, bob):
    """One address, many devices would hit the limit of one user: many addresses, one message each."""
    accounts = [mail.account() for _ in range(IDLE_CLIENTS)]
    sessions = {}
    selector = selectors.DefaultSelector()
    for account in accounts:
        session = mail.imap(account)
        session.select("INBOX")
        session.send(b"X1 IDLE\r\n")
        while not session.readline().startswith(b"+"):
            pass
        sessions[session] = account
        selector.register(session.sock, selectors.EVENT_READ, session)
    senders = [mail.account() for _ in range(IDLE_CLIENTS // 10)]
    for number, sender in enumerate(senders):
        targets = [a.address for a in accounts[number * 10 : number * 10 + 10]]
        with mail.smtp(sender) as smtp:
            reply = mail.send(smtp, sender.address, targets, encrypted(sender.address, bob.address))
        assert reply[0] == 250
    waiting, deadline = set(sessions), time.monotonic() + 60
    while waiting and time.monotonic() < deadline:
        for key, _events in selector.select(1):
            line = key.data.readline()
            if b"EXISTS" in line:
                waiting.discard(key.data)
                selector.unregister(key.fileobj)
    for session in sessions:
        session.shutdown()
    assert len(waiting) == 0


def test_the_web_site_behind_tls(mail, lab):
    import http.client
    import json

    with lab.at_client():
        connection = http.client.HTTPSConnection(mail.host, context=context("http/1.1"), timeout=30)
        connection.connect()

    def get(path, method="GET"):
        connection.request(method, path, headers={"Host": DOMAIN})
        response = connection.getresponse()
        return response.status, response.read().decode()

    status, page = get("/")
    assert status == 200 and f"dcaccount:{DOMAIN}" in page
    status, xml = get("/.well-known/autoconfig/mail/config-v1.1.xml")
    assert status == 200 and xml.count("<hostname>" + DOMAIN) == 6
    status, text = get("/new", "POST")
    account = json.loads(text)
    assert status == 200 and account["email"].endswith(f"@{DOMAIN}") and account["password"]
    assert get("/nothing")[0] == 404


def test_without_the_filter_no_mail_is_taken(mail, relay, alice, bob):
    sockets = [f"chatmail-filtermail-{name}.socket" for name in ("outgoing", "incoming", "sign")]
    relay.exec("systemctl", "stop", *sockets, "chatmail-filtermail.service")
    marks = []
    try:
        for account, port in ((None, 25), (alice, 465), (alice, 587), (alice, 443)):
            message = encrypted(alice.address, bob.address)
            marks.append(re.search(rb"Message-ID: (<.*>)", message)[1])
            with pytest.raises(smtplib.SMTPResponseException) as refused:
                with mail.smtp(account, port) as session:
                    reply = mail.send(session, alice.address, [bob.address], message)
                    raise smtplib.SMTPResponseException(*reply)
            assert refused.value.smtp_code == 421, (port, refused.value)
    finally:
        relay.exec("systemctl", "start", *sockets, "chatmail-filtermail.service")
    wait_for(lambda: relay.exec("chatmail-relay", "status", check=False).ok, 30, "status")
    assert alice.address not in relay.exec("postqueue", "-j").out
    got = b"".join(mail.received(bob) + mail.received(alice))
    assert [mark for mark in marks if mark in got] == []


def test_one_client_holds_so_many_connections_and_others_still_get_in(mail, relay, lab):
    """For IPv6 those of one network of 64 bits, as all of the lab, are one client."""
    neighbour = lab.place("neighbour", 43)

    def connect(place, host, port=993):
        with inside(place):
            plain = socket.create_connection((host, port), 30)
        return context().wrap_socket(plain)

    def is_refused(place, host):
        try:
            connect(place, host).close()
        except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return True
        return False

    before = relay.exec("chatmail-relay", "get", "max_connections_per_client").out.strip()
    relay.exec("chatmail-relay", "set", "max_connections_per_client=5")
    relay.exec("chatmail-relay", "apply")
    held = []
    try:
        ipv4, ipv6 = relay.address, relay.namespace.ipv6
        for host in (ipv4, ipv6):
            held += [connect(lab.client, host, port) for port in (993, 443, 993, 443, 993)]
        # from when on the workers with the new settings have taken over
        wait_for(lambda: is_refused(lab.client, ipv4), 20, "a refusal")
        wait_for(lambda: is_refused(lab.client, ipv6), 20, "a refusal by IPv6")
        assert not is_refused(neighbour, ipv4)
        assert is_refused(neighbour, ipv6)
        held.pop().close()
        wait_for(lambda: not is_refused(neighbour, ipv6), 20, "the place of who left")
    finally:
        for connection in held:
            connection.close()
        relay.exec("chatmail-relay", "set", f"max_connections_per_client={before}")
        relay.exec("chatmail-relay", "apply")
    wait_for(lambda: not is_refused(lab.client, ipv4), 20, "the settings as they were")


def test_one_relay_holds_half_of_port_25_and_others_still_get_in(relay, lab):
    limit = int(relay.exec("postconf", "-h", "smtpd_client_connection_count_limit").out)
    (line,) = relay.exec("postconf", "-F", "smtp/inet/process_limit").out.splitlines()
    assert int(line.split()[-1]) == 2 * limit
    other = lab.place("farther", 44)

    with contextlib.ExitStack() as stack:

        def greeting(place):
            with inside(place):
                connection = socket.create_connection((relay.address, 25), 30)
            stack.enter_context(connection)
            return connection.makefile("rb").readline()[:4]

        assert [greeting(lab.client) for _ in range(limit)] == [b"220 "] * limit
        assert greeting(lab.client) == b"421 "
        assert greeting(other) == b"220 "


def test_the_password_file_is_a_hash_and_private(mail, relay, alice):
    place = f"/var/lib/chatmail/mail/{DOMAIN}/{alice.address}"
    assert relay.read(f"{place}/password").startswith("{SHA512-CRYPT}$6$")
    assert relay.exec("stat", "-c", "%a %U", place).out == "700 _chatmail\n"
    assert hashlib.sha256(alice.password.encode()).hexdigest() not in relay.journal()
    assert alice.password not in relay.journal()
