# SPDX-License-Identifier: MIT
"""What the bot keeps, what it shows of it, and its account in the mail store."""

import base64
import re
from urllib.parse import parse_qs

import pytest
from chatmail_echobot import account, openpgp, settings, state
from chatmaild.users import MailStore
from conftest import BOT

PASSWORD = "a-password-of-the-bot"


def test_state_is_made_once_and_private(tmp_path):
    state.make(tmp_path, BOT)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    state.make(tmp_path, BOT)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert before.keys() == {"key.asc", "password", "invite-number", "auth"}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_a_missing_state_says_who_makes_it(tmp_path):
    with pytest.raises(state.StateError, match="chatmail-echobot.service"):
        state.load(tmp_path, BOT)


def test_the_invite_link_is_of_the_version_whose_answers_we_can_write(me):
    start, _, rest = me.invite_link.partition("#")
    fingerprint, _, query = rest.partition("&")
    assert start == "https://i.delta.chat/" and fingerprint == openpgp.fingerprint(me.cert)
    assert parse_qs(query) == {
        "i": [me.invite_number],
        "s": [me.auth],
        "a": [BOT],
        "n": [state.NAME],
    }


def test_the_vcard_has_address_and_key(me):
    assert f"\r\nEMAIL:{BOT}\r\n" in me.vcard
    key = re.search(r"KEY:data:application/pgp-keys;base64\\,(\S+)\r\n", me.vcard)
    assert key and base64.b64decode(key[1]) == me.cert


def test_the_account_is_made_once_and_marked(tmp_path):
    store = MailStore(tmp_path / "mail")
    assert account.make_account(store, BOT, PASSWORD)
    assert not account.make_account(store, BOT, PASSWORD)
    assert store.exists(BOT) and store.requires_encryption(BOT)
    assert (store.mailbox_path(BOT) / account.MARK).exists()


def test_somebody_elses_account_is_left_alone(tmp_path):
    store = MailStore(tmp_path / "mail")
    store.create(BOT, "password of somebody else")
    with pytest.raises(account.AccountError, match="echobot_name"):
        account.make_account(store, BOT, PASSWORD)
    assert not (store.mailbox_path(BOT) / account.MARK).exists()


def test_a_blocked_address_is_left_alone(tmp_path):
    store = MailStore(tmp_path / "mail")
    store.mailbox_path(BOT).mkdir(parents=True)
    (store.mailbox_path(BOT) / "password").touch()
    with pytest.raises(account.AccountError, match="is blocked"):
        account.make_account(store, BOT, PASSWORD)


def test_a_password_behind_a_link_is_not_read(tmp_path):
    (tmp_path / "secret").write_text("of root")
    (tmp_path / "password").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError):
        account.read_password(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[echobot]\naddress = a@b\n", "[echobot]\nmax_message_size = many\n", "junk"]
)
def test_broken_settings_name_the_file_and_the_remedy(tmp_path, text):
    path = tmp_path / "echobot.ini"
    path.write_text(text)
    with pytest.raises(settings.SettingsError, match="echobot.ini.*chatmail-relay apply"):
        settings.read_settings(path)
