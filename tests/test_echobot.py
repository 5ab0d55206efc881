# SPDX-License-Identifier: MIT
"""chatmail-echobot: real clients write to it, and get back what they wrote."""

import json
import os
import time

import pytest
from conftest import DOMAIN, measured, new_account
from lab import image
from lab.shell import wait_for

PACKAGE = "chatmail-echobot"
UNIT = "chatmail-echobot.service"
ADDRESS = f"echo@{DOMAIN}"
STATE = "/var/lib/private/chatmail-echobot"
MAILBOX = f"/var/lib/chatmail/mail/{DOMAIN}/{ADDRESS}"


@pytest.fixture(scope="module")
def bot(relay, lab):
    """The relay with the bot, installed while nobody may register."""
    image.download(lab.tree, PACKAGE)
    relay.exec("chatmail-relay", "set", "registration=closed", "max_new_addresses_per_hour=1")
    relay.exec("chatmail-relay", "apply", timeout=120)
    since = time.time()
    try:
        relay.sh(f"apt-get install -q --yes --no-install-recommends {PACKAGE}", timeout=120)
        relay.wait_log("^logged in$", since)
    finally:
        limit = "max_new_addresses_per_hour=100000"
        relay.exec("chatmail-relay", "set", "registration=open", limit)
        relay.exec("chatmail-relay", "apply", timeout=120)
    yield relay
    relay.sh(f"apt-get purge -q --yes {PACKAGE}", timeout=120)


def shown(relay, what):
    """What the administrator's command shows: invite or vcard."""
    return json.loads(relay.exec("chatmail-echobot", what, "--json").out)[what]


def person(delta, name):
    """A real client's account whose messages are not those of a program."""
    account = delta.add_account()
    account.set_config("displayname", name)
    account.add_transport_from_qr(f"dcaccount:{DOMAIN}")
    account.bring_online()
    return account


def receive(account, wanted):
    """The next incoming message of the bot that is *wanted*; all of them are encrypted."""
    while True:
        message = account.wait_for_incoming_msg().get_snapshot()
        assert message.show_padlock
        assert message.sender.get_snapshot().address == ADDRESS
        if wanted(message):
            return message


def echo(account, chat, text):
    """Send *text* and wait until it comes back."""
    chat.send_text(text)
    return receive(account, lambda message: message.text == text)


@pytest.fixture(scope="module")
def joined(bot, delta):
    """Alice, who has the bot by its invite link."""
    alice = person(delta, "alice")
    begin = time.monotonic()
    chat = alice.secure_join(shown(bot, "invite"))
    alice.wait_for_securejoin_joiner_success()
    measured["echo bot: SecureJoin by its link"] = f"{time.monotonic() - begin:.1f} s"
    return alice, chat


def test_it_is_there_although_registration_was_closed(bot):
    wait_for(lambda: bot.exec("chatmail-relay", "status", check=False).ok, 20, "status")
    users = json.loads(bot.exec("chatmail-relay", "user", "list", "--json").out)
    (user,) = [user for user in users if user["address"] == ADDRESS]
    assert user["state"] == "active"
    measured["memory (PSS) of the echo bot, optional"] = f"{bot.memory()[UNIT]:.1f} MB"


def test_the_unit_runs_with_least_privilege(bot):
    done = bot.exec(
        "systemd-analyze", "security", "--threshold=25", "--no-pager", UNIT, check=False
    )
    assert done.ok, done.out.splitlines()[-1]


def test_its_secrets_are_its_own(bot):
    listed = bot.exec("find", STATE, "-mindepth", "1", "-printf", "%f %m %u\n").out
    users = {line.split()[2] for line in listed.splitlines()}
    assert {line.split()[0] for line in listed.splitlines()} == {
        *("key.asc", "password", "invite-number", "auth")
    }
    assert {line.split()[1] for line in listed.splitlines()} == {"600"}
    assert len(users) == 1 and "root" not in users
    assert not bot.exec(
        *("setpriv", "--reuid=nobody", "--clear-groups", "chatmail-echobot", "invite"), check=False
    ).ok


def test_text_comes_back_encrypted_to_who_joined_by_the_link(joined):
    alice, chat = joined
    begin = time.monotonic()
    message = echo(alice, chat, "hello, écho ✓")
    measured["echo bot: text and back"] = f"{(time.monotonic() - begin) * 1000:.0f} ms"
    contact = message.sender.get_snapshot()
    assert contact.e2ee_avail and contact.display_name == "Echo"
    assert message.chat_id == chat.id


@pytest.mark.parametrize("size", [100_000, 1_000_000])
def test_a_file_comes_back_byte_for_byte(joined, tmp_path, size):
    """Clients send more than 140 kB as a message of its own after the text."""
    alice, chat = joined
    path = tmp_path / f"some {size}.bin"
    path.write_bytes(os.urandom(size - 3) + b"\r\n\n")
    chat.send_message(file=str(path), text=f"file {size}")
    texts = set()

    def is_file(message):
        texts.add(message.text)
        return message.file_name == path.name

    message = receive(alice, is_file)
    assert message.download_state == "Done"
    with open(message.file, "rb") as file:
        assert file.read() == path.read_bytes()
    assert f"file {size}" in texts


def test_help_tells_what_it_is(joined):
    alice, chat = joined
    chat.send_text("/help")
    assert "echo bot" in receive(alice, lambda message: True).text


def test_a_vcard_is_enough_to_write_to_it(bot, delta):
    bob = person(delta, "bob")
    (contact,) = bob.import_vcard(shown(bot, "vcard"))
    assert contact.get_snapshot().address == ADDRESS
    echo(bob, contact.create_chat(), "by vCard")


def test_programs_get_no_answer(bot, delta, joined):
    machine = new_account(delta, "machine")
    (contact,) = machine.import_vcard(shown(bot, "vcard"))
    since = time.time()
    contact.create_chat().send_text("from a program")
    bot.wait_log("^ignored: automatic message$", since)
    alice, chat = joined
    echo(alice, chat, "from a person")


def test_a_restart_of_the_bot_and_of_the_relay_keeps_contacts(bot, joined):
    alice, chat = joined
    link = shown(bot, "invite")
    bot.exec("systemctl", "restart", UNIT)
    echo(alice, chat, "after a restart")
    since = time.time()
    bot.exec("systemctl", "restart", "dovecot.service", timeout=120)
    bot.wait_log("^logged in$", since, timeout=60)
    echo(alice, chat, "after a restart of Dovecot")
    assert shown(bot, "invite") == link


def test_nothing_of_anybody_stays_in_mailbox_and_log(bot, joined):
    alice, chat = joined
    since = time.time()
    echo(alice, chat, "a secret of mine")
    bot.wait_log("^message echoed$", since)
    mails = ("find", f"{MAILBOX}/cur", f"{MAILBOX}/new", "-type", "f")
    wait_for(lambda: bot.exec(*mails).out == "", 10, "an empty mailbox")
    log = bot.journal("chatmail", "-u", UNIT)
    assert "message echoed" in log
    assert "@" not in log and "secret" not in log
    assert alice.get_config("configured_addr").partition("@")[0] not in log
    assert bot.exec("find", STATE, "-mindepth", "1").out.count("\n") == 4


def test_a_removal_keeps_the_contacts_for_the_next_installation(bot, joined):
    alice, chat = joined
    link = shown(bot, "invite")
    bot.sh(f"apt-get remove -q --yes {PACKAGE}", timeout=120)
    assert not bot.exec("systemctl", "is-active", UNIT, check=False).ok
    assert not bot.exec("test", "-e", "/etc/chatmail/echobot", check=False).ok
    bot.sh(f"apt-get install -q --yes --no-install-recommends {PACKAGE}", timeout=120)
    echo(alice, chat, "after a removal")
    assert shown(bot, "invite") == link


def test_purging_the_package_leaves_nothing(bot):
    bot.sh(f"apt-get purge -q --yes {PACKAGE}", timeout=120)
    named = bot.exec("find", "/etc", "/usr", "/var/lib", "-xdev", "-iname", "*echobot*").out
    books = ("/var/lib/dpkg/", "/var/lib/apt/")
    assert [path for path in named.splitlines() if not path.startswith(books)] == []
    assert not bot.exec("test", "-e", MAILBOX, check=False).ok
    units = bot.exec("systemctl", "list-units", "--all", "--plain", "chatmail-echobot*").out
    assert "0 loaded units listed" in units
    assert bot.exec("getent", "passwd", "chatmail-echobot", check=False).out == ""
    wait_for(lambda: bot.exec("chatmail-relay", "status", check=False).ok, 20, "status")
    assert bot.exec("chatmail-relay", "diff").out == ""
