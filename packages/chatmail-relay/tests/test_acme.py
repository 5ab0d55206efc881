# SPDX-License-Identifier: MIT
"""When the certificate authority is asked, for which names, and what is said when it refuses."""

import importlib.machinery
import importlib.util
import json
import os
import time
from pathlib import Path

import dns.exception
import pytest

PROGRAM = Path(__file__).parents[2] / "chatmail-acmetool-conf/acme"
DOMAIN = "chat.example"
DIRECTORY = "https://acme.example/dir"
TERMS = "https://acme.example/terms-v1.pdf"

#: acmetool's words for what happened in the test internet.
TARGET = f"error satisfying Target({DOMAIN};{DIRECTORY};0): "
PROBLEM = (
    'HTTP error: {status}\n(problem (type "urn:ietf:params:acme:error:{kind}") (instance "") '
    '(id <nil>) (title ""): (detail {detail}))'
)


@pytest.fixture
def acme(tmp_path, monkeypatch):
    """The program as a module, with its files in a folder of the test, and DNS and acmetool as set."""
    loader = importlib.machinery.SourceFileLoader("acme", str(PROGRAM))
    spec = importlib.util.spec_from_loader("acme", loader)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "acme", module)  # dataclasses look there
    loader.exec_module(module)
    for name in ("SETTINGS", "STATE", "RESPONSES", "ACME", "CHALLENGES", "SERVED"):
        path = tmp_path / name.lower()
        monkeypatch.setattr(module, name, path)
    module.ACME.mkdir()
    module.zone = {DOMAIN: {"192.0.2.1", "2001:db8::1"}}
    module.said = ""  # what acmetool prints; it fails if that is not empty
    module.asked = []
    module.taken = 0  # how often systemd was told to have it served
    module.shows = lambda token: token

    def addresses(name):
        found = module.zone.get(name, set())
        if isinstance(found, Exception):
            raise module.Waiting(f"{name}: {found}", "see the zone")
        return found

    def acmetool(command, **options):
        if command == module.TAKE:
            module.taken += 1
            return
        target = module.ACME / "desired" / command[-1]
        module.asked.append(json.loads(target.read_text().split("\n", 1)[1]))
        module.answers = json.loads(module.RESPONSES.read_text())
        if not module.said:
            folder = module.ACME / "certs" / f"cert{len(module.asked)}"
            folder.mkdir(parents=True)
            (folder / "privkey").symlink_to("../../keys/key1/privkey")
            for name in module.asked[-1]["satisfy"]["names"]:
                link = module.ACME / "live" / name
                link.parent.mkdir(exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(f"../certs/{folder.name}")
        return module.subprocess.CompletedProcess(command, bool(module.said), module.said)

    monkeypatch.setattr(module, "addresses", addresses)
    monkeypatch.setattr(module, "shown", lambda a, d, path: module.shows(path.rpartition("/")[2]))
    monkeypatch.setattr(module, "terms_of", lambda directory: TERMS)
    monkeypatch.setattr(module, "RELOAD_TIME", 0)
    monkeypatch.setattr(module.subprocess, "run", acmetool)
    settings(module)
    return module


def settings(acme, domain=DOMAIN, directory=DIRECTORY, agreement="true"):
    acme.SETTINGS.write_text(
        f'domain = "{domain}"\ndirectory = "{directory}"\nemail = ""\nagreement = {agreement}\n'
    )


def run(acme, what="now"):
    assert acme.main([what]) == 0
    return acme.read_state()


def finding(acme, capsys):
    capsys.readouterr()
    assert acme.main(["findings"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    return found


def fails(acme, kind, detail, status=403):
    acme.said = TARGET + PROBLEM.format(kind=kind, detail=json.dumps(detail), status=status)


def test_the_names_are_those_that_the_dns_points_here(acme):
    both = acme.zone[DOMAIN]
    acme.zone |= {f"www.{DOMAIN}": both, f"mta-sts.{DOMAIN}": {"192.0.2.99"}}
    assert run(acme).names == [DOMAIN, f"www.{DOMAIN}"]
    (asked,) = acme.asked
    assert asked["satisfy"]["names"] == [DOMAIN, f"www.{DOMAIN}"]
    assert asked["request"]["provider"] == DIRECTORY
    assert asked["request"]["key"] == {"type": "ecdsa", "ecdsa-curve": "nistp256"}
    acme.zone[f"www.{DOMAIN}"] = set()
    acme.zone[f"mta-sts.{DOMAIN}"] = {"192.0.2.1"}
    assert run(acme).names == [DOMAIN, f"mta-sts.{DOMAIN}"]
    assert {path.name for path in (acme.ACME / "live").iterdir()} == {DOMAIN, f"mta-sts.{DOMAIN}"}


def test_an_alias_that_the_dns_does_not_tell_is_left_out(acme):
    acme.zone[f"www.{DOMAIN}"] = dns.exception.Timeout()
    assert run(acme).names == [DOMAIN]


def test_the_terms_are_agreed_to_by_their_address_of_today(acme, capsys):
    run(acme)
    assert acme.answers == {"acme-enter-email": "", f"acme-agreement:{TERMS}": True}
    assert TERMS in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda acme: acme.zone.clear(), f"{DOMAIN} has no address in the DNS"),
        (lambda acme: acme.zone.update({DOMAIN: dns.exception.Timeout()}), DOMAIN),
        (lambda acme: setattr(acme, "shows", lambda token: "404"), "another machine's"),
        (lambda acme: settings(acme, agreement="false"), "have not agreed"),
    ],
)
def test_nothing_is_asked_before_the_time_and_status_says_why(acme, capsys, change, detail):
    change(acme)
    state = run(acme)
    assert acme.asked == [] and state.next == 0
    found = finding(acme, capsys)
    assert not found["well"] and detail in found["detail"] and found["remedy"]


def test_an_address_that_does_not_answer_from_inside_leaves_it_to_the_authority(acme):
    def refused(token):
        raise ConnectionRefusedError

    acme.shows = refused
    assert run(acme).problem == "" and len(acme.asked) == 1


@pytest.mark.parametrize(
    ("kind", "detail", "status", "remedy", "pause"),
    [
        ("rateLimited", 'too many "certificates" already issued', 429, "wait", 6 * 3600),
        (
            "unauthorized",
            "Account is not valid, has status",
            403,
            "accounts/acme.example%2fdir",
            900,
        ),
        ("connection", "Fetching http://chat.example: refused", 400, "port 80", 900),
        ("caa", "CAA record for chat.example prevents issuance", 403, "CAA record", 900),
        ("serverInternal", "down for maintenance", 503, "tried again", 900),
    ],
)
def test_what_the_authority_says_is_told_with_a_remedy(
    acme, capsys, kind, detail, status, remedy, pause
):
    fails(acme, kind, detail, status)
    state = run(acme)
    assert state.next - time.time() == pytest.approx(pause, abs=5)
    found = finding(acme, capsys)
    assert not found["well"] and remedy in found["remedy"]
    assert (
        detail in found["detail"]
        and kind in found["detail"]
        and "tried again 20" in found["detail"]
    )


def test_words_of_acmetool_that_are_no_problem_document_are_passed_on(acme, capsys):
    acme.said = f"[ERROR] first\n{TARGET}exhausted all possible challenges in authorization"
    run(acme)
    assert "could not fetch the challenge" in finding(acme, capsys)["detail"]
    acme.said = f"[ERROR] x\n{TARGET}something\nunheard of"
    run(acme)
    assert finding(acme, capsys)["detail"].startswith("no certificate: something unheard of")


def test_an_authority_that_is_down_matters_only_when_it_is_needed(acme, monkeypatch, capsys):
    def down(directory):
        raise acme.Failed(f"cannot be reached at {directory}: refused", "it is tried again", 0)

    monkeypatch.setattr(acme, "terms_of", down)
    assert run(acme).problem == ""  # acmetool had nothing to ask for
    acme.said = f"{TARGET}dial tcp: refused"
    run(acme)
    assert "cannot be reached at https://acme.example/dir" in finding(acme, capsys)["detail"]


def test_pauses_double_and_end_with_success(acme):
    fails(acme, "serverInternal", "down")
    pauses = [round((run(acme).next - time.time()) / 900) for _ in range(8)]
    assert pauses == [1, 2, 4, 8, 16, 32, 48, 48]
    acme.said = ""
    state = run(acme)
    assert (state.problem, state.failures, state.names) == ("", 0, [DOMAIN])


def test_a_timer_waits_a_person_need_not_and_new_settings_count_at_once(acme):
    fails(acme, "serverInternal", "down")
    run(acme, "timer")
    os.utime(acme.SETTINGS, (1, 1))
    run(acme, "timer")
    assert len(acme.asked) == 1
    os.utime(acme.SETTINGS)
    run(acme, "timer")
    assert len(acme.asked) == 2
    os.utime(acme.SETTINGS, (1, 1))
    run(acme, "now")
    assert len(acme.asked) == 3


def test_a_renewal_keeps_the_key_and_a_failure_the_certificate(acme):
    run(acme)
    link = acme.ACME / "live" / DOMAIN
    first = link.resolve()
    fails(acme, "serverInternal", "down")
    run(acme, "renew")
    assert acme.asked[-1]["request"]["key"]["id"] == "key1"
    assert link.resolve() == first and not (first / "revoked").exists()
    acme.said = ""
    run(acme, "renew")
    assert link.resolve() != first and (first / "revoked").exists()


def test_what_systemd_missed_is_handed_over_at_the_next_look(acme):
    assert acme.main(["now"]) == 0 and acme.taken == 0
    newest = acme.live(DOMAIN) / "fullchain"
    newest.write_text("new")
    assert (
        acme.main(["timer"]) == 0 and acme.taken == 0
    )  # nothing is served, the relay is being set up
    acme.SERVED.write_text("old")
    assert acme.main(["timer"]) == 0 and acme.taken == 1
    acme.SERVED.write_text("new")
    assert acme.main(["timer"]) == 0 and acme.taken == 1
    assert len(acme.asked) == 1


def test_a_new_key_is_made_when_it_is_wanted(acme):
    run(acme)
    run(acme, "new-key")
    assert "id" not in acme.asked[-1]["request"]["key"]
    run(acme)
    assert acme.asked[-1]["request"]["key"]["id"] == "key1"


def test_another_authority_is_asked_for_a_new_certificate(acme):
    run(acme)
    first = (acme.ACME / "live" / DOMAIN).resolve()
    other = "https://other.example/dir"
    settings(acme, directory=other)
    assert run(acme).directory == other
    assert acme.asked[-1]["request"]["provider"] == other and (first / "revoked").exists()


def test_another_mail_domain_ends_what_was_asked_for_the_old_one(acme):
    run(acme)
    (acme.ACME / "desired/mine.example").write_text("satisfy: {names: [mine.example]}\n")
    acme.zone["new.example"] = {"192.0.2.1"}
    settings(acme, domain="new.example")
    run(acme)
    assert {path.name for path in (acme.ACME / "desired").iterdir()} == {
        "new.example",
        "mine.example",
    }


def test_with_another_way_to_a_certificate_nothing_is_said_or_asked(acme, capsys):
    acme.SETTINGS.unlink()
    assert acme.main(["now"]) == 0 and acme.main(["findings"]) == 0
    assert capsys.readouterr().out == "[]\n" and acme.asked == []
