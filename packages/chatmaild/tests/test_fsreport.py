# SPDX-License-Identifier: MIT
"""The report: sizes, logins, selections, metrics file."""

import json
import os
import signal
import stat
import subprocess
import sys

import pytest
from mailstore import NOW, Box, make_box

from chatmaild import fsreport, maildir
from chatmaild.users import MailStore

KILOBYTE, MEGABYTE = 2**10, 2**20


@pytest.fixture
def store(tmp_path):
    """Three accounts and one address that is none."""
    made = MailStore(tmp_path / "mail")
    made.path.mkdir()
    for name, age in [("alice", 0), ("ci-bob", 20), ("carol", 120), ("dave", 0)]:
        make_box(made, f"{name}@chat.example", login_age=age)
    (made.path / "dave@chat.example" / "password").write_text("")
    return made


@pytest.fixture
def ini(tmp_path):
    path = tmp_path / "chatmail.ini"
    path.write_text(f"[params]\nmail_domain = chat.example\nmailboxes_dir = {tmp_path}/mail\n")
    return path


@pytest.fixture
def report(store):
    def make(**selection):
        with maildir.open_store(store.path) as opened:
            return fsreport.make_report(opened, fsreport.Selection(NOW, **selection))

    return make


def add(store, name, *args, **kwargs):
    box = Box(store.path / f"{name}@chat.example")
    return box.message(*args, **kwargs)


def test_messages_are_counted_by_size_and_cumulative(store, report):
    for size in (10, 100 * KILOBYTE, 100 * KILOBYTE - 1, MEGABYTE, 20 * MEGABYTE):
        add(store, "alice", 1, size=size, folder=".Sent/new")
        add(store, "alice", 1, size=size, folder="cur")
    made = report()
    assert made.size_counts == [10, 6, 4, 4, 2, 2, 2]
    assert made.size_bytes[0] == made.message_bytes == 2 * (200 * KILOBYTE + 9 + 21 * MEGABYTE)
    assert made.size_bytes[-1] == 40 * MEGABYTE


def test_what_is_no_message_is_extra(store, report):
    total = sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
    assert report().extra_bytes == total
    add(store, "alice", 1, size=100)
    (store.path / "alice@chat.example" / ".Sent").mkdir()
    (store.path / "alice@chat.example" / ".Sent" / "dovecot.index").write_text("x" * 7)
    (store.path / "alice@chat.example" / "link").symlink_to("/" + "x" * 8)
    made = report()
    assert (made.message_bytes, made.extra_bytes) == (100, total + 7 + 9)


def test_accounts_are_counted_by_last_login(report):
    made = report()
    assert (made.accounts, made.ci_accounts) == (3, 1)
    assert dict(zip(fsreport.LOGIN_DAYS, made.active, strict=True)) == {
        1: 1,
        10: 1,
        30: 2,
        40: 2,
        80: 2,
        100: 2,
        150: 3,
    }
    assert made.ci_active == [0, 0, 1, 1, 1, 1, 1]


def test_files_can_be_selected(store, report):
    add(store, "alice", 1, size=1)
    add(store, "carol", 1, size=10, folder="new")
    add(store, "carol", 1, size=100)
    assert report().message_bytes == 111
    assert report(min_login_age=100).message_bytes == 110
    assert report(min_login_age=100, mdir="new").message_bytes == 10
    assert report(maxnum=0).accounts == 0 and report(maxnum=4).accounts == 3


def test_the_text_names_no_address(ini, store, capsys):
    add(store, "carol", 1, size=3 * MEGABYTE)
    assert fsreport.main(["--config", str(ini)]) == 0
    text = capsys.readouterr().out
    for line in [
        "## Mailbox storage use analysis",
        "Messages: 3.0M",
        "at least     2.0M:     3.0M in 1 messages",
        "## Login stats: all accounts\naccounts: 3\nactive in last   1 days: 1 (33.33 %)",
        "## Login stats: non-CI accounts\naccounts: 2",
    ]:
        assert line in text
    assert "@" not in text


def test_the_metrics_are_those_of_existing_relays_and_replaced_in_one_step(ini, store, tmp_path):
    add(store, "carol", 1, size=MEGABYTE)
    folder = tmp_path / "metrics"
    folder.mkdir(mode=0o755)
    umask = os.umask(0o077)
    for path in (folder, folder / "other.prom"):
        assert fsreport.main(["--config", str(ini), "--textfile", str(path)]) == 0
    os.umask(umask)
    assert sorted(os.listdir(folder)) == ["fsreport.prom", "other.prom"]
    assert stat.S_IMODE((folder / "fsreport.prom").stat().st_mode) == 0o644
    text = (folder / "fsreport.prom").read_text()
    for line in [
        "# TYPE chatmail_storage_bytes gauge",
        f'chatmail_storage_bytes{{kind="messages"}} {MEGABYTE}',
        f'chatmail_messages_bytes{{min_size="524288"}} {MEGABYTE}',
        'chatmail_messages_count{min_size="1048576"} 1',
        'chatmail_messages_count{min_size="2097152"} 0',
        'chatmail_accounts{kind="all"} 3',
        'chatmail_accounts{kind="user"} 2',
        'chatmail_accounts_active{days="30"} 2',
    ]:
        assert f"\n{line}\n" in f"\n{text}"


@pytest.mark.parametrize("step", ["fchmod", "replace"])
def test_killed_while_it_writes_the_metrics_file_it_leaves_the_old_one_whole(
    ini, store, tmp_path, step
):
    folder = tmp_path / "metrics"
    folder.mkdir()
    arguments = ["--config", str(ini), "--textfile", str(folder)]
    assert fsreport.main(arguments) == 0
    before = (folder / "fsreport.prom").read_text()
    add(store, "alice", 1, size=MEGABYTE)
    killed = (
        "import os, signal, sys\n"
        "from chatmaild import fsreport\n"
        f"os.{step} = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
        "fsreport.main(sys.argv[1:])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", killed, *arguments], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert [path.read_text() for path in folder.glob("*.prom")] == [before]
    assert fsreport.main(arguments) == 0
    assert os.listdir(folder) == ["fsreport.prom"]
    assert (folder / "fsreport.prom").read_text() != before


def test_a_metrics_file_that_cannot_be_written_is_an_error_and_leaves_nothing(ini, store, tmp_path):
    target = tmp_path / "metrics" / "x.prom"
    assert fsreport.main(["--config", str(ini), "--textfile", str(target)]) == 1
    target.mkdir(parents=True)
    (target / "fsreport.prom").mkdir()
    assert fsreport.main(["--config", str(ini), "--textfile", str(target)]) == 1
    assert os.listdir(target) == ["fsreport.prom"]


def test_json_has_the_same_numbers(ini, store, capsys):
    assert fsreport.main(["--config", str(ini), "--json", "--days", "50"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["accounts"] == {"all": 3, "ci": 1, "user": 2}
    assert data["accounts_active"]["80"] == 2 and data["accounts_active"]["40"] == 0


def test_nothing_is_changed(store, report):
    before = sorted((str(path), path.stat().st_mtime_ns) for path in store.path.rglob("*"))
    report()
    assert sorted((str(path), path.stat().st_mtime_ns) for path in store.path.rglob("*")) == before


def test_a_mailbox_that_cannot_be_read_is_counted_and_not_named_in_the_report(
    ini, store, capsys, monkeypatch
):
    real = fsreport.open_directory

    def failing(name, parent):
        if name.startswith("alice"):
            raise PermissionError(13, "Permission denied")
        return real(name, parent)

    monkeypatch.setattr(fsreport, "open_directory", failing)
    assert fsreport.main(["--config", str(ini)]) == 1
    assert "1 mailboxes could not be read" in capsys.readouterr().out


def test_no_store_yet_is_an_empty_report(ini, tmp_path, capsys):
    assert fsreport.main(["--config", str(ini)]) == 0
    assert "accounts: 0\n" in capsys.readouterr().out
