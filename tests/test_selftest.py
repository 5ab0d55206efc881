# SPDX-License-Identifier: MIT
"""`chatmail-relay test` on a healthy relay, from elsewhere, and with everything broken that it looks at."""

import contextlib
import json
import re
import subprocess

import pytest
from conftest import DOMAIN, measured
from lab.shell import wait_for

FILTER = [f"chatmail-filtermail-{name}.socket" for name in ("outgoing", "incoming", "sign")]
FILTER += ["chatmail-filtermail.service"]
EVERYTHING = {
    f"name {DOMAIN}",
    *(f"TLS on {port}" for port in (25, 143, 443, 465, 587, 993)),
    "certificate",
    "ALPN imap on 443",
    "ALPN smtp on 443",
    "web page",
    "port 80",
    "autoconfig",
    "account by login",
    "account by /new",
    "logins",
    "cleartext on submission",
    "cleartext on port 25",
    "unsigned mail on port 25",
    "delivery",
    "privacy of mail",
    "METADATA",
    "TURN",
    f"clean up {DOMAIN}",
}


def findings(host, *words, timeout=180):
    """Exit status, and findings by name; what is not well is printed."""
    done = host.exec("chatmail-relay", "test", "--json", *words, check=False, timeout=timeout)
    found = {item["what"]: item for item in json.loads(done.out)}
    for name in sorted(bad(found)):
        print(f"{host.name}: {name}: {found[name]['detail']}")
    return done.code, found


def bad(found):
    """The names of what is not well."""
    return {name for name, item in found.items() if not item["well"]}


def accounts(host):
    return {
        user["address"]
        for user in json.loads(host.exec("chatmail-relay", "user", "list", "--json").out)
    }


def test_a_healthy_relay_is_well_and_is_left_as_it_was(relay):
    before = accounts(relay)
    status, found = findings(relay)
    assert bad(found) == set() and status == 0
    assert set(found) - {f"ports at {relay.address}"} == EVERYTHING
    assert found["cleartext on submission"]["detail"] == (
        "523 Encryption Needed: Invalid Unencrypted Mail"
    )
    assert accounts(relay) == before
    measured["self-test: 250 to notification"] = found["delivery"]["detail"]


def test_it_is_as_quick_as_a_person_waits(relay):
    done = relay.exec("chatmail-relay", "test", check=False)
    measured["self-test of a relay"] = f"{done.seconds:.1f} s"
    assert done.seconds < 60
    assert re.search(r"^ok  delivery: \d+\.\d\d s$", done.out, re.M)


def test_it_works_from_elsewhere_and_says_what_stays(relay, ip_relay):
    status, found = findings(ip_relay, "--domain", DOMAIN)
    assert bad(found) == set()
    assert "expire without a login" in found[f"clean up {DOMAIN}"]["detail"]
    # over the network a login before STARTTLS is looked for, too
    assert found["TLS on 143"]["well"]


def test_an_address_stands_in_for_the_dns(relay, ip_relay):
    words = ("--domain", "_elsewhere.example", "--address", relay.address)
    status, found = findings(ip_relay, *words)
    assert status == 1 and found["name _elsewhere.example"]["well"]
    assert "does not name _elsewhere.example" in found["certificate"]["detail"]


def test_nothing_of_it_is_in_the_log(relay):
    findings(relay)
    log = relay.journal()
    assert "filtermail" in log
    assert re.findall(r"ci-[a-z0-9]{6}|self-test|localhost>", log) == []


# --- faults -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def stopped(relay, *units):
    relay.exec("systemctl", "stop", *units)
    try:
        yield
    finally:
        relay.exec("systemctl", "start", *units)
        wait_for(lambda: relay.exec("chatmail-relay", "status", check=False).ok, 60, "status")


def test_without_the_turn_server_there_are_no_calls(relay):
    with stopped(relay, "chatmail-turn.service"):
        _status, found = findings(relay)
    assert bad(found) == {"TURN"}


CALL = """
import base64, hashlib, hmac, sys, time
sys.path.insert(0, "/usr/share/chatmail-relay")
from chatmail_relay.selftest import turn
from chatmail_relay.selftest.report import Wrong
secret = open("/var/lib/chatmail/keys/turn/secret", "rb").read() if sys.argv[2] == "right" else b"north"
name = int(time.time()) + 5 * 86400
code = hmac.new(secret, str(name).encode(), hashlib.sha1).digest()
told = f"{sys.argv[1]}:3478:{name}:{base64.b64encode(code).decode()}"
try:
    print(turn.allocate(turn.Credentials.parse(told), True))
except Wrong as error:
    print("BAD", error)
"""


def test_calls_are_judged_by_an_allocation(relay):
    def call(secret):
        return relay.exec("python3", "-I", "-", DOMAIN, secret, input=CALL).out

    assert re.fullmatch(rf"{re.escape(relay.address)} port \d+ in \d+ ms\n", call("right"))
    assert call("wrong") == f"BAD {relay.address} refuses: 401 Unauthorized\n"
    with stopped(relay, "chatmail-turn.service"):
        assert call("right") == f"BAD nobody listens at {relay.address}, UDP port 3478\n"


def test_without_the_filter_nothing_is_taken(relay):
    with stopped(relay, *FILTER):
        _status, found = findings(relay)
    ports = {f"TLS on {port}" for port in (25, 465, 587)}
    assert bad(found) == ports | {"ALPN smtp on 443", "the rest"}
    assert all(found[name]["detail"].startswith("421 ") for name in ports)


def test_a_relay_that_does_not_filter_is_found_out(relay):
    relay.exec("postconf", "-e", "smtpd_milters=", "chatmail_outgoing_milters=")
    relay.exec("postfix", "reload")
    try:
        _status, found = findings(relay)
    finally:
        relay.exec("chatmail-relay", "apply", timeout=120)
    assert found["cleartext on submission"]["detail"] == "is taken"
    assert found["cleartext on port 25"]["detail"] == "is taken"
    assert found["unsigned mail on port 25"]["detail"].startswith("is taken")
    assert found["privacy of mail"]["detail"] == "the subject of a message is not hidden"


def test_without_metadata_clients_are_told_nothing(relay):
    units = ("chatmail-metadata.socket", "chatmail-metadata.service")
    with stopped(relay, *units, "chatmail-metadata-lastlogin.socket"):
        _status, found = findings(relay)
    assert "METADATA" in bad(found)


def test_without_doveauth_nobody_gets_an_address(relay):
    units = ("chatmail-doveauth-create.socket", "chatmail-doveauth-new.socket")
    with stopped(relay, *units, "chatmail-doveauth-metrics.socket", "chatmail-doveauth.service"):
        status, found = findings(relay)
    assert {"account by login", "account by /new", "the rest"} == bad(found)
    assert status == 1


def test_without_the_web_server_the_pages_and_new_addresses_are_missed(relay):
    with stopped(relay, "nginx.service"):
        _status, found = findings(relay)
    missed = {"web page", "port 80", "autoconfig", "account by /new", f"ports at {relay.address}"}
    assert missed <= bad(found) and found["account by login"]["well"]


def test_without_the_front_nothing_else_is_tried(relay):
    with stopped(relay, "chatmail-front.service"):
        _status, found = findings(relay)
    assert {"TLS on 443", "TLS on 993", "ALPN imap on 443", "the rest"} <= bad(found)
    assert "443: Connection refused" in found[f"ports at {relay.address}"]["detail"]


OTHER = """
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days {days} \
    -subj /CN=x -addext subjectAltName=DNS:{name} -keyout /run/other.key -out /run/other.crt 2>/dev/null
sed 's#^CERTIFICATE=.*#CERTIFICATE=/run/other.crt#; s#^KEY=.*#KEY=/run/other.key#' \
    -i /etc/chatmail/front/certificate.env
systemctl restart chatmail-front
"""


@pytest.mark.parametrize(
    ("name", "days", "said"),
    [("other.example", 90, f"does not name {DOMAIN}"), (DOMAIN, 5, "expires in ")],
)
def test_a_wrong_certificate_is_told_and_where_it_is(relay, name, days, said):
    relay.sh(OTHER.format(name=name, days=days))
    try:
        _status, found = findings(relay)
    finally:
        relay.exec("chatmail-relay", "apply", timeout=120)
        relay.exec("systemctl", "restart", "chatmail-front")
        relay.exec("rm", "/run/other.key", "/run/other.crt")
    assert said in found["certificate"]["detail"]
    assert found["TLS on 465"]["detail"].startswith("another certificate")
    assert found["TLS on 993"]["well"]


# --- registration -----------------------------------------------------------------------------------


@contextlib.contextmanager
def registration(relay, way):
    def set_to(value):
        relay.exec("chatmail-relay", "set", f"registration={value}")
        relay.exec("chatmail-relay", "apply", timeout=120)

    set_to(way)
    try:
        yield
    finally:
        set_to("open")


@pytest.mark.parametrize(
    ("way", "how"),
    [
        ("token", "made by /new with a token of this test"),
        ("closed", "registration is closed: made by root for this test"),
    ],
)
def test_root_gets_in_where_the_public_does_not(relay, ip_relay, way, how):
    before = accounts(relay)
    with registration(relay, way):
        _status, found = findings(relay)
        tokens = json.loads(relay.exec("chatmail-relay", "token", "list", "--json").out)
        _status, elsewhere = findings(ip_relay, "--domain", DOMAIN)
    assert bad(found) == set()
    assert found["account by login"]["detail"].startswith(how)
    assert [token for token in tokens if token["note"] == "self-test"] == []
    assert accounts(relay) == before
    # who is no root there is told why not
    assert {"account by login", "account by /new", "the rest"} == bad(elsewhere)
    assert "/new answers" in elsewhere["account by /new"]["detail"]


# --- an end before the end ----------------------------------------------------------------------------


def test_an_interrupted_test_leaves_no_accounts(relay):
    before = accounts(relay)
    relay.exec("postconf", "-e", "defer_transports=lmtp")  # so that it waits for its message
    relay.exec("postfix", "reload")
    try:
        status, out, err = interrupted(relay, after="ok  unsigned mail on port 25")
    finally:
        relay.exec("postconf", "-X", "defer_transports")
        relay.exec("postfix", "reload")
        relay.exec("postsuper", "-d", "ALL", "deferred")
    assert status == 130
    assert "interrupted, cleaning up" in err
    assert f"ok  clean up {DOMAIN}: 2 accounts deleted" in out
    assert accounts(relay) == before


def started(relay, *words):
    """`chatmail-relay` with *words*, which Ctrl-C ends, and the number of its process on the host."""
    # tests in the background of a shell ignore Ctrl-C, and so would all they start
    run = 'echo $$; exec env --default-signal=INT chatmail-relay "$@"'
    running = subprocess.Popen(
        relay.command("sh", "-c", run, "sh", *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return running, running.stdout.readline().strip()


def interrupted(relay, after):
    """Press Ctrl-C once the test has said *after*: exit status, and what is said from then on."""
    running, process = started(relay, "test")
    for line in running.stdout:
        if line.startswith(after):
            break
    relay.exec("kill", "-INT", process)
    rest, err = running.communicate(timeout=60)
    return running.returncode, rest, err


def test_the_time_of_all_is_bounded(relay):
    before = accounts(relay)
    status, found = findings(relay, "--timeout", "0.5")
    assert status == 1 and found["time"]["detail"] == "not done after 0.5 s"
    assert accounts(relay) == before
