# SPDX-License-Identifier: MIT
"""The notify plugin of Dovecot, hibernation, and the relay without them.

The big runs are those of tests/bench/dovecot.py.
"""

import contextlib
import json
import re
import time

import pytest
from bench import idle
from conftest import DOMAIN, measured
from lab.messages import encrypted
from lab.shell import wait_for

PACKAGE = "dovecot-chatmail"
PLUGIN = "/usr/lib/dovecot-chatmail/lib30_chatmail_notify_plugin.so"
DECISION = "/run/chatmail/dovecot/notify.conf"
TEMPLATE = "hibernate.conf.j2"
SHIPPED = "/usr/share/chatmail-relay/components/dovecot"
OVERRIDES = "/etc/chatmail/templates/dovecot"
CLIENT = "/root/idle.py"

#: A unit's drop-in: hibernation without the plugin, which the relay never does.
STOCK_HIBERNATION = f"""\
[Service]
ExecStartPre=/bin/sh -c "echo '!include /etc/chatmail/dovecot/hibernate.conf' >{DECISION}"
"""
#: What Dovecot says to a client when it cannot load a plugin, and what it logs.
REFUSED = re.compile(r"initialization failed|Couldn't load required plugin")


def run_client(relay, *words, timeout=120):
    """Idling clients on the relay; what they found."""
    done = relay.exec("python3", CLIENT, *words, "--domain", DOMAIN, timeout=timeout)
    return json.loads(done.out)


def shown(result):
    """A result of the client in one line."""
    return f"median {result['median ms']} ms, p95 {result['p95 ms']} ms"


def finding(relay):
    """The line of `chatmail-relay status` that is about the plugin."""
    done = relay.exec("chatmail-relay", "status", "--json", check=False)
    (found,) = (item for item in json.loads(done.out) if item["what"] == "idle notification")
    return found


def restart(relay):
    """Restart Dovecot; the time before it, for the log."""
    since = time.time()
    relay.exec("systemctl", "restart", "dovecot.service")
    return since


def log_in(mail):
    """A login by someone who can, and what he sees; raises if it is refused."""
    session = mail.imap(mail.account())
    assert session.select("INBOX")[0] == "OK"
    session.logout()


def idling(mail, account):
    """A session of imaplib in IDLE."""
    session = mail.imap(account)
    session.select("INBOX")
    session.send(b"i IDLE\r\n")
    assert session.readline().startswith(b"+")
    return session


def told(session):
    """Wait until an idling session is told of a message; "Still here" may come before."""
    while not re.fullmatch(rb"\* \d+ EXISTS\r\n", line := session.readline()):
        assert line, "the server has ended the session"


def done(session):
    """End IDLE, and use the session."""
    session.send(b"DONE\r\n")
    while not (line := session.readline()).startswith(b"i "):
        assert line, "the server has ended the session"
    assert line.startswith(b"i OK"), line
    assert session.noop()[0] == "OK"


def send(mail, account):
    """One message to oneself."""
    with mail.smtp(account) as session:
        message = encrypted(account.address, account.address)
        code, text = mail.send(session, account.address, [account.address], message)
    assert code == 250, text


def sessions_of(relay, account):
    """The services that hold a user's sessions, as `doveadm who` tells."""
    lines = relay.exec("doveadm", "-f", "tab", "who", account.address).out.splitlines()[1:]
    return [line.split("\t")[2] for line in lines]


def hibernated(relay, account):
    """Wait until the one session of a user hibernates."""
    wait_for(lambda: sessions_of(relay, account) == ["imap-hibernate"], 20, "hibernation")


@pytest.fixture(scope="module", autouse=True)
def client(relay):
    """The client's program is there; Dovecot is as it was at the end."""
    relay.write(CLIENT, open(idle.__file__).read())
    yield
    relay.exec("rm", "-f", CLIENT)


@pytest.fixture(scope="module")
def naps(relay):
    """Sessions hibernate after a second, not after minutes."""
    relay.exec("mkdir", "-p", OVERRIDES)
    relay.sh(f"sed 's/= 5 mins/= 1 s/' {SHIPPED}/{TEMPLATE} >{OVERRIDES}/{TEMPLATE}")
    assert "changed" in relay.exec("chatmail-relay", "apply", timeout=120).out
    yield
    relay.sh("rm -r /etc/chatmail/templates")
    relay.exec("chatmail-relay", "apply", timeout=120)


def mapped(relay, pattern):
    """The maps of the processes that have it mapped; that one ends while grep(1) looks is no error."""
    return relay.sh(f"grep -ls '{pattern}' /proc/[0-9]*/maps || [ $? -le 2 ]").out


def test_status_says_that_plugin_and_hibernation_are_on(relay):
    found = finding(relay)
    assert found["well"] and found["detail"] == "plugin on, hibernation on"
    assert relay.exec("dpkg-query", "-W", "-f", "${Recommends}", "chatmail-relay").out == PACKAGE


def test_an_idling_client_is_told_at_once(relay):
    found = run_client(relay, "latency", "--clients", "5", "--rounds", "10", "--pause", "0.05")
    assert found["notifications"] == 50 and found["lost"] == 0
    measured["LMTP's reply to an idling client's EXISTS"] = f"{shown(found)} (stock: 500 ms)"
    # by whom: every imap process that idles has it mapped
    assert mapped(relay, PLUGIN)


def test_all_devices_of_a_user_are_told(relay):
    """In one imap process stock Dovecot calls only the last one; the others hear of it up to 30 s later."""
    words = ("--clients", "8", "--one-user", "--rounds", "3")
    found = run_client(relay, "latency", *words)
    assert found["notifications"] == 24 and found["lost"] == 0


def test_a_hibernated_session_is_told_and_goes_on(relay, mail, naps):
    account = mail.account()
    session = idling(mail, account)
    hibernated(relay, account)
    send(mail, account)
    told(session)
    hibernated(relay, account)
    done(session)
    assert sessions_of(relay, account) == ["imap"]
    session.logout()


def test_a_blocked_account_loses_its_hibernated_session(relay, mail, naps):
    account = mail.account()
    session = idling(mail, account)
    hibernated(relay, account)
    relay.exec("chatmail-relay", "user", "block", account.address)
    with contextlib.suppress(OSError):
        while session.readline():
            pass
    assert sessions_of(relay, account) == []


def test_no_notification_is_lost_around_the_moment_of_hibernation(relay, naps):
    """Sensitive: without its wake_successor() the plugin loses a tenth of these."""
    since = time.time()
    words = ("--clients", "40", "--rounds", "20", "--prefix", "race")
    found = run_client(relay, "race", *words)
    assert found["notifications"] == 800 and found["lost"] == 0, found
    measured["deliveries around the hibernation of an idle session"] = "800, none lost"
    log = relay.journal("chatmail", "-u", "dovecot.service", f"--since=@{since:.6f}")
    assert not re.search("Error|Panic|Fatal", log), log[-3000:]


def test_stock_hibernation_loses_notifications(relay, naps):
    """What the plugin is for; and that the test above counts what is lost."""
    folder = "/run/systemd/system/dovecot.service.d"
    relay.write(f"{folder}/stock.conf", STOCK_HIBERNATION)
    try:
        relay.exec("systemctl", "daemon-reload")
        restart(relay)
        words = ("--clients", "40", "--rounds", "2", "--after", "0.55", "--until", "0.95")
        found = run_client(relay, "race", *words, "--prefix", "race", "--lost-after", "8")
    finally:
        relay.exec("rm", "-r", folder)
        relay.exec("systemctl", "daemon-reload")
        restart(relay)
    measured["the same with stock Dovecot, in the half second before"] = (
        f"{found['lost']} of {found['notifications']} lost"
    )
    assert found["lost"] > 0
    assert finding(relay)["detail"] == "plugin on, hibernation on"


def test_a_reload_leaves_idle_and_hibernated_sessions(relay, mail, naps):
    accounts = [mail.account() for _ in range(3)]
    sleeping = idling(mail, accounts[0])
    hibernated(relay, accounts[0])
    awake = idling(mail, accounts[1])
    since = time.time()
    relay.exec("systemctl", "reload", "dovecot.service")
    relay.wait_log("reloading configuration", since)
    for account, session in zip(accounts, (sleeping, awake), strict=False):
        send(mail, account)
        told(session)
        done(session)
        session.logout()
    session = idling(mail, accounts[2])
    send(mail, accounts[2])
    told(session)
    done(session)
    session.logout()


def test_a_restart_takes_the_watches_of_sleepers_first(relay, mail, naps):
    """With them the kernel ends a thousand in ten seconds, and the restart waits for it."""

    def stopped_with():
        """Its watches as long as it is stopped: who ends has none."""
        state, watches = relay.sh(script).out.split()
        return int(watches) if state == "T" else None

    account = mail.account()
    session = idling(mail, account)
    hibernated(relay, account)
    (pid,) = relay.exec("pgrep", "-x", "imap-hibernate").out.split()
    count = f"cat /proc/{pid}/fdinfo/* | grep -c '^inotify wd:' || true"
    script = f"sed -n 's/^State:.\\(.\\).*/\\1/p' /proc/{pid}/status; {count}"
    relay.exec("kill", "-STOP", pid)  # it must not end before it has been looked at
    wait_for(stopped_with, 10, "a stopped process that watches")
    relay.exec("systemctl", "--no-block", "restart", "dovecot.service")
    try:
        wait_for(lambda: stopped_with() == 0, 20, "no watches")
    finally:
        relay.exec("kill", "-CONT", pid, check=False)
    while session.readline():
        pass
    log_in(mail)


def test_a_restart_leaves_nothing_to_wait_for(relay, mail):
    """A session that goes on does not hold it up, and what has not changed is not looked at again."""
    session = idling(mail, mail.account())
    since = restart(relay)
    relay.wait_log("notify plugin: as before", since, "chatmail")
    while session.readline():
        pass
    assert relay.exec("systemctl", "show", "-P", "Result", "dovecot.service").out == "success\n"
    log = relay.journal("*", "-u", "dovecot.service", f"--since=@{since:.6f}")
    assert "Deactivated successfully" in log and "timed out" not in log and "left-over" not in log
    log_in(mail)
    # any of what it depends on
    relay.exec("touch", PLUGIN)
    since = restart(relay)
    relay.wait_log("notify plugin: on", since, "chatmail")


# --- without it: these end with the plugin on, and hibernation as installed -----------------------------


@pytest.fixture
def whole_again(relay):
    """Put the package back as it was."""
    yield
    relay.sh(f"apt-get install -q --yes --reinstall --no-install-recommends {PACKAGE}", timeout=120)
    wait_for(lambda: finding(relay)["detail"] == "plugin on, hibernation on", 20, "the plugin")


def test_a_new_version_is_in_force_without_a_restart(relay, mail, whole_again):
    """Another file, of the same content here: sessions of before go on with the old one."""
    account, log = mail.account(), "reloading configuration"
    session = idling(mail, account)
    main = relay.exec("systemctl", "show", "-P", "MainPID", "dovecot.service").out
    inode, since = relay.exec("stat", "-c", "%i", PLUGIN).out.strip(), time.time()
    relay.sh(f"apt-get install -q --yes --reinstall --no-install-recommends {PACKAGE}", timeout=120)
    relay.wait_log(log, since, "chatmail")
    assert relay.exec("systemctl", "show", "-P", "MainPID", "dovecot.service").out == main
    assert relay.exec("stat", "-c", "%i", PLUGIN).out.strip() != inode
    send(mail, account)
    told(session)
    done(session)
    session.logout()
    fresh = idling(mail, account)
    send(mail, account)
    told(fresh)
    new = relay.exec("stat", "-c", "%i", PLUGIN).out.strip()
    assert mapped(relay, f" {new} .*{PLUGIN}$")
    done(fresh)
    fresh.logout()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("sed -i s/2[.]4[.]ABIv1/2.4.ABIv0/ {}", "different ABI version 2.4.ABIv0"),
        (": >{}", "file too short"),
    ],
)
def test_with_a_plugin_that_does_not_fit_logins_work(relay, mail, whole_again, damage, reason):
    """What an update of Dovecot makes of it; and a file that is damaged."""
    before = relay.sh(f"sha256sum {PLUGIN}").out
    # another file, as dpkg makes it: who runs has the old one mapped
    relay.sh(f"cp {PLUGIN} /root/p && {damage.format('/root/p')} && mv /root/p {PLUGIN}")
    assert relay.sh(f"sha256sum {PLUGIN}").out != before
    since = restart(relay)
    log_in(mail)
    found = finding(relay)
    assert not found["well"] and reason in found["detail"]
    assert "upgrade dovecot-chatmail" in found["remedy"]
    assert "include" not in relay.read(DECISION)
    relay.wait_log("notify plugin: Fatal", since, "chatmail")
    log = relay.journal("chatmail", "-u", "dovecot.service", f"--since=@{since:.6f}")
    assert "Internal error" not in log


def test_removed_it_is_not_missed_and_installed_it_is_on(relay, mail, whole_again):
    account = mail.account()
    since = time.time()
    relay.sh(f"apt-get remove -q --yes {PACKAGE}", timeout=120)
    found = finding(relay)
    assert found["well"] and "dovecot-chatmail is not installed" in found["detail"]
    session = idling(mail, account)
    send(mail, account)
    told(session)
    done(session)
    session.logout()
    log = relay.journal("chatmail", "-u", "dovecot.service", f"--since=@{since:.6f}")
    assert not REFUSED.search(log), log[-3000:]
    assert not relay.exec("test", "-e", "/run/dovecot-chatmail.leaving", check=False).ok
    late = run_client(relay, "latency", "--clients", "2", "--rounds", "2")
    assert late["lost"] == 0
    measured["LMTP's reply to EXISTS without the plugin"] = shown(late)


def test_without_inotify_instances_for_all_sessions_none_hibernates(relay, mail):
    """More sessions than the kernel has instances for: the awake ones would find none."""
    relay.exec("chatmail-relay", "set", "max_imap_connections=70000")
    try:
        relay.exec("chatmail-relay", "apply", timeout=120)
        found = finding(relay)
        assert found["well"]
        reason = "no hibernation: fs.inotify.max_user_instances is 65535, needed are"
        assert reason in found["detail"]
        log_in(mail)
    finally:
        relay.exec("chatmail-relay", "set", "max_imap_connections=")
        relay.exec("chatmail-relay", "apply", timeout=120)
    assert finding(relay)["detail"] == "plugin on, hibernation on"


def test_no_dependency_pins_the_abi(relay):
    """An update of Dovecot with another ABI is never held back by the plugin."""
    fields = ("Depends", "Pre-Depends", "Breaks", "Conflicts")
    shown = relay.exec("dpkg-query", "-W", "-f", "".join(f"${{{f}}}\n" for f in fields), PACKAGE)
    assert "dovecot-imapd" in shown.out
    assert not re.search(r"dovecot-abi|dovecot-\w+ \(", shown.out)
