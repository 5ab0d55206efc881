# SPDX-License-Identifier: MIT
"""Relays with ordinary names in the test internet: with each other, and with peers that do things wrong."""

import contextlib
import json
import re
import smtplib
import statistics
import threading
import time

import pytest
from conftest import measured, rpc_program
from deltachat_rpc_client.const import EventType
from lab.client import clients
from lab.inet import Authority
from lab.mail import Idle, Mail, context
from lab.messages import encrypted
from lab.network import inside
from lab.peers import Manners, Peer
from lab.shell import wait_for
from test_selftest import bad, findings
from test_transport import PROMPT, counted, exchange, forget, numbers, receive, request

ALPHA, BETA = "alpha.example", "beta.example"
TIMED = 50  # messages
BURST = 10  # messages that one account may send at once


# --- two relays, by HTTPS and by SMTP -----------------------------------------------------------------


@pytest.fixture(scope="module")
def alpha_mail(lab, alpha):
    return Mail(lab, alpha.address, ALPHA)


@pytest.fixture(scope="module")
def beta_mail(lab, beta):
    return Mail(lab, beta.address, BETA)


@pytest.fixture(scope="module", autouse=True)
def told(alpha, beta):
    """Both relays log the TLS of SMTP; in the end they are as they were."""
    for host in (alpha, beta):
        host.sh("postconf -e smtp_tls_loglevel=1 && postfix reload")
    yield
    for host in (alpha, beta):
        host.sh("postconf -X smtp_tls_loglevel && postfix reload")
        assert host.exec("chatmail-relay", "diff").out == ""
        assert host.exec("postqueue", "-j").out == ""


@pytest.fixture(scope="module", params=["HTTPS", "SMTP"])
def way(request, alpha, beta, beta_mail):
    """How mail goes between the two: by SMTP because beta has HTTPS delivery switched off."""

    def switch(value, status):
        beta.sh(f"chatmail-relay set https_delivery={value} && chatmail-relay apply", timeout=120)
        wait_for(lambda: probe(beta_mail) == status, 10, f"status {status}")
        forget(alpha)

    if request.param == "SMTP":
        switch("no", 404)
    yield request.param
    if request.param == "SMTP":
        switch("yes", 405)


def probe(mail):
    return request(mail, "", b"", method="GET")[0]


@contextlib.contextmanager
def goes_by(way, *pairs):
    """What is sent inside goes from each host to the domain beside it that *way* and no other."""
    since = time.time()
    before = [counted(host, "sent", "sent") for host, _domain in pairs]
    yield
    for (host, domain), number in zip(pairs, before, strict=True):
        log = host.journal("chatmail", f"--since=@{since:.6f}")
        by_smtp = f"Verified TLS connection established to {domain}[" in log
        by_https = counted(host, "sent", "sent") > number
        assert (by_https, by_smtp) == (way == "HTTPS", way == "SMTP"), (host.name, log)


@pytest.fixture(scope="module")
def people(internet, alpha, beta, tmp_path_factory):
    """Real clients: anna, arne of alpha, ben, bea, bert of beta."""
    names = {"anna": ALPHA, "arne": ALPHA, "ben": BETA, "bea": BETA, "bert": BETA}
    folder = tmp_path_factory.mktemp("clients")
    relays = {ALPHA: alpha, BETA: beta}
    with clients(internet, folder, rpc_program(), relays, len(names)) as accounts:

        def configure(account, name):
            account.set_config("displayname", name)
            account.set_config("bot", "1")  # not limited to one message a second by itself
            account.set_config("mdns_enabled", "1")
            account.add_transport_from_qr(f"dcaccount:{names[name]}")
            account.bring_online()

        made = dict(zip(names, accounts, strict=True))
        threads = [
            threading.Thread(target=configure, args=(account, name))
            for name, account in made.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        yield made


@pytest.fixture(scope="module")
def pair(way, people, alpha, beta):
    """One of each relay who got to know each other by SecureJoin that very way."""
    names = {"HTTPS": ("anna", "ben"), "SMTP": ("arne", "bea")}
    one, other = (people[name] for name in names[way])
    with goes_by(way, (alpha, BETA), (beta, ALPHA)):
        other.secure_join(one.get_qr_code())
        other.wait_for_securejoin_joiner_success()
    return one, other


def test_real_clients_verify_each_other_and_talk_both_ways(way, pair, alpha, beta):
    with goes_by(way, (alpha, BETA), (beta, ALPHA)):
        exchange(pair, f"by {way}")


def test_receipts_come_back(way, pair):
    one, other = pair
    for sender, reader in ((one, other), (other, one)):
        sent = sender.create_chat(reader).send_text(f"read me, {way}")
        while True:
            message = reader.wait_for_incoming_msg()
            if message.get_snapshot().text == f"read me, {way}":
                break
        message.mark_seen()
        while True:
            if sender.wait_for_event(EventType.MSG_READ).msg_id == sent.id:
                break


@pytest.fixture(scope="module")
def group(people):
    """All of both relays in one group of anna's; the chat, by name."""
    chats = {"anna": people["anna"].create_group("federation")}
    code = chats["anna"].get_qr_code()
    for name in ("arne", "ben", "bea"):
        chats[name] = people[name].secure_join(code)
        people[name].wait_for_securejoin_joiner_success()
    wait_for(lambda: len(chats["ben"].get_contacts()) == len(chats), PROMPT, "the group")
    return chats


def test_in_a_group_everybody_reads_everybody(way, people, group):
    for speaker in ("arne", "bea"):
        text = f"{speaker} by {way}"
        group[speaker].send_text(text)
        for name in group:
            if name != speaker:
                receive(people[name], text)


def test_a_report_of_the_other_relay_is_signed_and_passes(way, alpha, beta, alpha_mail, beta_mail):
    """Of a recipient who went while the message waited there: so beta has taken it."""
    alice, gone = alpha_mail.account(), beta_mail.account()
    beta.sh("postconf -e defer_transports=lmtp && postfix reload")
    try:
        mark = submit(alpha_mail, alice, gone.address)
        wait_for(lambda: gone.address in waiting(beta), PROMPT, "the message at beta")
        beta.exec("chatmail-relay", "user", "delete", "--yes", gone.address)
    finally:
        beta.sh("postconf -X defer_transports && postfix reload && postqueue -f")
    with goes_by(way, (beta, ALPHA)):
        report = wait_for(lambda: found(alpha_mail, alice, mark), PROMPT, "the report")
    assert re.search(rb"^From: .*MAILER-DAEMON@beta\.example", report, re.M | re.I)
    assert b"Final-Recipient: rfc822; " + gone.address.encode() in report
    assert b"DKIM-Signature" not in report.partition(b"\r\n\r\n")[0]  # of no use any more


def test_time_to_notification(way, alpha_mail, beta_mail):
    times = []

    def send_one_by_one():
        sender, recipient = alpha_mail.account(), beta_mail.account()
        session = Idle(beta_mail.imap(recipient))
        with alpha_mail.smtp(sender) as smtp:
            for _ in range(BURST):
                message = encrypted(sender.address, recipient.address)
                reply = alpha_mail.send(smtp, sender.address, [recipient.address], message)
                accepted = time.monotonic()
                assert reply[0] == 250
                times.append(1000 * (session.notified() - accepted))
        session.close()

    # side by side: most of the time is a pause of Dovecot's
    threads = [threading.Thread(target=send_one_by_one) for _ in range(TIMED // BURST)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(times) == TIMED
    measured[f"alpha's 250 to beta's notification by {way}, median of {TIMED}"] = (
        f"{statistics.median(times):.0f} ms ({min(times):.0f} to {max(times):.0f})"
    )


def submit(mail, sender, *recipients, ehlo=None):
    """One message over submission; its Message-ID."""
    message = encrypted(sender.address, recipients[0])
    with mail.smtp(sender) as session:
        reply = mail.send(session, sender.address, list(recipients), message)
    assert reply[0] == 250, reply
    return re.search(rb"Message-ID: (<.*>)", message)[1]


def found(mail, account, mark):
    """The message with *mark* in somebody's mailbox, None if it is not there."""
    return next((message for message in mail.received(account) if mark in message), None)


def waiting(host):
    """Recipient -> why it waits, of all in the queue."""
    entries = map(json.loads, host.exec("postqueue", "-j").out.splitlines())
    return {
        recipient["address"]: recipient.get("delay_reason", "")
        for entry in entries
        for recipient in entry["recipients"]
    }


# --- peers that do things right and wrong ---------------------------------------------------------------

SLOW = 30  # domains of a server that never answers
SLOW_EACH = 5  # messages to each: Postfix' first concurrency to a destination
NOBODY = "10.77.0.199"  # no machine

#: What becomes of mail for x@DOMAIN, and the reason that is told.
DELIVERED = (
    "good.example",
    "nomx.example",
    "sixonly.example",
    "deadfirst.example",
    "expiredfirst.example",
)
HELD = {
    "expired.example": "certificate",
    "othername.example": "certificate",
    "untrusted.example": "certificate",
    "plain.example": "TLS is required, but was not offered",
    "tempfail.example": "try later",
    "closed.example": "Connection refused",
    "lame.example": "Name service error",
}
RETURNED = {
    "nullmx.example": "does not accept mail",
    "nowhere.example": "not found",
    "refusing.example": "no such user here",
    "loop.example": "loops back to myself",
    "inward.example": "loops back to myself",
}


@pytest.fixture(scope="module")
def peers(internet, alpha):
    """The servers, by name: each is the MX mx.NAME.example of NAME.example."""
    own = internet.authority
    good = own.issue(
        *("mx.good.example", "nomx.example", "sixonly.example"),
        *(f"mx.{name}.example" for name in ("slow", "refusing", "tempfail", "https")),
    )
    pairs = {
        "good": good,
        "https": good,
        "slow": good,
        "refusing": good,
        "tempfail": good,
        "plain": None,
        "expired": own.issue("mx.expired.example", days=-1),
        "othername": own.issue("mx.elsewhere.example"),
        "untrusted": Authority().issue("mx.untrusted.example"),
    }
    made = {
        name: Peer(internet, name, number, pair, https=name in ("https", "untrusted"))
        for number, (name, pair) in enumerate(pairs.items(), 61)
    }
    made["slow"].manners.silent_at = ""
    made["refusing"].manners.says["RCPT"] = "550 5.1.1 no such user here"
    made["tempfail"].manners.says["RCPT"] = "451 4.3.0 try later"
    records = {(f"{name}.example", "MX"): [f"10 mx.{name}.example."] for name in made}
    for name, peer in made.items():
        peer.publish(f"mx.{name}.example")
    made["good"].publish("nomx.example")
    made["good"].publish("sixonly.example", "AAAA")
    made["untrusted"].publish("_untrusted.example")
    records |= {(f"slow{n}.example", "MX"): ["10 mx.slow.example."] for n in range(SLOW)}
    for name, kind, *values in (
        ("nobody.example", "A", NOBODY),
        ("loopback.example", "A", "127.0.0.1"),
        ("deadfirst.example", "MX", "10 nobody.example.", "20 mx.good.example."),
        ("expiredfirst.example", "MX", "10 mx.expired.example.", "20 mx.good.example."),
        ("closed.example", "MX", "10 acme.example."),
        ("nullmx.example", "MX", "0 ."),
        ("loop.example", "MX", f"10 {ALPHA}."),
        ("inward.example", "MX", "10 loopback.example."),
        ("lame.example", "NS", "acme.example."),
    ):
        records[name, kind] = values
    internet.edit(records)
    yield made
    alpha.exec("postsuper", "-d", "ALL")
    for peer in made.values():
        peer.close()


@pytest.fixture(scope="module")
def alice(alpha_mail):
    return alpha_mail.account()


@pytest.fixture(scope="module")
def marks(alpha_mail, alice, peers):
    """A message to x@DOMAIN for each domain above, all at once: their Message-IDs by domain."""
    domains = (*DELIVERED, *HELD, *RETURNED)
    with alpha_mail.smtp(alice) as session:

        def send(domain):
            message = encrypted(alice.address, f"x@{domain}")

            def taken():
                return alpha_mail.send(session, alice.address, [f"x@{domain}"], message)[0] == 250

            wait_for(taken, PROMPT)  # ten at once, then one a second
            return re.search(rb"Message-ID: (<.*>)", message)[1]

        return {domain: send(domain) for domain in domains}


@pytest.mark.parametrize("domain", DELIVERED)
def test_mail_arrives_over_verified_tls(peers, marks, domain):
    letter = peers["good"].letter(marks[domain])
    server = "mx.good.example" if domain not in ("nomx.example", "sixonly.example") else domain
    assert letter.recipients == (f"x@{domain}",)
    assert (letter.tls, letter.name) == ("TLSv1.3", server)


@pytest.mark.parametrize("domain", HELD)
def test_mail_waits_for_a_peer_that_may_get_well(alpha, peers, marks, domain):
    reason = wait_for(lambda: waiting(alpha).get(f"x@{domain}"), PROMPT, "a reason")
    assert HELD[domain] in reason


@pytest.mark.parametrize("domain", RETURNED)
def test_mail_that_will_never_arrive_comes_back_at_once(alpha_mail, alice, marks, domain):
    report = wait_for(lambda: found(alpha_mail, alice, marks[domain]), PROMPT, "a report")
    assert RETURNED[domain] in " ".join(report.decode().split())


def test_nothing_of_it_was_told_or_sent_without_tls(peers, marks):
    for name in ("plain", "expired", "othername", "untrusted"):
        assert peers[name].letters == [], name
        verbs = {line.split()[0] for line, _hidden in peers[name].heard}
        assert verbs <= {"EHLO", "STARTTLS", "QUIT"} and "EHLO" in verbs, name
    for peer in peers.values():
        in_clear = {line.split()[0] for line, hidden in peer.heard if not hidden}
        assert in_clear <= {"EHLO", "STARTTLS", "QUIT"}


def test_slow_peers_hold_up_nobody_else(alpha, alpha_mail, beta_mail, peers):
    slow = peers["slow"]
    domains = [f"slow{n}.example" for n in range(SLOW)]
    sender = alpha_mail.account()
    for _ in range(SLOW_EACH):
        submit(alpha_mail, sender, *(f"x@{domain}" for domain in domains))
    slow.wait(lambda: len(slow.connected) >= SLOW * SLOW_EACH, 10, "connections")
    bob = beta_mail.account()
    session = Idle(beta_mail.imap(bob))
    times = []
    for _ in range(BURST - SLOW_EACH):
        submit(alpha_mail, sender, bob.address)
        begin = time.monotonic()
        times.append(session.notified() - begin)
    measured[f"the same while {len(slow.connected)} deliveries hang"] = (
        f"{1000 * statistics.median(times):.0f} ms"
    )
