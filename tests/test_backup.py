# SPDX-License-Identifier: MIT
"""A relay is saved while it runs, its machine is lost, and a fresh one goes on in its place."""

import re
import shutil
import threading

import pytest
from conftest import measured
from lab.mail import Mail
from lab.messages import encrypted
from lab.shell import run, wait_for
from people import people_of, say

DOMAIN = "_saved.example"
STORE = f"/var/lib/chatmail/mail/{DOMAIN}"
DIRECTORY, TAR, BORG = "/root/backups", "/root/relay.tar", "borg:/root/borg"
PASSPHRASE = "/etc/chatmail/backup.passphrase"
MESSAGES = 20


def well(host):
    wait_for(lambda: host.exec("chatmail-relay", "status", check=False).ok, 60, "status")


@pytest.fixture(scope="module")
def machine(blank):
    """A relay that is going to be lost."""
    blank.begin(DOMAIN)
    return blank.host


@pytest.fixture(scope="module")
def mail(lab, machine):
    return Mail(lab, machine.address, DOMAIN)


@pytest.fixture(scope="module")
def people(lab, machine, tmp_path_factory):
    """Two real clients, with a chat."""
    with people_of(lab, tmp_path_factory.mktemp("people"), DOMAIN) as made:
        yield made


@pytest.fixture(scope="module")
def sent(machine, mail, people):
    """An account that has got messages; more arrive during the first backup, in the directory."""
    say(*people, "before")
    sender, receiver = mail.account(), mail.account()
    session = mail.smtp(sender)
    text = encrypted(sender.address, receiver.address)

    def send():
        assert mail.send(session, sender.address, [receiver.address], text)[0] == 250

    for _ in range(MESSAGES):
        send()
    wait_for(lambda: len(mail.received(receiver)) == MESSAGES, 30, "messages")
    stop = threading.Event()

    def keep_sending():
        while not stop.is_set():
            send()

    busy = threading.Thread(target=keep_sending)
    busy.start()
    try:
        done = machine.exec("chatmail-relay", "backup", DIRECTORY, timeout=120)
    finally:
        stop.set()
        busy.join()
    measured["backup of a small relay, while mail comes in"] = f"{done.seconds:.1f} s"
    session.quit()
    return receiver


def messages(machine, tree, account):
    """The names of messages, without flags, below *tree*."""
    found = machine.exec(
        "find", f"{tree}/{account.address}", "-path", "*/[nc]e[wu]/*", "-o", "-path", "*/cur/*"
    )
    return {line.rpartition("/")[2].partition(":")[0] for line in found.out.splitlines()}


def test_a_backup_has_what_was_there_when_it_began_and_the_next_one_links_it(machine, sent):
    (first,) = machine.exec("chatmail-relay", "restore", DIRECTORY, "--list").out.split()
    assert len(messages(machine, f"{DIRECTORY}/{first}{STORE}", sent)) >= MESSAGES
    done = machine.exec("chatmail-relay", "backup", DIRECTORY, timeout=120)
    total, new = re.search(r"(\d+) messages, (\d+) of them new", done.out).groups()
    assert int(total) >= MESSAGES and int(new) < int(total) - MESSAGES + 2
    assert machine.exec("stat", "-c", "%a", DIRECTORY).out == "700\n"
    assert machine.exec("chatmail-relay", "status", check=False).ok


def test_a_backup_that_is_killed_leaves_the_ones_before_and_the_next_one_works(machine, sent):
    before = machine.exec("chatmail-relay", "restore", DIRECTORY, "--list").out
    machine.sh(
        f"chatmail-relay backup {DIRECTORY} & p=$!\n"
        f"until [ -e {DIRECTORY}/.partial ]; do :; done; kill -9 $p; ! wait $p"
    )
    assert machine.exec("chatmail-relay", "restore", DIRECTORY, "--list").out == before
    machine.exec("chatmail-relay", "backup", DIRECTORY, timeout=120)
    assert len(machine.exec("ls", "-A", DIRECTORY).out.split()) == len(before.split()) + 1


def test_one_tar_file_is_a_backup_too_and_readable_for_root_alone(machine, sent):
    machine.exec("chatmail-relay", "backup", TAR, timeout=120)
    assert machine.exec("stat", "-c", "%a %U", TAR).out == "600 root\n"
    listed = machine.exec("tar", "tf", TAR).out
    assert "./var/lib/chatmail/keys/dkim/rsa.pem" in listed and "manifest.json" in listed


def test_a_borg_repository_is_made_with_a_passphrase_and_refused_without(machine, sent):
    done = machine.exec("chatmail-relay", "backup", BORG, check=False)
    assert done.code == 1 and PASSPHRASE in done.err and "mode 0600" in done.err
    machine.write(PASSPHRASE, "correct horse battery staple\n")
    done = machine.exec("chatmail-relay", "backup", BORG, check=False)
    assert done.code == 1 and f"chmod 600 {PASSPHRASE}" in done.err
    machine.exec("chmod", "600", PASSPHRASE)
    for _ in range(3):
        machine.exec("chatmail-relay", "backup", BORG, "--keep", "2", timeout=120)
    assert len(machine.exec("chatmail-relay", "restore", BORG, "--list").out.split()) == 2
    config = machine.read("/root/borg/config")
    assert "key = " in config and "correct horse" not in config
    machine.write(PASSPHRASE, "wrong\n", 0o600)
    done = machine.exec("chatmail-relay", "backup", BORG, check=False)
    assert done.code == 1 and re.search("passphrase .* is incorrect", done.err)
    machine.write(PASSPHRASE, "correct horse battery staple\n", 0o600)


def test_a_fresh_machine_goes_on_in_its_place_and_clients_notice_nothing(
    blank, machine, mail, people, sent, tmp_path
):
    machine.exec("chatmail-relay", "backup", BORG, timeout=120)
    session = mail.imap(sent)
    state = session.status("INBOX", "(UIDVALIDITY UIDNEXT MESSAGES)")[1]
    session.logout()
    key = machine.read("/var/lib/chatmail/keys/dkim/rsa.pem")
    run(["cp", "-a", machine.root / "root/borg", tmp_path])
    # mail that comes after the last backup is lost, but its UIDs were seen
    say(*people, "lost with the machine")

    blank.reset()
    assert machine.exec("chatmail-relay", "status", check=False).code == 1
    shutil.copytree(tmp_path / "borg", machine.root / "root/borg")
    machine.write(PASSPHRASE, "correct horse battery staple\n", 0o600)
    # a restoration that is killed in the middle is done again
    mark = "/var/lib/chatmail/state/restoring"
    machine.sh(
        f"chatmail-relay restore {BORG} & p=$!\n"
        f"until [ -e {mark} ]; do :; done; kill -9 $p; ! wait $p",
        timeout=120,
    )
    done = machine.exec("chatmail-relay", "restore", BORG, timeout=120)
    measured["restoration of a small relay on a fresh machine"] = f"{done.seconds:.1f} s"
    assert f"{DOMAIN} is restored" in done.out
    well(machine)
    assert machine.read("/var/lib/chatmail/keys/dkim/rsa.pem") == key
    foreign = ("find", "/var/lib/chatmail/mail", "!", "-user", "_chatmail")
    assert machine.exec(*foreign).out == ""

    session = mail.imap(sent)
    now = session.status("INBOX", "(UIDVALIDITY UIDNEXT MESSAGES)")[1]
    session.logout()
    old, new = (
        {name: int(value) for name, value in re.findall(r"(\w+) (\d+)", item[0].decode())}
        for item in (state, now)
    )
    assert (new["UIDVALIDITY"], new["MESSAGES"]) == (old["UIDVALIDITY"], old["MESSAGES"])
    assert new["UIDNEXT"] > old["UIDNEXT"] + 1000
    alice, bob = people
    for account in people:
        account.stop_io()
        account.start_io()
    measured["first message of real clients after it"] = f"{say(alice, bob, 'after'):.1f} s"
    say(bob, alice, "and back")


def test_mailboxes_that_are_there_are_moved_aside_only_if_asked(machine, mail, sent):
    machine.exec("chatmail-relay", "backup", TAR, timeout=120)
    later = mail.account()
    done = machine.exec("chatmail-relay", "restore", TAR, check=False)
    assert done.code == 1 and "--replace" in done.err
    done = machine.exec("chatmail-relay", "restore", TAR, "--replace", timeout=120)
    kept = re.search(r"the mail store before is in (\S+);", done.out)[1]
    machine.exec("test", "-d", f"{kept}/{later.address}")
    assert not machine.exec("test", "-e", f"{STORE}/{later.address}", check=False).ok
    well(machine)
    assert len(mail.received(sent)) >= MESSAGES
