# SPDX-License-Identifier: MIT
"""The relay's numbers: one address for all, who may read it, dashboard, alerts, and mtail."""

import collections
import contextlib
import imaplib
import json
import re
import socket
from pathlib import Path

import pytest
import yaml
from conftest import DOMAIN
from lab import image
from lab.mail import Account, context
from lab.messages import cleartext, encrypted
from lab.shell import WaitTimeout, wait_for
from prometheus_client.openmetrics.parser import text_string_to_metric_families

METRICS = Path(__file__).parents[1] / "packages/chatmail-relay/metrics"

# names that the tests below do not provoke, and what does
ELSEWHERE = {
    "dovecot_deliveries_failed_total": "a full mailbox",
    "chatmail_notifier_dropped_total": "five hours without an answer, or a full disk (test_notifier.py)",
    "chatmail_unit_memory_bytes": "a memory controller, which not every container has (test_export.py)",
}


def numbers(relay):
    """All samples by name, as (labels, value), read by a strict reader."""
    text = relay.exec(
        "python3",
        "-c",
        "import urllib.request as r; print(r.urlopen('http://127.0.0.1:3905/metrics').read().decode())",
    ).out
    found = {}
    for family in text_string_to_metric_families(text.strip() + "\n"):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_every_service_tells_its_numbers(relay):
    up = {labels["service"]: number for labels, number in numbers(relay)["chatmail_up"]}
    assert set(up) >= {"doveauth", "filtermail", "metadata", "dovecot"}
    assert set(up.values()) == {1}


def test_the_storage_report_is_among_them(relay, mail):
    mail.account()
    relay.exec("systemctl", "start", "chatmail-fsreport.service")
    found = numbers(relay)
    stored = {labels["kind"]: number for labels, number in found["chatmail_storage_bytes"]}
    assert stored["total"] == stored["messages"] + stored["extra"] > 0
    accounts = {labels["kind"]: number for labels, number in found["chatmail_accounts"]}
    assert accounts["all"] == accounts["user"] + accounts["ci"] > 0


def test_an_imap_login_is_counted_once(relay, mail):
    def logins():
        ((_labels, number),) = numbers(relay)["chatmail_logins_total"]
        return number

    alice = mail.account()
    before = wait_for(logins, 10, "the login that made the account")
    mail.imap(alice).logout()
    wait_for(lambda: logins() > before, 10, "one more login")
    assert logins() == before + 1


def expressions(tree):
    """All PromQL in a dashboard or a file of rules."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key in ("expr", "query") and isinstance(value, str):
                yield value
            else:
                yield from expressions(value)
    elif isinstance(tree, list):
        for item in tree:
            yield from expressions(item)


@pytest.mark.parametrize(
    "name, parse", [("dashboard.json", json.loads), ("alerts.yml", yaml.safe_load)]
)
def test_dashboard_and_alerts_ask_for_what_there_is(relay, mail, push, name, parse):
    shown = " ".join(expressions(parse((METRICS / name).read_text())))
    wanted = set(re.findall(r"\b(?:chatmail|dovecot)_[a-z_]+", shown))
    assert "chatmail_up" in wanted
    # what appears only after an event: mail accepted, signed, delivered, and refused, notifications
    # sent and given up ...
    alice, bob = mail.account(), mail.account()
    for token in ("taken", "gone"):
        mail.set_token(bob, token)
    push.answers["gone"] = 410
    session = mail.smtp(alice)
    for code, message in ((250, encrypted), (523, cleartext)):
        text = message(alice.address, bob.address)
        assert mail.send(session, alice.address, [bob.address], text)[0] == code
    session.quit()
    wait_for(lambda: mail.received(bob), 10, "the message")
    # ... and an address that is refused
    with pytest.raises(imaplib.IMAP4.error):
        mail.imap(Account(mail.new_address().address, "short"))

    def missing():
        moved = {
            name
            for name, samples in numbers(relay).items()
            if not name.endswith("_total") or any(number for _labels, number in samples)
        }
        return wanted - moved - set(ELSEWHERE)

    with contextlib.suppress(WaitTimeout):  # the names say more
        wait_for(lambda: not missing(), 10, "the numbers")
    assert not missing()


def test_the_exporter_is_gone_when_nobody_asks(relay):
    before = relay.exec("systemctl", "show", "-P", "UnitFileState", "chatmail-metrics.socket").out
    assert before == "enabled\n"
    relay.exec("systemctl", "stop", "chatmail-metrics.service")
    assert "chatmail-metrics.service" not in relay.memory()
    assert numbers(relay)


def web(lab, relay, path="/metrics"):
    """Status and body of a request from the lab's client."""
    with lab.at_client(), socket.create_connection((relay.address, 443), 10) as plain:
        with context("http/1.1").wrap_socket(plain, server_hostname=DOMAIN) as secured:
            request = f"GET {path} HTTP/1.1\r\nHost: {DOMAIN}\r\nConnection: close\r\n\r\n"
            secured.sendall(request.encode())
            answer = b"".join(iter(lambda: secured.recv(65536), b"")).decode()
    return int(answer.split()[1]), answer.partition("\r\n\r\n")[2]


@pytest.fixture
def metrics_allow(relay):
    def change(text):
        relay.exec("chatmail-relay", "set", f"metrics_allow={text}")
        relay.exec("chatmail-relay", "apply", timeout=120)

    yield change
    change("")


def test_the_web_tells_them_to_whom_the_setting_names(relay, lab, metrics_allow):
    assert web(lab, relay)[0] == 404
    metrics_allow("192.0.2.0/24 2001:db8::7")
    wait_for(lambda: web(lab, relay, "/robots.txt")[0] == 200, 10, "web site")
    refused = web(lab, relay)
    assert refused[0] == 404 and "chatmail_" not in refused[1]
    metrics_allow(lab.client.ipv4)
    status, body = wait_for(lambda: (web(lab, relay)[0] == 200) and web(lab, relay), 10, "200")
    assert status == 200 and "chatmail_up" in body and body.endswith("# EOF\n")


@pytest.fixture
def mtail(relay, lab):
    """chatmail-mtail-conf, which leaves nothing behind."""
    image.download(lab.tree, "chatmail-mtail-conf")
    relay.sh("apt-get install -q --yes --no-install-recommends chatmail-mtail-conf", timeout=120)
    try:
        wait_for(
            lambda: relay.exec("systemctl", "is-active", "chatmail-mtail", check=False).ok, 10, "up"
        )
        yield
        assert relay.memory()["chatmail-mtail.service"]
    finally:
        relay.sh("apt-get purge -q --yes chatmail-mtail-conf", timeout=120)
    assert "/etc/chatmail/mtail" not in relay.exec("find", "/etc/chatmail").out
    assert relay.exec("chatmail-relay", "status", check=False).ok
    assert relay.exec("chatmail-relay", "diff").out == ""


def counters(text):
    """The sums of all counters in mtail's exposition."""
    found = collections.Counter()
    for name, number in re.findall(r"^([a-z_]+)\{.*\} (\S+)$", text, re.MULTILINE):
        found[name] += int(float(number))
    return found


# a line of the journal, and the counters it moves, each as often as it moves it
LINES = {
    "Created address": ["created_accounts"],
    "registration rejected: load avg 9.5 > 8.0": ["rejected_registrations"],
    "password file is empty, the address is blocked": [],
    "lmtp(7)<7><aB>: saved mail to INBOX": ["delivered_mail"],
    "lmtp(7)<7><aB>: save failed to INBOX: Quota exceeded (mailbox for user is full)": [
        "quota_exceeded"
    ],
    "warning: hostname x.example does not resolve": ["warning_count"],
    "imap(7)<7><aB>: Warning: Inotify instance limit exceeded": ["warning_count"],
    "quota-expire: removed 0 message(s)": ["quota_expire_runs"],
    "quota-expire: removed 2 message(s)": [
        "quota_expire_runs",
        *["quota_expire_removed_files"] * 2,
    ],
    "Outgoing: encrypted mail accepted (3)": [
        *["filtered_outgoing_mail_count"] * 3,
        *["outgoing_encrypted_mail_count"] * 3,
    ],
    "Incoming: encrypted mail accepted (3)": [
        *["filtered_incoming_mail_count"] * 3,
        *["incoming_encrypted_mail_count"] * 3,
    ],
    "Outgoing: unencrypted mail accepted (1)": [
        "filtered_outgoing_mail_count",
        "outgoing_unencrypted_mail_count",
    ],
    "Incoming: unencrypted mail accepted (1)": [
        "filtered_incoming_mail_count",
        "incoming_unencrypted_mail_count",
    ],
    "Outgoing: SecureJoin request accepted (1)": [
        "filtered_outgoing_mail_count",
        "outgoing_unencrypted_mail_count",
    ],
    "Incoming: SecureJoin request accepted (1)": [
        "filtered_incoming_mail_count",
        "incoming_unencrypted_mail_count",
    ],
    "Incoming: delivery report accepted (1)": [
        "filtered_incoming_mail_count",
        "incoming_mailer_daemon_mail_count",
    ],
    "Bounce: signed mail accepted (1)": [],
    "Bounce: unsigned mail accepted (1)": [],
    "1234ABCD: DKIM-Signature field added (s=chatmail, d=example.org)": ["dkim_signed"],
}
WHYS = """
from chatmaild.filtermail import replies
print(*(item.why for item in vars(replies).values() if isinstance(item, replies.Reply)), sep="\\n")
"""


def test_mtail_counts_each_line_as_what_it_is(relay, mtail):
    lines = dict(LINES)
    for why in relay.exec("python3", "-Ic", WHYS).out.splitlines():
        for direction in ("outgoing", "incoming"):
            moved = [f"filtered_{direction}_mail_count", "rejected_mail_count"]
            if why == "unencrypted mail":
                moved += [f"{direction}_unencrypted_mail_count", "rejected_unencrypted_mail_count"]
            lines[f"{direction.capitalize()}: refused, {why}"] = moved
    assert "Incoming: refused, no valid DKIM signature" in lines
    head = "2026-01-01T00:00:00+00:00 alpha chatmail-x[7]: "
    told = relay.exec(
        *("mtail", "--one_shot", "--one_shot_format=prometheus", "--logs=-"),
        *("--progs=/usr/share/chatmail-relay/mtail", "--port=3999"),
        input="".join(f"{head}{line}\n" for line in lines),
    ).out
    assert counters(told) == collections.Counter(name for moved in lines.values() for name in moved)


def test_mtail_counts_the_journal_and_goes_as_it_came(relay, mail, mtail):
    security = relay.exec(
        "systemd-analyze",
        "security",
        "--threshold=25",
        "--no-pager",
        "chatmail-mtail.service",
        check=False,
    )
    assert security.ok, security.out.splitlines()[-1]

    def counted():
        return counters(
            relay.exec(
                "python3",
                "-c",
                "import urllib.request as r;"
                " print(r.urlopen('http://127.0.0.1:3903/metrics').read().decode())",
            ).out
        )

    # journalctl begins to follow a moment after mtail listens
    wait_for(lambda: mail.account() and counted()["created_accounts"], 20, "a count")
    alice, bob = mail.account(), mail.account()
    session = mail.smtp(alice)
    for code, message in ((250, encrypted), (523, cleartext)):
        text = message(alice.address, bob.address)
        assert mail.send(session, alice.address, [bob.address], text)[0] == code
    session.quit()
    names = ("outgoing_encrypted_mail_count", "rejected_unencrypted_mail_count", "delivered_mail")
    wait_for(lambda: all(counted()[name] for name in names), 10, "counts")
    assert relay.exec("chatmail-relay", "status", check=False).ok
