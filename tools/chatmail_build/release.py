# SPDX-License-Identifier: MIT
"""Releases: their changelog, the repository that keeps several of them, and the one before this tree.

debian/changelog in git is the only record. Its first entry is either a release, whose version has no
"~dev" and which one commit made, or the work towards the next one, "VERSION~dev". The repository is
that of `make repo`, but grows: each release is also a snapshot, a signed suite of its own that never
changes (reprepro(1), gensnapshot), since one suite of Debian 13's reprepro holds one version.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import textwrap
import time
from datetime import datetime, timezone
from email.utils import format_datetime, parsedate_to_datetime
from pathlib import Path
from typing import Any

from . import cache, debs, repository, sandbox, signing, trees
from .paths import BUILD, ROOT, SUITE, key_home

DEV = "~dev"

#: Releases that stay in the repository.
KEEP = 5

CHANGELOG = "debian/changelog"
#: What admins are told when they upgrade; its first entry may be of the version in work.
NEWS = "debian/chatmail-relay.NEWS"
#: The version of the wheel; that of a release.
PYPROJECT = "packages/chatmaild/pyproject.toml"
_PLACEHOLDER = "  * In development.\n"

# $1 suite, $2 version, $3... versions whose snapshots go
_PUBLISH = """
archive() {
	reprepro --silent --ignore=surprisingarch --basedir /releases --outdir /releases/public \\
		--confdir /conf "$@"
}
suite=$1 version=$2
shift 2
for changes in /debs/*.changes; do
	source=$(sed -n 's/^Source: //p' "$changes") has=$(sed -n 's/^Version: //p' "$changes")
	# the key's own package has the same version in many releases
	if [ ! -e /releases/db ] ||
		[ -z "$(archive -T dsc listfilter "$suite" "Package (== $source), Version (== $has)")" ]; then
		# also what is not made of it any more
		[ ! -e /releases/db ] || archive removesrc "$suite" "$source"
		archive include "$suite" "$changes"
	fi
done
archive gensnapshot "$suite" "$version"
for old; do
	rm -r "/releases/public/dists/$suite/snapshots/$old"
	archive unreferencesnapshot "$suite" "$old"
done
archive deleteunreferenced
archive export
gpgconf --kill all
"""


class ReleaseError(Exception):
    """There will be no release; says why and what to do."""


def folder() -> Path:
    """Where releases are kept: CHATMAIL_RELEASES, or beside the key that signs them."""
    return Path(os.environ.get("CHATMAIL_RELEASES") or key_home().parent / "releases")


# -- versions ------------------------------------------------------------------------------------------


def is_newer(version: str, than: str) -> bool:
    """Whether dpkg takes *version* for newer."""
    return subprocess.run(["dpkg", "--compare-versions", version, "gt", than]).returncode == 0


def ordered(versions: list[str]) -> list[str]:
    """The oldest first."""

    def order(one: str, two: str) -> int:
        return is_newer(one, two) - is_newer(two, one)

    return sorted(versions, key=functools.cmp_to_key(order))


def versions(changelog: str) -> list[str]:
    """All releases that a changelog names, the newest first."""
    found = re.findall(r"^\S+ \((\S+)\) ", changelog, re.MULTILINE)
    return [version for version in found if not version.endswith(DEV)]


def _git(top: Path, *words: str) -> bytes:
    done = subprocess.run(["git", *words], cwd=top, capture_output=True)
    if done.returncode:
        raise ReleaseError(f"git {' '.join(words)}: {done.stderr.decode().strip()}")
    return done.stdout


def commit_of(top: Path, version: str) -> str:
    """The commit that made release *version*: the last one that left it on top of the changelog."""
    for commit in _git(top, "log", "--format=%H", "--", CHANGELOG).decode().split():
        entry = _git(top, "show", f"{commit}:{CHANGELOG}").decode().split("\n", 1)[0]
        if f" ({version}) " in entry:
            return commit
    raise ReleaseError(
        f"no commit in the history made release {version}. If the clone is shallow, "
        "run git fetch --unshallow"
    )


def build_previous(top: Path = ROOT) -> tuple[str, Path]:
    """The release before this tree, built from its commit without its tests; version and directory.

    Built once: afterwards it is in build/sources/previous.
    """
    this = debs.Changelog.read(top).version
    older = [v for v in versions((top / CHANGELOG).read_text()) if is_newer(this, v)]
    if not older:
        raise ReleaseError(f"{top / CHANGELOG}: there is no release before {this}")
    version = ordered(older)[-1]
    archive = _git(top, "archive", "--format=tar", commit_of(top, version))
    results = BUILD / "sources/previous"
    with cache.locked(BUILD / "previous.lock"), trees.tree("build") as tree:
        key = cache.digest(archive, tree.name)
        stamp = cache.Stamp(BUILD / "stamps/previous", key, [results])
        if not stamp.fresh():
            stamp.invalidate()
            with tempfile.TemporaryDirectory() as unpacked, cache.new_directory(results) as new:
                with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                    if hasattr(tarfile, "data_filter"):
                        tar.extractall(unpacked, filter="data")
                    else:  # Debian 12's Python knows no filters; this archive is our own
                        tar.extractall(unpacked)
                made = debs.build_into(new, Path(unpacked), debs.QUICK)
            if made != version:
                raise ReleaseError(f"the commit of release {version} builds {made}")
            stamp.write()
    return version, results


# -- the repository ------------------------------------------------------------------------------------


def publish(directory: Path, built: Path, version: str, uri: str) -> dict[str, Any]:
    """Add a release to the repository in *directory*/public; returns what python-debian says of it.

    It is made beside the one before, checked, and put in its place. Raises ReleaseError with all that
    is wrong; the one before is then still there.
    """
    public = directory / "public"
    snapshots = public / "dists" / SUITE / "snapshots"
    there = [path.name for path in snapshots.iterdir()] if snapshots.is_dir() else []
    newest = ordered(there)[-1] if there else ""
    if newest and not is_newer(version, newest):
        raise ReleaseError(f"{public}: {newest} is there already; {version} is not newer")
    gone = ordered([*there, version])[:-KEEP]
    home = signing.ensure_key()
    with (
        cache.locked(directory.parent / f"{directory.name}.lock"),
        cache.new_directory(directory) as new,
        trees.tree("tools") as tree,
    ):
        if directory.exists():
            shutil.copytree(directory, new, symlinks=True, dirs_exist_ok=True)
        (new / "public").mkdir(exist_ok=True)
        sandbox.run(
            tree,
            ["sh", "-euc", _PUBLISH, "sh", SUITE, version, *gone],
            binds=[
                sandbox.Bind(str(new), "/releases", writable=True),
                sandbox.Bind(str(built), "/debs"),
                sandbox.Bind(str(ROOT / "reprepro/conf"), "/conf"),
                *signing.binds(home),
            ],
            env=signing.environment(),
            stdin=subprocess.DEVNULL,
        )
        (new / "public" / repository.KEYRING_NAME).write_bytes(signing.public_key(home))
        told = inspect(new / "public", uri)
        if told["wrong"]:
            raise ReleaseError("\n".join(told["wrong"]))
    return told


def inspect(public: Path, uri: str) -> dict[str, Any]:
    """Have archive.py look at a repository and write its page."""
    with trees.tree("tools") as tree:
        done = sandbox.run(
            tree,
            ["python3", "-m", "chatmail_build.archive", "/public", "/reprepro/index.html.j2", uri],
            binds=[
                sandbox.Bind(str(public), "/public", writable=True),
                sandbox.Bind(str(ROOT / "reprepro"), "/reprepro"),
                sandbox.Bind(str(ROOT / "tools"), "/tools"),
            ],
            env={"PYTHONPATH": "/tools", "PYTHONDONTWRITEBYTECODE": "1", "GNUPGHOME": "/tmp"},
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
    if not done.stdout:
        raise ReleaseError(f"{public}: could not be read; see above")
    told: dict[str, Any] = json.loads(done.stdout)
    return told


# -- make release --------------------------------------------------------------------------------------


def release(uri: str, version: str = "", top: Path = ROOT) -> dict[str, Any]:
    """Prepare the changelog, build, publish, commit, tag, and begin the work on the next version.

    *version*: the one that the changelog works towards, if not given. Until everything is built and
    checked, only three files have changed, and they are put back if something goes wrong.
    """
    if _git(top, "status", "--porcelain"):
        raise ReleaseError(f"{top}: has changes that are not committed; commit them first")
    path, project, news = top / CHANGELOG, top / PYPROJECT, top / NEWS
    before = {item: item.read_text() for item in (path, project, news)}
    current = debs.Changelog.read(top)
    version = version or current.version.removesuffix(DEV)
    if not current.version.endswith(DEV):
        raise ReleaseError(f"{path}: {current.version} is a release; begin the next one")
    if not is_newer(version, current.version):
        raise ReleaseError(f"{path}: {version} is not newer than {current.version}")
    path.write_text(finished(top, before[path], version))
    news.write_text(told_in(before[news], path.read_text(), current.version))
    project.write_text(re.sub('(?m)^version = ".*"', f'version = "{version}"', before[project]))
    try:
        told = publish(folder(), repository.build_all(uri), version, uri)
    except BaseException:
        for item, text in before.items():
            item.write_text(text)
        raise
    _commit(top, f"Release {version}", CHANGELOG, PYPROJECT, NEWS)
    _git(top, "tag", "--annotate", "--message", f"Release {version}", f"v{version}")
    path.write_text(begun(path.read_text(), version))
    _commit(top, f"Begin {_next(version)}", CHANGELOG)
    return told


def _commit(top: Path, message: str, *files: str) -> None:
    _git(top, "commit", "--quiet", "--message", message, "--", *files)


def finished(top: Path, changelog: str, version: str, now: float | None = None) -> str:
    """The changelog with its first entry as that of release *version*.

    What was written there by hand stays; if nothing was, the subjects of all commits since the last
    release are what changed.
    """
    match = re.match(r"(\S+) \(\S+\) (.*?)\n\n(.*?)\n( -- [^\n]*>)  .*?\n", changelog, re.DOTALL)
    assert match, "debs.Changelog.read has looked at it"
    source, rest, changes, author = match.groups()
    if changes.strip() == _PLACEHOLDER.strip():
        released = versions(changelog)
        since = [f"{commit_of(top, released[0])}..HEAD"] if released else ["HEAD"]
        log = _git(top, "log", "--reverse", "--no-merges", "--format=%s", *since).decode()
        subjects = [line for line in log.splitlines() if not re.match(r"(Begin|Release) \d", line)]
        changes = "".join(map(_bullet, subjects)) or "  * No changes.\n"
    date = _date(time.time() if now is None else now)
    head = f"{source} ({version}) {rest}\n\n{changes.rstrip()}\n\n{author}  {date}\n"
    return head + changelog[match.end() :]


def told_in(news: str, changelog: str, working: str) -> str:
    """The NEWS file, with an entry for the version *working* as one for the release of *changelog*."""
    entry = re.compile(r"(\S+ \()(\S+)(\) .*? -- [^\n]*>  )(.*?)(?=\n)", re.DOTALL)
    first, made = entry.match(news), entry.match(changelog)
    if not first or not made or first[2] != working:
        return news
    return f"{first[1]}{made[2]}{first[3]}{made[4]}{news[first.end() :]}"


def begun(changelog: str, released: str) -> str:
    """The changelog with an entry for the work on the version after *released*."""
    match = re.match(r"(\S+) \(\S+\) (.*?)\n.*?\n( -- [^\n]*>)  (.*?)\n", changelog, re.DOTALL)
    assert match, "finished() has made it"
    source, rest, author, date = match.groups()
    later = _date(parsedate_to_datetime(date).timestamp() + 1)  # as lintian wants it
    head = f"{source} ({_next(released)}{DEV}) {rest}\n\n{_PLACEHOLDER}\n{author}  {later}\n\n"
    return head + changelog


def _date(seconds: float) -> str:
    """As in deb-changelog(5), in UTC."""
    return format_datetime(datetime.fromtimestamp(seconds, timezone.utc))


def _next(version: str) -> str:
    """0.1.0 -> 0.2.0; a release with only corrections is named by hand."""
    major, minor, *_rest = version.split(".")
    return f"{major}.{int(minor) + 1}.0"


def _bullet(subject: str) -> str:
    """A line of a changelog entry, wrapped at 80 columns."""
    wrapper = textwrap.TextWrapper(79, "  * ", "    ", break_long_words=False)
    return wrapper.fill(subject) + "\n"
