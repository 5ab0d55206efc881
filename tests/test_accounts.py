# SPDX-License-Identifier: MIT
"""Accounts over the real sockets: first logins, blocks, deletions, limits, invitations, failures."""

import contextlib
import http.client
import imaplib
import json
import re
import secrets
import smtplib
import ssl
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import DOMAIN, measured
from deltachat_rpc_client import JsonRpcError
from lab.mail import TIMEOUT, Account, Mail, context
from lab.shell import wait_for

MAILBOXES = f"/var/lib/chatmail/mail/{DOMAIN}"
DOVEADM = ("doveadm", "-c", "/etc/chatmail/dovecot/dovecot.conf")
DOVEAUTH = (
    "chatmail-doveauth-create.socket",
    "chatmail-doveauth-new.socket",
    "chatmail-doveauth-metrics.socket",
    "chatmail-doveauth.service",
)
REFUSED = "AUTHENTICATIONFAILED"
# from the relay itself: another source than the lab's client
LOGIN = """
import imaplib, ssl, sys
context = ssl._create_unverified_context()
print(imaplib.IMAP4_SSL(sys.argv[1], ssl_context=context, timeout=30).login(*sys.argv[2:]))
"""
READ = """
import socket
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect("/run/chatmail/doveauth/metrics.socket")
    print(connection.makefile().read())
"""


@contextlib.contextmanager
def settings(relay, **changes):
    """The service of accounts with other settings. Not by `apply`, which restarts others, too."""
    file = "/etc/chatmail/chatmaild/chatmail.ini"
    restart = "systemctl reset-failed chatmail-doveauth; systemctl restart chatmail-doveauth"
    edits = " ".join(f"-e 's/^{key} = .*/{key} = {value}/'" for key, value in changes.items())
    relay.sh(f"cp -p {file} /root/settings.ini; sed -i {edits} {file}; {restart}")
    try:
        yield
    finally:
        relay.sh(f"mv /root/settings.ini {file}; {restart}")


@contextlib.contextmanager
def applied(relay, *changes):
    """Other settings by the operator's own commands."""
    # other tests restart the service more often than systemd allows
    relay.exec("systemctl", "reset-failed", "chatmail-doveauth.service")
    relay.sh("cp -p /etc/chatmail/chatmail.ini /root/settings.ini")
    relay.exec("chatmail-relay", "set", *changes)
    relay.exec("chatmail-relay", "apply", timeout=120)
    try:
        yield
    finally:
        relay.sh("mv /root/settings.ini /etc/chatmail/chatmail.ini")
        relay.exec("chatmail-relay", "apply", timeout=120)


def plain(mail, account):
    """IMAP with any bytes in the password: AUTHENTICATE, where LOGIN of imaplib takes ASCII only."""
    password = account.password
    if isinstance(password, str):
        password = password.encode()
    with mail.lab.at_client():
        session = imaplib.IMAP4_SSL(mail.host, 993, ssl_context=context(), timeout=TIMEOUT)
    session.authenticate("PLAIN", lambda _: b"\0" + account.address.encode() + b"\0" + password)
    return session


def refusals(mail, *accounts):
    """What all these logins, at once because each refusal takes two seconds, are told."""

    def login(account):
        try:
            plain(mail, account).logout()
        except imaplib.IMAP4.error as error:
            return str(error)
        return "logged in"

    with ThreadPoolExecutor(len(accounts)) as pool:
        return list(pool.map(login, accounts))


def fresh(mail, password):
    """An address nobody has yet, and this password."""
    return Account(mail.new_address().address, password)


def new(mail, query=""):
    """Status and JSON of /new, asked by somebody who lies about where they are."""
    with mail.lab.at_client():
        connection = http.client.HTTPSConnection(
            mail.host, 443, context=context("http/1.1"), timeout=30
        )
        connection.connect()
    liar = {"X-Real-IP": f"192.0.2.{secrets.randbelow(256)}", "X-Forwarded-For": "192.0.2.1"}
    connection.request("POST", f"/new{query}", headers={"Host": DOMAIN} | liar)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def journal_since(relay, cursor):
    """What the relay logged since *cursor*."""
    return relay.journal("chatmail", f"--after-cursor={cursor}", "-o", "cat")


@pytest.fixture
def cursor(relay):
    """The journal's end as it is now."""
    shown = relay.exec("journalctl", "--namespace=chatmail", "-n", "0", "--show-cursor").out
    return shown.rpartition("-- cursor: ")[2].strip()


def test_forty_first_logins_at_once_make_one_account(mail, relay, cursor):
    account = mail.new_address()
    with ThreadPoolExecutor(40) as pool:
        sessions = list(pool.map(lambda _: mail.imap(account), range(40)))
    assert all(session.noop()[0] == "OK" for session in sessions)
    for session in sessions:
        session.shutdown()
    assert journal_since(relay, cursor).count("Created address") == 1


def test_first_logins_by_smtp_and_imap_at_once_are_one_account(mail, relay, cursor):
    account = mail.new_address()
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(mail.smtp, account, port) for port in (465, 587, 443)]
        done.append(pool.submit(mail.imap, account))
        for item in done:
            item.result().noop()
    assert journal_since(relay, cursor).count("Created address") == 1


PRINTABLE = (
    "quote\"s and'more\\",
    "pässwörter-überall",
    "with spaces  ",
    "{PLAIN}x}{$6$%u%{user}",
    "ⓤⓝⓘ" * 50,
)


def test_any_printable_password_is_taken_and_is_the_only_one(mail, relay):
    accounts = [fresh(mail, password) for password in PRINTABLE]
    for account in accounts:
        plain(mail, account).logout()
    relay.exec(*DOVEADM, "auth", "cache", "flush")
    for account in accounts:
        plain(mail, account).logout()
    wrong = [Account(a.address, word) for a in accounts for word in (a.password + "x", "x" * 12)]
    assert all(REFUSED in reply for reply in refusals(mail, *wrong))


def test_a_password_that_cannot_be_kept_makes_no_account(mail, relay):
    passwords = (b"tab\tin-the-middle", b"not-utf8-\xff\xfe\x80", b"x" * 512)
    accounts = [fresh(mail, password) for password in passwords]
    assert all(REFUSED in reply for reply in refusals(mail, *accounts))
    made = relay.exec("ls", MAILBOXES).out
    assert not any(account.address in made for account in accounts)


def test_an_existing_account_may_have_control_characters_in_its_password(mail, relay):
    # Dovecot itself takes no tab and no line break
    account = fresh(mail, "bell\a and delete \x7f")
    script = "import sys, chatmaild.users as u; u.MailStore(sys.argv[1]).create(*sys.argv[2:])"
    words = ("python3", "-c", script, MAILBOXES, account.address, account.password)
    relay.exec("setpriv", "--reuid=_chatmail", "--regid=_chatmail", "--clear-groups", *words)
    plain(mail, account).logout()
    (reply,) = refusals(mail, Account(account.address, "bell\a and delete "))
    assert REFUSED in reply


def test_an_emptied_password_file_never_hands_the_address_to_a_stranger(mail, relay):
    emptied = {mail.account(): "", mail.account(): "  \n"}
    for account, content in emptied.items():
        relay.write(f"{MAILBOXES}/{account.address}/password", content)
    relay.exec(*DOVEADM, "auth", "cache", "flush")
    passwords = (mail.new_address().password, "the-password-of-a-stranger", "  ")
    tries = [Account(account.address, password) for account in emptied for password in passwords]
    assert all(REFUSED in reply for reply in refusals(mail, *tries))
    for account, content in emptied.items():
        assert relay.read(f"{MAILBOXES}/{account.address}/password") == content


def test_a_password_file_that_cannot_be_read_is_a_failure_for_now(mail, relay, cursor):
    account = mail.new_address()
    relay.exec("install", "-d", "-o", "_chatmail", f"{MAILBOXES}/{account.address}/password")
    with pytest.raises(imaplib.IMAP4.error, match="UNAVAILABLE"):
        mail.imap(account)
    logged = journal_since(relay, cursor)
    assert "imap-login" in logged
    assert account.address not in logged and mail.lab.client.ipv4 not in logged
    relay.exec("rm", "-r", f"{MAILBOXES}/{account.address}")
    mail.imap(account).logout()


def test_without_the_creation_service_existing_accounts_log_in_and_new_ones_are_told_to_wait(
    mail, relay
):
    account, later = mail.account(), mail.new_address()
    relay.exec("systemctl", "stop", *DOVEAUTH)
    try:
        relay.exec(*DOVEADM, "auth", "cache", "flush")
        mail.imap(account).logout()
        mail.smtp(account).quit()
        with pytest.raises(imaplib.IMAP4.error, match="UNAVAILABLE"):
            mail.imap(later)
    finally:
        relay.exec("systemctl", "start", *DOVEAUTH)
    mail.imap(later).logout()


def test_only_accounts_are_iterated(mail, relay):
    account = mail.account()
    half, empty = mail.new_address().address, mail.account().address
    relay.exec("install", "-d", "-o", "_chatmail", f"{MAILBOXES}/{half}")
    relay.write(f"{MAILBOXES}/{empty}/password", "")
    users = relay.exec(*DOVEADM, "user", "*").out.split()
    relay.exec("rm", "-r", f"{MAILBOXES}/{half}", f"{MAILBOXES}/{empty}")
    assert account.address in users and half not in users and empty not in users


def test_a_block_ends_sessions_and_refuses_login_sending_and_receiving(mail, relay):
    from test_mail_rules import encrypted

    blocked, other = mail.account(), mail.account()
    imap, others = mail.imap(blocked), [mail.imap(other) for _ in range(4)]
    imap.select()
    imap.send(b"X1 IDLE\r\n")
    assert imap.readline().startswith(b"+")
    smtp = mail.smtp(blocked)

    said = relay.exec("chatmail-relay", "user", "block", blocked.address).out
    assert said == f"chatmail-relay: {blocked.address} is blocked\n"

    with contextlib.suppress(ssl.SSLError):
        assert imap.readline()[:5] in (b"", b"* BYE")
    assert all(session.noop()[0] == "OK" for session in others)
    code, text = smtp.mail(blocked.address)
    assert code >= 500, text
    stranger = Account(blocked.address, "the-password-of-a-stranger")
    assert all(REFUSED in reply for reply in refusals(mail, blocked, stranger))
    with pytest.raises(smtplib.SMTPAuthenticationError):
        mail.smtp(blocked)
    with mail.smtp(None, 25) as session:
        assert mail.send(session, "x@far.example", [blocked.address], b"")[0] == 550
    with mail.smtp(other) as session:
        message = encrypted(other.address, blocked.address)
        assert mail.send(session, other.address, [blocked.address], message)[0] == 250
    bounce = wait_for(lambda: mail.received(other), 30, "a bounce")[0]
    assert b"550 5.1.1" in bounce and blocked.address.encode() in bounce
    listed = json.loads(relay.exec("chatmail-relay", "user", "list", "--json").out)
    states = {user["address"]: user["state"] for user in listed}
    assert states[blocked.address] == "blocked" and states[other.address] == "active"

    doveadm = relay.exec(*DOVEADM, "mailbox", "status", "-u", blocked.address, "messages", "INBOX")
    assert doveadm.out == "INBOX messages=0\n"

    relay.exec("chatmail-relay", "user", "unblock", blocked.address)
    assert mail.received(blocked) == []
    mail.smtp(blocked).quit()
    for session in others:
        session.logout()


def test_a_deleted_account_is_gone_with_sessions_mail_and_cached_password(mail, relay):
    account = mail.account()
    session = mail.imap(account)
    session.append("INBOX", None, None, b"Subject: x\r\n\r\nsecret\r\n")
    info = json.loads(relay.exec("chatmail-relay", "user", "info", account.address, "--json").out)
    assert info["messages"] == 1 and info["bytes"] > 10

    done = relay.exec("chatmail-relay", "user", "delete", account.address, check=False, input="y\n")
    assert done.code == 1 and session.noop()[0] == "OK"
    relay.exec("chatmail-relay", "user", "delete", account.address, input=f"{account.address}\n")

    with pytest.raises((imaplib.IMAP4.error, OSError)):
        session.noop()
    assert account.address not in relay.exec("ls", "-A", MAILBOXES, f"{MAILBOXES}/.removed").out
    assert relay.exec("chatmail-relay", "user", "info", account.address, check=False).code == 1
    with mail.smtp(None, 25) as smtp:
        assert mail.send(smtp, "x@far.example", [account.address], b"")[0] == 550
    # the address is free again, for anybody
    assert mail.received(Account(account.address, "a-password-of-another")) == []


def test_nothing_of_the_mail_store_is_written_as_root(mail, relay):
    account = mail.account().address
    relay.exec("chatmail-relay", "user", "block", account)
    relay.exec("chatmail-relay", "token", "revoke", relay_token(relay))
    found = relay.exec("find", MAILBOXES, "/var/lib/chatmail/doveauth", "!", "-user", "_chatmail")
    foreign = [line for line in found.out.splitlines() if not line.endswith("/password")]
    assert foreign == []
    assert relay.exec("stat", "-c", "%a", f"{MAILBOXES}/{account}/DISABLED").out == "600\n"


def relay_token(relay, *options):
    made = relay.exec("chatmail-relay", "token", "create", "--json", *options).out
    return json.loads(made)["token"]


def used(relay, token):
    listed = json.loads(relay.exec("chatmail-relay", "token", "list", "--json").out)
    return next(item["uses"] for item in listed if item["token"] == token)


def test_one_source_gets_so_many_addresses_an_hour_and_old_accounts_are_not_concerned(mail, relay):
    account = mail.account()
    with settings(relay, max_new_addresses_per_hour=3):
        made = mail.account()
        mail.smtp(mail.new_address(), 465).quit()
        mail.smtp(mail.new_address(), 443).quit()
        assert REFUSED in refusals(mail, mail.new_address())[0]
        with pytest.raises(smtplib.SMTPAuthenticationError):
            mail.smtp(mail.new_address())
        mail.imap(account).logout()
        mail.imap(made, 443).logout()
        assert [new(mail)[0] for _ in range(4)] == [200, 200, 200, 429]
        other = mail.new_address()
        relay.exec("python3", "-c", LOGIN, relay.address, other.address, other.password)
        ipv6 = Mail(mail.lab, relay.namespace.ipv6, DOMAIN)
        assert [new(ipv6)[0] for _ in range(4)] == [200, 200, 200, 429]
        for _ in range(3):
            ipv6.account()
        assert REFUSED in refusals(ipv6, ipv6.new_address())[0]


def test_by_invitation_only_the_invited_get_an_address(mail, relay, delta):
    account = mail.account()
    with applied(relay, "registration=token"):
        made = relay.exec("chatmail-relay", "token", "create", "--uses", "2")
        assert made.err == ""  # no warning that it is of no use
        token, code, _page = made.out.splitlines()
        wait_for(lambda: new(mail)[0] == 403, 20, "the service with the new settings")
        assert new(mail)[0] == new(mail, "?token=wrong")[0] == 403
        status, given = new(mail, f"?token={token}")
        assert status == 200 and used(relay, token) == 0
        others = (
            mail.new_address(),
            fresh(mail, given["password"]),
            Account(given["email"], "another-password"),
        )
        assert all(REFUSED in reply for reply in refusals(mail, *others))
        plain(mail, Account(given["email"], given["password"])).logout()
        assert used(relay, token) == 1
        mail.imap(account).logout()

        # the real client keeps the token, and shows its user why there is nothing more
        client = delta.add_account()
        client.add_transport_from_qr(code)
        assert client.get_config("configured_addr").endswith(f"@{DOMAIN}")
        assert used(relay, token) == 2
        with pytest.raises(JsonRpcError, match="this invitation has been used up"):
            delta.add_account().add_transport_from_qr(code)
        relay.exec("chatmail-relay", "token", "revoke", token)


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("registration", "closed", "this relay does not take new accounts at the moment"),
        ("min_available_memory", "9999G", "this relay is too busy for new accounts, try later"),
    ],
)
def test_a_closed_or_busy_relay_takes_nobody_new(mail, relay, setting, value, reason):
    account = mail.account()
    with settings(relay, **{setting: value}):
        assert new(mail) == (503, {"reason": reason})
        assert REFUSED in refusals(mail, mail.new_address())[0]
        mail.imap(account).logout()


def test_new_and_refused_addresses_are_counted_and_the_service_stays_small(mail, relay):
    mail.account()
    assert REFUSED in refusals(mail, fresh(mail, "short"))[0]
    told = relay.exec("python3", "-c", READ).out
    assert re.search(r"^chatmail_accounts_created_total [1-9]", told, re.M)
    assert re.search(r'^chatmail_accounts_refused_total{reason="password"} [1-9]', told, re.M)
    size = relay.memory()["chatmail-doveauth.service"]
    measured["memory of chatmail-doveauth after the tests of accounts"] = f"{size:.0f} MB"
    assert size < 40
