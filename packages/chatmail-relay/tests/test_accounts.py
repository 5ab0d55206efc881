# SPDX-License-Identifier: MIT
"""The commands user and token on a relay below another root: what they say, refuse and write."""

import io
import json
import os

import pytest
from chatmail_relay.accounts import AccountError, _owner
from chatmail_relay.cli import main
from chatmail_relay.paths import Paths
from chatmaild.users import MailStore

DOMAIN = "chat.example"
ALICE, BOB = f"alice1234@{DOMAIN}", f"bobby1234@{DOMAIN}"
INI = "tls_external_cert_and_key = /a.pem /b.pem"


@pytest.fixture
def root(tmp_path):
    configure(tmp_path)
    (tmp_path / "var/lib/chatmail/doveauth").mkdir(parents=True)
    return tmp_path


def configure(root, more=""):
    (root / "etc/chatmail").mkdir(parents=True, exist_ok=True)
    text = f"[params]\nmail_domain = {DOMAIN}\n{INI}\n{more}\n"
    (root / "etc/chatmail/chatmail.ini").write_text(text)


@pytest.fixture
def store(root):
    made = MailStore(root / f"var/lib/chatmail/mail/{DOMAIN}")
    for address in (ALICE, BOB):
        made.create(address, "secret-password")
    return made


@pytest.fixture
def run(root, capsys):
    def run(*words):
        status = main(list(words), root=str(root))
        out, err = capsys.readouterr()
        return status, json.loads(out) if "--json" in words and out else out, err

    return run


def test_users_are_listed_as_table_and_json(run, store):
    store.set_last_login(ALICE, 20000 * 86400)
    store.block(BOB)
    status, users, _err = run("user", "list", "--json")
    assert status == 0
    assert [(user["address"], user["state"]) for user in users] == [
        (ALICE, "active"),
        (BOB, "blocked"),
    ]
    assert users[0]["last_login"] == "2024-10-04"
    lines = run("user", "list")[1].splitlines()
    assert lines[0].split() == ["ADDRESS", "STATE", "LAST", "LOGIN"]
    assert lines[1].split() == [ALICE, "active", "2024-10-04"]


def test_a_mailbox_that_cannot_be_read_does_not_hide_the_others(run, store):
    (store.mailbox_path(ALICE) / "password").unlink()
    (store.mailbox_path(ALICE) / "password").mkdir()
    users = run("user", "list", "--json")[1]
    assert [(user["address"], user["state"]) for user in users] == [
        (ALICE, "unreadable"),
        (BOB, "active"),
    ]
    assert list(store) == [BOB]


def test_a_relay_without_users_has_an_empty_list(run):
    assert run("user", "list", "--json")[:2] == (0, [])


def test_one_user_is_told_with_messages_and_storage(run, store):
    for name in ("cur", "new", "tmp"):
        (store.mailbox_path(ALICE) / name).mkdir()
        (store.mailbox_path(ALICE) / name / "1.mail").write_bytes(b"x" * 1000)
    status, user, _err = run("user", "info", "alice1234", "--json")
    assert status == 0
    assert (user["messages"], user["bytes"], user["encrypted_only"]) == (2, 2000, True)
    assert "messages:     2" in run("user", "info", ALICE.upper())[1]


def test_block_and_unblock_keep_the_password(run, store):
    hashed = store.read_hash(ALICE)
    assert run("user", "block", ALICE)[0] == run("user", "block", ALICE)[0] == 0
    assert store.is_disabled(ALICE)
    assert run("user", "unblock", ALICE)[0] == run("user", "unblock", ALICE)[0] == 0
    assert not store.is_disabled(ALICE) and store.read_hash(ALICE) == hashed


def test_an_emptied_password_file_is_a_block_that_only_deletion_ends(run, store):
    (store.mailbox_path(ALICE) / "password").write_text("")
    assert run("user", "list", "--json")[1][0]["state"] == "blocked"
    assert "password file is empty" in run("user", "info", ALICE)[1]
    status, _out, err = run("user", "unblock", ALICE)
    assert status == 1 and "its password is lost" in err
    assert run("user", "delete", ALICE, "--yes")[0] == 0
    assert not store.is_taken(ALICE)


@pytest.mark.parametrize("action", ["info", "block", "unblock", "delete"])
@pytest.mark.parametrize("address", ["nobody123", f"nobody123@{DOMAIN}", "../../etc", "a@b@c", "@"])
def test_who_does_not_exist_is_refused(run, store, action, address):
    status, out, err = run("user", action, address)
    assert status == 1 and out == "" and "no such address" in err
    assert sorted(store) == [ALICE, BOB]


@pytest.mark.parametrize(
    ("typed", "deleted"), [(ALICE, True), (ALICE.upper(), True), ("y", False), ("", False)]
)
def test_a_deletion_needs_the_address_typed(run, store, monkeypatch, typed, deleted):
    monkeypatch.setattr("sys.stdin", io.StringIO(typed + "\n"))
    status, _out, err = run("user", "delete", ALICE)
    assert "deletes " + ALICE in err
    assert (status == 0) == deleted
    assert store.is_taken(ALICE) != deleted and store.is_taken(BOB)
    assert store.is_disabled(ALICE) is False


def test_a_token_is_made_shown_listed_and_revoked(run, root):
    configure(root, "registration = token")
    status, made, err = run("token", "create", "--uses", "5", "--note", "choir\n1", "--json")
    assert (status, err) == (0, "")
    assert made["code"] == f"dcaccount:https://{DOMAIN}/new?token={made['token']}"
    assert (made["max_uses"], made["uses"], made["note"]) == (5, 0, "choir 1")
    assert run("token", "list", "--json")[1] == [made]
    lines = run("token", "list")[1].splitlines()
    assert lines[1].split()[:5] == [made["token"], "valid", "0", "of", "5"]
    assert run("token", "revoke", made["token"])[0] == 0
    status, _out, err = run("token", "revoke", made["token"])
    assert status == 1 and "no such token" in err
    assert run("token", "list", "--json")[1] == []


def test_a_token_without_limits(run, root):
    configure(root, "registration = token")
    status, out, _err = run("token", "create", "--uses", "unlimited", "--expires", "never")
    token, code, page = out.splitlines()
    assert page == f"https://{DOMAIN}/invite?token={token}"
    assert status == 0 and code == f"dcaccount:https://{DOMAIN}/new?token={token}"
    assert "unlimited" in run("token", "list")[1] and "never" in run("token", "list")[1]


def test_a_token_nobody_needs_is_made_with_a_warning(run):
    status, _out, err = run("token", "create")
    assert status == 0 and "registration is open" in err and "registration=token" in err


@pytest.mark.parametrize(
    "words", [["--uses", "0"], ["--uses", "x"], ["--expires", "7"], ["--expires", "0d"]]
)
def test_a_wrong_limit_is_wrong_usage(run, words):
    with pytest.raises(SystemExit) as caught:
        run("token", "create", *words)
    assert caught.value.code == 2


def test_an_unconfigured_relay_says_how_to_go_on(tmp_path, capsys):
    for words in (["user", "list"], ["token", "list"], ["token", "create"]):
        assert main(words, root=str(tmp_path)) == 1
        assert "dpkg-reconfigure" in capsys.readouterr().out


# --- on a live relay: Dovecot is told -----------------------------------------------------------------


@pytest.fixture
def dovecot(tmp_path, monkeypatch, root):
    """A live relay whose doveadm is a script; returns a function that writes it."""
    monkeypatch.setattr(Paths, "is_live", property(lambda paths: True))
    monkeypatch.setattr(
        "chatmail_relay.systemd.properties",
        lambda units, *names: {unit: {"ActiveState": "active"} for unit in units},
    )
    program = tmp_path / "bin" / "doveadm"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    def write(script):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    return write


def test_a_block_ends_sessions_and_forgets_the_cached_password(run, store, dovecot, tmp_path):
    dovecot(f'echo "$*" >>{tmp_path}/asked')
    assert run("user", "block", ALICE)[0] == 0
    asked = (tmp_path / "asked").read_text()
    assert f"auth cache flush {ALICE}\n" in asked and f"kick {ALICE}\n" in asked


def test_a_block_whose_sessions_go_on_says_so(run, store, dovecot):
    dovecot("echo 'no such socket' >&2; exit 75")
    status, _out, err = run("user", "block", ALICE)
    assert status == 1 and "go on" in err and "no such socket" in err
    assert store.is_disabled(ALICE)  # refused from now on all the same


def test_nothing_is_deleted_while_its_sessions_go_on(run, store, dovecot):
    dovecot("exit 75")
    assert run("user", "delete", ALICE, "--yes")[0] == 1
    assert store.is_taken(ALICE)


def test_root_takes_the_rights_of_the_owner_by_name_whatever_lies_in_the_store(monkeypatch):
    named = []
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("os.stat", lambda *args: pytest.fail("a stat follows links of the owner"))
    monkeypatch.setattr("pwd.getpwnam", lambda name: named.append(name) or "the owner")
    assert _owner(Paths()) == "the owner" and named == ["_chatmail"]


def test_a_relay_without_its_user_tells_how_to_make_it(monkeypatch):
    def missing(name):
        raise KeyError(name)

    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("pwd.getpwnam", missing)
    with pytest.raises(AccountError, match="systemd-sysusers"):
        _owner(Paths())


def test_an_invitation_to_a_relay_without_a_name_is_its_page(root, run):
    text = "[params]\nmail_domain = 192.0.2.1\nregistration = token\n"
    (root / "etc/chatmail/chatmail.ini").write_text(text)
    _token, page = run("token", "create")[1].split()
    assert page.startswith("https://192.0.2.1/invite?token=")
