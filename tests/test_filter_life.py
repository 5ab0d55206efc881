# SPDX-License-Identifier: MIT
"""The filter in service: restarts, reloads, blocked users, and signatures that others verify."""

import re
import smtplib
import socket
import ssl
import threading
import time
from email.utils import formatdate, make_msgid

import dkim
import pytest
from lab import image
from lab.network import inside
from lab.shell import wait_for
from test_mail_rules import encrypted

DOMAIN = "_alpha.example"
FAR = "_far.example"  # its relay is the sink below; the underscore lets its certificate be anything
SELECTOR = f"chatmail._domainkey.{DOMAIN}"
UNIT = "chatmail-filtermail.service"
SENDERS = 6  # at a time, over restarts
GRACE = 5  # seconds a message under way has when the filter stops


@pytest.fixture(scope="module")
def alice(mail):
    return mail.account()


@pytest.fixture(scope="module")
def bob(mail):
    return mail.account()


def message(sender, recipient):
    """An encrypted message, and the mark by which to know it again."""
    text = encrypted(sender.address, recipient.address)
    mark = make_msgid(domain="mark.example").encode()
    head = b"Date: " + formatdate().encode() + b"\r\nMessage-ID: " + mark
    return re.sub(rb"Message-ID: <.*?>", head, text), mark


def has(mail, account, mark):
    return sum(mark in got for got in mail.received(account))


def start(session, sender, recipient):
    """The first refusal of MAIL and RCPT, or 250; on port 25 the filter is not waited for at MAIL."""
    code = session.mail(sender)[0]
    return session.rcpt(recipient)[0] if code == 250 else code


def restart(relay):
    """Restart the filter, also if these tests do it more often than systemd allows."""
    relay.exec("systemctl", "reset-failed", UNIT)
    relay.exec("systemctl", "restart", UNIT)


def said(error):
    """Code of a refusal, or 421 for a connection that was closed without one."""
    return getattr(error, "smtp_code", 421)


# --- restart and reload ---------------------------------------------------------------------------


def test_a_reload_drops_no_session_and_no_message(mail, relay, alice, bob):
    first, first_mark = message(alice, bob)
    second, second_mark = message(alice, bob)
    with mail.smtp(alice) as busy, mail.smtp(alice) as idle, mail.smtp(None, 25) as incoming:
        busy.mail(alice.address)
        busy.rcpt(bob.address)
        busy.putcmd("data")
        assert busy.getreply()[0] == 354
        busy.send(first[:300])
        pid = relay.exec("systemctl", "show", "-P", "MainPID", UNIT).out
        relay.exec("systemctl", "reload", UNIT)
        busy.send(first[300:] + b".\r\n")
        assert busy.getreply()[0] == 250
        assert mail.send(idle, alice.address, [bob.address], second)[0] == 250
        assert start(incoming, "x@far.example", bob.address) == 250
    assert relay.exec("systemctl", "show", "-P", "MainPID", UNIT).out == pid
    wait_for(lambda: has(mail, bob, first_mark) and has(mail, bob, second_mark), 20)


def test_a_restart_costs_idle_sessions_one_421(mail, relay, alice, bob):
    text, mark = message(alice, bob)
    sessions = [mail.smtp(alice, 465), mail.smtp(alice, 587), mail.smtp(None, 25)]
    restart(relay)
    for session in sessions:
        assert start(session, alice.address, bob.address) == 421
        with pytest.raises((smtplib.SMTPException, OSError)):
            session.noop()
        session.close()
    with mail.smtp(alice) as session:
        assert mail.send(session, alice.address, [bob.address], text)[0] == 250
    wait_for(lambda: has(mail, bob, mark), 20)


@pytest.mark.parametrize("in_time", [True, False], ids=["in time", "too late"])
def test_a_message_under_way_is_taken_or_asked_for_again(mail, relay, alice, bob, in_time):
    text, mark = message(alice, bob)
    session = mail.smtp(alice)
    session.mail(alice.address)
    session.rcpt(bob.address)
    session.putcmd("data")
    assert session.getreply()[0] == 354
    session.send(text[:300])
    began = time.time()
    stopping = threading.Thread(target=restart, args=(relay,))
    stopping.start()
    relay.wait_log(f"Stopping {UNIT}|Stopping chatmail relay: encryption", began)
    if not in_time:
        stopping.join()
        assert time.time() - began > GRACE - 1
    session.send(text[300:] + b".\r\n")
    try:
        code = session.getreply()[0]
    except (smtplib.SMTPException, OSError) as error:
        code = said(error)
    session.close()
    stopping.join()
    if in_time:
        assert code == 250
    else:
        assert 400 <= code < 500
        with mail.smtp(alice) as again:
            assert mail.send(again, alice.address, [bob.address], text)[0] == 250
    wait_for(lambda: has(mail, bob, mark), 20)
    assert has(mail, bob, mark) == 1


def test_over_restarts_every_message_is_delivered_once(mail, relay):
    """Clients that send all the time and try again after a 4xx, as Delta Chat does."""
    target = mail.account()
    senders = [mail.account() for _ in range(SENDERS)]
    stop, marks, refused, failures = threading.Event(), [], [], []

    def submit(sender, text):
        """Whether it was taken; adds to refused if not."""
        try:
            with mail.smtp(sender) as session:
                code = mail.send(session, sender.address, [target.address], text)[0]
        except (smtplib.SMTPException, OSError) as error:
            code = said(error)
        if code != 250:
            refused.append(code)
        return code == 250

    def send(sender):
        try:
            while not stop.is_set():
                text, mark = message(sender, target)
                while not (taken := submit(sender, text)) and not stop.wait(0.05):
                    pass
                if taken:
                    marks.append(mark)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=send, args=(sender,)) for sender in senders]
    for thread in threads:
        thread.start()
    try:
        for number in range(3):
            wait_for(lambda number=number: len(marks) > 5 * (number + 1), 30, "messages")
            restart(relay)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert failures == [] and all(400 <= code < 500 for code in refused)

    def delivered():
        got = b"".join(mail.received(target))
        return all(mark in got for mark in marks)

    wait_for(delivered, 30, f"{len(marks)} messages")
    got = b"".join(mail.received(target))
    assert [mark for mark in marks if got.count(mark) != 1] == []


def test_the_sockets_outlive_the_service(relay):
    inodes = "stat -c %i /var/spool/postfix/chatmail/*.sock"
    before = relay.sh(inodes).out
    restart(relay)
    assert relay.sh(inodes).out == before


# --- blocked users --------------------------------------------------------------------------------


def test_who_is_disabled_neither_sends_nor_receives_and_senders_are_told(mail, relay, alice, bob):
    erin = mail.account()
    text, mark = message(alice, bob)
    flag = f"/var/lib/chatmail/mail/{DOMAIN}/{erin.address}/DISABLED"
    with mail.smtp(erin) as open_session:
        relay.exec("touch", flag)
        code, reply = open_session.mail(erin.address)
        assert (code, reply.decode()) == (554, f"5.7.1 <{erin.address}>: account disabled")
    with mail.smtp(None, 25) as session:
        session.mail("x@far.example")
        code, reply = session.rcpt(erin.address)
        assert (code, reply.decode()) == (550, f"5.2.1 <{erin.address}>: account disabled")
        assert session.rcpt(bob.address)[0] == 250
    with mail.smtp(alice) as session:
        assert mail.send(session, alice.address, [erin.address, bob.address], text)[0] == 250
    wait_for(lambda: has(mail, bob, mark), 20)
    wait_for(lambda: has(mail, alice, erin.address.encode()), 20, "a bounce")


# --- signatures -----------------------------------------------------------------------------------


class Sink:
    """The relay of FAR: takes every message over STARTTLS."""

    def __init__(self, namespace, tls):
        self.messages = []
        self._tls = tls
        with inside(namespace):
            self._listener = socket.create_server((namespace.ipv4, 25))
        self._listener.settimeout(0.2)
        self._open = True
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self):
        self._open = False
        self._thread.join(10)
        self._listener.close()

    def wait(self, mark):
        return wait_for(lambda: [m for m in self.messages if mark in m], 30, f"{mark!r}")[0]

    def _serve(self):
        while self._open:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(10)
            try:
                self._session(connection)
            except OSError:
                pass
            finally:
                connection.close()

    def _session(self, connection):
        connection.sendall(b"220 far ESMTP\r\n")
        stream = connection.makefile("rb")
        while line := stream.readline():
            command = line.split(b" ")[0].strip().upper()
            if command == b"EHLO":
                connection.sendall(b"250-far\r\n250 STARTTLS\r\n")
            elif command == b"STARTTLS":
                connection.sendall(b"220 go\r\n")
                stream.close()
                connection = self._tls.wrap_socket(connection, server_side=True)
                stream = connection.makefile("rb")
            elif command == b"DATA":
                connection.sendall(b"354 go\r\n")
                lines = []
                while (text := stream.readline()) and text != b".\r\n":
                    lines.append(text[1:] if text.startswith(b".") else text)
                self.messages.append(b"".join(lines))
                connection.sendall(b"250 taken\r\n")
            elif command == b"QUIT":
                connection.sendall(b"221 bye\r\n")
                return
            else:
                connection.sendall(b"250 ok\r\n")


@pytest.fixture(scope="module")
def second(lab, relay, tmp_path_factory):
    """The second party: mail for FAR ends there, and the relay's key is in the DNS."""
    folder = tmp_path_factory.mktemp("far")
    for name in ("key", "crt"):
        (folder / name).write_text(relay.read(f"/var/lib/chatmail/tls/self-signed.{name}"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / "crt", folder / "key")
    lab.dns.set(FAR, "A", lab.client.ipv4)
    record = "v=DKIM1; k=rsa; p=" + public_key(relay, "rsa")
    lab.dns.set(SELECTOR, "TXT", f'"{record[:200]}" "{record[200:]}"')
    record = "v=DKIM1; k=ed25519; p=" + public_key(relay, "ed25519")
    lab.dns.set(f"chatmail-ed25519._domainkey.{DOMAIN}", "TXT", f'"{record}"')
    sink = Sink(lab.client, tls)
    yield sink
    sink.close()


def public_key(relay, kind):
    path = f"/var/lib/chatmail/keys/dkim/{kind}.pem"
    tail = "| tail -c 32 " if kind == "ed25519" else ""
    return relay.sh(f"openssl pkey -in {path} -pubout -outform DER {tail}| base64 -w0").out.strip()


@pytest.fixture(scope="module")
def opendkim(lab):
    """Another machine, with OpenDKIM's verifier; tells what it says of a message."""
    with image.host_tree() as tree:
        image.download(tree, "opendkim-tools")
    host = lab.host("verifier", 12)
    host.sh("apt-get install -qq --yes --no-install-recommends opendkim-tools", timeout=120)
    host.write("/etc/resolv.conf", f"nameserver {lab.dns.address}\n")

    def verify(text):
        (host.root / "root/message").write_bytes(text)
        return host.sh("opendkim-testmsg </root/message", check=False)

    yield verify
    lab.remove(host)


def dkimpy(lab, text):
    """Whether dkimpy finds the first signature valid, with the keys of the lab's DNS."""

    def lookup(name, timeout=5):
        (record,) = lab.dns._records[name.decode(), "TXT"]
        return "".join(re.findall('"([^"]*)"', record)).encode()

    return dkim.verify(text, dnsfunc=lookup)


def test_mail_and_bounces_are_signed_so_that_others_can_verify(
    lab, mail, relay, alice, bob, second, opendkim
):
    text, mark = message(alice, bob)
    with mail.smtp(alice) as session:
        assert mail.send(session, alice.address, [f"x@{FAR}"], text)[0] == 250
    nobody = mail.new_address().address
    relay.exec("sendmail", "-f", f"x@{FAR}", nobody, input="Subject: lost\n\nhello\n")
    for sent in (second.wait(mark), second.wait(nobody.encode())):
        assert dkimpy(lab, sent)
        assert opendkim(sent).ok
        changed = sent.replace(b"\r\n\r\n", b"\r\n\r\nx", 1)
        assert not dkimpy(lab, changed) and not opendkim(changed).ok


def test_a_bounce_passes_the_filter_of_another_relay(mail, relay, bob, second):
    """It is cleartext, and the null sender's: the rule for mailer-daemon reports lets it pass."""
    nobody = mail.new_address().address
    relay.exec("sendmail", "-f", f"x@{FAR}", nobody, input="Subject: lost\n\nhello\n")
    bounce = second.wait(nobody.encode())
    assert b"Auto-Submitted: auto-replied" in bounce and b"multipart/report" in bounce
    with mail.smtp(None, 25) as session:
        assert mail.send(session, "", [bob.address], bounce)[0] == 250
        changed = bounce.replace(b"Undelivered", b"undelivered")
        reply = mail.send(session, "", [bob.address], changed)
    assert reply == (554, "5.7.1 No valid DKIM signature found")
    wait_for(lambda: has(mail, bob, nobody.encode()), 20)


def test_changed_settings_reach_open_sessions(lab, mail, relay, alice, bob, second, opendkim):
    plain = f"From: <{alice.address}>\r\nTo: <{bob.address}>\r\n\r\nhello\r\n".encode()
    text, mark = message(alice, bob)
    with mail.smtp(alice) as session:
        assert mail.send(session, alice.address, [bob.address], plain)[0] == 523
        try:
            passthrough = f"passthrough_senders={alice.address}"
            relay.exec("chatmail-relay", "set", passthrough, "dkim_ed25519=yes")
            relay.exec("chatmail-relay", "apply", timeout=120)
            assert mail.send(session, alice.address, [bob.address], plain)[0] == 250
            assert mail.send(session, alice.address, [f"x@{FAR}"], text)[0] == 250
        finally:
            relay.exec("chatmail-relay", "set", "passthrough_senders=", "dkim_ed25519=no")
            relay.exec("chatmail-relay", "apply", timeout=120)
        assert mail.send(session, alice.address, [bob.address], plain)[0] == 523
    sent = second.wait(mark)
    assert sent.count(b"DKIM-Signature:") == 2 and b"a=ed25519-sha256" in sent
    assert dkimpy(lab, sent) and opendkim(sent).ok


def test_where_postfix_says_so_another_milter_signs_and_verifies(mail, relay, alice, bob, second):
    """What chatmail-opendkim-conf sets; without that milter nothing is signed or verified."""
    unsigned = encrypted("x@far.example", bob.address)
    two_from = b"From: <y@far.example>\r\n" + unsigned

    def receive(text):
        with mail.smtp(None, 25) as session:
            return mail.send(session, "x@far.example", [bob.address], text)

    def is_signed():
        text, mark = message(alice, bob)
        with mail.smtp(alice) as session:
            assert mail.send(session, alice.address, [f"x@{FAR}"], text)[0] == 250
        return b"DKIM-Signature" in second.wait(mark)

    def say(value):  # a waiting smtpd(8) serves one more client with the old settings
        relay.exec("postconf", f"milter_macro_defaults={value}")
        relay.exec("postfix", "reload")

    before = relay.exec("postconf", "-h", "milter_macro_defaults").out.strip()
    say("{chatmail_dkim}=opendkim")
    try:
        wait_for(lambda: receive(unsigned)[0] == 250, 20, "no verification")
        wait_for(lambda: not is_signed(), 20, "no signature")
        assert receive(two_from)[0] == 554
    finally:
        say(before)
    no_signature = (554, "5.7.1 No valid DKIM signature found")
    wait_for(lambda: receive(unsigned) == no_signature, 20, "verification")
    wait_for(is_signed, 20, "a signature")
    assert relay.exec("chatmail-relay", "diff").out == ""


def test_the_numbers_say_what_happened(relay):
    reader = (
        "import socket; s = socket.socket(socket.AF_UNIX);"
        "s.connect('/run/chatmail/filtermail/metrics.socket'); print(s.makefile().read())"
    )
    text = relay.exec("python3", "-c", reader).out
    for line in (
        'chatmail_mail_accepted_total{direction="outgoing",kind="encrypted mail"} ',
        'chatmail_mail_refused_total{direction="incoming",reason="no valid DKIM signature"} ',
        'chatmail_dkim_total{result="signed"} ',
        'chatmail_dkim_total{result="valid"} ',
    ):
        assert re.search(re.escape(line) + "[1-9]", text), text
