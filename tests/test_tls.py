# SPDX-License-Identifier: MIT
"""TLS of every port of a relay with an ordinary name, looked at by testssl.sh."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import measured
from lab.shell import LabError

PORTS = {25: "smtp", 587: "smtp", 465: "", 143: "imap", 993: "", 443: ""}
#: What is asked: protocols, kinds of ciphers, forward secrecy, certificate, and all known attacks.
CHECKS = ("--protocols", "--std", "--fs", "--server-defaults", "--vulnerable")
WELL = {"OK", "INFO", "LOW", "DEBUG"}
#: What is found, and stays.
EXCEPTIONS = {
    "cert_revocation": "the test internet's authority publishes no list of what it revoked",
    "BREACH": "compressed are only files that are the same for everybody",
}
#: What testssl.sh could not look at.
UNSEEN = {
    "engine_problem": "Debian's openssl has no GOST ciphers, and neither have our daemons",
    "NPN": "an extension of TLS 1.2, on a port that speaks 1.3 alone",
    "sessionresumption_ticket": "Dovecot closes the connection without a login",
}
SECONDS = 300


AUTHORITIES = "/root/authorities.pem"
#: A server as there are too many.
CARELESS = """\
server {
    listen 8443 ssl;
    ssl_certificate /root/careless.pem;
    ssl_certificate_key /root/careless.key;
    ssl_protocols TLSv1.2;
    ssl_ciphers ALL:aNULL:@SECLEVEL=0;
}
"""


def scan(internet, name, address, port, *checks):
    """All findings about *port* of a host, each with id, severity and finding."""
    report = f"/tmp/testssl-{port}.json"
    starttls = ("--starttls", PORTS[port]) if PORTS.get(port) else ()
    done = internet.host.exec(
        *("testssl", "--quiet", "--warnings", "batch", "--color", "0", "--nodns", "min"),
        *("--ip", address, "--add-ca", AUTHORITIES, "--overwrite", "--jsonfile", report),
        *(*(checks or CHECKS), *starttls, f"{name}:{port}"),
        check=False,
        timeout=SECONDS,
    )
    try:
        return json.loads(internet.host.read(report))
    except (ValueError, LabError):
        raise AssertionError(done.out[-2000:]) from None


def bad(findings):
    """What is above low and what could not be looked at, each but the known; id -> what it says."""
    return {
        item["id"]: f"{item['severity']}: {item['finding']}"
        for item in findings
        if item["severity"] not in WELL
        and item["id"] not in (UNSEEN if item["severity"] == "WARN" else EXCEPTIONS)
    }


@pytest.fixture(scope="module")
def authorities(internet):
    known = internet.authority.certificate + internet.acme_root
    internet.host.write(AUTHORITIES, known)


@pytest.fixture(scope="module")
def scans(internet, alpha, authorities):
    begin = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        jobs = {
            port: pool.submit(scan, internet, "alpha.example", alpha.address, port)
            for port in PORTS
        }
        found = {port: job.result() for port, job in jobs.items()}
    measured["testssl.sh, six ports"] = f"{time.monotonic() - begin:.0f} s"
    return found


@pytest.mark.parametrize("port", PORTS)
def test_nothing_above_low_is_found_but_the_exceptions(scans, port):
    seen = {item["id"].partition(" ")[0] for item in scans[port]}
    assert {"TLS1", "TLS1_2", "TLS1_3", "heartbleed", "cert_chain_of_trust"} <= seen
    assert bad(scans[port]) == {}


def test_every_exception_is_still_one(scans):
    found = {
        item["id"] for items in scans.values() for item in items if item["severity"] not in WELL
    }
    assert set(EXCEPTIONS) <= found


def test_a_careless_server_is_found_out(internet, authorities):
    host = internet.host
    pair = internet.authority.issue("careless.example", days=-1)
    host.write("/root/careless.pem", pair.chain)
    host.write("/root/careless.key", pair.key)
    host.write("/etc/nginx/conf.d/careless.conf", CARELESS)
    try:
        host.sh("systemctl reset-failed nginx; systemctl restart nginx")
        checks = ("--protocols", "--std", "--server-defaults")
        found = bad(scan(internet, "careless.example", host.address, 8443, *checks))
    finally:
        host.sh("rm /etc/nginx/conf.d/careless.conf; systemctl reset-failed nginx")
        host.exec("systemctl", "restart", "nginx")
    assert {"cert_expirationStatus", "cert_chain_of_trust"} <= set(found), found
    assert "cipherlist_aNULL" in found, found
