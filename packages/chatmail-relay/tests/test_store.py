# SPDX-License-Identifier: MIT
"""Commands on the mail store: passed on with their options, and never run as root."""

import json
import os

import pytest

from chatmail_relay import cli, store


@pytest.fixture
def ini(tmp_path):
    path = tmp_path / "chatmail.ini"
    path.write_text(f"[params]\nmail_domain = chat.example\nmailboxes_dir = {tmp_path}/mail\n")
    return str(path)


@pytest.mark.parametrize("arguments", [["expire", "--dry-run"], ["fsreport"]])
def test_options_reach_the_command(ini, arguments, monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cli.main([*arguments, "--json", "--config", ini]) == 0
    assert json.loads(capsys.readouterr().out)["errors"] == 0


def test_the_commands_are_listed_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    said = capsys.readouterr().out
    assert all(command in said for command in store.COMMANDS)


def test_root_becomes_the_owner_of_the_store_before_anything_is_read(monkeypatch):
    calls = []
    owner = type("Owner", (), {"pw_uid": 111, "pw_gid": 112})
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(store.pwd, "getpwnam", lambda name: owner)
    for name in ("setgroups", "setgid", "setuid"):
        monkeypatch.setattr(os, name, lambda value, name=name: calls.append((name, value)))
    module = type("Module", (), {"main": staticmethod(lambda *rest: calls.append(rest) or 3)})
    monkeypatch.setattr(store.importlib, "import_module", lambda name: module)
    assert store.run("expire", ["-v"]) == 3
    assert calls == [
        ("setgroups", []),
        ("setgid", 112),
        ("setuid", 111),
        (["-v"], "chatmail-relay expire"),
    ]
