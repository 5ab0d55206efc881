# SPDX-License-Identifier: MIT
"""A relay without a name: an IPv4 address in place of the mail domain, and mail with one that has a name."""

import http.client
import json
import re
import smtplib
import ssl

import pytest
from conftest import DOMAIN, measured, new_account
from cryptography import x509
from lab.mail import Mail, context
from lab.messages import encrypted
from lab.shell import wait_for
from test_mail_rules import wait_received


@pytest.fixture(scope="module")
def host(ip_relay):
    return ip_relay.address


@pytest.fixture(scope="module")
def ip_mail(lab, ip_relay):
    """Raw SMTP and IMAP to the relay without a name."""
    return Mail(lab, ip_relay.address, f"[{ip_relay.address}]")


def web(lab, host, method, path):
    with lab.at_client():
        connection = http.client.HTTPSConnection(host, context=context("http/1.1"), timeout=30)
        connection.connect()
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_a_preseeded_address_makes_a_relay_that_is_well(ip_relay, host):
    for command in ("status", "check"):
        done = ip_relay.exec("chatmail-relay", command, "--json", check=False)
        assert [item for item in json.loads(done.out) if not item["well"]] == []
        assert done.code == 0
    assert ip_relay.exec("chatmail-relay", "get", "mail_domain").out == f"[{host}]\n"
    assert ip_relay.exec("chatmail-relay", "get", "tls").out == "self\n"
    assert ip_relay.exec("chatmail-relay", "dns").out.endswith("it needs no DNS.\n")
    assert ip_relay.exec("chatmail-relay", "apply").out == "chatmail-relay: nothing to change\n"


def test_the_certificate_names_the_address(lab, host):
    with lab.at_client():
        der = ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate((host, 993)))
    names = x509.load_der_x509_certificate(der).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert list(map(str, names.value.get_values_for_type(x509.IPAddress))) == [host]
    assert names.value.get_values_for_type(x509.DNSName) == []


def fresh(lab, host):
    """The code of a new account, as the web page gives it."""
    status, text = web(lab, host, "POST", "/new")
    assert status == 200, text
    return json.loads(text)


def test_the_web_site_gives_codes_that_hold_everything(lab, ip_relay, host):
    account = fresh(lab, host)
    assert re.fullmatch(rf"[a-z0-9]{{9}}@\[{re.escape(host)}\]", account["email"])
    assert account["dclogin_url"].endswith(f"&v=1&ih={host}&sh={host}&ic=3")
    status, page = web(lab, host, "GET", "/invite")
    assert status == 200 and "dclogin:" in page and "<svg" in page
    status, page = web(lab, host, "GET", "/")
    assert status == 200 and host in page and "dcaccount:" not in page
    status, xml = web(lab, host, "GET", "/.well-known/autoconfig/mail/config-v1.1.xml")
    assert status == 200 and xml.count(f"<hostname>{host}</hostname>") == 6


def test_the_mailbox_is_below_the_bare_address(ip_relay, ip_mail, host):
    account = ip_mail.account()
    ip_relay.exec("test", "-s", f"/var/lib/chatmail/mail/{host}/{account.address}/password")
    listed = ip_relay.exec("chatmail-relay", "user", "info", account.address).out
    assert account.address in listed
    ip_relay.exec("chatmail-relay", "user", "delete", "--yes", account.address)


# --- real clients -----------------------------------------------------------------------------------


def client(delta, lab, host, name):
    """A real client with an account of the relay without a name."""
    account = delta.add_account()
    account.set_config("displayname", name)
    account.set_config("bot", "1")
    account.add_transport_from_qr(fresh(lab, host)["dclogin_url"])
    account.bring_online()
    return account


def exchange(one, other):
    """Get to know each other by SecureJoin, and a message each way."""
    chat = other.secure_join(one.get_qr_code())
    other.wait_for_securejoin_joiner_success()
    chat.send_text("hello one")
    assert one.wait_for_incoming_msg().get_snapshot().text == "hello one"
    one.create_chat(other).send_text("hello other")
    message = other.wait_for_incoming_msg().get_snapshot()
    assert message.text == "hello other" and message.show_padlock


def test_two_real_clients_talk(delta, lab, host):
    exchange(client(delta, lab, host, "alice"), client(delta, lab, host, "bob"))


@pytest.fixture(scope="module")
def published(lab, relay):
    """The named relay's DKIM key in the lab's DNS, as its own command says."""
    zone = relay.exec("chatmail-relay", "dns", "--zone").out
    name, text = re.search(r"^(\S+_domainkey\S+)\.\s.*TXT\s+(.*)$", zone, re.M).groups()
    lab.dns.set(name, "TXT", text)


def test_real_clients_talk_across_relays_with_and_without_a_name(delta, lab, host, published):
    exchange(client(delta, lab, host, "carol"), new_account(delta, "dora"))


# --- mail -------------------------------------------------------------------------------------------


def send(mail, sender, recipient):
    """One message over submission; its Message-ID."""
    text = encrypted(sender.address, recipient.address)
    with mail.smtp(sender) as session:
        assert mail.send(session, sender.address, [recipient.address], text)[0] == 250
    return re.search(rb"Message-ID: (<.*>)", text)[1]


def test_mail_goes_both_ways_without_a_signature_one_way(ip_mail, mail, published):
    here, there = ip_mail.account(), mail.account()
    wait_received(mail, there, send(ip_mail, here, there))
    got = wait_received(ip_mail, here, send(mail, there, here))
    assert b"Received:" not in got and b"DKIM-Signature" not in got


def test_a_sender_without_a_name_must_come_from_its_address(lab, ip_mail, mail, host):
    """The lab's client is neither relay."""
    for target, account in ((mail, mail.account()), (ip_mail, ip_mail.account())):
        for literal in (host, "10.77.0.99"):
            sender = f"x@[{literal}]"
            with target.smtp(None, 25) as session:
                reply = target.send(
                    session, sender, [account.address], encrypted(sender, account.address)
                )
            assert reply == (554, "5.7.1 From is an address literal of another host")
    sender = f"x@[{lab.client.ipv4}]"
    with mail.smtp(None, 25) as session:
        account = mail.account()
        message = encrypted(sender, account.address)
        assert mail.send(session, sender, [account.address], message)[0] == 250


def test_port_25_takes_mail_for_this_address_only(ip_mail, host):
    """Postfix counts every address of the host, and its names, as its own."""
    with ip_mail.smtp(None, 25) as session:
        for domain in ("[127.0.0.1]", "[10.77.0.99]", "elsewhere.example", "localhost", "ip"):
            code, _text = ip_mail.send(session, "x@far.example", [f"root@{domain}"], b"")
            assert code in (550, 554), domain
        code, text = ip_mail.send(session, "x@far.example", [f"nobody12@[{host}]"], b"")
    assert (code, text[:5]) == (550, "5.1.1")


def test_an_unknown_recipient_is_bounced_to_the_submitter(ip_mail, host):
    sender, nobody = ip_mail.account(), ip_mail.new_address()
    send(ip_mail, sender, nobody)
    bounce = wait_received(ip_mail, sender, nobody.address.encode())
    assert re.search(rb"^From: .*MAILER-DAEMON@\[" + host.encode(), bounce, re.M | re.I)


def test_mail_of_the_host_itself_stays_local(ip_relay):
    ip_relay.exec("useradd", "--create-home", "operator1")
    ip_relay.exec("sendmail", "operator1", input="Subject: cron\n\nlocal\n")
    wait_for(lambda: "Subject: cron" in ip_relay.sh("cat /var/mail/operator1 || true").out, 20)


def test_the_login_is_the_sender(ip_mail):
    account = ip_mail.account()
    with ip_mail.smtp(account) as session:
        code, _text = ip_mail.send(session, "other@[10.77.0.99]", [account.address], b"")
    assert code == 553
    other = ip_mail.new_address()
    with pytest.raises(smtplib.SMTPAuthenticationError):
        ip_mail.smtp(type(other)(other.address.replace("[10.", "[11."), other.password))


def test_both_relays_pass_the_self_test_with_each_other(relay, ip_relay, host, published):
    for here, other in ((relay, host), (ip_relay, DOMAIN)):
        done = here.exec("chatmail-relay", "test", "--json", other, check=False, timeout=180)
        found = {item["what"]: item for item in json.loads(done.out)}
        assert [name for name, item in found.items() if not item["well"]] == []
        there = found[f"delivery to {other if here is ip_relay else f'[{host}]'}"]["seconds"]
        back = found[f"delivery from {other if here is ip_relay else f'[{host}]'}"]["seconds"]
        measured[f"250 to notification, {here.name} to {other} and back"] = (
            f"{there:.2f} s, {back:.2f} s"
        )
