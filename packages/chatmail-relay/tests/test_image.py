# SPDX-License-Identifier: MIT
"""Settings from outside: which, from where, and what is refused."""

import configparser

import re
from pathlib import Path

import pytest
from chatmail_relay import image
from chatmail_relay.apply import NotConfigured
from chatmail_relay.paths import Paths
from chatmaild.config import FIELDS, ConfigError, explicit_values

UNIT = Path(__file__).parents[1] / "units/chatmail-configure.service"
DOMAIN = {"CHATMAIL_MAIL_DOMAIN": "_env.example"}


@pytest.fixture
def credentials(tmp_path):
    """Writes credentials; returns the environment that names their folder."""
    folder = tmp_path / "credentials"
    folder.mkdir()

    def write(**values):
        for key, value in values.items():
            (folder / f"chatmail.{key}").write_bytes(value)
        return {"CREDENTIALS_DIRECTORY": str(folder)}

    return write


@pytest.fixture
def relay(tmp_path):
    """A tree with one component, as a package brings it."""
    folder = tmp_path / "root/usr/share/chatmail-relay/components/toy"
    folder.mkdir(parents=True)
    (folder / "component.toml").write_text(
        'name = "toy"\norder = 1\n[[file]]\ntemplate = "a.j2"\ndest = "/etc/toy"\n'
    )
    (folder / "a.j2").write_text("{{ mail_domain }} {{ delete_mails_after }}\n")
    return Paths(tmp_path / "root")


def configure(relay, environ):
    return image.configure(relay, "1", environ)


def test_the_unit_passes_a_variable_for_every_setting():
    lines = re.findall(r"^PassEnvironment=(.*)$", UNIT.read_text(), re.MULTILINE)
    assert " ".join(lines).split() == [f"CHATMAIL_{key.upper()}" for key in FIELDS]
    parser = configparser.RawConfigParser(strict=False)
    parser.read_string(UNIT.read_text())
    assert parser["Service"]["ImportCredential"] == "chatmail.*"


def test_variables_are_written_into_the_file_and_rendered(relay):
    settings, plan = configure(relay, {**DOMAIN, "CHATMAIL_DELETE_MAILS_AFTER": "7", "HOME": "/"})
    assert settings == ["delete_mails_after", "mail_domain"]
    assert [component.name for component in plan.changed_components] == ["toy"]
    assert relay.real("/etc/toy").read_text() == "_env.example 7\n"
    assert explicit_values(relay.ini)["delete_mails_after"] == "7"
    assert configure(relay, DOMAIN)[0] == []
    assert relay.real("/etc/toy").read_text() == "_env.example 7\n"


def test_a_credential_wins_over_a_variable(relay, credentials):
    outside = credentials(mail_domain=b"_cred.example\n", privacy_postal="Straße 1\nOrt".encode())
    configure(relay, DOMAIN | outside)
    found = explicit_values(relay.ini)
    assert found["mail_domain"] == "_cred.example"
    assert found["privacy_postal"] == "Straße 1\nOrt"


def test_without_settings_from_outside_the_file_in_force_stays(relay):
    with pytest.raises(NotConfigured):
        configure(relay, {})
    configure(relay, DOMAIN)
    relay.ini.write_text(relay.ini.read_text().replace("_env", "_edited"))
    assert configure(relay, {})[0] == []
    assert relay.real("/etc/toy").read_text() == "_env.example 20\n"


def test_the_first_boot_of_an_image_finishes_what_is_missing(relay):
    configure(relay, DOMAIN)
    relay.real("/etc/toy").unlink()
    mark = image.image_mark(relay)
    mark.touch()
    configure(relay, {})
    assert relay.real("/etc/toy").exists() and not mark.exists()


@pytest.mark.parametrize(
    ("environ", "secret", "message"),
    [
        ({"CHATMAIL_DELETE_MAILS_AFTER": "soon"}, {}, "CHATMAIL_DELETE_MAILS_AFTER: delete_mails"),
        ({}, {"tls": b"magic"}, "credential chatmail.tls: tls = magic: unknown way"),
        ({}, {"tsl": b"self"}, "credential chatmail.tsl: unknown setting"),
        ({}, {"privacy_pdo": b"\xff"}, "credential chatmail.privacy_pdo: not UTF-8"),
        ({}, {"privacy_pdo": b"x" * (image.MAX_SIZE + 1)}, "too long for a setting"),
    ],
)
def test_what_is_refused_is_named_and_changes_nothing(relay, credentials, environ, secret, message):
    configure(relay, DOMAIN)
    before = relay.ini.read_bytes()
    with pytest.raises(ConfigError, match=re.escape(message)):
        configure(relay, DOMAIN | environ | credentials(**secret))
    assert relay.ini.read_bytes() == before
    assert relay.real("/etc/toy").read_text() == "_env.example 20\n"


def test_the_largest_credential_is_taken(relay, credentials):
    configure(relay, DOMAIN | credentials(privacy_pdo=b"x" * image.MAX_SIZE))
    assert len(explicit_values(relay.ini)["privacy_pdo"]) == image.MAX_SIZE


def test_only_a_whole_system_that_does_not_run_is_an_image(relay, monkeypatch):
    assert not relay.is_image
    for running in (False, True):
        monkeypatch.setattr("os.path.isdir", lambda path, running=running: running)
        assert Paths().is_image is not running
