# SPDX-License-Identifier: MIT
"""Deletion of old mail and idle accounts, trimming of full mailboxes, and the storage report."""

import datetime
import imaplib
import json
import re
import time

import pytest
from conftest import DOMAIN, measured
from lab.shell import wait_for
from test_mail_rules import encrypted

STORE = f"/var/lib/chatmail/mail/{DOMAIN}"
QUOTA = 500 * 2**20  # the default
MESSAGE = b"Subject: [...]\r\n\r\nhello\r\n"


def append(session, age, text=MESSAGE, folder="INBOX"):
    """Store a message that is *age* days old."""
    date = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=age)
    answer = session.append(folder, "", imaplib.Time2Internaldate(date), text)
    assert answer[0] == "OK", answer


def used(session):
    """Bytes that the client is told, in units of 1024."""
    _status, (_roots, quotas) = session.getquotaroot("INBOX")
    return int(quotas[0].split(b"(STORAGE ")[1].split()[0])


def expire(relay):
    relay.exec("systemctl", "start", "chatmail-expire.service")


def expect(session, wanted):
    """Read what the server says until a line with *wanted*; fails after the session's timeout."""
    while wanted not in (line := session.readline()):
        assert line, f"closed before {wanted!r}"


def expect_expunged(session, messages, *gone):
    """Read what the server says until those are *gone* of so many *messages*, in whatever order and steps."""
    left = list(range(1, messages + 1))
    while set(gone) & set(left):
        line = session.readline()
        assert line, f"closed, {left} are left"
        if number := re.fullmatch(rb"\* (\d+) EXPUNGE\r\n", line):
            del left[int(number[1]) - 1]
    assert left == [number for number in range(1, messages + 1) if number not in gone]


@pytest.fixture
def alice(mail):
    return mail.account()


def test_both_timers_wait_for_their_next_run(relay):
    for name in ("chatmail-expire", "chatmail-fsreport"):
        timer = f"{name}.timer"
        assert relay.exec("systemctl", "is-enabled", timer).out == "enabled\n"
        shown = relay.exec("systemctl", "show", "-P", "NextElapseUSecRealtime", timer).out
        assert shown.strip() not in ("", "n/a")
    said = relay.exec("chatmail-relay", "status").out
    assert "ok  unit chatmail-expire.timer: active (waiting)" in said
    assert "ok  last run of chatmail-expire.service: success" in said


@pytest.mark.parametrize("name", ["chatmail-expire.service", "chatmail-fsreport.service"])
def test_both_run_with_least_privilege(relay, name):
    done = relay.exec(
        "systemd-analyze", "security", "--threshold=25", "--no-pager", name, check=False
    )
    assert done.ok, done.out.splitlines()[-1]


def test_old_messages_vanish_before_the_eyes_of_an_idle_client(relay, mail, alice):
    session = mail.imap(alice)
    session.create("Sent")
    for age, folder in ((30, "INBOX"), (19, "INBOX"), (25, "Sent")):
        append(session, age, folder=folder)
    append(session, 8, MESSAGE + b"x" * 99 + b"\r\n")
    large = b"".join(f"{number:x}".encode() for number in range(500_000))  # of which gz makes 1 MB
    append(session, 8, b"Subject: [...]\r\n\r\n" + large + b"\r\n")
    session.select("INBOX")
    before = used(session)
    session.send(b"i1 IDLE\r\n")
    expect(session, b"+ idling")
    expire(relay)
    expect_expunged(session, 4, 1, 4)
    session.send(b"DONE\r\n")
    expect(session, b"i1 OK")
    session.noop()
    assert session.search(None, "ALL")[1] == [b"1 2"]
    assert session.fetch("1", "(BODY.PEEK[])")[1][0][1] == MESSAGE
    assert used(session) <= before - len(large) // 1024
    assert session.status("Sent", "(MESSAGES)")[1] == [b"Sent (MESSAGES 0)"]
    session.logout()
    assert "Removed 0 out of " in relay.journal("chatmail", "-u", "chatmail-expire.service")


def test_an_idle_account_goes_and_its_address_is_free(relay, mail, alice):
    idle = mail.account()
    session = mail.imap(idle)
    append(session, 1)
    session.logout()
    relay.exec("touch", "-d", "92 days ago", f"{STORE}/{idle.address}/password")
    relay.exec("touch", "-d", "89 days ago", f"{STORE}/{alice.address}/password")
    said = json.loads(relay.exec("chatmail-relay", "expire", "--dry-run", "--json").out)
    assert said["removed_mailboxes"] == 1 and said["dry_run"]
    relay.exec("test", "-d", f"{STORE}/{idle.address}")
    shown = relay.exec("chatmail-relay", "expire", "--verbose")
    assert f"{idle.address}: idle\n" in shown.err and alice.address not in shown.err
    assert "Removed 1 out of " in shown.out
    gone = relay.exec("ls", "-A", STORE, f"{STORE}/.removed").out
    assert idle.address not in gone and alice.address in gone and gone.endswith(".removed:\n")
    assert relay.exec("stat", "-c", "%U", f"{STORE}/.removed").out == "_chatmail\n"
    again = type(idle)(idle.address, "another-password-of-22")
    session = mail.imap(again)
    assert session.select("INBOX")[1] == [b"0"]
    session.logout()


def test_an_account_with_a_session_is_in_use_however_old_its_login(relay, mail, alice):
    session = mail.imap(alice)
    relay.exec("touch", "-d", "92 days ago", f"{STORE}/{alice.address}/password")
    shown = relay.exec("chatmail-relay", "expire", "--verbose", "--dry-run")
    assert alice.address not in shown.err
    expire(relay)
    session.select("INBOX")
    session.logout()
    days = int(relay.exec("stat", "-c", "%Y", f"{STORE}/{alice.address}/password").out) / 86400
    assert days == time.time() // 86400


def test_a_login_renews_the_account(relay, mail, alice):
    relay.exec("touch", "-d", "92 days ago", f"{STORE}/{alice.address}/password")
    mail.imap(alice).logout()
    wait_for(
        lambda: (
            int(relay.exec("stat", "-c", "%Y", f"{STORE}/{alice.address}/password").out)
            > time.time() - 2 * 86400
        ),
        10,
        "last login",
    )
    expire(relay)
    relay.exec("test", "-f", f"{STORE}/{alice.address}/password")


def fill(relay, account, sizes):
    """Put messages of these sizes into a mailbox, three days old and each a bit younger."""
    folder = f"{STORE}/{account.address}/cur"
    lines = [f"install -d -m 700 -o _chatmail -g _chatmail {folder}"]
    for number, size in enumerate(sizes):
        name = f"{folder}/170000000{number}.M1P1.x,S={size},W={size}:2,S"
        age = f"{72 * 60 - number} minutes ago"
        lines.append(f"truncate -s {size} '{name}'; touch -d '{age}' '{name}'")
    lines.append(f"chown _chatmail: {folder}/*; rm -f {STORE}/{account.address}/maildirsize")
    relay.sh("\n".join(lines))


def test_a_mailbox_that_fills_up_loses_its_oldest_messages_and_goes_on_receiving(
    relay, mail, alice
):
    bob = mail.account()
    line = QUOTA * 75 // 100
    fill(relay, bob, [98_000_000] * 4 + [line - 4 * 98_000_000 - 100])
    sender = mail.smtp(alice)
    begin = time.monotonic()
    code, _text = mail.send(
        sender, alice.address, [bob.address], encrypted(alice.address, bob.address)
    )
    assert code == 250
    relay_says = "quota-expire: removed 1 message(s)"
    wait_for(lambda: relay_says in relay.journal("chatmail"), 20, relay_says)
    measured["a mailbox at 75 % trimmed after"] = f"{(time.monotonic() - begin) * 1000:.0f} ms"
    sender.quit()
    session = mail.imap(bob)
    session.select("INBOX")
    session.search(None, "ALL")
    dates = session.fetch("1:*", "(RFC822.SIZE)")[1]
    assert len(dates) == 5
    assert used(session) <= QUOTA * 70 // 100 // 1024
    session.logout()
    left = relay.exec("ls", f"{STORE}/{bob.address}/cur").out
    assert "1700000000." not in left and "1700000001." in left


def test_a_full_mailbox_refuses_mail_until_the_nightly_run(relay, mail, alice):
    bob = mail.account()
    fill(relay, bob, [QUOTA // 4] * 4)
    message = encrypted(alice.address, bob.address)
    session = mail.imap(bob)
    assert used(session) == QUOTA // 1024
    assert session.append("INBOX", "", None, MESSAGE)[0] == "NO"
    expire(relay)
    assert used(session) == QUOTA // 2 // 1024
    session.logout()
    sender = mail.smtp(alice)
    assert mail.send(sender, alice.address, [bob.address], message)[0] == 250
    sender.quit()
    wait_for(lambda: len(relay.exec("ls", f"{STORE}/{bob.address}/new").out.split()), 20, "mail")


def test_the_report_is_logged_and_written_for_prometheus(relay, alice):
    def foreign():
        return relay.exec("find", STORE, "!", "-user", "_chatmail").out

    before = foreign()
    relay.exec("systemctl", "start", "chatmail-fsreport.service")
    log = relay.journal("chatmail", "-u", "chatmail-fsreport.service")
    assert "## Mailbox storage use analysis" in log and "@" not in log.partition("##")[2]
    path = "/var/lib/chatmail/report/fsreport.prom"
    assert relay.exec("stat", "-c", "%a %U", path).out == "644 _chatmail\n"
    metrics = dict(line.rsplit(" ", 1) for line in relay.read(path).splitlines() if line[0] != "#")
    data = json.loads(relay.exec("chatmail-relay", "fsreport", "--json").out)
    assert int(metrics['chatmail_accounts{kind="all"}']) == data["accounts"]["all"] > 0
    assert int(metrics['chatmail_accounts_active{days="1"}']) > 0
    assert int(metrics['chatmail_storage_bytes{kind="total"}']) > 0
    assert foreign() == before  # root ran the command, and wrote nothing there
