# SPDX-License-Identifier: MIT
"""The questions of the installation: at every priority, in both frontends, and without anybody there."""

import re
from contextlib import contextmanager
from pathlib import Path

import pytest
from lab import image
from lab.shell import wait_for
from lab.terminal import ESCAPE, KILL_ENTRY, terminal

ROOT = Path(__file__).resolve().parents[1]
INI = "/etc/chatmail/chatmail.ini"
DOMAIN = "Mail domain of this chatmail relay: "
TLS = "Certificate of this chatmail relay: "
AGREEMENT = r"Do you agree to the terms of the certificate authority\? \[yes/no\] "
ACME_MAIL = "Mail address for the certificate authority: "
PATHS = "Paths of the certificate chain and of its key: "
OPERATOR = "Mail address of the operator: "
PURGE = r"Delete mailboxes and keys when the package is purged\? \[yes/no\] "
APT = ("apt-get", "-q", "--yes", "--no-install-recommends")


def reconfigure(*options):
    return ("dpkg-reconfigure", *options, "chatmail-relay")


NOBODY = reconfigure("-f", "noninteractive")


def settings(host):
    shown = host.exec("chatmail-relay", "get").out.splitlines()
    return dict(line.split(" =", 1) for line in shown)


def get(host, key):
    return settings(host)[key].strip()


def well(host):
    wait_for(lambda: host.exec("chatmail-relay", "status", check=False).ok, 60, "status")


def answer(screen, *pairs):
    """Questions in the order they are asked, each with what is typed; nothing else may be asked."""
    for question, reply in pairs:
        screen.expect(question)
        screen.type(reply)
    status, text = screen.finish()
    assert status == 0, text


@pytest.fixture(scope="module")
def asked(lab):
    """A machine on which somebody installs the relay in a terminal, and mistypes the name."""
    image.download(lab.tree, "whiptail", "debconf-i18n")
    host = lab.host("asked", 72)
    host.use_repository()
    host.sh(f"{' '.join(APT)} install whiptail debconf-i18n")
    with terminal(
        host, *APT, "install", "chatmail-relay", frontend="dialog", priority="critical", timeout=300
    ) as screen:
        screen.expect("Mail domain of this chatmail relay:")
        screen.type("https://_asked.example/", kill="")
        screen.expect("is neither a full domain name nor")
        screen.type("", kill="")
        screen.expect("Mail domain of this chatmail relay:")
        screen.type(" _asked.example ", kill=KILL_ENTRY)
        status, text = screen.finish()
    assert status == 0, text
    yield host
    lab.remove(host)


def test_a_dialog_at_priority_critical_asks_for_the_domain_alone_until_it_is_one(asked):
    well(asked)
    assert get(asked, "mail_domain") == "_asked.example"


@contextmanager
def questions_only(host):
    """Reconfiguration ends with the answers in debconf: what follows takes seconds, and has its own tests."""
    postinst = "/var/lib/dpkg/info/chatmail-relay.postinst"
    host.sh(f"mv {postinst} /root/ && printf '#!/bin/sh\\n' >{postinst} && chmod 755 {postinst}")
    try:
        yield
    finally:
        host.sh(f"mv /root/chatmail-relay.postinst {postinst}")


@pytest.mark.parametrize(
    ("priority", "questions"),
    [
        ("critical", [DOMAIN]),
        ("high", [DOMAIN, TLS, AGREEMENT]),
        ("medium", [DOMAIN, TLS, AGREEMENT, OPERATOR]),
        ("low", [DOMAIN, TLS, AGREEMENT, ACME_MAIL, OPERATOR, PURGE]),
    ],
)
def test_each_priority_asks_its_questions_line_by_line(asked, priority, questions):
    replies = {
        DOMAIN: "asked.example",
        TLS: "1",
        AGREEMENT: "no",
        ACME_MAIL: "",
        OPERATOR: "admin@example.org",
        PURGE: "no",
    }
    with (
        questions_only(asked),
        terminal(asked, *reconfigure("-p", priority)) as screen,
    ):
        answer(screen, *((question, replies[question]) for question in questions))


def test_every_answer_that_cannot_be_right_is_asked_for_again(asked):
    asked.sh(
        "mkdir -p /etc/mycert && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
        " -days 90 -subj /CN=mine -addext subjectAltName=DNS:asked.example"
        " -keyout /etc/mycert/privkey.pem -out /etc/mycert/fullchain.pem"
    )
    with terminal(asked, *reconfigure()) as screen:
        for name in ("asked", "a..example", "300.0.2.1", "admin@asked.example", "asked.example."):
            screen.expect(DOMAIN)
            screen.type(name)
            screen.expect(f'"{re.escape(name)}" is neither')
        answer(
            screen,
            (DOMAIN, "asked.example"),
            (TLS, "2"),
            (PATHS, "mycert/fullchain.pem"),
            ("does not name two files on this machine(?s:.*)" + PATHS, "/etc/mycert /etc/none"),
            (
                "does not name two files on this machine(?s:.*)" + PATHS,
                "/etc/mycert/fullchain.pem /etc/mycert/privkey.pem",
            ),
            (OPERATOR, "example.org"),
            ("is not one mail address(?s:.*)" + OPERATOR, "a@example.org b@example.org"),
            ("is not one mail address(?s:.*)" + OPERATOR, "me+relay@example.org"),
            (PURGE, "no"),
        )
    well(asked)
    assert get(asked, "tls") == "external"
    assert get(asked, "privacy_mail") == "me+relay@example.org"


def debconf_says(host, question):
    done = host.exec(
        "debconf-communicate", "chatmail-relay", input=f"GET chatmail-relay/{question}\n"
    )
    return done.out.strip().partition(" ")[2]


@pytest.mark.parametrize("frontend", ["dialog", "readline"])
def test_who_cancels_leaves_the_name_as_it_was(asked, frontend):
    with (
        questions_only(asked),
        terminal(asked, *reconfigure("-p", "critical"), frontend=frontend) as screen,
    ):
        screen.expect("Mail domain of this chatmail relay:")
        if frontend == "readline":
            screen.type("not a domain")
            screen.expect("is neither(?s:.*)" + DOMAIN)
            screen.send("\x15\x04")  # ^U ^D
        else:
            screen.send(ESCAPE)
        status, text = screen.finish()
    assert status == 0, text
    assert debconf_says(asked, "mail_domain") == "asked.example"


def test_a_name_that_begins_with_an_underscore_needs_no_question_about_its_certificate(asked):
    asked.exec("chatmail-relay", "set", "tls=acme", "tls_external_cert_and_key=")
    with terminal(asked, *reconfigure()) as screen:
        answer(screen, (DOMAIN, "_asked.example"), (OPERATOR, ""), (PURGE, "no"))
    well(asked)
    assert get(asked, "tls") == "self" and get(asked, "privacy_mail") == ""


LANGUAGES = {
    "de": "Mail-Domain dieses Chatmail-Relays:",
    "es": "Dominio de correo de este repetidor chatmail:",
    "fr": "Domaine de messagerie de ce relais chatmail\u00a0:",
    "ru": "Почтовый домен этого сервера chatmail:",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_questions_speak_the_language_of_the_administrator(asked, language):
    done = asked.exec(
        *("env", f"LANGUAGE={language}", "debconf-communicate", "chatmail-relay"),
        input="METAGET chatmail-relay/mail_domain description\n",
    )
    assert done.out == f"0 {LANGUAGES[language]}\n"


def test_a_line_removed_from_the_file_does_not_come_back(asked):
    asked.exec(
        "chatmail-relay", "set", "privacy_mail=gone@example.org", "acme_email=gone@example.org"
    )
    with questions_only(asked):
        asked.exec(*NOBODY, timeout=120)
    assert debconf_says(asked, "privacy_mail") == "gone@example.org"
    asked.sh(f"sed -i /gone@/d {INI}")
    asked.exec(*NOBODY, timeout=120)
    assert "gone@" not in asked.read(INI)


def test_an_upgrade_with_a_file_that_is_not_valid_warns_and_leaves_the_relay_as_it_was(asked):
    """As a reconfiguration it fails and names the line."""
    asked.sh(f"cp -a {INI} /root/good.ini && echo 'delete_mails_after = soon' >>{INI}")
    version = asked.exec("dpkg-query", "-W", "-f", "${Version}", "chatmail-relay").out
    postinst = ("/var/lib/dpkg/info/chatmail-relay.postinst", "configure", version)
    try:
        done = asked.exec("env", "DPKG_MAINTSCRIPT_PACKAGE=chatmail-relay", *postinst, timeout=120)
        assert "delete_mails_after = soon: not a whole number" in done.err
        assert "the configuration in force stays" in done.err
        failed = asked.exec(*NOBODY, check=False, timeout=120)
        assert not failed.ok and "delete_mails_after = soon" in failed.err
    finally:
        asked.sh(f"mv /root/good.ini {INI}")
    well(asked)


def test_answers_given_before_the_package_is_unpacked_count_also_if_there_is_a_file(asked):
    """A package that was removed and comes again, on a machine whose debconf knows nothing."""
    asked.sh("apt-get remove -q --yes chatmail-relay", timeout=120)
    asked.exec("debconf-communicate", "chatmail-relay", input="PURGE\n")
    with terminal(asked, *APT, "install", "chatmail-relay", priority="critical") as screen:
        answer(screen, (DOMAIN, "_again.example"))
    well(asked)
    assert get(asked, "mail_domain") == "_again.example"


def preseed():
    """The answers of docs/install.md."""
    text = (ROOT / "docs/install.md").read_text()
    block = re.search(r"debconf-set-selections <<END\n(.*?)\n    END\n", text, re.DOTALL)
    return [line.strip() for line in block[1].splitlines()]


def test_every_question_is_in_the_documentation_with_its_type_and_priority():
    templates = (ROOT / "debian/chatmail-relay.templates").read_text()
    questions = dict(re.findall(r"Template: chatmail-relay/(\w+)\nType: (\w+)", templates))
    questions = {name: kind for name, kind in questions.items() if kind != "error"}
    text = (ROOT / "docs/install.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)` \| (\w+) \| \w+ \|", text, re.MULTILINE))
    assert table == questions
    assert {line.split()[1].partition("/")[2] for line in preseed()} == set(questions) - {
        "tls_external_cert_and_key"
    }


def test_the_preseed_of_the_documentation_answers_everything(asked):
    asked.sh(f"rm {INI}")
    asked.exec("debconf-set-selections", input="\n".join(preseed()) + "\n")
    asked.exec(*NOBODY, timeout=120)
    shown = settings(asked)
    assert shown["mail_domain"].strip() == "chat.example.org" and shown["tls"].strip() == "acme"
    assert shown["acme_agreement"].strip() == "true"
    assert shown["acme_email"] == shown["privacy_mail"] == " admin@example.org"


def test_a_preseed_that_cannot_be_right_is_refused_with_its_reason(asked):
    asked.sh(f"rm {INI}")
    bad = "chatmail-relay chatmail-relay/mail_domain string no domain\n"
    asked.exec("debconf-set-selections", input=bad)
    done = asked.exec(*NOBODY, check=False, timeout=120)
    assert not done.ok and "mail_domain = no domain: not a full domain name" in done.err
