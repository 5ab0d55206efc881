# SPDX-License-Identifier: MIT
"""The gates of `make lint`: each looks at a copy of the work tree and reports findings.

A gate is a function from Source to a list of findings, one line each; an empty list is a pass. What
needs Debian's tools runs in the tools tree, whatever the host is.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import sandbox, venvs
from .paths import ROOT

_UNIT_SUFFIXES = {".service", ".socket", ".timer", ".path", ".target"}
_SOURCE_SUFFIXES = {".c", ".h", ".lua", ".py", ".sh", *_UNIT_SUFFIXES}

_LINTIAN = ["lintian", "-EvIL", ">=pedantic", "--fail-on", "error,warning,info,pedantic"]


@dataclass(frozen=True)
class Source:
    """An exported work tree (see export.py) and the trees to check it in."""

    top: Path
    tools: Path
    packages: Path | None = None

    def files(self) -> list[Path]:
        """All regular files."""
        return sorted(p for p in self.top.rglob("*") if p.is_file() and not p.is_symlink())

    def scripts(self, *interpreters: str) -> list[str]:
        """Relative names of the scripts for one of the interpreters, judged by their first line."""
        pattern = re.compile(
            rb"#!\s*/\S*?(?:/env )?\s*(?:\S*/)?(%s)\b" % "|".join(interpreters).encode()
        )
        return [
            str(path.relative_to(self.top))
            for path in self.files()
            if pattern.match(path.read_bytes()[:80].split(b"\n", 1)[0])
        ]

    def run(self, argv: Sequence[str], cwd: str = "/src") -> list[str]:
        """Run a program in the tools tree with the source at /src; its output if it failed."""
        binds = [sandbox.Bind(str(self.top), "/src")]
        if self.packages:
            binds.append(sandbox.Bind(str(self.packages), "/debs"))
        result = sandbox.run(
            self.tools,
            argv,
            binds=binds,
            cwd=cwd,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if result.returncode == 0:
            return []
        return result.stdout.splitlines() or [f"{argv[0]}: exit status {result.returncode}"]


def spdx(source: Source) -> list[str]:
    """Each program text says its licence in its first lines."""
    found = []
    for path in source.files():
        text = path.read_bytes()[:2000]
        if path.suffix not in _SOURCE_SUFFIXES and path.name != "Makefile" and text[:2] != b"#!":
            continue
        head = b"\n".join(text.split(b"\n")[:3])
        if text.strip() and b"SPDX-License-Identifier: MIT" not in head:
            found.append(
                f"{path.relative_to(source.top)}: no SPDX-License-Identifier in the first lines"
            )
    return found


def local_names() -> list[str]:
    """Names that belong to this machine: its mirrors, its package indices, where the work tree is."""
    words: set[str] = set()
    for command in (
        ["apt-get", "indextargets", "--format", "$(SITE)"],
        ["/usr/bin/python3", "-m", "pip", "config", "list"],
        ["npm", "config", "get", "registry"],
    ):
        try:
            text = subprocess.run(command, check=False, capture_output=True, text=True).stdout
        except FileNotFoundError:
            continue
        words |= set(re.findall(r"https?://(?:[^/@\s]*@)?([^/:\s'\"]+)", text))
    # A first path component that every system has says nothing.
    usual = {"/home", "/root", "/srv", "/usr", "/var", "/tmp", "/opt", "/mnt", "/build", "/src"}
    top = f"/{ROOT.parts[1]}"
    if top not in usual:
        words.add(f"{top}/")
    words.add(f"{ROOT}/")
    return sorted(words - {"localhost", "127.0.0.1"})


def names(source: Source, words: Sequence[str] | None = None) -> list[str]:
    """Nothing of the machine it was written on is in the source."""
    pattern = re.compile(
        "|".join(rf"(?<![\w./$}}-]){re.escape(word)}" for word in words or local_names())
    )
    found = []
    for path in source.files():
        text = path.read_bytes().decode("utf-8", "replace")
        for number, line in enumerate(text.splitlines(), 1):
            if match := pattern.search(line):
                found.append(f"{path.relative_to(source.top)}:{number}: names {match[0]!r}")
    return found


def shellcheck(source: Source) -> list[str]:
    """All shell scripts, the maintainer scripts among them."""
    # SC1091: debconf's library is not there when we check; SC2119: its db_go takes no arguments.
    return source.run(
        ["shellcheck", "-x", "-e", "SC1091,SC2119", *source.scripts("sh", "dash", "bash")]
    )


def checkbashisms(source: Source) -> list[str]:
    """What says #!/bin/sh is POSIX shell."""
    return source.run(["checkbashisms", "--posix", "--extra", *source.scripts("sh", "dash")])


def _ruff(source: Source, *args: str) -> list[str]:
    python = venvs.venv("tools", ROOT / "tools/requirements.txt")
    result = subprocess.run(
        [str(python), "-m", "ruff", *args, "--no-cache", "."],
        cwd=source.top,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return result.stdout.splitlines() if result.returncode else []


def ruff_check(source: Source) -> list[str]:
    """Python: mistakes and habits."""
    return _ruff(source, "check", "--output-format=concise")


def ruff_format(source: Source) -> list[str]:
    """Python: layout."""
    return _ruff(source, "format", "--check")


def mypy(source: Source) -> list[str]:
    """Python: types, against the library versions of Debian."""
    # One run for each import root, as modules of different roots may have the same name.
    script = """
    export MYPYPATH=packages/chatmaild/src:packages/chatmail-relay:packages/chatmail-echobot:tools:tests
    cache=--cache-dir=/tmp/mypy
    status=0
    for package in chatmaild chatmail_relay chatmail_echobot chatmail_build lab bench; do
        mypy $cache --no-error-summary -p $package || status=1
    done
    for program in tools/*; do
        head -n1 "$program" 2>/dev/null | grep -q python || continue
        mypy $cache --no-error-summary --scripts-are-modules "$program" || status=1
    done
    exit $status
    """
    return source.run(["sh", "-uc", script])


def wrap_and_sort(source: Source) -> list[str]:
    """debian/ is laid out as `wrap-and-sort -ast` lays it out."""
    script = """
    for top in . reprepro/keyring; do
        [ -d $top/debian ] || continue
        mkdir -p /tmp/sorted/$top && cp -r $top/debian /tmp/sorted/$top/
        (cd /tmp/sorted/$top && wrap-and-sort -ast)
        diff -ru $top/debian /tmp/sorted/$top/debian
    done
    """
    return source.run(["sh", "-euc", script])


def debconf(source: Source) -> list[str]:
    """debian/po/templates.pot is made from the questions as they are now."""
    script = """
    cp -r debian /tmp/debian && cd /tmp && debconf-updatepo
    for tree in /src /tmp; do grep -v '^"POT-Creation-Date' $tree/debian/po/templates.pot >$tree.pot; done
    diff -u /src.pot /tmp.pot
    """
    return source.run(["sh", "-euc", script])


#: Languages in which every installation can be done.
LANGUAGES = ("de", "es", "fr", "ru")

#: Prints what a catalogue leaves out of a message: "${value}" is filled in by debconf.
_PLACEHOLDERS = r"""
import gettext, re, sys
with open(sys.argv[2], "rb") as file:
    catalogue = gettext.GNUTranslations(file)._catalog
for text, translated in catalogue.items():
    if sorted(re.findall(r"\$\{\w*\}", text)) != sorted(re.findall(r"\$\{\w*\}", translated)):
        print(f"{sys.argv[1]}: other placeholders in {translated!r}")
"""


def translations(source: Source) -> list[str]:
    """All questions, as they are now, are translated into LANGUAGES and whatever else there is."""
    script = f"""
    cp -r debian /tmp/debian && cd /tmp/debian && debconf-updatepo && cd po
    for language in {" ".join(LANGUAGES)}; do
        [ -e $language.po ] || echo "debian/po/$language.po: missing"
    done >/tmp/found
    for po in *.po; do
        [ -e "$po" ] || continue
        msgfmt -c --statistics -o /tmp/mo $po >/tmp/said 2>&1 || cat /tmp/said
        grep -E 'fuzzy|untranslated' /tmp/said | sed "s|^|debian/po/$po: |" || :
        python3 -c "$1" debian/po/$po /tmp/mo
    done >>/tmp/found
    cat /tmp/found
    [ ! -s /tmp/found ]
    """
    return source.run(["sh", "-euc", script, "sh", _PLACEHOLDERS])


def debputy(source: Source) -> list[str]:
    """debputy's own checks of the files in debian/."""
    script = """
    for top in . reprepro/keyring; do
        [ ! -d $top/debian ] || (cd $top && debputy lint --no-linter-exit-code)
    done >/tmp/out 2>&1
    ! grep -E '^(error|warning)' /tmp/out
    """
    return source.run(["sh", "-euc", script])


def overrides(source: Source) -> list[str]:
    """Every lintian override has its reason in a comment above it."""
    found = []
    for path in source.files():
        if "debian" not in path.parts or "lintian-overrides" not in path.name:
            continue
        before = ""
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.strip() and not line.startswith("#") and not before.startswith("#"):
                found.append(
                    f"{path.relative_to(source.top)}:{number}: an override without a reason"
                )
            before = line if line.startswith("#") else ""
    return found


def units(source: Source) -> list[str]:
    """systemd reads our units as we mean them; programs of other packages need not be there."""
    script = r"""
    for deb in /debs/*.deb; do dpkg-deb -x "$deb" /; done
    # daemons that our units start and that this tree does not have
    grep -rhoE '^Exec[A-Za-z]+=[-+!:@]*/usr/s?bin/[^ ]+' /usr/lib/systemd/system |
        sed 's|^[^/]*||' | sort -u |
        while read -r program; do [ -e "$program" ] || install -m 755 /bin/true "$program"; done
    for deb in /debs/chatmail-*.deb; do
        dpkg-deb --contents $deb
    done | sed -n 's|.* \./usr/lib/systemd/system/\([^/]*\.[a-z]*\)$|\1|p' >/tmp/units
    [ -s /tmp/units ] || { echo 'no units in the packages'; exit 1; }
    xargs systemd-analyze verify --man=no --generators=no </tmp/units >/tmp/out 2>&1 || :
    ! grep -E 'chatmail' /tmp/out
    """
    return source.run(["sh", "-euc", script])


def lintian(source: Source) -> list[str]:
    """The packages, all tags down to pedantic."""
    # As a normal user, as lintian wants it; copied, because lintian writes beside the .changes.
    script = f"cd /tmp && cp /debs/* . && for c in *.changes; do {' '.join(map(_quote, _LINTIAN))} $c; done"
    return source.run(["setpriv", *_AS_BUILDER, "sh", "-euc", script], cwd="/tmp")


_AS_BUILDER = [f"--reuid={sandbox.BUILDER}", f"--regid={sandbox.BUILDER}", "--clear-groups"]


def _quote(text: str) -> str:
    return f"'{text}'"


Gate = Callable[[Source], list[str]]

#: In the order in which they are reported.
GATES: dict[str, Gate] = {
    "spdx": spdx,
    "names": names,
    "shellcheck": shellcheck,
    "checkbashisms": checkbashisms,
    "ruff-check": ruff_check,
    "ruff-format": ruff_format,
    "mypy": mypy,
    "wrap-and-sort": wrap_and_sort,
    "debconf": debconf,
    "translations": translations,
    "debputy": debputy,
    "overrides": overrides,
    "units": units,
    "lintian": lintian,
}

#: These look at built packages.
NEED_PACKAGES = {"units", "lintian"}
