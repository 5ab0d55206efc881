# SPDX-License-Identifier: MIT
"""Relays with ordinary names in the test internet: with each other, and with peers that do things wrong."""

import contextlib
import gzip
import json
import re
import smtplib
import socket
import statistics
import threading
import time

import dkim
import dns.message
import dns.query
import pytest
from conftest import measured, rpc_program
from deltachat_rpc_client.const import EventType
from lab.client import clients
from lab.inet import Authority
from lab.mail import Idle, Mail, context
from lab.messages import encrypted
from lab.network import inside
from lab.peers import Peer
from lab.shell import wait_for
from test_selftest import bad, findings
from test_transport import PROMPT, counted, exchange, forget, receive, request

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
    before = {host: host.exec("postconf", "-n").out for host in (alpha, beta)}
    for host in before:
        host.sh("postconf -e smtp_tls_loglevel=1 && systemctl reload postfix")
    yield
    for host, settings in before.items():
        host.sh("postconf -X smtp_tls_loglevel && systemctl reload postfix")
        assert host.exec("postconf", "-n").out == settings
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
        while sender.wait_for_event(EventType.MSG_READ).msg_id != sent.id:
            pass


@pytest.fixture(scope="module")
def group(people):
    """All of both relays in one group of anna's; the chat, by name."""
    chats = {"anna": people["anna"].create_group("federation")}
    code = chats["anna"].get_qr_code()
    for name in ("arne", "ben", "bea"):
        chats[name] = people[name].secure_join(code)
        people[name].wait_for_securejoin_joiner_success()
    # who does not know a member yet sends him nothing
    for name, chat in chats.items():
        wait_for(
            lambda chat=chat: len(chat.get_contacts()) == len(chats), PROMPT, f"{name}'s group"
        )
    return chats


def test_in_a_group_everybody_reads_everybody(way, people, group):
    for speaker in ("arne", "bea"):
        text = f"{speaker} by {way}"
        group[speaker].send_text(text)
        for name in group:
            if name != speaker:
                receive(people[name], text)


@pytest.mark.parametrize("way", ["HTTPS"], indirect=True)
def test_a_client_learns_that_the_other_is_gone(way, people, beta):
    anna, bert = people["anna"], people["bert"]
    # else it looks at no report, because they are not encrypted
    anna.set_config("force_encryption", "0")
    chat = anna.create_chat(bert)
    bert.stop_io()  # his next login would make the address again
    beta.exec("chatmail-relay", "user", "delete", "--yes", bert.get_config("configured_addr"))
    sent = chat.send_text("are you there?")
    while anna.wait_for_event(EventType.MSG_FAILED).msg_id != sent.id:
        pass
    assert "550 5.1.1" in sent.get_snapshot().error


def test_a_report_of_the_other_relay_is_signed_and_passes(way, alpha, beta, alpha_mail, beta_mail):
    """Of a recipient who went while the message waited there: so beta has taken it."""
    alice, gone = alpha_mail.account(), beta_mail.account()
    beta.sh("postconf -e defer_transports=lmtp && systemctl reload postfix")
    try:
        mark = submit(alpha_mail, alice, gone.address)
        wait_for(lambda: gone.address in waiting(beta), PROMPT, "the message at beta")
        beta.exec("chatmail-relay", "user", "delete", "--yes", gone.address)
    finally:
        beta.sh("postconf -X defer_transports && systemctl reload postfix")
    with goes_by(way, (beta, ALPHA)):
        report = flush_until(beta, lambda: found(alpha_mail, alice, mark))
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


def submit(mail, sender, *recipients):
    """One message over submission, as soon as the sender may have it sent; its Message-ID."""
    message = encrypted(sender.address, recipients[0])
    with mail.smtp(sender) as session:

        def sent():
            return mail.send(session, sender.address, list(recipients), message)[0] == 250

        wait_for(sent, PROMPT, "the submission")
    return re.search(rb"Message-ID: (<.*>)", message)[1]


def found(mail, account, mark):
    """The message with *mark* in somebody's mailbox, None if it is not there."""
    return next((message for message in mail.received(account) if mark in message), None)


def flush_until(host, condition):
    """Have *host* try all of its queue until *condition*: a queue manager that just reloads may not hear."""

    def look():
        host.exec("postqueue", "-f")
        return condition()

    return wait_for(look, PROMPT, "what waits in the queue")


def waiting(host):
    """Recipient -> why it waits, of all in the queue."""
    entries = map(json.loads, host.exec("postqueue", "-j").out.splitlines())
    return {
        recipient["address"]: recipient.get("delay_reason", "")
        for entry in entries
        for recipient in entry["recipients"]
    }


# --- peers that do things right and wrong ---------------------------------------------------------------

SLOW = 60  # domains of a server that never answers
SLOW_EACH = 4  # messages to each
SLOW_HOLD = 2  # deliveries that each holds: smtp_initial_destination_concurrency
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
    own, unknown = internet.authority, Authority()
    names = ("good", "https", "slow", "refusing", "tempfail")
    pairs = {name: own.issue(f"mx.{name}.example") for name in names} | {
        "good": own.issue("mx.good.example", "nomx.example", "sixonly.example"),
        "plain": None,
        "expired": own.issue("mx.expired.example", days=-1),
        "othername": own.issue("mx.elsewhere.example"),
        "untrusted": unknown.issue("mx.untrusted.example"),
        "selfsigned": unknown.issue("_selfsigned.example"),
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
    for name in ("untrusted", "selfsigned"):
        made[name].publish(f"_{name}.example")
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
    return {
        domain: submit(alpha_mail, alice, f"x@{domain}")
        for domain in (*DELIVERED, *HELD, *RETURNED)
    }


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
        letters = b"".join(letter.data for letter in peers[name].letters)
        assert marks[f"{name}.example"] not in letters
        verbs = {line.split()[0] for line, _hidden in peers[name].heard}
        assert verbs <= {"EHLO", "STARTTLS", "QUIT"} and "EHLO" in verbs, name
    for peer in peers.values():
        in_clear = {line.split()[0] for line, hidden in peer.heard if not hidden}
        assert in_clear <= {"EHLO", "STARTTLS", "QUIT"}


def test_slow_peers_hold_up_nobody_else(alpha, alpha_mail, beta_mail, peers):
    """More deliveries hang than Postfix has processes by default."""
    slow, sender, bob = peers["slow"], alpha_mail.account(), beta_mail.account()
    marks = [
        submit(alpha_mail, sender, *(f"x@slow{n}.example" for n in range(SLOW)))
        for _ in range(SLOW_EACH)
    ]
    slow.wait(lambda: len(slow.connected) >= SLOW * SLOW_HOLD, PROMPT, "connections")
    session = Idle(beta_mail.imap(bob))
    times = []
    for _ in range(BURST - SLOW_EACH):
        submit(alpha_mail, sender, bob.address)
        begin = time.monotonic()
        times.append(1000 * (session.notified() - begin))
    session.close()
    held = len(slow.connected)
    measured[f"250 to notification while {held} deliveries to slow relays hang"] = (
        f"{statistics.median(times):.0f} ms ({min(times):.0f} to {max(times):.0f})"
    )
    assert held == SLOW * SLOW_HOLD and max(times) < 1000 * PROMPT
    # and they get their mail when they are well
    slow.manners.answering.set()
    slow.wait(lambda: len(slow.letters) == SLOW * SLOW_EACH, 60, "all of the mail")
    assert {mark for mark in marks for letter in slow.letters if mark in letter.data} == set(marks)


def test_what_waited_too_long_comes_back_with_the_reason(alpha, alpha_mail, alice, peers, marks):
    lifetime = "maximal_queue_lifetime"
    before = alpha.exec("postconf", "-h", lifetime).out.strip()
    alpha.sh(f"postconf -e {lifetime}=0 && systemctl reload postfix")
    try:
        for domain, reason in HELD.items():
            report = flush_until(alpha, lambda: found(alpha_mail, alice, marks[domain]))
            assert reason in " ".join(report.decode().split())
    finally:
        alpha.sh(f"postconf -e {lifetime}={before} && systemctl reload postfix")


@pytest.mark.parametrize(("name", "way"), [("selfsigned", "SMTP"), ("untrusted", "HTTPS")])
def test_peers_that_cannot_have_a_certificate_others_trust(alpha_mail, peers, name, way):
    """An underscore before the name, or an address in place of it."""
    sender, peer = alpha_mail.account(), peers[name]
    ipv4, ipv6 = peer.place.ipv4, peer.place.ipv6
    for domain in (f"_{name}.example", f"[{ipv4}]", f"[IPv6:{ipv6}]"):
        letter = peer.letter(submit(alpha_mail, sender, f"x@{domain}"))
        assert letter.way == way and letter.tls, domain


def test_a_sender_without_a_name_comes_from_its_own_address(alpha_mail, alice, peers):
    peer = peers["selfsigned"]
    own, other = f"x@[{peer.place.ipv4}]", f"x@[{peers['good'].place.ipv4}]"
    refusal = "5.7.1 From is an address literal of another host"
    unsigned = "x@_selfsigned.example"
    with inside(peer.place):
        session = smtplib.SMTP(alpha_mail.host, 25, "[127.0.0.1]", 30)
    with session:
        session.starttls(context=context())
        session.ehlo()
        for sender, reply in (
            (own, (250, "")),
            (other, (554, refusal)),
            (unsigned, (554, "5.7.1 No valid DKIM signature found")),
        ):
            message = encrypted(sender, alice.address)
            code, text = alpha_mail.send(session, sender, [alice.address], message)
            assert (code, text if code > 250 else "") == reply
    for sender, status in ((own, 200), (other, 400)):
        message = encrypted(sender, alice.address)
        answer = request(alpha_mail, alice.address, message, sender, place=peer.place)
        assert answer[0] == status and (status == 200 or refusal in answer[1])


# --- privacy ----------------------------------------------------------------------------------------

LAPTOP = "laptop.home.example"


def telling(lab, sender, recipient):
    """A message from a client that tells about itself wherever it can."""
    fields = (
        f"Received: from {LAPTOP} ({lab.client.ipv4}) by somewhere",
        "Authentication-Results: somewhere; dkim=pass",
        f"X-Originating-IP: {lab.client.ipv4}",
        "X-Mailer: a mailer 1.0",
        "User-Agent: a mailer 1.0",
    )
    head = "".join(f"{field}\r\n" for field in fields).encode()
    return head + encrypted(sender, recipient, subject="secret plans")


def submit_telling(lab, mail, sender, recipient):
    message = telling(lab, sender.address, recipient)
    with mail.smtp(sender, 587) as session:
        session.ehlo(LAPTOP)
        assert mail.send(session, sender.address, [recipient], message)[0] == 250
    return re.search(rb"Message-ID: (<.*>)", message)[1]


def traces(lab):
    """Patterns of what tells of the client and its message."""
    addresses = (lab.client.ipv4.encode() + b"\\b", re.escape(lab.client.ipv6.encode()))
    return (*addresses, LAPTOP.encode(), b"secret plans", b"a mailer", b"X-Originating-IP")


@pytest.mark.parametrize(("name", "way"), [("good", "SMTP"), ("https", "HTTPS")])
def test_on_the_wire_nothing_tells_of_the_client(
    lab, internet, alpha, alpha_mail, alice, peers, name, way
):
    mark = submit_telling(lab, alpha_mail, alice, f"x@{name}.example")
    letter = peers[name].letter(mark)
    assert (letter.way, letter.sender) == (way, alice.address)
    assert letter.client in (alpha.namespace.ipv4, alpha.namespace.ipv6)
    assert letter.helo == (ALPHA if way == "SMTP" else "")
    for trace in traces(lab):
        assert not re.search(trace, letter.data), trace
    heard = "\n".join(line for line, _hidden in peers[name].heard)
    assert LAPTOP not in heard and lab.client.ipv4 + "]" not in heard
    message = letter.data if way == "SMTP" else letter.data.partition(b"\r\n\r\n")[2]
    assert dkim.verify(message, dnsfunc=lambda key, **_: key_of(internet, key))


def key_of(internet, name):
    """The text of a DKIM key's record."""
    with internet.lab.at_client():
        query = dns.message.make_query(name.decode(), "TXT")
        reply = dns.query.tcp(query, internet.resolver, timeout=10)
    (record,) = reply.answer[0]
    return b"".join(record.strings)


def test_nothing_is_kept_of_the_way(lab, way, alpha_mail, alice, beta, beta_mail):
    bob = beta_mail.account()
    mark = submit_telling(lab, alpha_mail, alice, bob.address)
    wait_for(lambda: found(beta_mail, bob, mark), PROMPT, "the message")
    folder = f"/var/lib/chatmail/mail/{BETA}/{bob.address}"
    file = beta.sh(f"find {folder}/cur {folder}/new -type f").out.strip()
    stored = (beta.root / file.lstrip("/")).read_bytes()
    if stored.startswith(b"\x1f\x8b"):
        stored = gzip.decompress(stored)
    assert mark in stored
    for trace in (*traces(lab), b"DKIM-Signature", b"Authentication-Results", b"(?m)^Received"):
        assert not re.search(trace, stored, re.I), trace
    assert ALPHA.encode() not in stored.replace(alice.address.encode(), b"")


def test_verify_tells_neither_who_has_a_mailbox_nor_who_is_on_the_host(beta_mail):
    mailboxes = (
        beta_mail.account().address,
        beta_mail.new_address().address,
        f"root@{BETA}",
    )
    users = ("root", "backup", "nosuchuser")  # backup: Debian's base-passwd
    with beta_mail.smtp(None, 25) as session:

        def verify(name):
            code, text = session.docmd("VRFY", name)
            return code, text.replace(name.encode(), b"NAME")

        assert {verify(name) for name in mailboxes} == {(252, b"2.0.0 NAME")}
        (reply,) = {verify(name) for name in users}
        assert reply[0] == 554
        assert session.docmd("EXPN", mailboxes[0])[0] in (500, 502)


# --- commands ---------------------------------------------------------------------------------------


def records(host):
    """Exit status of `chatmail-relay dns`, and what it says of records that are not well."""
    done = host.exec("chatmail-relay", "dns", "--json", check=False)
    wrong = [item for item in json.loads(done.out) if item["state"] != "ok"]
    return done.code, {(item["name"], item["type"]): item["problems"] for item in wrong}


def way_of_mail(since, *hosts):
    """For who wants to know where a message is."""
    return "\n".join(f"{host.name}: {waiting(host)}\n{host.state(since)}" for host in hosts)


def test_both_relays_are_well_together(alpha, beta):
    for host in (alpha, beta):
        assert records(host) == (0, {})
    since = time.time()
    status, said = findings(alpha, BETA)
    assert (status, bad(said)) == (0, set()), way_of_mail(since, alpha, beta)
    there, back = (said[f"delivery {word} {BETA}"]["seconds"] for word in ("to", "from"))
    measured[f"chatmail-relay test {BETA}"] = f"{there:.2f} s to it, {back:.2f} s from it"


@pytest.mark.parametrize(
    ("name", "kind", "value", "problem"),
    [
        (f"chatmail._domainkey.{ALPHA}", "TXT", '"v=DKIM1; k=rsa; p="', "is a revoked key"),
        (ALPHA, "MX", f"5 {BETA}.", f"says 5 {BETA}."),
        (f"_mta-sts.{ALPHA}", "TXT", '"v=STSv1"', "not valid"),
    ],
)
def test_a_broken_record_is_found(internet, alpha, beta, name, kind, value, problem):
    since = time.time()
    internet.set(name, kind, value)
    try:
        status, wrong = records(alpha)
        assert status == 1 and list(wrong) == [(name, kind)]
        assert problem in " ".join(wrong[name, kind])
        if "_domainkey" in name:
            _status, said = findings(alpha, BETA)
            assert f"delivery to {BETA}" in bad(said), way_of_mail(since, alpha, beta)
            assert "No valid DKIM signature found" in said[f"delivery to {BETA}"]["detail"]
    finally:
        internet.publish_zone(ALPHA, alpha)


# --- a provider that blocks port 25 -----------------------------------------------------------------


@pytest.mark.parametrize("way", ["HTTPS"], indirect=True)
def test_with_port_25_blocked_chats_go_on(lab, way, pair, alpha, beta):
    with lab.network.blocked(25, alpha.namespace, beta.namespace):
        with inside(alpha.namespace), pytest.raises(TimeoutError):
            socket.create_connection((beta.address, 25), 0.5)
        forget(alpha)
        forget(beta)
        seconds = exchange(pair, "blocked")
    measured["port 25 blocked, relays that never met: both ways"] = f"{seconds:.1f} s"
    assert seconds < PROMPT
