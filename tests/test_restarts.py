# SPDX-License-Identifier: MIT
"""Dovecot ends and begins again: who wants to log in waits, and is not refused. Postfix reads anew."""

import contextlib
import smtplib
import threading
import time

import pytest

from conftest import measured
from lab.mail import context
from lab.shell import wait_for
from lab.traffic import Traffic, works

UNIT = "dovecot.service"
SOCKETS = "/etc/chatmail/dovecot/sockets"


def held(relay):
    """How many sockets systemd holds for Dovecot."""
    return int(relay.exec("systemctl", "show", "-P", "NFileDescriptorStore", UNIT).out)


def wanted(relay):
    """The sockets it shall hold, a line each."""
    return [line for line in relay.read(SOCKETS).splitlines() if not line.startswith("#")]


def during(mail, what, times):
    """Mail and logins while something happens to Dovecot, again and again.

    A login that had begun with the Dovecot that ends may be cut; the next one is good, however long it waits.
    """
    with Traffic(mail) as traffic:
        traffic.more(5)
        for _ in range(times):
            what()
            traffic.more(5)
    traffic.settle()
    assert traffic.imap.refused <= times, traffic.imap.reasons
    assert traffic.submission.refused <= times, traffic.submission.reasons
    return traffic


def test_restarts_of_dovecot_refuse_nobody(relay, mail):
    traffic = during(mail, lambda: relay.exec("systemctl", "restart", UNIT), 4)
    measured["4 restarts of Dovecot"] = str(traffic)
    assert held(relay) == len(wanted(relay)) >= 3


def test_reloads_of_dovecot_refuse_nobody(relay, mail):
    traffic = during(mail, lambda: relay.exec("systemctl", "reload", UNIT), 4)
    measured["4 reloads of Dovecot"] = str(traffic)


def test_a_dovecot_that_is_killed_refuses_nobody(relay, mail):
    """systemd starts it again after RestartSec=, which the clients wait."""
    main = relay.exec("systemctl", "show", "-P", "MainPID", UNIT).out
    traffic = during(mail, lambda: relay.exec("systemctl", "kill", "--signal=KILL", UNIT), 1)
    assert relay.exec("systemctl", "show", "-P", "MainPID", UNIT).out != main
    assert traffic.imap.slowest > 1


def test_a_dovecot_that_is_stopped_holds_no_port(relay, mail):
    try:
        relay.exec("systemctl", "stop", UNIT)
        assert held(relay) == 0
        ports = {line.split()[1] for line in wanted(relay)}
        assert ports
        listening = relay.sh("ss -Hltn | awk '{print $4}'").out.split()
        assert not [address for address in listening if address.rpartition(":")[2] in ports]
    finally:
        relay.exec("systemctl", "start", UNIT)
    works(mail)


def test_without_a_configuration_a_restart_holds_no_port(relay, mail):
    """As at the removal of the relay, and apply is not in its own way then."""
    conf = "/etc/chatmail/dovecot/dovecot.conf"
    relay.exec("mv", conf, f"{conf}.away")
    try:
        relay.exec("systemctl", "restart", UNIT)
        assert relay.exec("systemctl", "is-active", UNIT, check=False).out == "inactive\n"
        assert held(relay) == 0
    finally:
        relay.exec("mv", f"{conf}.away", conf)
        relay.exec("chatmail-relay", "apply", timeout=120)
        relay.exec("systemctl", "start", UNIT)
    works(mail)


def test_what_cannot_be_held_is_named_and_left_to_dovecot(relay, mail):
    """An address that the host does not have."""
    relay.sh(f"cp {SOCKETS} /root/sockets; echo '192.0.2.1 143' >>{SOCKETS}")
    since = time.time()
    try:
        relay.exec("systemctl", "restart", UNIT)
    finally:
        relay.sh(f"cat /root/sockets >{SOCKETS}")
    relay.wait_log(
        "192.0.2.1 port 143 is not held: Cannot assign requested address", since, "chatmail"
    )
    wait_for(lambda: held(relay) == len(wanted(relay)), 10, "the others")
    works(mail)


# --- a reload of Postfix ------------------------------------------------------------------------------

POSTFIX = "postfix.service"
SILENT = 3  # seconds


def greeted(mail, seconds):
    """A client on 465 that has its greeting and stays; raises OSError without one."""
    with mail.lab.at_client():
        return smtplib.SMTP_SSL(mail.host, 465, "localhost", context=context(), timeout=seconds)


def smtpd(relay):
    """The one process of port 465."""
    found = relay.sh("pgrep -f '^smtpd -n submissions '", check=False).out.split()
    return int(found[0]) if found else 0


def caught(relay, mail, reload):
    """A client whose process starts while Postfix reads its settings anew."""
    relay.exec("systemctl", "restart", POSTFIX)
    held = []
    client = threading.Thread(target=lambda: held.append(greeted(mail, 30)))
    # new, it keeps a process that starts busy for two seconds
    relay.exec("touch", "/etc/postfix/main.cf")
    client.start()
    pid = wait_for(lambda: smtpd(relay), 10, "the smtpd of the client")
    relay.exec("kill", "-STOP", str(pid))
    relay.sh(reload)
    relay.exec("kill", "-CONT", str(pid))
    client.join(30)
    assert smtpd(relay) == pid
    return held[0]


def test_a_reload_leaves_no_port_without_answers(relay, mail):
    with contextlib.closing(caught(relay, mail, "postfix reload")):
        with pytest.raises(TimeoutError):  # what would be if the unit did no more
            greeted(mail, SILENT)
        since = time.time()
        relay.exec("systemctl", "reload", POSTFIX)
        greeted(mail, SILENT).quit()
    relay.wait_log(
        "submissions: no new smtpd was started, so 1 of before the reload", since, "chatmail"
    )
    works(mail)


def test_clients_that_come_and_stay_are_greeted_while_postfix_reads_anew(relay, mail):
    clients, over = [], threading.Event()

    def come():
        while not over.is_set():
            try:
                clients.append(greeted(mail, 20))
            except TimeoutError:
                raise
            except OSError:  # its process was ended; a client comes again
                pass

    with contextlib.ExitStack() as stack:
        thread = threading.Thread(target=come)
        thread.start()
        stack.callback(thread.join)
        stack.callback(over.set)
        for _ in range(4):
            relay.exec("systemctl", "reload", POSTFIX)
            before = len(clients)
            wait_for(lambda: len(clients) > before, 20, "another client")
    for client in clients:
        client.close()
    assert len(clients) > 4
    works(mail)


def test_what_apply_changes_has_settled(relay):
    relay.exec("chatmail-relay", "set", "max_message_size=31000000")
    try:
        relay.exec("chatmail-relay", "apply", timeout=120)
        assert "31000000" in relay.exec("postconf", "message_size_limit").out
        age = relay.sh("echo $(( $(date +%s) - $(stat -c %Y /etc/postfix/main.cf) ))").out
        assert int(age) >= 3
    finally:
        relay.exec("chatmail-relay", "set", "max_message_size=31457280")
        relay.exec("chatmail-relay", "apply", timeout=120)
