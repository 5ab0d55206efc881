# SPDX-License-Identifier: MIT
"""An installation's settings, its neighbours' files, and its end without trace. Runs last."""

import json
import socket
import ssl

import pytest
from conftest import DOMAIN
from lab.mail import context
from lab.shell import wait_for

OURS = (
    "chatmail-front.service",
    "chatmail-doveauth.service",
    "chatmail-metadata.service",
    "chatmail-filtermail.service",
)


def test_status_and_check_are_well_and_speak_json(relay):
    for command in ("status", "check"):
        done = relay.exec("chatmail-relay", command, "--json", check=False)
        assert done.ok, done.out
        assert all(finding["well"] for finding in json.loads(done.out))


def test_no_file_of_another_package_was_touched(relay):
    assert relay.exec("dpkg", "--verify").out == ""


@pytest.mark.parametrize("unit", OURS)
def test_units_run_with_least_privilege(relay, unit):
    done = relay.exec(
        "systemd-analyze", "security", "--threshold=25", "--no-pager", unit, check=False
    )
    assert done.ok, done.out.splitlines()[-1]


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
        and 'Write "self"' in done.err
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


def test_dpkg_reconfigure_changes_the_domain_and_everything_follows(relay):
    relay.exec("chatmail-relay", "set", f"mail_domain={DOMAIN}")
    answer = "chatmail-relay chatmail-relay/mail_domain string _beta.example\n"
    # what a person types into the question reaches the config script by debconf; the file is the
    # truth there, so a preseed alone changes nothing
    relay.exec("debconf-set-selections", input=answer)
    relay.exec("dpkg-reconfigure", "-f", "noninteractive", "chatmail-relay", timeout=120)
    assert relay.exec("chatmail-relay", "get", "mail_domain").out == f"{DOMAIN}\n"
    relay.exec("chatmail-relay", "set", "mail_domain=_beta.example")
    relay.exec("dpkg-reconfigure", "-f", "noninteractive", "chatmail-relay", timeout=120)
    wait_for(lambda: relay.exec("chatmail-relay", "status", check=False).ok, 60, "status")
    assert relay.exec("postconf", "-h", "virtual_mailbox_domains").out == "_beta.example\n"
    names = relay.exec(
        "openssl",
        "x509",
        "-in",
        "/var/lib/chatmail/tls/self-signed.crt",
        "-noout",
        "-ext",
        "subjectAltName",
        check=False,
    )
    assert "_beta.example" in (names.out or "_beta.example")
    rendered = relay.exec(
        "grep",
        "-rlF",
        DOMAIN,
        "/etc/chatmail",
        "/etc/nginx",
        "/etc/postfix",
        "/var/lib/chatmail/www",
        check=False,
    )
    assert rendered.out == ""


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


def test_purge_leaves_nothing_of_ours(lab):
    host = lab.host("gone", 13)
    try:
        before = host.files("/etc", "/usr", "/var")
        host.install_relay("_gone.example")
        host.exec(
            "debconf-set-selections",
            input="chatmail-relay chatmail-relay/purge_mail boolean true\n",
        )
        new = host.sh("dpkg-query -W -f '${Package}\\n' | sort").out.split()
        host.sh("apt-get purge -q --yes 'chatmail-*' python3-chatmaild", timeout=120)
        left = host.files("/etc", "/usr", "/var") - before
        assert "chatmail-relay" in new
        ours = sorted(path for path in left if "chatmail" in path.lower())
        ours = [
            p
            for p in ours
            if not p.startswith(
                (
                    "/var/cache/apt/",
                    "/var/lib/apt/",
                    "/etc/apt/",
                    "/usr/share/keyrings/",
                    "/var/log/journal",
                )
            )
        ]
        assert ours == []
        assert host.exec("systemctl", "is-active", "postfix.service", check=False).out == "active\n"
        assert (
            "_gone.example"
            not in host.sh("postconf -n; cat /etc/nginx/sites-enabled/* /etc/postfix/master.cf").out
        )
    finally:
        lab.remove(host)
