# SPDX-License-Identifier: MIT
"""A relay that is installed in a plain tree without systemd, and configures itself where it boots."""

import json
import re

import pytest
from conftest import measured
from lab import image
from lab.lab import UNBOUND
from lab.mail import Mail
from lab.shell import wait_for

DOMAIN = "_image.example"
UNIT = "chatmail-configure.service"
INSTALL = f"""
cp {image.INSIDE_REPO}/{image.KEYRING_NAME} /usr/share/keyrings/
{image.UPDATE}
apt-get install -q --yes --no-install-recommends chatmail-relay
"""
#: What runs in the tree, besides this script itself; and what the relay and its daemons have there.
LOOK = """
echo == looks
cat /proc/[0-9]*/comm 2>/dev/null | sort -u
echo --
find /var/lib/chatmail /etc/chatmail /etc/nginx/sites-enabled ! -type d | sort
"""


OURS = {"cat", "sh", "sort", "unshare"}


def secrets(files):
    return [name for name in files if "/keys/" in name or "/tls/" in name]


def look(host, script=""):
    """Processes and files after *script* in the tree."""
    return seen(host.chroot(script + LOOK, timeout=120).out)


def seen(text):
    running, _, files = text.rpartition("== looks\n")[2].partition("--\n")
    return set(running.splitlines()), files.split()


def well(host):
    wait_for(lambda: host.exec("chatmail-relay", "status", check=False).ok, 60, "status")


def boot(host, *arguments, failed=()):
    host.power_off()
    host.arguments = arguments
    host.start(failed)


def setting(host, key):
    return host.exec("chatmail-relay", "get", key).out.strip()


@pytest.fixture(scope="module")
def tree(lab):
    """A Debian tree with the packages in it that has never booted."""
    host = lab.disk("image", 62)
    lab.dns.set(DOMAIN, "A", host.address)
    for path, text in (
        ("etc/apt/sources.list.d/chatmail.sources", image.SOURCES),
        ("etc/unbound/unbound.conf.d/lab.conf", UNBOUND.format(address=lab.dns.address)),
    ):
        (host.root / path).parent.mkdir(parents=True, exist_ok=True)
        (host.root / path).write_text(text)
    done = host.chroot(INSTALL + LOOK, timeout=300)
    measured["apt install into a tree without systemd"] = f"{done.seconds:.1f} s"
    host.installed = done
    yield host
    lab.remove(host)


def test_an_installation_without_systemd_starts_nothing_and_makes_no_key(tree):
    running, files = seen(tree.installed.out)
    assert running <= OURS
    assert secrets(files) == []
    assert "not configured yet" in tree.installed.err


def test_a_tree_with_a_mail_domain_is_rendered_and_still_has_no_key(tree):
    running, files = look(
        tree, "chatmail-relay set mail_domain=_built.example; chatmail-relay apply\n"
    )
    assert running <= OURS
    assert "/etc/chatmail/dovecot/dovecot.conf" in files
    assert "/etc/nginx/sites-enabled/chatmail.conf" in files
    assert secrets(files) == []
    values = tree.chroot("postconf -h virtual_mailbox_domains; chatmail-relay diff").out
    assert values == "_built.example\n"


def test_it_boots_with_another_domain_from_a_credential_and_makes_its_keys(tree, lab):
    tree.arguments = (
        f"--set-credential=chatmail.mail_domain:{DOMAIN}",
        "--setenv=CHATMAIL_MAIL_DOMAIN=_loses.example",
        "--setenv=CHATMAIL_DELETE_MAILS_AFTER=7",
        "--setenv=CHATMAIL_MAX_LOAD_1M=1000",
    )
    tree.start()
    measured["boot of an image, configured by a credential"] = f"{tree.boot_seconds:.1f} s"
    well(tree)
    assert setting(tree, "mail_domain") == DOMAIN and setting(tree, "delete_mails_after") == "7"
    assert tree.exec("chatmail-relay", "diff").out == ""
    assert tree.exec("grep", "-rlF", "_built.example", "/etc", check=False).out == ""
    key = "/var/lib/chatmail/keys/dkim/rsa.pem"
    assert tree.exec("stat", "-c", "%a %U", key).out == "600 root\n"
    mail = Mail(lab, tree.address, DOMAIN)
    session = mail.imap(mail.account())
    assert session.select("INBOX")[0] == "OK"
    session.logout()


def test_a_variable_changes_a_setting_at_the_next_boot_and_keys_stay(tree):
    before = tree.exec("sha256sum", "/var/lib/chatmail/keys/dkim/rsa.pem").out
    # another image numbers its users differently
    tree.sh("chown -R 4711:4711 /var/lib/chatmail/mail")
    boot(tree, "--setenv=CHATMAIL_DELETE_MAILS_AFTER=9")
    well(tree)
    assert setting(tree, "mail_domain") == DOMAIN and setting(tree, "delete_mails_after") == "9"
    assert tree.exec("sha256sum", "/var/lib/chatmail/keys/dkim/rsa.pem").out == before
    foreign = ("find", "/var/lib/chatmail/mail", "!", "-user", "_chatmail")
    assert tree.exec(*foreign).out == ""


def test_a_value_that_is_refused_is_named_and_the_relay_goes_on_as_before(tree):
    boot(tree, "--setenv=CHATMAIL_DELETE_MAILS_AFTER=soon", failed=[UNIT])
    well(tree)
    said = tree.journal("", "-u", UNIT, "-b")
    assert re.search("CHATMAIL_DELETE_MAILS_AFTER: delete_mails_after = soon: not a whole", said)
    assert setting(tree, "delete_mails_after") == "9"


def test_the_unit_has_least_privilege(tree):
    done = tree.exec(
        *("systemd-analyze", "security", "--threshold=25", "--no-pager", "--json=short", UNIT),
        check=False,
    )
    assert done.ok, json.loads(done.out)
