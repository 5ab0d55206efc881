# SPDX-License-Identifier: MIT
"""A copy of a reference relay's files becomes a relay of ours; what is there stays there."""

import io
import json
import os
import time

import pytest
from chatmail_relay.cli import main
from chatmail_relay.importing import steps
from chatmail_relay.paths import Paths
from chatmaild.config import explicit_values
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

DOMAIN = "old.example"
INI = f"""\
[params]
mail_domain = {DOMAIN}
max_mailbox_size = 100M
delete_mails_after = 12
passthrough_recipients = echo@{DOMAIN} @friends.example
filtermail_smtp_port = 10080
disable_ipv6 = False
passdb_path = /home/vmail/passdb.sqlite
mailboxes_dir = /home/vmail/mail/{DOMAIN}
invented = 1
privacy_postal =
    Some Street 1
    Some Town
"""
OLD = "old/home/vmail/mail/old.example"
NEW = "relay/var/lib/chatmail/mail/old.example"
DAY = 86400 * 19000


@pytest.fixture
def place(tmp_path):
    """`old`, the copy, and `relay`, on which nothing is configured."""
    folder = tmp_path / "relay/usr/share/chatmail-relay/components/toy"
    folder.mkdir(parents=True)
    (folder / "component.toml").write_text(
        'name = "toy"\norder = 1\n[[file]]\ntemplate = "a.j2"\ndest = "/etc/toy"\n'
    )
    (folder / "a.j2").write_text("{{ mail_domain }}\n")
    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    files = {
        "usr/local/lib/chatmaild/chatmail.ini": INI.encode(),
        "etc/dkimkeys/opendkim.private": key,
        "etc/chatmail-nocreate": b"",
        "var/lib/acme/accounts/acme-v02.example/abc/privkey": b"ACCOUNT",
        "var/lib/acme/certs/x/fullchain": b"PEM",
        "var/lib/acme/conf/target": b"request: webroot",
        "var/spool/postfix/deferred/A/A1B2C3": b"queued",
        "etc/systemd/system/doveauth.service": b"[Unit]",
    }
    for name, data in files.items():
        write(tmp_path / "old" / name, data)
    (tmp_path / "old/var/lib/acme/live").mkdir()
    (tmp_path / f"old/var/lib/acme/live/{DOMAIN}").symlink_to("../certs/x")
    mailbox = tmp_path / OLD / f"alice@{DOMAIN}"
    write(mailbox / "password", b"{SHA512-CRYPT}$6$x")
    os.utime(mailbox / "password", (DAY, DAY))
    write(mailbox / "cur/1.M1.h,S=900,W=910:2,S", b"\x1f\x8bgzip")
    write(mailbox / ".DeltaChat/new/2.M2.h,S=9", b"\x1f\x8bgzip")
    write(mailbox / "dovecot-uidlist", b"3 V17 N3 Gab\n2 :1.M1.h,S=900,W=910\n")
    write(mailbox / "metadata.json", b'{"devicetoken": {"t": 1}}')
    write(mailbox / "DISABLED", b"")
    write(mailbox / "rawlog.in", b"secret")
    write(tmp_path / OLD / "pending_notifications/x", b"")
    return tmp_path


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def run(place, *words):
    return main(["import", str(place / "old"), *words], root=str(place / "relay"))


def listing(top):
    return {str(p.relative_to(top)): p.is_file() and p.read_bytes() for p in top.rglob("*")}


def test_everything_is_taken_over_and_the_copy_stays_as_it_was(place):
    before = listing(place / "old")
    assert run(place, "--yes") == 0
    assert listing(place / "old") == before
    mailbox = place / NEW / f"alice@{DOMAIN}"
    assert (mailbox / "password").stat().st_mtime == DAY
    assert (mailbox / "cur/1.M1.h,S=900,W=910:2,S").read_bytes() == b"\x1f\x8bgzip"
    assert (mailbox / ".DeltaChat/new/2.M2.h,S=9").exists() and (mailbox / "DISABLED").exists()
    # nothing came in between: the numbers go on as they are
    assert (mailbox / "dovecot-uidlist").read_bytes().startswith(b"3 V17 N3 Gab\n")
    assert not (mailbox / "enforceE2EEincoming").exists()
    assert not (mailbox / "rawlog.in").exists()
    assert not (place / NEW / "pending_notifications").exists()
    relay = place / "relay"
    dkim = (relay / "var/lib/chatmail/keys/dkim/rsa.pem").read_bytes()
    assert dkim == (place / "old/etc/dkimkeys/opendkim.private").read_bytes()
    assert (relay / f"var/lib/acme/live/{DOMAIN}/fullchain").read_bytes() == b"PEM"
    assert (relay / "var/lib/acme/accounts/acme-v02.example/abc/privkey").exists()
    assert not (relay / "var/lib/acme/conf").exists()
    assert (relay / "var/spool/postfix/deferred/A/A1B2C3").read_bytes() == b"queued"
    assert (relay / "etc/chatmail-nocreate").exists()
    assert (relay / "etc/toy").read_text() == f"{DOMAIN}\n"
    found = explicit_values(relay / "etc/chatmail/chatmail.ini")
    assert found == {
        "mail_domain": DOMAIN,
        "max_mailbox_size": "100M",
        "delete_mails_after": "12",
        "passthrough_recipients": "@friends.example",
        "privacy_postal": "Some Street 1\nSome Town",
        "dkim_selector": "opendkim",
        "acme_agreement": "true",
    }


def test_all_is_said_before_and_nothing_done_without_a_yes(place, capsys, monkeypatch):
    before = listing(place)
    assert run(place, "--dry-run") == 0
    said = capsys.readouterr().out
    for words in ("mail_domain = old.example", "not invented: Nothing reads it", "DKIM key"):
        assert words in said
    assert run(place, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["step"] == "settings"
    for typed in ("y\n", ""):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert run(place) == 1
    assert listing(place) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("none", "no relay of the reference tool"),
        ("unset", "mail_domain is not set"),
        ("value", "delete_mails_after = soon"),
        ("configured", "already"),
    ],
)
def test_what_cannot_be_imported_changes_nothing(place, capsys, damage, message):
    ini = place / "old/usr/local/lib/chatmaild/chatmail.ini"
    if damage == "none":
        ini.unlink()
    elif damage == "unset":
        ini.write_text("[params]\nmail_domain =\n")
    elif damage == "value":
        ini.write_text(INI.replace("= 12", "= soon"))
    else:
        main(["set", "mail_domain=_mine.example"], root=str(place / "relay"))
    assert run(place, "--yes") == 1
    assert message in capsys.readouterr().err
    assert not (place / NEW).exists()


class _Kill(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def _killed(*_arguments, **_options):
    raise _Kill


@pytest.mark.parametrize(
    "where",
    ["exchange", "give", "change_settings", "apply", "write_file", "shutil.copy2", "shutil.rmtree"],
)
def test_an_import_that_is_ended_half_way_goes_on(place, monkeypatch, where):
    (place / NEW).mkdir(parents=True)  # empty, as tmpfiles may have made it
    with monkeypatch.context() as broken:
        target = "chatmail_relay.importing.steps"
        if where == "write_file":
            calls = []

            def write_and_die(change, original=steps.write_file):
                calls.append(change)
                if len(calls) > 4:
                    raise _Kill
                original(change)

            broken.setattr(f"{target}.write_file", write_and_die)
        else:
            broken.setattr(f"{target}.{where}", _killed)
        with pytest.raises(_Kill):
            run(place, "--yes")
    assert run(place, "--yes") == 0
    assert (place / NEW / f"alice@{DOMAIN}/password").stat().st_mtime == DAY
    assert (place / "relay/etc/toy").read_text() == f"{DOMAIN}\n"
    assert run(place, "--yes") == 0  # and is done once


def test_on_the_machine_itself_what_is_in_the_way_moves_aside_with_its_path(place):
    """Without systemd here; tests/test_import.py has it running."""
    old = place / "old"
    os.makedirs(old / "usr/share", exist_ok=True)
    (place / "relay/usr/share/chatmail-relay").rename(old / "usr/share/chatmail-relay")
    for name in ("etc/apt/preferences.d/pin-dovecot", "usr/local/bin/filtermail"):
        write(old / name, b"x")
    wants = old / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir()
    (wants / "doveauth.service").symlink_to("/etc/systemd/system/doveauth.service")
    for name in ("main.cf", "master.cf"):
        write(old / "etc/postfix" / name, b"reference")
    write(old / "usr/share/postfix/main.cf.debian", b"debian")
    write(old / "usr/share/postfix/master.cf.dist", b"debian")
    begin = time.time()
    assert main(["import", "--yes"], root=str(old)) == 0
    attic = old / "var/lib/chatmail/imported"
    for name in (
        "etc/apt/preferences.d/pin-dovecot",
        "usr/local/bin/filtermail",
        "usr/local/lib/chatmaild/chatmail.ini",
        "etc/systemd/system/doveauth.service",
        "etc/systemd/system/multi-user.target.wants/doveauth.service",
        "var/lib/acme/conf/target",
    ):
        assert os.path.lexists(attic / name) and not os.path.lexists(old / name), name
    assert (old / "etc/postfix/main.cf").read_bytes() == b"debian"
    assert (attic / "etc/postfix/main.cf").read_bytes() == b"reference"
    # still in its place, and the same file: nothing was copied
    message = f"alice@{DOMAIN}/cur/1.M1.h,S=900,W=910:2,S"
    one, other = place / OLD / message, old / f"var/lib/chatmail/mail/{DOMAIN}" / message
    assert one.stat().st_ino == other.stat().st_ino
    assert (old / "etc/toy").stat().st_mtime >= int(begin)
    assert not Paths(old).real("/var/lib/chatmail/import.partial").exists()
