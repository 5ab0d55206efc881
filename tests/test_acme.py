# SPDX-License-Identifier: MIT
"""The certificate by ACME in the test internet: from the installation on, and whatever goes wrong."""

import json
import socket
import ssl
import time

import pytest
from conftest import measured
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from lab.inet import NEW_ORDER
from lab.mail import Mail, context
from lab.shell import wait_for
from lab.terminal import terminal

DOMAIN = "gamma.example"
TLS_PORTS = (465, 993, 443)
STARTTLS_PORTS = (25, 587, 143)
UNIT = "chatmail-acme@{}.service"
SPKI = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
GOES_LIVE = 20  # seconds from the certificate on disk to all daemons
DOVECOTS_PATIENCE = 10  # seconds: silent for longer, a session is one that a reload may end


class Relay:
    """The relay under test, as its operator and its clients see it."""

    def __init__(self, lab, internet, host):
        self.lab, self.internet, self.host = lab, internet, host
        self.mail = Mail(lab, host.address, DOMAIN)

    def findings(self):
        done = self.host.exec("chatmail-relay", "status", "--json", check=False)
        return {item["what"]: item for item in json.loads(done.out)}

    def look(self, how="now"):
        """One look of the unit; returns status' line about it."""
        self.host.exec("systemctl", "start", UNIT.format(how), timeout=120)
        return self.findings()["acme"]

    def certificate(self, port):
        """What is served on a port."""
        with self.lab.at_client(), socket.create_connection((self.host.address, port), 10) as plain:
            if port in STARTTLS_PORTS:
                self._starttls(plain, port)
            with context().wrap_socket(plain, server_hostname=DOMAIN) as secured:
                return x509.load_der_x509_certificate(secured.getpeercert(binary_form=True))

    @staticmethod
    def _starttls(plain, port):
        file = plain.makefile("rwb", buffering=0)
        say = [b"a STARTTLS\r\n"] if port == 143 else [b"EHLO client\r\n", b"STARTTLS\r\n"]
        file.readline()
        for line in say:
            file.write(line)
            while file.readline()[3:4] == b"-":
                pass

    def served(self):
        """The same certificate on every port, or an AssertionError."""
        found = {port: self.certificate(port) for port in (*TLS_PORTS, *STARTTLS_PORTS)}
        assert len(set(found.values())) == 1, {p: c.issuer for p, c in found.items()}
        return found[993]

    def wait_new(self, old):
        """Until another certificate than *old* is served everywhere; returns it."""

        def new():
            now = self.served()
            assert now != old
            return now

        return wait_for(new, GOES_LIVE, "a new certificate on all ports")

    def settings(self, *words):
        self.host.exec("chatmail-relay", "set", *words)
        self.host.exec("chatmail-relay", "apply", timeout=120)


def names(certificate):
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return set(extension.value.get_values_for_type(x509.DNSName))


def issuer(certificate):
    return certificate.issuer.rfc4514_string()


def spki(certificate):
    return certificate.public_key().public_bytes(*SPKI)


@pytest.fixture(scope="module")
def relay(lab, internet):
    """A relay with an ordinary name, installed while the DNS knows nothing of it."""
    host = internet.relay_host("gamma", 53)
    host.install_relay(DOMAIN, internet.ANSWERS)
    made = Relay(lab, internet, host)
    yield made
    lab.remove(host)


@pytest.fixture(scope="module")
def certified(relay):
    """The same relay with a certificate of the authority."""
    relay.internet.publish(DOMAIN, relay.host)
    if not relay.look()["well"]:
        raise AssertionError(relay.findings()["acme"])
    wait_for(lambda: "Pebble" in issuer(relay.served()), GOES_LIVE, "the authority's certificate")
    return relay


def test_before_the_dns_is_right_a_temporary_certificate_is_served_and_status_says_why(relay):
    found = relay.look()
    assert not found["well"]
    assert found["detail"] == f"{DOMAIN} has no address in the DNS"
    assert "chatmail-relay dns" in found["remedy"]
    assert "temporary self-signed" in relay.findings()["certificate"]["detail"]
    assert issuer(relay.served()) == f"CN={DOMAIN}"
    relay.mail.account()
    # all else is well
    bad = {name for name, item in relay.findings().items() if not item["well"]}
    assert bad == {"acme", "certificate"}


def test_a_name_that_points_to_another_machine_is_told_and_the_authority_not_asked(relay):
    relay.internet.set(DOMAIN, "A", relay.internet.host.address)
    began = time.time()
    found = relay.look()
    assert relay.internet.host.address in found["detail"] and not found["well"]
    relay.internet.unset(DOMAIN, "A")
    asked = relay.internet.host.journal("", "-u", "pebble", f"--since=@{began:.6f}")
    assert NEW_ORDER not in asked and "order" not in asked.lower()


def test_the_timer_finds_the_dns_right_and_the_certificate_goes_live_under_open_sessions(relay):
    account = relay.mail.account()
    sessions = [relay.mail.imap(account, port) for port in (993, 143, 443)]
    for session in sessions:
        session.select("INBOX")
    began = time.time()
    old = relay.served()
    relay.internet.publish(DOMAIN, relay.host, "www")
    begin = time.monotonic()
    relay.host.exec("systemctl", "restart", "chatmail-acme.timer")  # as after an apply
    wait_for(lambda: relay.findings()["acme"]["well"], 60, "the timer's look")
    new = relay.wait_new(old)
    measured["ACME: DNS right to certificate on six ports"] = f"{time.monotonic() - begin:.1f} s"
    silent = time.monotonic() - begin
    assert silent > DOVECOTS_PATIENCE
    assert "Pebble" in issuer(new) and names(new) == {DOMAIN, f"www.{DOMAIN}"}
    assert new.public_key().curve.name == "secp256r1"
    for session in sessions:
        assert session.noop()[0] == "OK"
        session.logout()
    said = relay.host.journal("chatmail", "-u", UNIT.format("*"), f"--since=@{began:.6f}")
    assert "terms of service, which you agreed to: data:text/plain,Do%20what" in said
    assert relay.findings()["certificate"]["well"]
    done = relay.host.exec("chatmail-relay", "status", check=False)
    assert done.ok, done.out


def test_clients_verify_the_certificate_and_its_chain(certified):
    trusting = ssl.create_default_context(cadata=certified.internet.acme_root)
    for name in (DOMAIN, f"www.{DOMAIN}"):
        with certified.lab.at_client():
            plain = socket.create_connection((certified.host.address, 443), 10)
        with trusting.wrap_socket(plain, server_hostname=name) as secured:
            assert secured.version() == "TLSv1.3"


def test_names_follow_the_dns(certified):
    internet = certified.internet
    internet.publish(DOMAIN, certified.host, "www")
    certified.look()
    old = wait_for(lambda: certified.served(), GOES_LIVE, "one certificate")
    internet.set(f"mta-sts.{DOMAIN}", "CNAME", f"{DOMAIN}.")
    internet.set(f"www.{DOMAIN}", "A", internet.host.address)
    assert certified.look()["well"]
    new = certified.wait_new(old)
    assert names(new) == {DOMAIN, f"mta-sts.{DOMAIN}"}
    assert certified.findings()["acme"]["detail"].endswith(f"{DOMAIN}, mta-sts.{DOMAIN}")


def test_a_renewal_goes_live_with_the_same_key(certified):
    account = certified.mail.account()
    session = certified.mail.imap(account, 143)
    old = certified.served()
    begin = time.monotonic()
    assert certified.look("renew")["well"]
    new = certified.wait_new(old)
    measured["ACME: renewal to certificate on six ports"] = f"{time.monotonic() - begin:.1f} s"
    assert new.serial_number != old.serial_number
    assert spki(new) == spki(old)
    measured["ACME: key after a renewal"] = "the same"
    assert session.noop()[0] == "OK"
    session.logout()


def test_a_renewal_that_systemd_missed_goes_live(certified):
    old = certified.served()
    certified.host.exec("systemctl", "stop", "chatmail-certificate.path")
    try:
        assert certified.look("renew")["well"]
        assert certified.wait_new(old).serial_number != old.serial_number
    finally:
        certified.host.exec("systemctl", "start", "chatmail-certificate.path")


def test_looks_at_the_same_time_wait_for_each_other(certified):
    """As when an operator asks while the timer does."""
    units = [UNIT.format(how) for how in ("now", "renew", "timer")]
    certified.host.exec("systemctl", "start", *units, timeout=120)
    shown = certified.host.exec("systemctl", "show", "-P", "Result", *units).out.split()
    assert shown == ["success"] * len(units)
    assert certified.findings()["acme"]["well"]
    assert not certified.host.sh("ls -d /run/chatmail-acme* 2>/dev/null || true").out
    last = certified.host.read(f"/var/lib/acme/live/{DOMAIN}/cert").encode()
    new = x509.load_pem_x509_certificate(last)
    wait_for(lambda: certified.served() == new, GOES_LIVE, "the last certificate on all ports")


@pytest.mark.parametrize(("kind", "other"), [("AAAA", "A"), ("A", "AAAA")])
def test_addresses_of_one_kind_suffice(certified, kind, other):
    """So the authority asks there, too."""
    old = certified.served()
    certified.internet.unset(DOMAIN, other)
    try:
        found = certified.look("renew")
    finally:
        certified.internet.publish(DOMAIN, certified.host)
    assert found["well"], found
    assert certified.wait_new(old).serial_number != old.serial_number


@pytest.mark.parametrize(
    ("status", "error", "detail", "remedy"),
    [
        (429, "rateLimited", "too many certificates already issued", "wait"),
        (
            403,
            "unauthorized",
            'Account is not valid, has status "revoked"',
            "/var/lib/acme/accounts/",
        ),
        (503, "serverInternal", "The service is down for maintenance", "tried again"),
    ],
)
def test_what_the_authority_refuses_is_told_and_the_old_certificate_stays(
    certified, status, error, detail, remedy
):
    internet = certified.internet
    old = certified.served()
    internet.unset(f"www.{DOMAIN}", "A")
    internet.set(f"www.{DOMAIN}", "CNAME", f"{DOMAIN}.")
    with internet.authority_says(NEW_ORDER, status, error, detail):
        found = certified.look()
    assert not found["well"] and detail in found["detail"] and remedy in found["remedy"]
    assert "tried again 20" in found["detail"]
    assert certified.served() == old and certified.findings()["certificate"]["well"]


def test_an_authority_that_is_down_is_told_and_the_old_certificate_stays(certified):
    old = certified.served()
    with certified.internet.authority_down():
        found = certified.look()
    assert not found["well"] and "cannot be reached" in found["detail"]
    assert "Connection refused" in found["detail"]
    assert certified.served() == old


def test_when_the_authority_answers_again_so_does_the_relay(certified):
    old = certified.served()
    assert certified.look()["well"]
    assert f"www.{DOMAIN}" in names(certified.wait_new(old))


def test_an_authority_that_forgot_the_account_gets_a_new_registration(certified):
    old = certified.served()
    certified.internet.restart_authority()
    assert certified.look("renew")["well"]
    assert issuer(certified.wait_new(old)) != issuer(old)


def test_another_way_to_a_certificate_and_back_is_a_reload(certified):
    """By set and apply; the administrator's own files are watched."""
    host = certified.host
    account = certified.mail.account()
    sessions = [certified.mail.imap(account, port) for port in (993, 143)]
    acme = certified.served()

    certified.settings("tls=self")
    assert issuer(certified.wait_new(acme)) == f"CN={DOMAIN}"
    assert "acme" not in certified.findings()

    first, second = (certified.internet.authority.issue(DOMAIN) for _ in range(2))
    host.write("/etc/mine/chain.pem", first.chain)
    host.write("/etc/mine/key.pem", first.key, 0o600)
    mine = "tls_external_cert_and_key=/etc/mine/chain.pem /etc/mine/key.pem"
    own = certified.served()
    certified.settings("tls=external", mine)
    old = certified.wait_new(own)
    assert issuer(old) == "CN=Lab Web CA"

    # the chain alone does not fit the key: nothing changes until both are there
    host.write("/etc/mine/chain.pem", second.chain)
    wait_for(lambda: "new certificate" in certified.findings(), 10, "status")
    assert certified.served() == old
    host.write("/etc/mine/key.pem", second.key, 0o600)
    assert spki(certified.wait_new(old)) != spki(old)
    assert host.exec("chatmail-relay", "status", check=False).ok

    # files that are links, as of many ACME clients
    host.sh("cd /etc/mine && mkdir a && mv *.pem a/ && ln -s a now && ln -s now/*.pem .")
    host.write("/etc/mine/b/chain.pem", first.chain)
    host.write("/etc/mine/b/key.pem", first.key, 0o600)
    host.sh("cd /etc/mine && ln -s b new && mv -T new now")
    assert certified.wait_new(_loaded(second)) == old

    certified.settings("tls=acme")
    assert certified.wait_new(old) == acme
    for session in sessions:
        assert session.noop()[0] == "OK"
        session.logout()


def _loaded(pair):
    return x509.load_pem_x509_certificate(pair.chain.encode())


def test_dpkg_reconfigure_asks_for_the_way_and_the_agreement(certified):
    host = certified.host
    acme = certified.served()
    with terminal(host, "dpkg-reconfigure", "chatmail-relay") as screen:
        screen.expect(r"Mail domain of this chatmail relay: ")
        screen.type(DOMAIN)
        screen.expect(
            r"1\. certificate authority \(ACME\) +2\. existing certificate +3\. self-signed"
        )
        screen.expect(r"Certificate of this chatmail relay: ")
        screen.type("3")
        screen.expect(r"Mail address of the operator: ")
        screen.type("")
        screen.expect(r"Delete mailboxes and keys when the package is purged\? \[yes/no\] ")
        screen.type("no")
        status, text = screen.finish()
    assert status == 0, text
    assert issuer(certified.wait_new(acme)) == f"CN={DOMAIN}"
    with terminal(host, "dpkg-reconfigure", "chatmail-relay") as screen:
        screen.expect(r"Mail domain of this chatmail relay: ")
        screen.type(DOMAIN)
        screen.expect(r"Certificate of this chatmail relay: ")
        screen.type("1")
        screen.expect(r"Do you agree to the terms of the certificate authority\? \[yes/no\] ")
        screen.type("no")
        screen.expect(r"Mail address for the certificate authority: ")
        screen.type("")
        screen.expect(r"Mail address of the operator: ")
        screen.type("")
        screen.expect(r"Delete mailboxes and keys when the package is purged\? \[yes/no\] ")
        screen.type("no")
        status, text = screen.finish()
    assert status == 0, text
    assert host.exec("chatmail-relay", "get", "acme_agreement").out == "false\n"
    wait_for(lambda: certified.served() == acme, GOES_LIVE, "the authority's certificate")
    assert "have not agreed" in certified.look()["detail"]
    certified.settings("acme_agreement=true")
    assert certified.look()["well"]


def test_the_units_run_with_least_privilege(certified):
    for unit in (UNIT.format("now"), "chatmail-certificate.service"):
        asked = ("systemd-analyze", "security", "--threshold=25", "--no-pager", unit)
        done = certified.host.exec(*asked, check=False)
        assert done.ok, done.out.strip().splitlines()[-1]


def test_debians_own_timer_is_left_alone_and_no_file_of_another_package_changed(certified):
    host = certified.host
    shown = host.exec("systemctl", "is-enabled", "acmetool.timer", check=False).out
    assert shown == "disabled\n"
    changed = {line.split()[-1] for line in host.exec("dpkg", "--verify").out.splitlines()}
    assert changed == {"/usr/share/dns/root.key", "/usr/share/dns/root.hints"}  # the lab's


def test_purge_takes_what_was_the_relays_and_leaves_what_an_administrator_has(certified):
    """Runs last here: acmetool stays installed, with a target and a certificate of its own."""
    host = certified.host
    host.sh(
        "cd /var/lib/acme && echo 'satisfy: {names: [shop.example]}' >desired/shop.example && "
        "mkdir -p keys/shop certs/shop && touch keys/shop/privkey certs/shop/cert && "
        "ln -s ../../keys/shop/privkey certs/shop/privkey && ln -s ../certs/shop live/shop.example"
    )
    host.sh("apt-get purge -q --yes 'chatmail-*' python3-chatmaild", timeout=120)
    left = host.sh("cd /var/lib/acme && find desired live keys -mindepth 1 -maxdepth 1 | sort").out
    assert left.split() == ["desired/shop.example", "keys/shop", "live/shop.example"]
    assert host.exec("find", "/etc/systemd/system", "-name", "chatmail*").out == ""
    assert not host.exec("test", "-e", "/var/lib/chatmail/acme", check=False).ok
    host.sh(
        "cd /var/lib/acme && rm desired/* live/* && apt-get purge -q --yes acmetool", timeout=60
    )
    assert not host.exec("test", "-e", "/var/lib/acme", check=False).ok
