# SPDX-License-Identifier: MIT
"""The relay's numbers: one address for all, who may read it, dashboard, alerts, and mtail."""

import re
import socket

import pytest
from conftest import DOMAIN
from lab import image
from lab.mail import context
from lab.shell import wait_for
from prometheus_client.openmetrics.parser import text_string_to_metric_families


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


def test_mtail_counts_the_journal_and_goes_as_it_came(relay, lab):
    image.download(lab.tree, "chatmail-mtail-conf")
    relay.sh("apt-get install -q --yes --no-install-recommends chatmail-mtail-conf", timeout=120)
    try:
        wait_for(
            lambda: relay.exec("systemctl", "is-active", "chatmail-mtail", check=False).ok, 10, "up"
        )
        security = relay.exec(
            "systemd-analyze",
            "security",
            "--threshold=25",
            "--no-pager",
            "chatmail-mtail.service",
            check=False,
        )
        assert security.ok, security.out.splitlines()[-1]

        def counted(name):
            text = relay.exec(
                "python3",
                "-c",
                "import urllib.request as r;"
                " print(r.urlopen('http://127.0.0.1:3903/metrics').read().decode())",
                check=False,
            ).out
            return sum(float(n) for n in re.findall(rf"^{name}\{{.*\}} (\S+)$", text, re.MULTILINE))

        say = (
            "systemd-run --quiet --wait --property=LogNamespace=chatmail"
            " --property=SyslogIdentifier=chatmail-doveauth sh -c"
        )
        lines = "echo Created address; echo Incoming: refused, unencrypted mail"
        # journalctl begins to follow a moment after mtail listens
        wait_for(
            lambda: relay.sh(f"{say} '{lines}'") and counted("created_accounts") > 0, 20, "a count"
        )
        wait_for(lambda: counted("rejected_unencrypted_mail_count") > 0, 10, "a count")
        assert relay.exec("chatmail-relay", "status", check=False).ok
    finally:
        relay.sh("apt-get purge -q --yes chatmail-mtail-conf", timeout=120)
    assert "/etc/chatmail/mtail" not in relay.exec("find", "/etc/chatmail").out
    assert relay.exec("chatmail-relay", "status", check=False).ok
    assert relay.exec("chatmail-relay", "diff").out == ""
