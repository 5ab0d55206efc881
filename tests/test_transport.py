# SPDX-License-Identifier: MIT
"""Two relays that exchange mail over HTTPS: real clients, blocked ports, broken peers, raw requests."""

import base64
import contextlib
import re
import smtplib
import socket
import ssl
import time

import pytest
from conftest import DOMAIN, measured, new_account
from lab.mail import Mail, context
from lab.messages import cleartext, encrypted
from lab.network import inside
from lab.shell import wait_for

BETA = "_beta.example"
UNIT = "chatmail-transport"
SOCKETS = (f"{UNIT}.socket", f"{UNIT}-mxdeliv.socket", f"{UNIT}-metrics.socket")
PEER_REQUESTS = 20  # at a time, of one peer
FEW = 3  # messages, for the test of their limit
PROMPT = 20  # seconds: less than Postfix' first retry
HUNG = 60  # seconds for a process that hangs to be replaced: WatchdogSec=, and a little


@pytest.fixture(scope="module")
def beta(lab, relay):
    """The second relay; both have their keys in the DNS."""
    host = lab.host("beta", 15, names=(BETA, f"www.{BETA}"))
    host.install_relay(BETA)
    host.exec("chatmail-relay", "set", "max_new_addresses_per_hour=100000", "max_load_1m=1000")
    host.exec("chatmail-relay", "apply", timeout=120)
    lab.publish_key(relay, DOMAIN)
    lab.publish_key(host, BETA)
    yield host
    lab.remove(host)


@pytest.fixture(scope="module")
def beta_mail(lab, beta):
    return Mail(lab, beta.address, BETA)


@pytest.fixture(scope="module")
def alice(mail):
    return mail.account()


@pytest.fixture(scope="module")
def bob(beta_mail):
    return beta_mail.account()


@pytest.fixture(scope="module")
def chat(delta, beta):
    """Real clients on both relays, who have verified each other."""
    anna = new_account(delta, "anna")
    ben = delta.add_account()
    ben.set_config("displayname", "ben")
    ben.set_config("bot", "1")
    ben.add_transport_from_qr(f"dcaccount:{BETA}")
    ben.bring_online()
    ben.secure_join(anna.get_qr_code())
    ben.wait_for_securejoin_joiner_success()
    return anna, ben


def numbers(host):
    """What the service on *host* has counted, by name and label."""
    reader = (
        "import socket; s = socket.socket(socket.AF_UNIX);"
        "s.connect('/run/chatmail/transport/metrics.socket'); print(s.makefile().read())"
    )
    text = host.exec("python3", "-c", reader).out
    pattern = r'^chatmail_https_(\w+)_total\{result="(.*)"\} (\d+)'
    return {(name, result): int(n) for name, result, n in re.findall(pattern, text, re.M)}


def counted(host, name, result):
    return numbers(host).get((name, result), 0)


def forget(host):
    """Let the service begin anew: it knows no peers then, and has counted nothing."""
    host.exec("systemctl", "reset-failed", *SOCKETS, f"{UNIT}.service", check=False)
    host.exec("systemctl", "restart", f"{UNIT}.service")


def receive(account, text):
    while True:
        message = account.wait_for_incoming_msg().get_snapshot()
        if message.text == text:
            assert message.show_padlock
            return


def exchange(chat, text):
    """Both say *text* to each other; seconds until the second has arrived."""
    anna, ben = chat
    begin = time.monotonic()
    anna.create_chat(ben).send_text(f"{text}, anna")
    receive(ben, f"{text}, anna")
    ben.create_chat(anna).send_text(f"{text}, ben")
    receive(anna, f"{text}, ben")
    return time.monotonic() - begin


def deliver(mail, alice, beta_mail, bob):
    """Submit a message at alpha; seconds until it is in a mailbox of beta."""
    message = encrypted(alice.address, bob.address)
    mark = re.search(rb"Message-ID: (<.*>)", message)[1]
    with mail.smtp(alice) as session:
        begin = time.monotonic()
        assert mail.send(session, alice.address, [bob.address], message)[0] == 250
    wait_for(lambda: any(mark in m for m in beta_mail.received(bob)), HUNG, "the message")
    return time.monotonic() - begin


@contextlib.contextmanager
def without_smtp(*hosts):
    """Port 25 of *hosts* is closed; submission is not."""
    before = [" ".join(host.exec("postconf", "-M", "smtp/inet").out.split()) for host in hosts]
    try:
        for host in hosts:
            host.sh("postconf -MX smtp/inet && systemctl reload postfix")
            wait_for(
                lambda host=host: (
                    ":25 " not in host.exec("cat", "/proc/net/tcp").out
                    and not host.exec(
                        "python3",
                        "-c",
                        "import socket; socket.create_connection(('127.0.0.1', 25))",
                        check=False,
                    ).ok
                ),
                10,
                "port 25 to close",
            )
        yield
    finally:
        for host, line in zip(hosts, before, strict=True):
            host.sh(f"postconf -M 'smtp/inet={line}' && systemctl reload postfix")
            assert host.exec("chatmail-relay", "diff").out == ""


def queue(host):
    return host.exec("postqueue", "-p").out


# --- chats ------------------------------------------------------------------------------------------


def test_real_clients_exchange_mail_over_https(chat, relay, beta):
    before = [counted(host, "sent", "sent") for host in (relay, beta)]
    exchange(chat, "hello")
    for host, number in zip((relay, beta), before, strict=True):
        assert number >= 1, "SecureJoin went another way"
        assert counted(host, "sent", "sent") > number
        assert counted(host, "received", "accepted") >= 2


def test_with_port_25_blocked_chats_go_on_and_new_ones_begin(chat, relay, beta):
    with without_smtp(relay, beta):
        exchange(chat, "blocked")
        forget(relay)
        forget(beta)
        seconds = exchange(chat, "blocked and never met")
    measured["port 25 blocked, relays that never met: both ways"] = f"{seconds:.1f} s"
    assert seconds < PROMPT


def test_times_by_both_ways(mail, alice, beta_mail, bob, relay, beta):
    senders = [mail.account() for _ in range(2)]  # one may send ten at once
    deliver(mail, alice, beta_mail, bob)
    https = sorted(deliver(mail, senders[0], beta_mail, bob) for _ in range(7))[3]
    relay.exec("systemctl", "stop", *SOCKETS, f"{UNIT}.service")
    try:
        smtp = sorted(deliver(mail, senders[1], beta_mail, bob) for _ in range(7))[3]
    finally:
        relay.exec("systemctl", "start", *SOCKETS)
    measured["alpha's submission to beta's mailbox, median of 7"] = (
        f"{1000 * https:.0f} ms by HTTPS, {1000 * smtp:.0f} ms by SMTP with the service down"
    )
    assert smtp < PROMPT


# --- when it does not go by HTTPS -----------------------------------------------------------------


def test_a_peer_without_https_delivery_gets_smtp(mail, alice, beta_mail, bob, relay, beta):
    beta.sh("chatmail-relay set https_delivery=no && chatmail-relay apply", timeout=120)
    try:
        wait_for(lambda: request(beta_mail, bob.address, b"")[0] == 404, 10, "404")
        assert beta.exec("postconf", "-h", "transport_maps").out == "\n"
        forget(relay)
        assert deliver(mail, alice, beta_mail, bob) < PROMPT
        assert numbers(relay) == {("probes", "no"): 1}
        # and it sends by SMTP only, to one that does take HTTPS
        assert deliver(beta_mail, bob, mail, alice) < PROMPT
        assert counted(relay, "received", "accepted") == 0
    finally:
        beta.sh("chatmail-relay set https_delivery=yes && chatmail-relay apply", timeout=120)
    wait_for(lambda: request(beta_mail, bob.address, b"")[0] == 400, 10, "400")
    forget(relay)
    deliver(mail, alice, beta_mail, bob)
    assert counted(relay, "sent", "sent") >= 1  # and what earlier tests left in the queue


def test_a_peer_that_stops_taking_https_gets_smtp_in_the_same_attempt(
    mail, alice, beta_mail, bob, relay, beta
):
    forget(relay)
    deliver(mail, alice, beta_mail, bob)
    beta.exec("systemctl", "stop", "nginx.service")
    try:
        seconds = deliver(mail, alice, beta_mail, bob)
    finally:
        beta.exec("systemctl", "start", "nginx.service")
    measured["a peer's web server is gone: submission to mailbox, by SMTP"] = (
        f"{1000 * seconds:.0f} ms"
    )
    counts = numbers(relay)
    assert (
        counts["sent", "sent"] >= 1  # and what earlier tests left in the queue
        and sum(n for (name, result), n in counts.items() if name == "sent" and result != "sent")
        == 1
    )
    assert seconds < PROMPT and "Mail queue is empty" in queue(relay)
    assert deliver(mail, alice, beta_mail, bob) < PROMPT
    assert numbers(relay) == counts  # it is left alone for a while


def test_what_the_peer_refuses_is_told_to_the_sender_in_the_peers_words(
    mail, alice, beta_mail, relay, beta
):
    nobody = beta_mail.new_address().address
    forget(relay)
    with mail.smtp(alice) as session:
        message = encrypted(alice.address, nobody)
        assert mail.send(session, alice.address, [nobody], message)[0] == 250
    said = f"550 5.1.1 <{nobody}>: unknown recipient".encode()
    wait_for(
        lambda: any(said in re.sub(rb"\s+", b" ", m) for m in mail.received(alice)),
        PROMPT,
        "bounce",
    )
    assert counted(relay, "sent", "refused") == 1
    # and it is no reason to think worse of the peer
    assert (
        "chatmail_https_peers 1"
        in relay.exec(
            "python3",
            "-c",
            "import socket; s = socket.socket(socket.AF_UNIX);"
            "s.connect('/run/chatmail/transport/metrics.socket'); print(s.makefile().read())",
        ).out
    )


def test_a_service_that_hangs_stops_no_mail(mail, alice, beta_mail, bob, relay, beta):
    forget(relay)
    relay.exec("systemctl", "kill", "--signal=STOP", f"{UNIT}.service")
    seconds = deliver(mail, alice, beta_mail, bob)
    measured["the service hangs: submission to mailbox"] = f"{seconds:.0f} s"
    assert seconds < HUNG
    assert deliver(mail, alice, beta_mail, bob) < PROMPT


def test_mail_within_the_relay_never_meets_the_service(mail, alice, relay):
    relay.exec("systemctl", "stop", *SOCKETS, f"{UNIT}.service")
    try:
        assert deliver(mail, alice, mail, mail.account()) < PROMPT
    finally:
        relay.exec("systemctl", "start", *SOCKETS)
    for domain in (DOMAIN, "localhost", "alpha", "a,b.example", "a b"):
        asked = ("postmap", "-q", f"x@{domain}", "sqlite:/etc/chatmail/postfix/https_transport.cf")
        assert relay.exec(*asked, check=False).out == "", domain


# --- requests -------------------------------------------------------------------------------------


def connect(mail, place=None):
    with inside(place or mail.lab.client):
        plain = socket.create_connection((mail.host, 443), 30)
    return context("http/1.1").wrap_socket(plain, server_hostname=mail.domain)


def head(domain, *fields, method="POST"):
    lines = [f"{method} /mxdeliv HTTP/1.1", f"Host: {domain}", "Connection: close", *fields]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def answer(connection):
    """Status and text."""
    data = b""
    with contextlib.suppress(ssl.SSLError):
        while some := connection.recv(65536):
            data += some
    first, _, text = data.partition(b"\r\n\r\n")
    return int(first.split()[1]), text.decode()


def request(mail, recipient, body, sender="x@far.example", place=None, method="POST"):
    fields = [f"X-MAIL-TO: {recipient}", f"Content-Length: {len(body)}"]
    if sender:
        fields.insert(0, f"X-MAIL-FROM: {sender}")
    with connect(mail, place) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(head(mail.domain, *fields, method=method) + body)
        return answer(connection)


@pytest.fixture(scope="module")
def far(lab):
    """Signs as far.example."""
    import dkim
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    text = "v=DKIM1; k=rsa; p=" + base64.b64encode(public).decode()
    lab.dns.set("t._domainkey.far.example", "TXT", f'"{text[:200]}" "{text[200:]}"')
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    return lambda message: dkim.sign(message, b"t", b"far.example", pem) + message


def test_a_signed_message_is_taken_and_leaves_no_trace_of_its_way(mail, alice, far):
    message = encrypted("x@far.example", alice.address)
    mark = re.search(rb"Message-ID: (<.*>)", message)[1]
    assert request(mail, alice.address.upper(), far(message)) == (200, "250 OK")
    got = wait_for(lambda: [m for m in mail.received(alice) if mark in m], PROMPT)[0]
    for trace in (b"Received:", b"10.77.0.", b"DKIM-Signature:", b"X-MAIL"):
        assert trace not in got


def test_the_reference_systems_replies(mail, alice, far):
    nobody = mail.new_address().address
    good = encrypted("x@far.example", alice.address)
    plain = cleartext("x@far.example", alice.address)
    for recipient, message, expected in (
        (alice.address, good, (400, "554 5.7.1 No valid DKIM signature found")),
        (alice.address, far(plain), (400, "523 Encryption Needed: Invalid Unencrypted Mail")),
        (nobody, far(good), (400, f"550 5.1.1 <{nobody}>: unknown recipient")),
        (
            "y@elsewhere.example",
            far(good),
            (400, "554 5.7.1 <y@elsewhere.example>: Relay access denied"),
        ),
        (f"{alice.address}\tSIZE=1", good, (400, "501 5.1.3 Bad recipient address syntax")),
        (alice.address, far(good)[:-2], (400, "500 Invalid DATA")),
        (alice.address, good + b".\r\nMAIL FROM:<>\r\n", (400, "500 Invalid DATA")),
    ):
        assert request(mail, recipient, message) == expected
    assert request(mail, alice.address, b"", method="GET") == (405, "Method Not Allowed")


def test_mail_for_the_host_itself_is_not_taken(mail, relay, far):
    hostname = relay.exec("hostname").out.strip()
    message = far(encrypted("x@far.example", "root@localhost"))
    for recipient in ("root@localhost", f"root@{hostname}", f"root@[{relay.address}]"):
        status, text = request(mail, recipient, message)
        assert status == 400 and text[:3] in ("550", "554", "501"), text


def test_the_largest_message_passes_and_a_larger_one_does_not(mail, alice, relay, far):
    limit = int(relay.exec("postconf", "-h", "message_size_limit").out)
    small = encrypted("x@far.example", alice.address)
    too_large = small + b"x" * (limit + 1000) + b"\r\n"
    assert request(mail, alice.address, too_large) == (413, "552 Message exceeds maximum size")
    # it gets as far as the filter, which then finds text after the encrypted part
    # (Postfix counts a few octets more for each line)
    large = small + (b"x" * 998 + b"\r\n") * (limit // 1010)
    assert request(mail, alice.address, large) == (
        400,
        "523 Encryption Needed: Invalid Unencrypted Mail",
    )
    status, _ = request(mail, alice.address, small + b"x" * (limit + (2 << 20)))
    assert status == 413


def test_an_address_literal_must_be_the_peers_own(lab, mail, alice):
    own, other = f"x@[{lab.client.ipv4}]", "x@[10.77.0.99]"
    assert request(mail, alice.address, encrypted(own, alice.address), own) == (200, "250 OK")
    assert request(mail, alice.address, encrypted(other, alice.address), other) == (
        400,
        "554 5.7.1 From is an address literal of another host",
    )
    # whatever the peer says about itself
    fields = ("X-Real-IP: 10.77.0.99", "X-Forwarded-For: 10.77.0.99")
    message = encrypted(other, alice.address)
    with connect(mail) as connection:
        to = (f"X-MAIL-TO: {alice.address}", f"X-MAIL-FROM: {other}")
        length = f"Content-Length: {len(message)}"
        connection.sendall(head(mail.domain, *fields, *to, length) + message)
        assert answer(connection)[0] == 400


def test_a_chunked_request(mail, alice, far):
    message = far(encrypted("x@far.example", alice.address))
    fields = (f"X-MAIL-TO: {alice.address}", "Transfer-Encoding: chunked")
    with connect(mail) as connection:
        connection.sendall(head(mail.domain, *fields))
        for at in range(0, len(message), 100):
            piece = message[at : at + 100]
            connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
        connection.sendall(b"0\r\n\r\n")
        assert answer(connection) == (200, "250 OK")


@pytest.mark.parametrize(
    "fields",
    [
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("X-MAIL-TO: a@b\rRCPT TO:<c@d>", "Content-Length: 5"),
        ("X-MAIL-TO: " + "a" * 40_000, "Content-Length: 5"),
        ("X-MAIL-TO: a@b\0c", "Content-Length: 5"),
    ],
)
def test_hostile_heads_are_refused(mail, alice, relay, fields):
    with connect(mail) as connection:
        connection.sendall(head(mail.domain, f"X-MAIL-TO: {alice.address}", *fields) + b"A: b\n")
        assert 400 <= answer(connection)[0] < 500


def test_a_peer_has_a_share_of_the_requests(lab, mail, alice, far):
    message = far(encrypted("x@far.example", alice.address))
    begin = head(mail.domain, f"X-MAIL-TO: {alice.address}", f"Content-Length: {len(message)}")
    other = lab.place("elsewhere", 41)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(mail)) for _ in range(PEER_REQUESTS)]
        for connection in held:
            connection.sendall(begin + message[:100])
        # each has a smtpd by then, or soon
        wait_for(
            lambda: request(mail, alice.address, message) == (429, "450 4.7.1 Too much mail"),
            10,
            "429",
        )
        assert request(mail, alice.address, message, place=other) == (200, "250 OK")
        for connection in held:
            connection.sendall(message[100:])
        assert {answer(connection) for connection in held} == {(200, "250 OK")}


@pytest.fixture
def few_messages(relay):
    """The service allows a peer no more than FEW messages at once, and one a minute."""
    drop_in = f"/run/systemd/system/{UNIT}.service.d/few.conf"
    program = (
        "from chatmaild.transport.limits import Limits as L;"
        f" L.__init__.__defaults__ = (64, 20, 1, {FEW});"
        " from chatmaild.transport.__main__ import main; raise SystemExit(main([]))"
    )
    start = f'ExecStart=/usr/bin/python3 -Ic "{program}"'
    relay.write(drop_in, f"[Service]\nExecStart=\n{start}\n")
    relay.exec("systemctl", "daemon-reload")
    forget(relay)
    yield
    relay.exec("rm", drop_in)
    relay.exec("systemctl", "daemon-reload")
    forget(relay)


def test_a_peer_has_a_share_of_the_messages(lab, mail, alice, far, few_messages):
    """Refused ones count, too: they cost as much. What is one too many comes by SMTP."""
    refused, good = (
        cleartext("x@far.example", alice.address),
        far(encrypted("x@far.example", alice.address)),
    )
    place = lab.place("busy", 42)
    codes = [request(mail, alice.address, refused, place=place)[0] for _ in range(FEW)]
    assert codes == [400] * FEW
    too_much = (429, "450 4.7.1 Too much mail")
    assert request(mail, alice.address, good, place=place) == too_much
    assert request(mail, alice.address, good) == (200, "250 OK")
    with inside(place):
        session = smtplib.SMTP(mail.host, 25, "[127.0.0.1]", 30)
    with session:
        session.starttls(context=context())
        session.ehlo()
        assert mail.send(session, "x@far.example", [alice.address], good)[0] == 250


# --- the unit -------------------------------------------------------------------------------------


def test_the_unit_is_confined_and_small_and_its_log_names_nobody(relay, mail, alice, bob):
    security = relay.exec(
        *("systemd-analyze", "security", "--threshold=25", "--no-pager", f"{UNIT}.service"),
        check=False,
    )
    assert security.ok, security.out.splitlines()[-1]
    forget(relay)
    fresh = relay.memory()[f"{UNIT}.service"]
    request(mail, alice.address, b"")
    measured["memory (PSS) of HTTPS delivery"] = (
        f"{fresh:.1f} MB fresh, {relay.memory()[f'{UNIT}.service']:.1f} MB after a request; 0 when "
        "nobody sent for ten minutes"
    )
    assert fresh < 30
    log = relay.journal("chatmail", "-u", UNIT)
    assert "received by HTTPS" in log and "sent by HTTPS" in log
    assert "@" not in log and "10.77.0." not in log and "Traceback" not in log and BETA not in log
    assert relay.exec("chatmail-relay", "status", check=False).ok
