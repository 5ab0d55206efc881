# SPDX-License-Identifier: MIT
"""Which certificate is served: the newest good one of the way in force, never a broken one."""

import datetime
import json
import os
from pathlib import Path

import pytest
from chatmail_relay import apply as brain
from chatmail_relay import certificate, cli, systemd
from chatmail_relay.cli import main
from chatmail_relay.errors import CertificateError
from chatmail_relay.paths import Paths
from chatmail_relay.status import certificate as certificate_findings
from chatmaild.config import LIVE_CERT, LIVE_KEY, read_settings
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DOMAIN = "chat.example"
ACME = f"var/lib/acme/live/{DOMAIN}"

TOML = """
name = "toy"
order = 10
units = ["toy.service"]
activate = "reload"
certificate = ["toy.service"]
[[file]]
template = "toy.conf.j2"
dest = "/etc/toy/toy.conf"
[[file]]
template = "settings.j2"
dest = "/etc/chatmail/chatmaild/chatmail.ini"
"""


def make(domain=DOMAIN, days=90):
    """A certificate and its key, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, domain)])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=200))
        .not_valid_after(now + datetime.timedelta(days=days, hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(domain)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return made.public_bytes(serialization.Encoding.PEM), pem


def put(root, chain, key, folder=ACME):
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / "fullchain").write_bytes(chain)
    (root / folder / "privkey").write_bytes(key)


def served(root):
    return (root / LIVE_CERT[1:]).read_bytes(), (root / LIVE_KEY[1:]).read_bytes()


def own(root):
    folder = root / "var/lib/chatmail/tls"
    return (folder / "self-signed.crt").read_bytes(), (folder / "self-signed.key").read_bytes()


@pytest.fixture
def root(tmp_path, monkeypatch):
    folder = tmp_path / "usr/share/chatmail-relay/components/toy"
    folder.mkdir(parents=True)
    (folder / "component.toml").write_text(TOML)
    (folder / "toy.conf.j2").write_text("cert={{ tls_cert }}\nkey={{ tls_key }}\n")
    (folder / "settings.j2").write_text("{{ settings_file }}")
    monkeypatch.setattr(cli, "QUIET_SECONDS", 0)
    if os.geteuid() != 0:  # the package build is not root
        monkeypatch.setattr("chatmail_relay.transaction.os.geteuid", lambda: 1)
    return tmp_path


@pytest.fixture
def reloads(monkeypatch):
    """What is activated, on a machine that runs."""
    done = []
    monkeypatch.setattr(Paths, "is_live", property(lambda self: True))
    monkeypatch.setattr(systemd, "daemon_reload", lambda: None)
    monkeypatch.setattr(systemd, "activate", lambda unit, action: done.append((unit, action)))
    monkeypatch.setattr(brain, "foreign_listeners", lambda components: [])
    return done


def run(root, *words):
    return main(list(words), root=str(root))


def configure(root, *settings):
    assert run(root, "set", f"mail_domain={DOMAIN}", "acme_agreement=true", *settings) == 0
    return run(root, "apply")


def findings(root):
    config, _warnings = read_settings(root / "etc/chatmail/chatmail.ini")
    return {item.what: item for item in certificate_findings(Paths(root), config)}


def test_until_there_is_one_a_temporary_certificate_is_served(root):
    assert configure(root, "tls=acme") == 0
    assert served(root) == own(root)
    finding = findings(root)["certificate"]
    assert not finding.well and "temporary self-signed" in finding.detail


def test_a_new_certificate_is_a_reload_and_nothing_else(root, reloads):
    assert configure(root, "tls=acme") == 0
    before = (root / "etc/toy/toy.conf").read_text()
    reloads.clear()
    pair = make()
    put(root, *pair)
    assert run(root, "certificate") == 0
    assert served(root) == pair
    assert reloads == [("toy.service", "reload")]
    assert (root / "etc/toy/toy.conf").read_text() == before
    assert run(root, "certificate") == 0
    assert reloads == [("toy.service", "reload")]


def test_another_certificate_during_the_reload_is_served_too(root, reloads, monkeypatch):
    """systemd starts nothing for a change that comes while the service runs."""
    configure(root, "tls=acme")
    first, second = make(), make()
    put(root, *first)
    monkeypatch.setattr(systemd, "activate", lambda _unit, _action: put(root, *second))
    assert run(root, "certificate") == 0
    assert served(root) == second


def test_a_key_that_comes_after_its_certificate_is_waited_for(root, monkeypatch):
    good, new = make(), make()
    put(root, *good, folder="etc/mine")
    paths = "tls_external_cert_and_key=/etc/mine/fullchain /etc/mine/privkey"
    assert configure(root, "tls=external", paths) == 0
    put(root, new[0], good[1], folder="etc/mine")
    monkeypatch.setattr(cli.time, "sleep", lambda _seconds: put(root, *new, folder="etc/mine"))
    assert run(root, "certificate") == 0
    assert served(root) == new


def test_the_key_is_private_and_no_old_pair_stays(root):
    configure(root, "tls=acme")
    for _ in range(3):
        put(root, *make())
        assert run(root, "certificate") == 0
    assert (root / LIVE_KEY[1:]).stat().st_mode & 0o777 == 0o600
    assert len(list((root / "var/lib/chatmail/tls").glob("pair.*"))) == 1


def test_what_cannot_be_used_is_not_taken_over(root, capsys):
    configure(root, "tls=acme")
    good = make()
    put(root, *good)
    run(root, "certificate")
    for chain, key in ((b"", good[1]), (make()[0], good[1]), (good[0], b"x"), (b"x", b"")):
        put(root, chain, key)
        assert run(root, "certificate") == 0
        assert served(root) == good


def test_half_written_files_of_the_administrator_leave_the_old_ones_served(root, capsys):
    good, new = make(), make()
    put(root, *good, folder="etc/mine")
    paths = "tls_external_cert_and_key=/etc/mine/fullchain /etc/mine/privkey"
    assert configure(root, "tls=external", paths) == 0
    put(root, new[0], good[1], folder="etc/mine")
    assert run(root, "certificate") == 1
    assert "is not the key of the certificate in /etc/mine/fullchain" in capsys.readouterr().err
    assert served(root) == good
    assert "the one before is served" in findings(root)["new certificate"].detail
    put(root, *new, folder="etc/mine")
    assert run(root, "certificate") == 0
    assert served(root) == new and set(findings(root)) == {"certificate"}


def test_missing_files_of_the_administrator_are_refused_with_the_remedy(root, capsys):
    paths = "tls_external_cert_and_key=/etc/mine/fullchain /etc/mine/privkey"
    assert configure(root, "tls=external", paths) == 1
    said = capsys.readouterr().err
    assert "/etc/mine/fullchain: No such file" in said and "chatmail-relay set tls=acme" in said
    assert not (root / "etc/toy").exists()


def test_the_way_changes_back_and_forth(root, reloads):
    mine, theirs = make(), make()
    put(root, *mine, folder="etc/mine")
    put(root, *theirs)
    paths = "tls_external_cert_and_key=/etc/mine/fullchain /etc/mine/privkey"
    assert configure(root, paths, "tls=acme") == 0
    expected = {"external": mine, "self": own(root), "acme": theirs}
    for tls in ("self", "external", "acme", "external", "self", "acme"):
        reloads.clear()
        run(root, "set", f"tls={tls}")
        assert run(root, "apply") == 0
        assert served(root) == expected[tls]
        assert ("toy.service", "reload") in reloads
    # edited, but not applied: not in force
    run(root, "set", "tls=self")
    assert run(root, "certificate") == 0
    assert served(root) == theirs


def test_acme_without_a_certificate_yet_goes_on_with_the_one_that_is_served(root):
    mine = make()
    put(root, *mine, folder="etc/mine")
    paths = "tls_external_cert_and_key=/etc/mine/fullchain /etc/mine/privkey"
    configure(root, "tls=external", paths)
    run(root, "set", "tls=acme")
    assert run(root, "apply") == 0
    assert served(root) == mine
    run(root, "set", "mail_domain=other.example")
    assert run(root, "apply") == 0
    assert certificate.live(Paths(root)).is_for("other.example")


@pytest.mark.parametrize(
    ("domain", "days", "detail"),
    [
        (DOMAIN, 90, "valid for 90 days"),
        (DOMAIN, 3, "valid for 3 days"),
        (DOMAIN, -3, "has expired"),
        ("other.example", 90, "names other.example, not chat.example"),
        ("*.example", 90, "valid for 90 days"),
    ],
)
def test_status_tells_what_is_wrong_with_it(root, domain, days, detail):
    put(root, *make(domain, days))
    configure(root, "tls=acme")
    finding = findings(root)["certificate"]
    assert (finding.detail, finding.well) == (detail, "valid for 90" in detail)


def test_errors_name_the_file(tmp_path):
    chain, key = make()
    put(tmp_path, chain, key, folder="x")
    (tmp_path / "x/encrypted").write_bytes(
        serialization.load_pem_private_key(key, None).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    for cert, other, said in (
        ("/x/none", "/x/privkey", "/x/none: No such file"),
        ("/x/privkey", "/x/privkey", "/x/privkey: not a PEM certificate"),
        ("/x/fullchain", "/x/encrypted", "/x/encrypted: not a PEM key without password"),
        ("/x/fullchain", "/x/fullchain", "/x/fullchain: not a PEM key"),
    ):
        with pytest.raises(CertificateError, match=said):
            certificate.read_pair(Paths(Path(tmp_path)), cert, other)


def test_findings_of_a_component_are_part_of_status(root, capsys, monkeypatch):
    said = json.dumps([{"what": "toy", "well": False, "detail": "is broken", "remedy": "mend it"}])
    toml = root / "usr/share/chatmail-relay/components/toy/component.toml"
    toml.write_text(f"findings = [['echo', '{said}'], ['false']]\n{TOML}")
    configure(root, "tls=acme")
    from chatmail_relay.component import load_components
    from chatmail_relay.status import _of_components

    lines = list(map(str, _of_components(load_components(Paths(root).components))))
    assert lines[0] == "BAD toy: is broken; mend it"
    assert lines[1].startswith("BAD toy: false: ")
