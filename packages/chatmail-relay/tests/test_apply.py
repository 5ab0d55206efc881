# SPDX-License-Identifier: MIT
"""Settings in, files out: applied once, changed by settings, refused whole, undone without trace."""

import json
import os

import pytest
from chatmail_relay import apply as brain
from chatmail_relay import stateformat, systemd
from chatmail_relay.cli import main
from chatmail_relay.paths import Paths
from chatmail_relay.transaction import Change, Transaction
from cryptography import x509

TOML = """
name = "toy"
order = 10
units = ["toy.service"]
activate = "reload"
check = [["sh", "-c", "! grep -q poison %(root)s/etc/toy/toy.conf"]]

[[file]]
template = "toy.conf.j2"
dest = "/etc/toy/toy.conf"
mode = "0640"

[[file]]
template = "extra.j2"
dest = "/etc/toy/extra.conf"
when = "imap_compress"
activate = "restart"
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    folder = tmp_path / "usr/share/chatmail-relay/components/toy"
    folder.mkdir(parents=True)
    (folder / "component.toml").write_text(TOML % {"root": tmp_path})
    (folder / "toy.conf.j2").write_text(
        "# {{ header }}\ndomain={{ mail_domain }}\n{{ privacy_pdo }}\n"
    )
    (folder / "extra.j2").write_text("extra\n")
    if os.geteuid() != 0:  # the package build is not root
        monkeypatch.setattr("chatmail_relay.transaction.os.geteuid", lambda: 1)
    return tmp_path


def run(root, *words):
    return main(list(words), root=str(root))


def configured(root):
    assert run(root, "set", "mail_domain=_alpha.example") == 0
    assert run(root, "apply") == 0


def test_without_a_domain_nothing_is_rendered_and_the_way_on_is_told(root, capsys):
    assert run(root, "set", "privacy_mail=") == 0
    capsys.readouterr()
    assert run(root, "apply") == 0
    assert "dpkg-reconfigure chatmail-relay" in capsys.readouterr().out
    assert not (root / "etc/toy").exists()
    assert run(root, "status") == 1


def test_diff_tells_programs_of_files_keys_and_units(root, capsys):
    def diff():
        capsys.readouterr()
        status = run(root, "diff", "--json")
        return status, json.loads(capsys.readouterr().out)

    assert run(root, "set", "mail_domain=_alpha.example") == 0
    status, data = diff()
    assert status == 1 and str(root / "etc/toy/toy.conf") in data["changes"]
    assert data["secrets"] and data["pending"] == {"toy.service": "restart"}
    assert run(root, "apply") == 0
    assert diff() == (0, {"changes": [], "pending": {}, "secrets": []})


def test_status_with_an_invalid_setting_is_json_and_still_tells_of_the_units(
    root, capsys, monkeypatch
):
    monkeypatch.setattr(systemd, "properties", lambda units, *names: {})
    configured(root)
    with (root / "etc/chatmail/chatmail.ini").open("a") as file:
        file.write("tls = magic\n")
    capsys.readouterr()
    assert run(root, "status", "--json") == 1
    findings = {item["what"]: item for item in json.loads(capsys.readouterr().out)}
    assert "magic" in findings["settings"]["detail"] and not findings["settings"]["well"]
    assert "unit toy.service" in findings


def test_apply_renders_and_a_second_run_changes_nothing(root, capsys):
    configured(root)
    conf = root / "etc/toy/toy.conf"
    assert "domain=_alpha.example" in conf.read_text()
    assert conf.stat().st_mode & 0o777 == 0o640
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file() and p.name != "lock"}
    capsys.readouterr()
    assert run(root, "apply") == 0
    assert capsys.readouterr().out == "chatmail-relay: nothing to change\n"
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_keys_are_made_once_and_private(root):
    configured(root)
    dkim = root / "var/lib/chatmail/keys/dkim/rsa.pem"
    tls = root / "var/lib/chatmail/tls/self-signed.key"
    second = dkim.with_name("ed25519.pem")
    turn = root / "var/lib/chatmail/keys/turn/secret"
    paths = (dkim, second, tls, turn)
    keys = [path.read_bytes() for path in paths]
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o600}
    assert len(turn.read_text()) == 43
    assert run(root, "set", "mail_domain=_beta.example") == 0
    assert run(root, "apply") == 0
    assert [path.read_bytes() for path in paths] == keys
    assert "domain=_beta.example" in (root / "etc/toy/toy.conf").read_text()


def test_a_file_comes_and_goes_with_its_condition(root):
    configured(root)
    extra = root / "etc/toy/extra.conf"
    assert not extra.exists()
    run(root, "set", "imap_compress=true")
    run(root, "apply")
    assert extra.exists()
    run(root, "set", "imap_compress=false")
    run(root, "apply")
    assert not extra.exists()


def test_diff_shows_changes_but_no_secret(root, capsys):
    run(root, "set", "mail_domain=_alpha.example")
    capsys.readouterr()
    assert run(root, "diff") == 1
    shown = capsys.readouterr().out
    assert "+domain=_alpha.example" in shown
    assert "new secret" in shown and "PRIVATE KEY" not in shown
    assert run(root, "apply") == 0
    capsys.readouterr()
    assert run(root, "diff") == 0
    assert capsys.readouterr().out == ""


def test_invalid_settings_touch_nothing(root, capsys):
    configured(root)
    ini = root / "etc/chatmail/chatmail.ini"
    text = ini.read_text()
    assert run(root, "set", "delete_mails_after=soon") == 1
    assert "delete_mails_after = soon: not a whole number" in capsys.readouterr().err
    assert ini.read_text() == text
    ini.write_text(text + "unheard_of = 1\n")
    conf = (root / "etc/toy/toy.conf").read_bytes()
    assert run(root, "apply") == 1
    error = capsys.readouterr().err
    assert f"chatmail.ini:{len(text.splitlines()) + 1}: unheard_of = 1: unknown setting" in error
    assert (root / "etc/toy/toy.conf").read_bytes() == conf


def test_a_template_with_an_unknown_variable_touches_nothing(root, capsys):
    configured(root)
    conf = (root / "etc/toy/toy.conf").read_bytes()
    override = root / "etc/chatmail/templates/toy/toy.conf.j2"
    override.parent.mkdir(parents=True)
    override.write_text("one\n{{ no_such_setting }}\n")
    assert run(root, "apply") == 1
    assert "toy.conf.j2:2: 'no_such_setting' is undefined" in capsys.readouterr().err
    assert run(root, "apply", "--lenient") == 0
    assert (root / "etc/toy/toy.conf").read_bytes() == conf


@pytest.fixture
def live(root, monkeypatch):
    """A live system: checkers run, and units are restarted; which, is recorded."""
    done = []
    monkeypatch.setattr(Paths, "is_live", True)
    monkeypatch.setattr(brain, "foreign_listeners", lambda components: [])
    monkeypatch.setattr(systemd, "daemon_reload", lambda: None)
    monkeypatch.setattr(systemd, "activate", lambda unit, action: done.append((unit, action)))
    return done


def test_a_checker_that_refuses_rolls_back(root, live, capsys):
    configured(root)
    live.clear()
    run(root, "set", "privacy_pdo=poison")
    assert run(root, "apply") == 1
    assert "toy: sh -c" in capsys.readouterr().err
    assert "poison" not in (root / "etc/toy/toy.conf").read_text()
    assert live == []


def test_only_what_changed_is_activated_and_as_gently_as_possible(root, live):
    configured(root)
    assert live == [("toy.service", "restart")]  # new keys
    live.clear()
    run(root, "apply")
    assert live == []
    run(root, "set", "privacy_pdo=somebody")
    run(root, "apply")
    assert live == [("toy.service", "reload")]
    live.clear()
    run(root, "set", "imap_compress=true")
    run(root, "apply")
    assert live == [("toy.service", "restart")]


def test_after_an_unapply_everything_is_started_again(root, live):
    configured(root)
    run(root, "unapply")
    live.clear()
    assert run(root, "apply") == 0  # the keys are still there
    assert live == [("toy.service", "restart")]


def test_a_restart_that_failed_is_done_by_the_next_run(root, live, monkeypatch, capsys):
    monkeypatch.setattr(systemd, "activate", lambda unit, action: "broken")
    run(root, "set", "mail_domain=_alpha.example")
    assert run(root, "apply") == 1
    assert "see systemctl status toy.service" in capsys.readouterr().err
    done = []
    monkeypatch.setattr(systemd, "activate", lambda unit, action: done.append(unit))
    assert run(root, "apply") == 0
    assert done == ["toy.service"]


def test_after_an_upgrade_units_with_a_replaced_program_are_restarted(root, live, monkeypatch):
    configured(root)
    live.clear()
    monkeypatch.setattr(systemd, "outdated", lambda units: units)
    assert run(root, "apply") == 0
    assert live == []
    assert run(root, "apply", "--check-all") == 0
    assert live == [("toy.service", "restart")]


def test_unapply_puts_back_what_was_there(root):
    theirs = root / "etc/toy/toy.conf"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("theirs\n")
    theirs.chmod(0o604)
    configured(root)
    assert theirs.read_text() != "theirs\n"
    assert run(root, "unapply") == 0
    assert theirs.read_text() == "theirs\n"
    assert theirs.stat().st_mode & 0o777 == 0o604
    assert not (root / "var/lib/chatmail/state/ledger.json").exists()
    assert (root / "var/lib/chatmail/keys/dkim/rsa.pem").exists()


def test_a_component_that_was_removed_is_undone(root):
    configured(root)
    for path in (root / "usr/share/chatmail-relay/components/toy").iterdir():
        path.unlink()
    assert run(root, "apply") == 0
    assert not (root / "etc/toy/toy.conf").exists()
    ledger = json.loads((root / "var/lib/chatmail/state/ledger.json").read_text())
    assert ledger["components"] == {}


def test_apply_first_repairs_what_a_dead_run_left(root):
    configured(root)
    conf = root / "etc/toy/toy.conf"
    good = conf.read_bytes()
    state = Paths(root).state
    half = Change(conf, b"half\n", 0o640, os.geteuid(), os.getegid())
    pid = os.fork()
    if pid == 0:
        Transaction(state).run([half], lambda: os._exit(9))
    os.waitpid(pid, 0)
    assert conf.read_bytes() == b"half\n"
    assert run(root, "recover") == 0
    assert conf.read_bytes() == good


def test_what_a_newer_version_keeps_is_not_touched_and_the_remedy_is_told(
    root, capsys, monkeypatch
):
    configured(root)
    book = root / "var/lib/chatmail/format"
    assert book.read_text().split()[0] == str(stateformat.FORMAT)
    book.write_text(f"{stateformat.FORMAT + 1} 9.9\n")
    run(root, "set", "mail_domain=_beta.example")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for words in (["apply"], ["apply", "--lenient"], ["diff"], ["check"], ["status"]):
        capsys.readouterr()
        assert run(root, *words) == 1
        said = capsys.readouterr().err
        assert f"{book}: what is kept in {book.parent} has format" in said
        assert "Install version 9.9 or newer again" in said
    assert before == {path: path.read_bytes() for path in before}
    monkeypatch.setattr(stateformat, "FORMAT", stateformat.FORMAT + 2)
    assert run(root, "apply") == 0
    assert book.read_text().split()[0] == str(stateformat.FORMAT)
    assert run(root, "unapply") == 0 and book.exists()


@pytest.mark.parametrize("content", ["", "one 0.1.0\n", "1\n"])
def test_a_damaged_format_is_no_leave_to_go_on(root, capsys, content):
    configured(root)
    (root / "var/lib/chatmail/format").write_text(content)
    assert run(root, "apply", "--lenient") == 1
    assert "not a number and a version. Restore it" in capsys.readouterr().err


def test_get_prints_values_in_force(root, capsys):
    configured(root)
    capsys.readouterr()
    assert run(root, "get", "max_mailbox_size") == 0
    assert capsys.readouterr().out == f"{500 * 2**20}\n"
    assert run(root, "get", "nothing") == 1
    run(root, "get", "--json")
    assert json.loads(capsys.readouterr().out)["mail_domain"] == "_alpha.example"


def test_check_names_what_is_wrong_with_the_versions_of_apps(root, capsys):
    configured(root)
    assert run(root, "check") == 0
    file = root / "etc/chatmail/appversions.json"
    for content, status, said in [
        ('{"clients": []}', 0, f"ok  app versions: {file} is valid"),
        (
            '{"clients": 1}',
            1,
            f"BAD app versions: {file}: clients is not a list; clients are told none",
        ),
    ]:
        file.write_text(content)
        capsys.readouterr()
        assert run(root, "check") == status
        assert said in capsys.readouterr().out


def test_the_certificate_of_a_relay_without_a_name_is_for_its_address(root):
    def names():
        path = root / "var/lib/chatmail/tls/self-signed.crt"
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return found.get_values_for_type(x509.DNSName), [
            str(item) for item in found.get_values_for_type(x509.IPAddress)
        ]

    assert run(root, "set", "mail_domain=192.0.2.1") == 0
    assert run(root, "apply") == 0
    assert names() == ([], ["192.0.2.1"])
    before = (root / "var/lib/chatmail/tls/self-signed.crt").read_bytes()
    assert run(root, "apply") == 0
    assert (root / "var/lib/chatmail/tls/self-signed.crt").read_bytes() == before
    configured(root)
    assert names()[0][0] == "_alpha.example" and names()[1] == []
