# SPDX-License-Identifier: MIT
"""Each gate of `make lint` turns red on the defect it is there for, and is green without it."""

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from chatmail_build import gates, hostapt, paths, sandbox, trees  # noqa: E402

SPDX = "# SPDX-License-Identifier: MIT\n"

CONTROL = """\
Source: toy
Section: mail
Priority: optional
Maintainer: Nobody <nobody@toy.example>
Build-Depends:
 debhelper-compat (= 13),
Standards-Version: 4.7.2
Rules-Requires-Root: no

Package: toy
Architecture: all
Depends:
 ${misc:Depends},
Description: toy of the tests
 A package that is never built.
"""
TEMPLATES = "Template: toy/name\nType: string\n_Description: Name:\n The name of the toy.\n"
POT = """\
msgid ""
msgstr ""

#. Type: string
#. Description
#: ../toy.templates:1001
msgid "Name:"
msgstr ""
"""

#: gate: (file, text without the defect, text with it)
DEFECTS = {
    "spdx": ("tools/a.py", SPDX, '"""No licence."""\n'),
    "names": ("README.md", "See packages.example.\n", "See mirror.toy.example.\n"),
    "shellcheck": ("tools/a", f'#!/bin/sh\n{SPDX}rm -- "$1"\n', f"#!/bin/sh\n{SPDX}rm -- $1\n"),
    "checkbashisms": (
        "tools/a",
        f"#!/bin/sh\n{SPDX}[ a = b ]\n",
        f"#!/bin/sh\n{SPDX}[[ a == b ]]\n",
    ),
    "ruff-check": ("tools/a.py", f"{SPDX}x = 1\n", f"{SPDX}import os\n"),
    "ruff-format": ("tools/a.py", f"{SPDX}x = 1\n", f"{SPDX}x  =  1\n"),
    "mypy": (
        "tools/chatmail_build/b.py",
        f"{SPDX}def f(x: int) -> int:\n    return x\n",
        f"{SPDX}def f(x: int) -> int:\n    return str(x)\n",
    ),
    "wrap-and-sort": (
        "debian/control",
        CONTROL,
        CONTROL.replace("Depends:\n ${misc:Depends},", "Depends: ${misc:Depends}, b, a"),
    ),
    "debputy": (
        "debian/control",
        CONTROL,
        CONTROL.replace("Architecture: all", "Architecture: al l"),
    ),
    "overrides": (
        "debian/toy.lintian-overrides",
        "# The reason.\nsome-tag *\n",
        "some-tag *\n",
    ),
}


@pytest.fixture(scope="module")
def tools():
    with trees.tree("tools") as tree:
        yield tree


def run(gate, top, tools, monkeypatch):
    if gate == "names":
        monkeypatch.setattr(gates, "local_names", lambda: ["mirror.toy.example"])
    return gates.GATES[gate](gates.Source(top, tools))


def write(top, name, text):
    path = top / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755 if text.startswith("#!") else 0o644)


def base(top):
    """A source in which every gate passes."""
    write(top, "pyproject.toml", (ROOT / "pyproject.toml").read_text())
    for package in (
        "packages/chatmaild/src/chatmaild",
        "packages/chatmail-relay/chatmail_relay",
        "packages/chatmail-echobot/chatmail_echobot",
        "tests/bench",
        "tests/lab",
        "tools/chatmail_build",
    ):
        write(top, f"{package}/__init__.py", SPDX)
    write(top, "tools/ok", f"#!/bin/sh\n{SPDX}true\n")
    write(top, "debian/control", CONTROL)
    for name in ("debian/changelog", "debian/copyright", "debian/rules"):
        write(top, name, (ROOT / name).read_text().replace("chatmail-relay (", "toy ("))
    write(top, "debian/toy.templates", TEMPLATES)
    write(top, "debian/po/POTFILES.in", "[type: gettext/rfc822deb] toy.templates\n")


@pytest.mark.parametrize("gate", DEFECTS)
def test_gate_sees_its_defect(gate, tools, tmp_path, monkeypatch):
    name, good, bad = DEFECTS[gate]
    base(tmp_path)
    write(tmp_path, name, good)
    assert run(gate, tmp_path, tools, monkeypatch) == []
    write(tmp_path, name, bad)
    assert run(gate, tmp_path, tools, monkeypatch) != []


def test_debconf_gate_sees_a_question_that_translators_do_not_know(tools, tmp_path):
    base(tmp_path)
    source = gates.Source(tmp_path, tools)
    for name in ("POTFILES.in", "templates.pot"):
        write(tmp_path, f"debian/po/{name}", (ROOT / "debian/po" / name).read_text())
    write(
        tmp_path,
        "debian/chatmail-relay.templates",
        (ROOT / "debian/chatmail-relay.templates").read_text(),
    )
    assert gates.debconf(source) == []
    with (tmp_path / "debian/chatmail-relay.templates").open("a") as file:
        file.write(f"\n{TEMPLATES}")
    assert gates.debconf(source) != []


TRANSLATED = """\
msgid ""
msgstr ""
"Project-Id-Version: toy\\n"
"PO-Revision-Date: 2026-11-24 20:00+0000\\n"
"Last-Translator: Nobody <nobody@toy.example>\\n"
"Language-Team: Toy <toys@toy.example>\\n"
"Language: de\\n"
"MIME-Version: 1.0\\n"
"Content-Type: text/plain; charset=UTF-8\\n"
"Content-Transfer-Encoding: 8bit\\n"

msgid "Name:"
msgstr "Name:"

msgid "The name of the toy ${toy}."
msgstr "Der Name des Spielzeugs ${toy}."
"""


@pytest.mark.parametrize(
    ("good", "bad", "found"),
    [
        ("Der Name des Spielzeugs ${toy}.", "", "1 untranslated"),
        ("Name of the toy", "Names of the toy", "fuzzy"),
        ("Spielzeugs ${toy}.", "Spielzeugs.", "other placeholders"),
        ('msgstr "Name:"', 'msgstr "Name:', "end-of-line within string"),
        (TRANSLATED, None, "de.po: missing"),
    ],
)
def test_translations_gate_sees_what_is_incomplete(good, bad, found, tools, tmp_path):
    """In one of four; a question that was changed since makes its translation fuzzy."""
    base(tmp_path)
    source = gates.Source(tmp_path, tools)
    write(tmp_path, "debian/toy.templates", TEMPLATES.replace("toy.\n", "toy ${toy}.\n"))
    for language in gates.LANGUAGES:
        write(tmp_path, f"debian/po/{language}.po", TRANSLATED)
    assert gates.translations(source) == []
    if bad is None:
        (tmp_path / "debian/po/de.po").unlink()
    elif found == "fuzzy":
        write(tmp_path, "debian/toy.templates", TEMPLATES.replace("toy.\n", "${toy}, your toy.\n"))
    else:
        write(tmp_path, "debian/po/de.po", TRANSLATED.replace(good, bad))
    findings = gates.translations(source)
    assert any(found in line and "de.po" in line for line in findings), findings


def test_every_static_gate_has_a_seeded_defect():
    assert set(DEFECTS) | {"debconf", "translations"} | gates.NEED_PACKAGES == set(gates.GATES)


def test_units_gate_sees_a_misspelt_section(tools, tmp_path):
    good = gates.Source(tmp_path, tools, paths.DEBS)
    assert gates.units(good) == []
    damage = """
    deb=$(echo /out/chatmail-relay_*.deb)
    dpkg-deb -R $deb /tmp/package
    sed -i 's/^\\[Service\\]/[Servise]/' /tmp/package/usr/lib/systemd/system/*.service
    dpkg-deb -b /tmp/package $deb
    """
    broken = repack(tools, paths.DEBS, tmp_path / "debs", damage)
    assert gates.units(gates.Source(tmp_path, tools, broken)) != []


def test_lintian_gate_sees_a_package_without_its_copyright(tools, tmp_path):
    (tmp_path / "source").mkdir()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    for path in paths.DEBS.glob("chatmail-a*"):  # the small source
        shutil.copy(path, whole)
    assert gates.lintian(gates.Source(tmp_path / "source", tools, whole)) == []
    damage = """
    deb=$(echo /out/chatmail-archive-keyring_*.deb)
    dpkg-deb -R $deb /tmp/package
    rm /tmp/package/usr/share/doc/chatmail-archive-keyring/copyright
    dpkg-deb -b /tmp/package $deb
    changestool /out/*.changes updatechecksums
    """
    repack(tools, whole, broken, damage)
    found = gates.lintian(gates.Source(tmp_path / "source", tools, broken))
    assert any("no-copyright-file" in line for line in found), found


def repack(tools, debs, target, damage):
    """A copy of packages, in /out, on which a shell script was run."""
    target.mkdir()
    sandbox.run(
        tools,
        ["sh", "-euc", f"cp /debs/* /out/\n{damage}"],
        binds=[
            sandbox.Bind(str(debs), "/debs"),
            sandbox.Bind(str(target), "/out", writable=True),
        ],
    )
    return target


TARGETS = [
    hostapt.Target("http://third.example/debian/", "bookworm", "main", ""),
    hostapt.Target("http://mirror.example/debian/", "bookworm", "main", ""),
    hostapt.Target("http://mirror.example/debian/", "bookworm-updates", "main", ""),
    hostapt.Target("http://mirror.example/security/", "bookworm-security", "main", ""),
]


def test_mirror_is_the_one_that_has_updates(monkeypatch):
    for variable in ("CHATMAIL_MIRROR", "CHATMAIL_SECURITY_MIRROR"):
        monkeypatch.delenv(variable, raising=False)
    found = hostapt.choose(TARGETS, "bookworm")
    assert found.main == "http://mirror.example/debian/"
    assert found.security == "http://mirror.example/security/"


def test_missing_mirror_says_what_to_set(monkeypatch):
    monkeypatch.delenv("CHATMAIL_MIRROR", raising=False)
    with pytest.raises(hostapt.NoMirror, match="CHATMAIL_MIRROR"):
        hostapt.choose([], "bookworm")
