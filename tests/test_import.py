# SPDX-License-Identifier: MIT
"""A machine on which the reference tool has deployed its relay becomes ours; its users notice nothing.

The machine is built from what is known of such machines, on a Debian 13 with our packages installed and not
configured. The mailboxes are those of real clients.
"""

import re
import shutil
import time

import pytest
from conftest import measured
from lab.mail import Mail
from lab.messages import encrypted
from lab.shell import run, wait_for
from people import Person, people_of, say

DOMAIN = "_old.example"
OURS = f"/var/lib/chatmail/mail/{DOMAIN}"
STORE = f"/home/vmail/mail/{DOMAIN}"
ATTIC = "/var/lib/chatmail/imported"
DAYS = 30  # since the last login of somebody

INI = f"""\
[params]
mail_domain = {DOMAIN}
max_mailbox_size = 300M
max_load_1m = 1000
max_smtp_connections = 500
filtermail_smtp_port = 10080
passdb_path = /home/vmail/passdb.sqlite
privacy_mail = admin@example.org
"""
SERVICES = (
    *("doveauth", "chatmail-metadata", "lastlogin", "filtermail", "filtermail-incoming"),
    *("filtermail-transport", "chatmail-expire", "chatmail-fsreport", "turnserver", "iroh-relay"),
    *("mtail", "echobot", "acmetool-redirector", "acmetool-reconcile", "tls-cert-reload"),
    *("mta-sts-daemon", "doveauth-dictproxy"),
)
RUNNING = ("doveauth", "chatmail-metadata", "filtermail", "turnserver")
UNIT = "[Service]\nExecStart=/usr/bin/sleep infinity\n[Install]\nWantedBy=multi-user.target\n"
TIMERS = ("chatmail-expire", "chatmail-fsreport", "acmetool-reconcile")
TIMER = "[Timer]\nOnCalendar=daily\n[Install]\nWantedBy=timers.target\n"
RESTART = "[Service]\nRestart=always\nRestartSec=30\n"
FILES = {
    **{f"/etc/systemd/system/{name}.service": UNIT for name in SERVICES},
    **{f"/etc/systemd/system/{name}.timer": TIMER for name in TIMERS},
    "/etc/systemd/system/tls-cert-reload.path": "[Path]\nPathChanged=/etc/nothing\n",
    "/etc/systemd/system/opendkim.service.d/10-prevent-memory-leak.conf": RESTART,
    "/etc/systemd/system/dovecot.service.d/10_restart.conf": RESTART,
    "/etc/systemd/system/postfix@.service.d/10_restart.conf": RESTART,
    "/etc/apt/preferences.d/pin-dovecot": (
        "Package: dovecot-*\nPin: version *\nPin-Priority: -1\n"
    ),
    "/etc/apt/apt.conf.d/00InstallRecommends": 'APT::Install-Recommends "false";\n',
    "/etc/cron.d/chatmail-metrics": "# metrics\n",
    "/etc/unbound/unbound.conf.d/chatmail.conf": "server:\n    cache-max-negative-ttl: 0\n",
    "/etc/nginx/nginx.conf": (
        "events { worker_connections 2048; }\n"
        "http { server { listen 80; listen 127.0.0.1:8443; root /var/www/html; } }\n"
    ),
    "/etc/postfix/main.cf": (
        f"compatibility_level = 3.6\nmyhostname = {DOMAIN}\nmydestination =\n"
        "virtual_mailbox_domains = $myhostname\nvirtual_transport = lmtp:unix:private/dovecot-lmtp\n"
        "login_map = regexp:/etc/postfix/login_map\n"
    ),
    "/etc/postfix/login_map": "/^(.*)$/ ${1}\n",
    "/etc/postfix/submission_header_cleanup": "/^Received:/ IGNORE\n",
    "/etc/postfix/lmtp_header_cleanup": "/^Received:/ IGNORE\n",
    "/etc/postfix/smtp_tls_policy_map": "/^_/ encrypt\n",
    "/etc/dovecot/dovecot.conf": "protocols = imap lmtp\nauth_mechanisms = plain\n!include auth.conf\n",
    "/etc/dovecot/auth.conf": "uri = proxy:/run/doveauth/doveauth.socket:auth\n",
    "/etc/dovecot/push_notification.lua": "-- push\n",
    "/etc/iroh-relay.toml": "enable_relay = true\n",
    "/etc/mtail/delivered_mail.mtail": "# counters\n",
    "/etc/acme/hooks/nginx": "#!/bin/sh\n",
    "/etc/chatmail-version": "48ad92bf\n",
    "/usr/local/bin/filtermail": "binary\n",
    "/usr/local/bin/chatmail-turn": "binary\n",
    "/usr/local/bin/iroh-relay": "binary\n",
    "/usr/local/bin/mtail": "binary\n",
    "/usr/lib/cgi-bin/newemail.py": "#!/usr/local/lib/chatmaild/venv/bin/python3\n",
    "/usr/local/lib/chatmaild/chatmail.ini": INI,
    "/usr/local/lib/chatmaild/venv/pyvenv.cfg": "home = /usr/bin\n",
}
#: Stay where they are.
KEPT = {
    "/etc/mailname": f"{DOMAIN}\n",
    "/etc/environment": "TZ=:/etc/localtime\n",
    "/etc/systemd/journald.conf": "[Journal]\nMaxRetentionSec=3d\nStorage=volatile\n",
}


def queue_something(old, recipient):
    """A message that waits, as Postfix is down: from the machine itself."""
    text = encrypted(f"root@{DOMAIN}", recipient).decode()
    old.exec("systemctl", "stop", "postfix.service")
    old.exec("sendmail", "-f", f"root@{DOMAIN}", recipient, input=text.replace("\r\n", "\n"))


class Old:
    """The machine, and who has been there."""

    def __init__(self, host, mail, people, reader, sleeper):
        self.host = host
        self.mail = mail
        self.people: list[Person] = people
        self.reader = reader
        self.sleeper = sleeper


@pytest.fixture(scope="module")
def old(lab, blank, tmp_path_factory):
    """The relay as its users have known it, laid out as the reference tool lays it out."""
    folder = tmp_path_factory.mktemp("old")
    mail = Mail(lab, blank.host.address, DOMAIN)
    blank.begin(DOMAIN)
    with people_of(lab, folder, DOMAIN) as people:
        say(*people, "before")
        reader, sleeper = mail.account(), mail.account()
        with mail.smtp(reader) as session:
            for to in (reader, sleeper):
                text = encrypted(reader.address, to.address)
                assert mail.send(session, reader.address, [to.address], text)[0] == 250
        wait_for(lambda: mail.received(sleeper) and mail.received(reader), 30, "messages")
        # what the machine is left with is its state alone
        host = blank.host
        state = host.root / "var/lib/chatmail"
        run(["cp", "-a", state / f"mail/{DOMAIN}", folder / "mail"])
        key = host.read("/var/lib/chatmail/keys/dkim/rsa.pem")
        pair = [host.read(f"/var/lib/chatmail/tls/self-signed.{end}") for end in ("crt", "key")]
        blank.reset()
        shutil.copytree(folder / "mail", host.root / f"home/vmail/mail/{DOMAIN}", symlinks=True)
        host.sh(
            "useradd --system --home-dir /home/vmail vmail; chown -R vmail: /home/vmail;"
            f"touch -d '{DAYS} days ago' {STORE}/{sleeper.address}/password;"
            f"find {STORE} -name 'dovecot.index*' -exec sh -c 'echo of 2.3 >\"$1\"' sh {{}} \\;;"
            f"mkdir {STORE}/pending_notifications"
        )
        for path, text in (FILES | KEPT).items():
            host.write(path, text)
        host.write("/etc/dkimkeys/opendkim.private", key, 0o600)
        host.write("/etc/ssl/certs/mailserver.pem", pair[0])
        host.write("/etc/ssl/private/mailserver.key", pair[1], 0o600)
        host.sh(
            f"systemctl daemon-reload; systemctl enable --quiet {' '.join(SERVICES[:12])};"
            f"systemctl start {' '.join(RUNNING)}; systemctl restart nginx.service"
        )
        queue_something(host, reader.address)
        yield Old(host, mail, people, reader, sleeper)


def compressed(old):
    """Whether all messages on disk are, as the reference system's are."""
    names = old.host.sh(f"find {STORE} -path '*/cur/*' -o -path '*/new/*'").out.split()
    heads = [old.host.exec("head", "-c2", name).out for name in names]
    return len(heads) >= 2 and all(head.startswith("\x1f") for head in heads)


def test_everything_that_would_be_done_is_said_and_nothing_is_done(old):
    assert compressed(old)
    before = old.host.files("/etc", "/usr/local", "/home", "/var/lib/chatmail")
    done = old.host.exec("chatmail-relay", "import", "--dry-run")
    for path in FILES:
        if "/chatmaild/" not in path:
            assert path in done.out, path
    for path in KEPT:
        assert f"leave {path}" in done.out
    assert "max_mailbox_size = 300M" in done.out and "not passdb_path" in done.out
    refused = old.host.exec("chatmail-relay", "import", input="no\n", check=False)
    assert refused.code == 1
    assert old.host.files("/etc", "/usr/local", "/home", "/var/lib/chatmail") == before


def test_an_import_that_is_killed_goes_on_and_the_relay_is_well(old):
    host = old.host
    host.sh(
        "chatmail-relay import --yes >/dev/null & p=$!\n"
        f"until [ -e {ATTIC}/usr/local ]; do :; done; kill -9 $p; ! wait $p",
        timeout=200,
    )
    begin = time.monotonic()
    host.exec("chatmail-relay", "import", "--yes", timeout=300)
    measured["import of a relay of the reference tool"] = f"{time.monotonic() - begin:.1f} s"
    wait_for(lambda: host.exec("chatmail-relay", "status", check=False).ok, 60, "status")
    assert "is imported already" in host.exec("chatmail-relay", "import", "--yes").out


def test_who_did_not_log_in_meanwhile_keeps_the_day_of_the_last_login(old):
    path = f"{OURS}/{old.sleeper.address}/password"
    age = time.time() - int(old.host.exec("stat", "-c", "%Y", path).out)
    assert DAYS - 1 < age / 86400 < DAYS + 2
    assert old.host.exec("find", OURS, "!", "-user", "_chatmail").out == ""


def test_nothing_of_the_reference_tool_is_in_the_way_and_nothing_is_lost(old):
    host = old.host
    for name in FILES:
        assert host.exec("test", "-e", f"{ATTIC}{name}", check=False).ok, name
    shadowed = ("systemctl", "show", "-P", "FragmentPath", "chatmail-metadata.service")
    assert host.exec(*shadowed).out == "/usr/lib/systemd/system/chatmail-metadata.service\n"
    for name in ("doveauth", "filtermail", "turnserver"):
        state = host.exec("systemctl", "show", "-P", "LoadState", f"{name}.service").out
        assert state == "not-found\n", name
    changed = host.exec("dpkg", "--verify").out.split()
    assert [word for word in changed if word.startswith("/")] == ["/etc/systemd/journald.conf"]
    policy = host.exec("apt-cache", "policy", "dovecot-core").out
    assert "Candidate: (none)" not in policy
    assert "login_map = regexp" not in host.exec("postconf", "-n").out
    host.exec("test", "-d", f"{STORE}/{old.reader.address}")


def test_keys_and_settings_are_those_that_the_dns_and_the_operator_know(old):
    zone = old.host.exec("chatmail-relay", "dns", "--zone").out
    public = old.host.sh(
        "openssl pkey -in /etc/dkimkeys/opendkim.private -pubout -outform DER | base64 -w0"
    ).out
    assert "opendkim._domainkey" in zone
    assert public in re.sub(r'"\s*"', "", zone).replace("\n", "")
    shown = old.host.exec("chatmail-relay", "get").out
    for line in ("max_mailbox_size = 314572800", "privacy_mail = admin@example.org"):
        assert line in shown


def test_old_passwords_open_old_mailboxes_with_their_numbers_and_mail_that_waited_comes(old):
    mail = old.mail
    first = mail.received(old.sleeper)
    assert len(first) == 1 and b"BEGIN PGP MESSAGE" in first[0]
    wait_for(lambda: len(mail.received(old.reader)) == 2, 30, "what was in the queue")
    listed = old.host.read(f"{STORE}/{old.reader.address}/dovecot-uidlist")
    session = mail.imap(old.reader)
    said = session.status("INBOX", "(UIDVALIDITY)")[1][0].decode()
    session.logout()
    assert re.search(r"V(\d+)", listed)[1] in said


def test_real_clients_of_before_go_on(old):
    alice, bob = old.people
    for account in old.people:
        account.stop_io()
        account.start_io()
    measured["first message of real clients after the import"] = f"{say(alice, bob, 'after'):.1f} s"
    say(bob, alice, "and back")
