# SPDX-License-Identifier: MIT
"""An installation's settings, its neighbours' files, and its end without trace. Runs last."""

import http.client
import imaplib
import json
import re
import smtplib
import socket
import ssl
import time

import pytest
from conftest import DOMAIN, measured
from lab.mail import Account, Mail, context
from lab.messages import cleartext, encrypted
from lab.shell import wait_for


#: Addresses of users (the echo bot is none), and of clients: all of the lab's but the name server's and
#: the relay's.
PERSONAL = (
    rf"(?<![\w.+-])(?!echo@)[\w.+-]+@{re.escape(DOMAIN)}|\b(10\.77\.0\.|fd77::)(?!(1|11)\b)\d+"
)
#: Interrupts a change of the files it is given, as a power failure would.
INTERRUPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, "/usr/share/chatmail-relay")
from chatmail_relay.transaction import Change, Transaction
changes = [Change(Path(path), b"half-made") for path in sys.argv[1:]]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
Transaction(Path("/var/lib/chatmail/state")).run(changes, die)
"""


def test_status_and_check_are_well_and_speak_json(relay):
    for command in ("status", "check"):
        done = relay.exec("chatmail-relay", command, "--json", check=False)
        assert done.ok, done.out
        assert all(finding["well"] for finding in json.loads(done.out))


def test_status_sees_a_socket_that_is_gone_and_its_remedy_mends_it(relay):
    relay.exec("rm", "/var/spool/postfix/chatmail/incoming.sock")
    shown = relay.exec("chatmail-relay", "status", "--json", check=False)
    (finding,) = (item for item in json.loads(shown.out) if not item["well"])
    assert shown.code == 1 and finding["what"] == "socket chatmail-filtermail-incoming.socket"
    relay.exec(*finding["remedy"].removeprefix("run ").split())
    wait_for(lambda: relay.exec("chatmail-relay", "status", check=False).ok, 20, "status")
    relay.exec("test", "-S", "/var/spool/postfix/chatmail/incoming.sock")


def test_no_file_of_another_package_was_touched(relay):
    assert relay.exec("dpkg", "--verify").out == ""


def test_units_run_with_least_privilege(relay):
    """All services of ours; 25 is 2.5 of 10."""
    shown = relay.exec(
        "systemctl", "list-unit-files", "--plain", "--no-legend", "chatmail-*.service"
    )
    units = {line.split()[0] for line in shown.out.splitlines()}
    assert {"chatmail-front.service", "chatmail-filtermail.service"} < units
    asked = ("systemd-analyze", "security", "--threshold=25", "--no-pager")
    exposed = {}
    for unit in units:
        done = relay.exec(*asked, unit, check=False)
        last = done.out.strip().splitlines()[-1]
        measured[f"exposure of {unit}"] = re.search(r": ([0-9.]+) ", last)[1]
        if not done.ok:
            exposed[unit] = last
    assert exposed == {}


def test_a_second_apply_changes_nothing(relay):
    assert relay.exec("chatmail-relay", "apply").out == "chatmail-relay: nothing to change\n"
    assert relay.exec("chatmail-relay", "diff").out == ""


def test_an_invalid_setting_is_refused_with_file_line_value_and_remedy(relay):
    relay.sh(
        "cp -a /etc/chatmail/chatmail.ini /root/good.ini && echo 'tls = magic' >>/etc/chatmail/chatmail.ini"
    )
    done = relay.exec("chatmail-relay", "apply", check=False)
    relay.sh("mv /root/good.ini /etc/chatmail/chatmail.ini")
    assert done.code == 1
    assert (
        "chatmail.ini:" in done.err
        and "tls = magic: unknown way" in done.err
        and 'Write "acme", "external" or "self"' in done.err
    )
    assert relay.exec("chatmail-relay", "status", check=False).ok


def test_a_configuration_its_owner_refuses_is_rolled_back(relay):
    folder = "/etc/chatmail/templates/dovecot"
    shipped = "/usr/share/chatmail-relay/components/dovecot/dovecot.conf.j2"
    script = (
        f"mkdir -p {folder} && sed '$a no_such_setting = 1' {shipped} >{folder}/dovecot.conf.j2"
    )
    relay.sh(script)
    done = relay.exec("chatmail-relay", "apply", check=False)
    relay.sh("rm -r /etc/chatmail/templates")
    assert done.code == 1 and "no_such_setting" in done.err
    assert "no_such_setting" not in relay.read("/etc/chatmail/dovecot/dovecot.conf")
    assert relay.exec("chatmail-relay", "status", check=False).ok
    assert relay.exec("chatmail-relay", "diff").out == ""


def test_an_upgrade_of_a_daemon_runs_the_trigger_and_changes_nothing(relay):
    done = relay.exec(
        "dpkg-trigger", "--no-await", "--by-package=dovecot-core", "/usr/sbin/dovecot", check=False
    )
    assert done.ok, done.err
    done = relay.exec("dpkg", "--configure", "--pending", timeout=120)
    assert "chatmail-relay: nothing to change" in done.out
    assert relay.exec("chatmail-relay", "status", check=False).ok


def test_an_existing_certificate_is_served_on_every_port(relay, mail, lab):
    relay.sh(
        "mkdir -p /etc/mycert && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
        f" -days 90 -subj /CN=mine -addext subjectAltName=DNS:{DOMAIN}"
        " -keyout /etc/mycert/key.pem -out /etc/mycert/chain.pem"
    )
    paths = "/etc/mycert/chain.pem /etc/mycert/key.pem"
    relay.exec("chatmail-relay", "set", f"tls_external_cert_and_key={paths}", "tls=external")
    relay.exec("chatmail-relay", "apply", timeout=120)
    wanted = ssl.PEM_cert_to_DER_cert(relay.read("/etc/mycert/chain.pem"))

    def served(port):
        with lab.at_client(), socket.create_connection((relay.address, port), 10) as plain:
            with context().wrap_socket(plain, server_hostname=DOMAIN) as secured:
                return secured.getpeercert(binary_form=True)

    for port in (443, 465, 993):
        wait_for(lambda port=port: served(port) == wanted, 20, f"new certificate on {port}")
    relay.exec("chatmail-relay", "set", "tls=self", "tls_external_cert_and_key=")
    relay.exec("chatmail-relay", "apply", timeout=120)
    wait_for(lambda: relay.exec("chatmail-relay", "status", check=False).ok, 60, "status")
    assert served(993) != wanted


def test_no_log_names_a_user_or_the_address_of_a_client(relay, mail, lab):
    """Of all tests before this one, and of what follows."""
    for via in (mail, Mail(lab, relay.namespace.ipv6, DOMAIN)):
        alice, bob, nobody = via.account(), via.account(), via.new_address()
        for port in (465, 587, 443):
            with via.smtp(alice, port) as session:
                for recipient in (bob, nobody):
                    text = encrypted(alice.address, recipient.address)
                    assert via.send(session, alice.address, [recipient.address], text)[0] == 250
            with pytest.raises(smtplib.SMTPAuthenticationError):
                via.smtp(Account(bob.address, "not-the-password"), port)
        for port in (993, 143, 443):
            via.imap(alice, port).logout()
            with pytest.raises(imaplib.IMAP4.error):
                via.imap(Account(bob.address, "not-the-password"), port)
        with via.smtp(None, 25) as session:
            assert via.send(session, "x@far.example", [nobody.address], b"")[0] == 550
            for make in (cleartext, encrypted):
                text = make("x@far.example", bob.address)
                assert via.send(session, "x@far.example", [bob.address], text)[0] > 500
        wait_for(lambda via=via, alice=alice: len(via.received(alice)) == 3, 30, "bounces")
    relay.exec("journalctl", "--namespace=chatmail", "--sync")
    lines = relay.journal("*").splitlines()
    assert any("postfix" in line for line in lines) and any("dovecot" in line for line in lines)
    assert [line for line in lines if re.search(PERSONAL, line)] == []
    # nginx' own log is of the host's other sites, here Debian's default one; ours is not in it
    with lab.at_client():
        web = http.client.HTTPConnection(relay.address, 80, timeout=20)
        for host, path in ((DOMAIN, "/ours"), ("other.example", "/others")):
            web.request("GET", path, headers={"Host": host})
            web.getresponse().read()
        web.close()
    log = "/var/log/nginx/access.log"
    wait_for(lambda: "/others" in relay.read(log), 10, "the line of another site")
    assert "/ours" not in relay.read(log)
    skipped = ("--exclude-dir=journal", "--exclude=access.log")
    shown = relay.exec("grep", "-rP", PERSONAL, "/var/log", *skipped, check=False)
    assert shown.out == ""


@pytest.fixture
def unfiltered(relay):
    """Postfix' lines as they are, without the patterns of its unit."""
    override = "/run/systemd/system/postfix.service.d/zz-unfiltered.conf"
    relay.write(override, "[Service]\nLogFilterPatterns=\n")
    relay.sh("systemctl daemon-reload; systemctl restart postfix")
    since = time.time()

    def entries():
        relay.exec("journalctl", "--namespace=chatmail", "--sync")
        lines = relay.journal("chatmail", "-u", "postfix", f"--since=@{since:.6f}", "-o", "json")
        return [json.loads(line) for line in lines.splitlines()]

    yield entries
    relay.exec("rm", override)
    relay.sh("systemctl daemon-reload; systemctl restart postfix")


def test_who_names_somebody_logs_by_way_of_a_process_that_stays(unfiltered, mail):
    """journald must find the unit of each line: one who logs and ends may be gone when it looks."""
    alice, bob, nobody = mail.account(), mail.account(), mail.new_address()
    with mail.smtp(alice) as session:
        for recipient in (bob, nobody):
            text = encrypted(alice.address, recipient.address)
            assert mail.send(session, alice.address, [recipient.address], text)[0] == 250
    with mail.smtp(None, 25) as session:
        assert mail.send(session, "x@far.example", [nobody.address], b"")[0] == 550
    wait_for(lambda: mail.received(alice) and mail.received(bob), 30, "the message, and the bounce")
    names = re.compile(r"unknown\[|(from|to|orig_to|message-id)=<[^>]")
    named = [entry for entry in unfiltered() if names.search(entry["MESSAGE"])]
    programs = {entry["SYSLOG_IDENTIFIER"].rpartition("/")[2] for entry in named}
    assert programs >= {"smtpd", "cleanup", "qmgr", "lmtp"}
    assert {entry.get("_COMM") for entry in named} == {"postlogd"}


def test_the_counter_of_connections_never_tells_whom_it_counted(unfiltered, relay, mail):
    """anvil(8) does as it ends, so when Postfix reloads."""

    def pids():
        # Dovecot has one, too
        return set(relay.exec("pgrep", "-f", "^anvil -l", check=False).out.split())

    mail.account()
    for _ in range(3):
        mail.smtp(None, 25).quit()
    (counter,) = pids()
    relay.exec("systemctl", "reload", "postfix")
    wait_for(lambda: counter not in pids(), 20, "the old anvil's end")
    found = unfiltered()
    assert any("disconnect from unknown[10.77.0." in entry["MESSAGE"] for entry in found)
    assert [entry for entry in found if entry.get("SYSLOG_IDENTIFIER", "").endswith("/anvil")] == []


def test_our_daemons_log_into_the_relay_s_namespace_alone(relay):
    """But mtail, which must not read what it says itself, and what runs at boot before that is there."""
    shown = relay.exec("systemctl", "list-unit-files", "--plain", "--no-legend", "*.service").out
    units = [line.split()[0] for line in shown.splitlines()]
    ours = re.compile(r"(chatmail-(?!(mtail|recover|configure)\.).*|postfix|dovecot)\.service")
    for unit in filter(ours.fullmatch, units):
        instance = unit.replace("@.", "@now.")
        where = relay.exec("systemctl", "show", "-P", "LogNamespace", instance).out
        assert where == "chatmail\n", unit
    entries = [json.loads(line) for line in relay.journal("", "-o", "json").splitlines()]
    assert entries
    said = [e["MESSAGE"] for e in entries if ours.fullmatch(e.get("_SYSTEMD_UNIT", ""))]
    assert said == []


def test_log_lines_go_within_the_days_that_the_privacy_page_says(relay):
    """The relay's own numbers, with seconds for days, in another namespace."""
    settings = relay.read("/usr/lib/systemd/journald@chatmail.conf")
    assert "MaxFileSec=1day\nMaxRetentionSec=2day\n" in settings
    assert "at most three days, in memory only" in relay.read("/var/lib/chatmail/www/privacy.html")
    relay.write("/etc/systemd/journald@quick.conf", settings.replace("day\n", "s\n"))
    talk = "echo the first; while sleep 0.1; do echo another; done"

    def said():
        return relay.exec("journalctl", "-q", "-o", "cat", "--namespace=quick", check=False).out

    try:
        relay.exec("systemd-run", "-q", "-u", "talk", "-p", "LogNamespace=quick", "sh", "-c", talk)
        wait_for(lambda: "another" in said(), 20, "any line")
        wait_for(lambda: "the first" not in said(), 30, "the first one's end")
        assert "another" in said()
    finally:
        relay.sh(
            "systemctl stop talk; rm -r /etc/systemd/journald@quick.conf /run/log/journal/*.quick"
        )


def test_a_preseed_alone_changes_nothing_because_the_file_is_the_truth(relay):
    answer = "chatmail-relay chatmail-relay/mail_domain string _other.example\n"
    relay.exec("debconf-set-selections", input=answer)
    relay.exec("dpkg-reconfigure", "-f", "noninteractive", "chatmail-relay", timeout=120)
    assert relay.exec("chatmail-relay", "get", "mail_domain").out == f"{DOMAIN}\n"


def test_a_power_failure_in_the_middle_of_apply_is_repaired_at_boot(relay):
    files = (
        "/etc/chatmail/dovecot/dovecot.conf",
        "/etc/nginx/sites-enabled/chatmail.conf",
        "/etc/postfix/main.cf",
        "/var/lib/chatmail/www/index.html",
    )
    new = "/etc/chatmail/new/file"
    before = relay.exec("sha256sum", *files).out
    assert relay.exec("python3", "-c", INTERRUPT, *files, new, check=False).code == -9
    assert [relay.read(path) for path in (*files, new)] == ["half-made"] * 5
    relay.kill()
    relay.start()
    assert relay.exec("sha256sum", *files).out == before
    assert not relay.exec("test", "-e", "/etc/chatmail/new", check=False).ok
    assert "repaired an interrupted apply (installing)" in relay.journal("")
    wait_for(lambda: relay.exec("chatmail-relay", "status", check=False).ok, 60, "status")
    assert relay.exec("chatmail-relay", "diff").out == ""


def test_a_new_domain_is_everywhere_and_asking_again_keeps_it(relay):
    """What a person at a terminal is asked is in test_debconf.py."""
    given = ("mail_domain=_beta.example", "privacy_mail=admin@example.org")
    relay.exec("chatmail-relay", "set", *given)
    relay.exec("chatmail-relay", "apply", timeout=120)
    relay.exec("dpkg-reconfigure", "--frontend=noninteractive", "chatmail-relay", timeout=120)
    wait_for(lambda: relay.exec("chatmail-relay", "status", check=False).ok, 60, "status")
    assert relay.exec("chatmail-relay", "get", "mail_domain").out == "_beta.example\n"
    assert relay.exec("chatmail-relay", "get", "privacy_mail").out == "admin@example.org\n"
    assert relay.exec("postconf", "-h", "virtual_mailbox_domains").out == "_beta.example\n"
    certificate = "/var/lib/chatmail/tls/self-signed.crt"
    shown = relay.exec("openssl", "x509", "-in", certificate, "-noout", "-ext", "subjectAltName")
    assert "DNS:_beta.example" in shown.out
    places = (
        "/etc/chatmail",
        "/etc/nginx",
        "/etc/postfix",
        "/etc/unbound",
        "/var/lib/chatmail/www",
    )
    assert relay.exec("grep", "-rlF", DOMAIN, *places, check=False).out == ""


def test_an_unconfigured_installation_succeeds_and_says_how_to_go_on(lab):
    host = lab.host("bare", 12)
    try:
        host.install_relay("")
        done = host.exec("chatmail-relay", "status", check=False)
        assert done.code == 1 and "dpkg-reconfigure chatmail-relay" in done.out
        assert (
            host.exec("systemctl", "is-active", "dovecot.service", check=False).out == "inactive\n"
        )
        host.exec("chatmail-relay", "set", "mail_domain=_gamma.example")
        host.exec("chatmail-relay", "apply", timeout=120)
        wait_for(lambda: host.exec("chatmail-relay", "status", check=False).ok, 60, "status")
    finally:
        lab.remove(host)


#: The administrator's own source of our repository, its lists and its key.
APT = ("/etc/apt/sources.list.d/", "/var/lib/apt/lists/", "/usr/share/keyrings/")

#: What Debian's own packages leave after a purge: package manager's books, logs, shared caches, users that
#: daemons made (Policy 9.2.2 lets them stay), and what their maintainer scripts forget.
LEFT_BY_DEBIAN = re.compile(
    r"/(etc/(passwd|group|shadow|gshadow|subuid|subgid)-?"
    r"|etc/(rc\d\.d|systemd/system)/.*|etc/\.pwd\.lock|etc/ld\.so\.cache|etc/ssl/certs/.*"
    r"|etc/aliases(\.db)?|var/lib/dovecot/instances|var/www/html/index\.nginx-debian\.html"
    r"|var/(cache|log|backups)/.*|var/lib/(apt|dpkg|systemd|ucf|debconf)/.*)"
)

#: Other packages' postrm needs these: a purge of all at once leaves Dovecot's files without them.
PURGE_HELPERS = {"ucf", "sensible-utils", "libtext-wrapi18n-perl", "libtext-charwidth-perl"}


def test_purge_of_everything_leaves_nothing_of_ours(lab):
    """File lists of the system, and what is written in the files that stayed, before and after."""
    host = lab.host("gone", 13)
    packages = "dpkg-query -W -f '${Package}\\n' | sort"
    everything = ("/etc", "/usr", "/var")
    try:
        before = host.files(*everything)
        installed = set(host.sh(packages).out.split())
        host.install_relay("_gone.example")
        host.exec("chatmail-relay", "set", "mailboxes_dir=/srv/mailboxes", "max_load_1m=1000")
        host.exec("chatmail-relay", "apply", timeout=120)
        account = Mail(lab, host.address, "_gone.example").account()
        assert host.exec("test", "-d", f"/srv/mailboxes/{account.address}").ok
        host.write("/srv/mailboxes/notes", "of the administrator's\n")
        host.exec(
            "debconf-set-selections",
            input="chatmail-relay chatmail-relay/purge_mail boolean true\n",
        )
        new = set(host.sh(packages).out.split()) - installed
        assert {"chatmail-relay", "postfix", "dovecot-core", "nginx"} <= new
        host.sh(f"apt-get purge -q --yes {' '.join(sorted(new - PURGE_HELPERS))}", timeout=300)
        host.sh(f"apt-get purge -q --yes {' '.join(sorted(new & PURGE_HELPERS))}", timeout=300)
        assert set(host.sh(packages).out.split()) == installed
        left = {path for path in host.files(*everything) - before if not path.startswith(APT)}
        assert sorted(path for path in left if not LEFT_BY_DEBIAN.fullmatch(path)) == []
        books = ("/var/log/", "/var/cache/apt/", "/var/cache/debconf/", "/var/lib/dpkg/")
        kept = sorted(
            path
            for path in (left | host.files("/etc")) - {"/etc/mtab"}
            if not path.startswith((*books, *APT))
        )
        named = host.exec(
            "xargs", "grep", "-slE", "chatmail|_gone[.]example", input="\n".join(kept), check=False
        )
        # systemd-sysusers' user stays with the others (Policy 9.2.2)
        assert set(named.out.split()) <= {
            f"/etc/{name}{suffix}"
            for name in ("passwd", "group", "shadow", "gshadow")
            for suffix in ("", "-")
        }
        assert sorted(path for path in left if "chatmail" in path) == []
        shown = host.exec("debconf-show", "chatmail-relay", check=False)
        assert shown.out == ""
        units = host.exec("systemctl", "list-units", "--all", "--plain", "chatmail*").out
        assert "0 loaded units listed" in units
        assert not host.exec("test", "-e", "/var/lib/chatmail", check=False).ok
        assert host.exec("ls", "-A", "/srv/mailboxes").out == "notes\n"
    finally:
        lab.remove(host)
