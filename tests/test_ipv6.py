# SPDX-License-Identifier: MIT
"""Every port over IPv6, which the other tests leave out; relays with only one of the two."""

import http.client
import json
import re
import uuid

import pytest
from conftest import DOMAIN, HEALTHY_SECONDS
from lab.lab import UNBOUND
from lab.mail import Mail
from lab.messages import encrypted
from lab.shell import run, wait_for
from test_selftest import bad, findings


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


# --- relays with one of the two -----------------------------------------------------------------------


def install(lab, host, domain):
    """Install, and publish the key for DKIM as the relay's own command says."""
    host.install_relay(domain)
    wait_for(
        lambda: host.exec("chatmail-relay", "status", check=False).ok, HEALTHY_SECONDS, "status"
    )
    host.exec("chatmail-relay", "set", "max_load_1m=1000")
    host.exec("chatmail-relay", "apply", timeout=120)
    publish_key(lab, host)


def publish_key(lab, host):
    zone = host.exec("chatmail-relay", "dns", "--zone").out
    name, text = re.search(r"^(\S+_domainkey\S+)\.\s.*TXT\s+(.*)$", zone, re.M).groups()
    lab.dns.set(name, "TXT", text)


def listeners(host, family):
    """Ports on which something listens for others, over IPv4 ("4") or IPv6 ("6")."""
    shown = host.exec("ss", f"-{family}", "-H", "-l", "-n", "-t", "-u").out
    found = [line.split()[4].rpartition(":") for line in shown.splitlines()]
    local = re.compile(r"127\.|\[::1\]|\[::ffff:127\.")
    return {int(port) for address, _colon, port in found if not local.match(address)}


PORTS = {25, 80, 143, 443, 465, 587, 993, 3478}


@pytest.fixture(scope="module")
def six(lab):
    """A relay that has no IPv4 but loopback's, when it is installed and ever after."""
    host = lab.host("six", 22)
    run(["ip", "-n", host.namespace.name, "-4", "addr", "flush", "dev", "host0"])
    host.write("/etc/unbound/unbound.conf.d/lab.conf", UNBOUND.format(address=lab.dns.address6))
    lab.dns.set("_six.example", "AAAA", host.namespace.ipv6)
    install(lab, host, "_six.example")
    yield host
    lab.remove(host)


@pytest.fixture(scope="module")
def four(lab):
    """A relay whose kernel has IPv6 switched off."""
    host = lab.host("four", 23)
    for scope in ("all", "default"):
        setting = f"net.ipv6.conf.{scope}.disable_ipv6=1"
        run(["ip", "netns", "exec", host.namespace.name, "sysctl", "-q", "-w", setting])
    lab.dns.set("_four.example", "A", host.address)
    install(lab, host, "_four.example")
    yield host
    lab.remove(host)


def well(host):
    for command in ("status", "check"):
        done = host.exec("chatmail-relay", command, "--json", check=False)
        assert [item for item in json.loads(done.out) if not item["well"]] == []


def test_with_ipv6_only_everything_works(six):
    well(six)
    assert listeners(six, 6) >= PORTS
    _status, found = findings(six)
    assert bad(found) == set()
    assert found["name _six.example"]["detail"] == six.namespace.ipv6


def test_with_ipv6_only_mail_goes_both_ways(lab, relay, six):
    publish_key(lab, relay)
    lab.dns.set(DOMAIN, "AAAA", relay.namespace.ipv6)
    try:
        _status, found = findings(six, DOMAIN)
    finally:
        lab.dns.set(DOMAIN, "AAAA")
    assert bad(found) == set()
    assert found[f"delivery to {DOMAIN}"]["seconds"] and found[f"delivery from {DOMAIN}"]["seconds"]


def test_with_ipv6_switched_off_in_the_kernel_everything_works(four):
    well(four)
    assert listeners(four, 4) >= PORTS and listeners(four, 6) & (PORTS - {80}) == set()
    _status, found = findings(four)
    assert bad(found) == set()


def test_a_relay_without_ipv6_and_one_with_both_exchange_mail(lab, relay, four):
    publish_key(lab, relay)
    _status, found = findings(four, DOMAIN)
    assert bad(found) == set()


def test_the_setting_disables_it_for_every_daemon_and_back(relay):
    def apply(value):
        relay.exec("chatmail-relay", "set", f"disable_ipv6={value}")
        relay.exec("chatmail-relay", "apply", timeout=120)
        wait_for(lambda: relay.exec("chatmail-relay", "status", check=False).ok, 60, "status")

    apply("true")
    try:
        assert listeners(relay, 6) & (PORTS - {80}) == set()  # 80: Debian's own site is there, too
        assert listeners(relay, 4) >= PORTS
        well(relay)
    finally:
        apply("false")
    assert listeners(relay, 6) >= PORTS
