# SPDX-License-Identifier: MIT
"""Backups of a tree: complete and small ones, and what is left when they are ended half-way."""

import json
import os
import sqlite3
import stat
import tarfile

import pytest
from chatmail_relay.backup import restore as restoring
from chatmail_relay.backup import snapshot, storage
from chatmail_relay.cli import main
from chatmail_relay.paths import Paths

DOMAIN = "_alpha.example"
STORE = f"var/lib/chatmail/mail/{DOMAIN}"
KEY = "var/lib/chatmail/keys/dkim/rsa.pem"
ALICE = f"{STORE}/alice1234@{DOMAIN}"
UIDS = b"3 V1700000000 N1 Gabcdef\n7 G1.M1.host :1.M1.host,S=5\n"


class Relay:
    """A tree of a relay, with one component and two mailboxes."""

    def __init__(self, root):
        self.root = root
        folder = root / "usr/share/chatmail-relay/components/toy"
        folder.mkdir(parents=True)
        (folder / "component.toml").write_text(
            'name = "toy"\norder = 1\n[[file]]\ntemplate = "a.j2"\ndest = "/etc/chatmail/toy/a"\n'
        )
        (folder / "a.j2").write_text("{{ mail_domain }}\n")

    def run(self, *words):
        return main(list(words), root=str(self.root))

    def fill(self):
        assert self.run("set", f"mail_domain={DOMAIN}") == 0
        assert self.run("apply") == 0
        self.write("etc/chatmail/www/logo.svg", b"<svg/>")
        self.write("var/lib/acme/certs/x/fullchain", b"PEM")
        (self.root / "var/lib/acme/live").mkdir(parents=True)
        (self.root / "var/lib/acme/live/a.example").symlink_to("../certs/x")
        os.makedirs(self.root / "var/lib/chatmail/doveauth")
        database = sqlite3.connect(self.root / "var/lib/chatmail/doveauth/tokens.sqlite")
        with database:
            database.execute("CREATE TABLE t (x)")
            database.execute("INSERT INTO t VALUES (42)")
        database.close()
        for name in ("alice1234", "bob123456"):
            mailbox = f"{STORE}/{name}@{DOMAIN}"
            self.write(f"{mailbox}/password", b"{SHA512-CRYPT}$6$x")
            os.utime(self.root / mailbox / "password", (86400 * 20000,) * 2)
            self.write(f"{mailbox}/cur/1.M1.host,S=5:2,S", b"hello")
            self.write(f"{mailbox}/new/2.M2.host,S=3", b"new")
            self.write(f"{mailbox}/.Sent/cur/3.M3.host,S=4:2,", b"sent")
            self.write(f"{mailbox}/tmp/9.half", b"ha")
            self.write(f"{mailbox}/dovecot-uidlist", UIDS)
            self.write(f"{mailbox}/dovecot.index.log", b"made anew")
        self.write(f"{STORE}/.removed/x", b"gone")
        return self

    def write(self, name, data):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def read(self, name):
        return (self.root / name).read_bytes()


@pytest.fixture
def relay(tmp_path):
    return Relay(tmp_path / "relay").fill()


@pytest.fixture
def fresh(tmp_path):
    return Relay(tmp_path / "fresh")


def targets(tmp_path):
    return {"directory": str(tmp_path / "backups"), "tar": str(tmp_path / "backup.tar")}


@pytest.mark.parametrize("kind", ["directory", "tar"])
def test_a_fresh_machine_gets_everything_that_makes_the_relay(relay, fresh, tmp_path, kind):
    target = targets(tmp_path)[kind]
    assert relay.run("backup", target) == 0
    assert fresh.run("restore", target) == 0
    for name in (
        "etc/chatmail/chatmail.ini",
        "etc/chatmail/www/logo.svg",
        KEY,
        "var/lib/chatmail/keys/turn/secret",
        "var/lib/chatmail/tls/self-signed.key",
        "var/lib/acme/live/a.example/fullchain",
        f"{ALICE}/cur/1.M1.host,S=5:2,S",
        f"{ALICE}/new/2.M2.host,S=3",
        f"{ALICE}/.Sent/cur/3.M3.host,S=4:2,",
        f"{ALICE}/password",
        "etc/chatmail/toy/a",
    ):
        assert fresh.read(name) == relay.read(name), name
    assert (fresh.root / ALICE / "password").stat().st_mtime == 86400 * 20000
    assert not (fresh.root / ALICE / "dovecot.index.log").exists()
    assert not (fresh.root / STORE / ".removed").exists()
    assert list((fresh.root / ALICE / "tmp").iterdir()) == []
    database = sqlite3.connect(fresh.root / "var/lib/chatmail/doveauth/tokens.sqlite")
    assert database.execute("SELECT x FROM t").fetchall() == [(42,)]
    database.close()
    left = {path.name for path in (fresh.root / "var/lib/chatmail").iterdir()}
    assert left == {"doveauth", "format", "keys", "mail", "state", "tls"}


def test_folders_keep_their_uidvalidity_and_go_on_with_uids_nobody_has_seen(relay, fresh, tmp_path):
    target = targets(tmp_path)["directory"]
    relay.run("backup", target)
    fresh.run("restore", target)
    head, record, rest = fresh.read(f"{ALICE}/dovecot-uidlist").split(b"\n")
    following = 8 + restoring.UIDS_AHEAD
    assert head == b"3 V1700000000 N%d Gabcdef" % following
    assert record == UIDS.split(b"\n")[1] and rest == b""


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"3 V1 N5 Gx\n3 :a\n", b"3 V1 N%d Gx\n3 :a\n" % (5 + restoring.UIDS_AHEAD)),
        (b"3 V1 N5 Gx\n3 :a\n9 :b", b"3 V1 N%d Gx\n3 :a\n" % (5 + restoring.UIDS_AHEAD)),
        (
            b"3 V1 N%d Gx\n" % (2**32 - 5),
            b"3 V1 N%d Gx\n" % (2**32 - 1 - restoring.UIDS_AHEAD),
        ),
        (b"garbage", None),
    ],
)
def test_lists_of_uids_as_they_may_be(tmp_path, data, wanted):
    path = tmp_path / "dovecot-uidlist"
    path.write_bytes(data)
    restoring.skip_uids(path)
    assert (path.read_bytes() if path.exists() else None) == wanted


def test_a_second_backup_links_what_did_not_change(relay, tmp_path, capsys):
    target = tmp_path / "backups"
    relay.run("backup", str(target))
    (relay.root / ALICE / "new/2.M2.host,S=3").rename(relay.root / ALICE / "cur/2.M2.host,S=3:2,")
    relay.write(f"{ALICE}/new/4.M4.host,S=6", b"fourth")
    capsys.readouterr()
    assert relay.run("backup", str(target), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["messages"], said["new"], said["new_bytes"]) == (7, 1, 6)
    first, second = (target / name for name in sorted(os.listdir(target)))
    before = (first / ALICE / "new/2.M2.host,S=3").stat()
    assert before.st_ino == (second / ALICE / "cur/2.M2.host,S=3:2,").stat().st_ino
    assert not (second / ALICE / "new/2.M2.host,S=3").exists()


def test_only_as_many_are_kept_as_wanted(relay, tmp_path, capsys):
    target = tmp_path / "backups"
    for _ in range(3):
        assert relay.run("backup", str(target), "--keep", "2") == 0
    assert len(os.listdir(target)) == 2
    with pytest.raises(SystemExit):
        relay.run("backup", str(target), "--keep", "0")


@pytest.mark.parametrize("kind", ["directory", "tar"])
def test_nobody_else_can_read_a_backup(relay, tmp_path, kind):
    target = targets(tmp_path)[kind]
    relay.run("backup", target)
    assert stat.S_IMODE(os.stat(target).st_mode) == {"directory": 0o700, "tar": 0o600}[kind]
    if kind == "directory":
        (name,) = os.listdir(target)
        tree = tmp_path / "backups" / name
        assert stat.S_IMODE(tree.stat().st_mode) == 0o700
        assert stat.S_IMODE((tree / KEY).stat().st_mode) == 0o600
    assert not (relay.root / "var/lib/chatmail/backup.partial").exists()


def test_a_message_that_moves_while_it_is_looked_for_is_in_the_backup(
    relay, fresh, tmp_path, monkeypatch
):
    """Between listing and copying it gets a flag; another one moves to a folder already looked at."""
    original = snapshot._copy
    moves = [
        ("new/2.M2.host,S=3", "cur/2.M2.host,S=3:2,S"),
        (".Sent/cur/3.M3.host,S=4:2,", "cur/3.M3.host,S=4:2,"),
    ]

    def copy(name, descriptor, target):
        if moves and str(target).endswith("1.M1.host,S=5:2,S"):
            for old, new in moves:
                (relay.root / ALICE / old).rename(relay.root / ALICE / new)
            moves.clear()
        original(name, descriptor, target)

    monkeypatch.setattr(snapshot, "_copy", copy)
    target = str(tmp_path / "backups")
    assert relay.run("backup", target) == 0
    assert fresh.run("restore", target) == 0
    names = {path.name for path in (fresh.root / ALICE).rglob("*.host,*")}
    assert names == {"1.M1.host,S=5:2,S", "2.M2.host,S=3:2,S", "3.M3.host,S=4:2,"}


def test_no_link_in_the_store_is_followed(relay, fresh, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("of root")
    for name in ("cur/5.M5.host,S=1", "dovecot-keywords"):
        (relay.root / ALICE / name).symlink_to(secret)
    (relay.root / STORE / f"eve@{DOMAIN}").symlink_to(tmp_path)
    target = tmp_path / "backups"
    assert relay.run("backup", str(target)) == 1
    fresh.run("restore", str(target))
    assert not any(path.is_symlink() for path in (fresh.root / STORE).rglob("*"))
    for path in target.rglob("*"):
        assert not path.is_file() or path.read_bytes() != b"of root", path


def test_a_backup_that_is_ended_half_way_leaves_the_ones_before(relay, tmp_path, monkeypatch):
    for target in (str(tmp_path / "backups"), str(tmp_path / "backup.tar")):
        place = storage.storage(Paths(), target)
        relay.run("backup", target)
        before = place.names()
        with monkeypatch.context() as broken:
            broken.setattr(os, "sync", _killed)
            with pytest.raises(_Kill):
                relay.run("backup", target)
        assert place.names() == before
        assert relay.run("backup", target) == 0
        assert len(place.names()) == (1 if target.endswith(".tar") else 2)
        left = os.listdir(tmp_path / "backups") + os.listdir(tmp_path)
        assert not [name for name in left if "partial" in name]


class _Kill(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def _killed(*_arguments, **_options):
    raise _Kill


STEPS = ("skip_uids", "give", "_swap", "exchange", "_small_files", "_links", "apply")


@pytest.mark.parametrize("step", STEPS)
def test_a_restoration_that_is_ended_half_way_is_done_again_and_loses_nothing(
    relay, tmp_path, monkeypatch, capsys, step
):
    """On the relay itself, which has got a message since."""
    target = str(tmp_path / "backups")
    relay.run("backup", target)
    relay.write(f"{ALICE}/new/4.M4.host,S=6", b"fourth")
    with monkeypatch.context() as broken:
        broken.setattr(restoring, step, _killed)
        with pytest.raises(_Kill):
            relay.run("restore", target, "--replace")
    assert relay.read(f"{ALICE}/cur/1.M1.host,S=5:2,S") == b"hello"  # a whole store is in place
    assert relay.run("restore", target, "--replace") == 0
    assert not (relay.root / ALICE / "new/4.M4.host,S=6").exists()
    kept = list((relay.root / "var/lib/chatmail").glob("replaced-*"))
    found = [path for top in kept for path in top.rglob("4.M4.host,S=6")]
    assert [path.read_bytes() for path in found] == [b"fourth"]
    assert not restoring.mark(Paths(relay.root)).exists()


def test_mailboxes_that_are_there_are_replaced_only_if_asked(relay, tmp_path, capsys):
    target = str(tmp_path / "backups")
    relay.run("backup", target)
    assert relay.run("restore", target) == 1
    assert "--replace" in capsys.readouterr().err
    assert relay.read(f"{ALICE}/dovecot-uidlist") == UIDS


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("none", "no backup there"),
        ("manifest", "no backup there"),
        ("format", "newer chatmail-relay"),
        ("state", "has format 99"),
        ("settings", "unknown way"),
    ],
)
def test_a_backup_that_cannot_be_restored_changes_nothing(
    relay, fresh, tmp_path, capsys, damage, message
):
    target = tmp_path / "backups"
    if damage != "none":
        relay.run("backup", str(target))
        (name,) = os.listdir(target)
        manifest = target / name / "manifest.json"
        if damage == "manifest":
            manifest.unlink()
        elif damage == "format":
            manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
        elif damage == "state":
            (target / name / "var/lib/chatmail/format").write_text("99 9.9\n")
        else:
            with (target / name / "etc/chatmail/chatmail.ini").open("a") as file:
                file.write("tls = magic\n")
    assert fresh.run("restore", str(target)) == 1
    assert message in capsys.readouterr().err
    assert not (fresh.root / STORE).exists() and not (fresh.root / "etc/chatmail").exists()


def test_an_archive_that_is_cut_off_is_refused(relay, fresh, tmp_path, capsys):
    target = tmp_path / "backup.tar"
    relay.run("backup", str(target))
    assert tarfile.is_tarfile(target)
    os.truncate(target, target.stat().st_size // 2)
    assert fresh.run("restore", str(target)) == 1
    assert not (fresh.root / STORE).exists()


def test_a_directory_with_other_things_in_it_is_refused(relay, tmp_path, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter").touch()
    assert relay.run("backup", str(tmp_path / "home")) == 1
    assert "name a directory for backups alone" in capsys.readouterr().err


def test_an_older_one_can_be_chosen(relay, fresh, tmp_path, capsys):
    target = str(tmp_path / "backups")
    relay.run("backup", target)
    relay.write(f"{ALICE}/new/4.M4.host,S=6", b"fourth")
    relay.run("backup", target)
    capsys.readouterr()
    assert fresh.run("restore", target, "--list", "--json") == 0
    names = json.loads(capsys.readouterr().out)
    assert fresh.run("restore", target, "--snapshot", "yesterday") == 1
    assert names[0] in capsys.readouterr().err
    assert fresh.run("restore", target, "--snapshot", names[0]) == 0
    assert not (fresh.root / ALICE / "new/4.M4.host,S=6").exists()
