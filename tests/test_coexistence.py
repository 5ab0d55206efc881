# SPDX-License-Identifier: MIT
"""A machine that already does other things: a web site, local mail by exim, rsyslog, firewalls, resolvers."""

import re
import socket
import textwrap

import pytest
from chatmail_build import paths
from lab import image
from lab.mail import Mail
from lab.messages import encrypted
from lab.network import inside
from lab.shell import CommandFailed, wait_for

DOMAIN = "_kept.example"
OTHERS = ("exim4-daemon-light", "nginx", "rsyslog", "systemd-resolved", "bsd-mailx")
#: Not from the beginning: firewalls, and what takes the place of systemd-resolved.
LATER = ("nftables", "ufw", "resolvconf")
#: A site of the administrator's; at first it has 443 as well.
SITE = """\
server {
    listen 80;
    listen [::]:80;
    LISTEN
    server_name other.example;
    ssl_certificate /etc/ssl/other.pem;
    ssl_certificate_key /etc/ssl/other.key;
    location / { return 200 "the other site\\n"; }
}
"""
GET = (
    "import urllib.request as r;"
    "print(r.urlopen(r.Request('http://127.0.0.1/', headers={'Host': 'other.example'})).read())"
)


def well(host):
    """Until the relay says so."""

    def status():
        done = host.exec("chatmail-relay", "status", check=False)
        assert done.ok, done.out
        return True

    wait_for(status, 60, "status")


class Machine:
    def __init__(self, host):
        self.host = host

    def site(self, listen):
        self.host.write("/etc/nginx/sites-enabled/other", SITE.replace("LISTEN", listen))
        self.host.exec("systemctl", "restart", "nginx")

    def the_other_site_is_there(self):
        return "the other site" in self.host.exec("python3", "-c", GET).out

    def local_mail(self, word):
        """Mail of a local user to another, as cron sends it."""
        self.host.sh(f"echo {word} | runuser -u max -- mail -s {word} lena")
        box = "/var/mail/lena"
        wait_for(lambda: word in self.host.exec("cat", box, check=False).out, 20, "local mail")

    def settings(self):
        """Of daemons that were there before us."""
        shown = "cat /etc/nginx/sites-enabled/* /etc/rsyslog.conf; readlink -f /etc/resolv.conf"
        return self.host.sh(shown).out


@pytest.fixture(scope="module")
def machine(lab):
    image.download(lab.tree, *OTHERS, relay=False)
    for package in LATER:
        image.download(lab.tree, package, relay=False)
    host = lab.host("kept", 14, names=(DOMAIN, f"www.{DOMAIN}"))
    host.sh(
        f"apt-get install -qq --yes --no-install-recommends {' '.join(OTHERS)} openssl >/dev/null"
        " && useradd --create-home lena && useradd --create-home max"
        " && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 9"
        " -subj /CN=other.example -keyout /etc/ssl/other.key -out /etc/ssl/other.pem 2>/dev/null",
        timeout=180,
    )
    made = Machine(host)
    made.site("listen 443 ssl;")
    made.local_mail("before")
    made.before = made.settings()
    yield made
    lab.remove(host)


def test_a_port_that_another_site_has_is_named_with_the_remedy_and_nothing_is_changed(machine):
    """The installation stops there, and goes on when asked again."""
    host = machine.host
    with pytest.raises(CommandFailed, match=r"port 443 .* in use by nginx\.service: .*then run "):
        host.install_relay(DOMAIN)
    assert not host.exec("test", "-e", "/etc/chatmail/front/nginx.conf", check=False).ok
    assert machine.the_other_site_is_there()
    machine.local_mail("refused")


@pytest.fixture(scope="module")
def installed(machine):
    """The other site has left 443 to the relay."""
    machine.site("")
    machine.host.exec("dpkg", "--configure", "--pending", timeout=180)
    return machine


def test_the_relay_works_beside_the_others(installed, lab):
    host = installed.host
    well(host)
    host.exec("chatmail-relay", "set", "max_load_1m=1000")
    host.exec("chatmail-relay", "apply", timeout=120)
    via = Mail(lab, host.address, DOMAIN)
    alice, bob = via.account(), via.account()
    with via.smtp(alice) as session:
        text = encrypted(alice.address, bob.address)
        assert via.send(session, alice.address, [bob.address], text)[0] == 250
    wait_for(lambda: via.received(bob), 20, "the message")
    assert installed.the_other_site_is_there()
    installed.local_mail("during")
    assert host.exec("dpkg", "--verify").out == ""
    # rsyslog writes what the host's own journal has
    logged = host.exec("grep", "-rlE", f"@{DOMAIN}", "/var/log", check=False)
    assert logged.out == "" and host.exec("test", "-s", "/var/log/syslog").ok


def advice(begin):
    """A block of commands or rules from the page for operators, found by how it begins."""
    page = (paths.ROOT / "docs/install.md").read_text()
    blocks = re.findall(r"(?m)(?:^    .*\n)+", page)
    (found,) = [text for text in map(textwrap.dedent, blocks) if text.startswith(begin)]
    return found


def everything_goes_through(lab, host):
    """All ports of a client, and a message; what is nobody's business stays closed."""
    via = Mail(lab, host.address, DOMAIN)
    alice, bob = via.account(), via.account()
    for port in (143, 443):
        via.imap(alice, port).logout()
    for port in (465, 587, 443):
        via.smtp(alice, port).quit()
    via.smtp(None, 25).quit()
    with via.smtp(alice) as session:
        text = encrypted(alice.address, bob.address)
        assert via.send(session, alice.address, [bob.address], text)[0] == 250
    wait_for(lambda: via.received(bob), 20, "the message")
    with lab.at_client(), socket.create_connection((host.address, 80), 5):
        pass
    assert not reaches(lab, host, 4000)


def reaches(lab, host, port):
    """Whether a client can connect to what listens there."""
    with inside(host.namespace), socket.create_server(("0.0.0.0", port)), lab.at_client():
        try:
            socket.create_connection((host.address, port), 1).close()
        except OSError:
            return False
    return True


def test_behind_nftables_as_the_page_says(installed, lab):
    host = installed.host
    assert reaches(lab, host, 4000)
    host.sh("apt-get install -qq --yes --no-install-recommends nftables >/dev/null", timeout=120)
    host.write("/etc/nftables.conf", advice("table inet firewall"))
    host.exec("systemctl", "start", "nftables")
    try:
        everything_goes_through(lab, host)
        well(host)
    finally:
        host.exec("systemctl", "stop", "nftables")


def test_behind_ufw_as_the_page_says(installed, lab):
    host = installed.host
    host.sh("apt-get install -qq --yes --no-install-recommends ufw >/dev/null", timeout=120)
    host.sh(advice("ufw allow").replace("ufw enable", "ufw --force enable"))
    try:
        everything_goes_through(lab, host)
        well(host)
    finally:
        host.exec("ufw", "--force", "disable")


def test_after_the_removal_the_others_are_as_before_and_mail_and_keys_are_kept(installed):
    host = installed.host
    done = host.sh("apt-get remove -q --yes 'chatmail-*' python3-chatmaild", timeout=120)
    # Debian's configuration of coturn relays for everybody: not even its next upgrade starts it
    assert "coturn.service is stopped and disabled" in done.out + done.err
    host.exec("dpkg-reconfigure", "coturn")
    for question, answer in (("is-active", "inactive\n"), ("is-enabled", "disabled\n")):
        assert host.exec("systemctl", question, "coturn.service", check=False).out == answer
    assert host.exec("test", "-e", "/var/lib/chatmail/keys/dkim/rsa.pem").ok
    for unit in ("postfix.service", "nginx.service", "unbound.service", "rsyslog.service"):
        assert host.exec("systemctl", "is-active", unit, check=False).out == "active\n"
    shown = host.sh("postconf -n; postconf -M").out
    assert DOMAIN not in shown and "chatmail" not in shown
    installed.site("listen 443 ssl;")
    assert installed.settings() == installed.before
    assert installed.the_other_site_is_there()
    installed.local_mail("after")


def test_installed_again_it_is_the_same_relay(installed):
    host = installed.host
    installed.site("")
    host.sh("apt-get install -q --yes --no-install-recommends chatmail-relay", timeout=120)
    well(host)
    assert host.exec("chatmail-relay", "get", "mail_domain").out == f"{DOMAIN}\n"


def test_resolvconf_in_the_place_of_systemd_resolved(installed, lab):
    host = installed.host
    host.sh("apt-get install -qq --yes --no-install-recommends resolvconf >/dev/null", timeout=120)
    assert not host.exec("test", "-e", "/usr/lib/systemd/systemd-resolved", check=False).ok
    host.exec("chatmail-relay", "apply", timeout=120)
    host.exec("systemctl", "restart", "postfix", "unbound")
    well(host)
    via = Mail(lab, host.address, DOMAIN)
    alice = via.account()
    with via.smtp(alice) as session:
        text = encrypted(alice.address, alice.address)
        assert via.send(session, alice.address, [alice.address], text)[0] == 250
    wait_for(lambda: via.received(alice), 20, "the message")


def test_purged_after_the_daemons_it_leaves_nothing_either(installed):
    host = installed.host
    daemons = "postfix dovecot-core dovecot-imapd dovecot-lmtpd nginx unbound coturn"
    host.sh("apt-get remove -q --yes 'chatmail-*' python3-chatmaild", timeout=120)
    host.sh(f"apt-get purge -q --yes {daemons}", timeout=120)
    answer = "chatmail-relay chatmail-relay/purge_mail boolean true\n"
    host.exec("debconf-set-selections", input=answer)
    host.sh("apt-get purge -q --yes 'chatmail-*' python3-chatmaild", timeout=120)
    own = r"/(etc/apt|var/lib/apt|usr/share/keyrings)/.*"
    found = host.exec("find", "/etc", "/usr", "/var", "-xdev", "-iname", "*chatmail*").out.split()
    assert [path for path in found if not re.fullmatch(own, path)] == []
    assert installed.host.exec("systemctl", "is-active", "rsyslog", check=False).out == "active\n"
