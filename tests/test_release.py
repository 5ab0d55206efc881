# SPDX-License-Identifier: MIT
"""`make release`: changelog and version, a signed repository of several releases, its page, its checks."""

import hashlib
import re
import shutil
import subprocess
from email.utils import formatdate

import html5lib
import pytest
from chatmail_build import debs, paths, release, repository, sandbox, signing, trees
from conftest import RELEASES_URI
from lab.packages import Unpacked
from lab.shell import run

#: $1 suite; the tree's own lists are Debian's.
APT = """
cat >/etc/apt/sources.list.d/chatmail.sources <<END
Types: deb deb-src
URIs: file:/public
Suites: $1
Components: main
Signed-By: /public/chatmail-archive-keyring.pgp
END
only="-o Dir::Etc::sourcelist=/etc/apt/sources.list.d/chatmail.sources -o Dir::Etc::sourceparts=-"
apt-get update -qq $only -o APT::Get::List-Cleanup=0 --error-on=any
apt-cache madison chatmail-relay
apt-get install --simulate --no-install-recommends chatmail-relay | grep '^Inst chatmail-'
"""


def apt(public, suite):
    """What apt says of a suite; (exit status, output)."""
    with trees.tree("tools") as tree:
        done = sandbox.run(
            tree,
            ["sh", "-euc", APT, "sh", suite],
            binds=[sandbox.Bind(str(public), "/public")],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    return done.returncode, done.stdout


@pytest.fixture
def copy(releases, tmp_path):
    """The repository, to be changed."""
    shutil.copytree(releases.directory, tmp_path / "releases", symlinks=True)
    return tmp_path / "releases"


def changes_file(folder, built, version):
    """A .changes(5) of repacked packages, as reprepro takes it."""
    listed = {"Checksums-Sha256": [""], "Files": [""]}
    for deb in built:
        content = deb.read_bytes()
        size, name = len(content), deb.name
        listed["Checksums-Sha256"].append(f" {hashlib.sha256(content).hexdigest()} {size} {name}")
        listed["Files"].append(f" {hashlib.md5(content).hexdigest()} {size} mail optional {name}")
    names = [deb.name.split("_")[0] for deb in built]
    fields = {
        "Format": "1.8",
        "Date": formatdate(),
        "Source": "chatmail-relay",
        "Binary": " ".join(names),
        "Architecture": "all",
        "Version": version,
        "Distribution": "trixie",
        "Urgency": "medium",
        "Maintainer": "nobody <nobody@example.org>",
        "Description": "\n".join(["", *(f" {name} - repacked" for name in names)]),
        "Changes": f"\n chatmail-relay ({version}) trixie; urgency=medium\n .\n   * Repacked.",
        **{name: "\n".join(lines) for name, lines in listed.items()},
    }
    text = "".join(f"{name}: {value}\n" for name, value in fields.items())
    (folder / f"chatmail-relay_{version}_all.changes").write_text(text)


@pytest.fixture
def pack(tmp_path):
    """pack(version): a directory as a build leaves it, with two packages.

    *changelog* is the version its changelog is of; *conffile* is one that it should not have.
    """

    def pack(version, changelog="", conffile=""):
        folder = tmp_path / f"built-{version}"
        folder.mkdir()
        built = []
        for name in ("chatmail-relay", "chatmail-turn-conf"):
            item = Unpacked(next(paths.DEBS.glob(f"{name}_*.deb")), folder)
            entry = (
                f"chatmail-relay ({changelog or version}) trixie; urgency=medium\n\n  * Repacked.\n\n"
                f" -- nobody <nobody@example.org>  {formatdate()}\n"
            )
            packed = subprocess.run(["gzip", "-9n"], input=entry.encode(), stdout=subprocess.PIPE)
            (item.tree / "usr/share/doc" / name / "changelog.gz").write_bytes(packed.stdout)
            if conffile and name == "chatmail-turn-conf":
                (item.tree / conffile.lstrip("/")).parent.mkdir()
                (item.tree / conffile.lstrip("/")).write_text("x\n")
                (item.tree / "DEBIAN/conffiles").write_text(f"{conffile}\n")
            built.append(item.pack(version, folder))
            shutil.rmtree(item.tree)
        changes_file(folder, built, version)
        return folder

    return pack


def test_apt_finds_the_newest_release_and_each_one_in_its_own_suite(releases):
    for suite, version in (
        ("trixie", releases.current),
        (f"trixie/snapshots/{releases.current}", releases.current),
        (f"trixie/snapshots/{releases.previous}", releases.previous),
    ):
        status, said = apt(releases.public, suite)
        assert status == 0, said
        assert set(re.findall(r"^ *chatmail-relay \| +(\S+) \|", said, re.MULTILINE)) == {version}
        installed = dict(re.findall(r"^Inst (\S+) \((\S+) ", said, re.MULTILINE))
        assert {"chatmail-relay", "chatmail-dovecot-conf"} <= set(installed)
        assert set(installed.values()) == {version}


@pytest.mark.parametrize("name", ["InRelease", "main/binary-amd64/Packages"])
def test_a_changed_snapshot_is_refused(copy, releases, name):
    suite = f"trixie/snapshots/{releases.previous}"
    path = copy / "public/dists" / suite / name
    path.write_bytes(path.read_bytes().replace(b"hatmail", b"hatmall", 1))
    path.with_name("Packages.gz").unlink(missing_ok=True)
    (copy / "public/dists" / suite / "Release").unlink()
    status, said = apt(copy / "public", suite)
    assert status != 0, said
    expected = "signature" if name == "InRelease" else "unexpected size|Hash Sum mismatch"
    assert re.search(expected, said, re.IGNORECASE), said


def test_no_secret_and_no_book_of_reprepro_s_is_published(releases):
    assert {path.name for path in releases.public.iterdir()} == {
        "dists",
        "pool",
        "index.html",
        repository.KEYRING_NAME,
    }
    for path in releases.public.rglob("*"):
        assert not path.is_file() or b"PRIVATE KEY BLOCK" not in path.read_bytes()


def contents(deb, folder):
    """The files of a package but its changelog, by dpkg-deb."""
    run(["dpkg-deb", "-x", deb, folder])
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "changelog.gz"]
    return {f"/{path.relative_to(folder)}": path.read_bytes() for path in files}


def test_python_debian_tells_versions_conffiles_and_differences(releases, tmp_path):
    newest, before = releases.told["releases"]
    assert releases.told["wrong"] == []
    assert (newest["version"], before["version"]) == (releases.current, releases.previous)
    assert set(newest["packages"]) == {path.name.split("_")[0] for path in paths.DEBS.glob("*.deb")}
    conffiles = {name: item["conffiles"] for name, item in newest["packages"].items()}
    assert {name for name, files in conffiles.items() if files} == {"chatmail-apt-source"}
    for name in ("chatmail-relay", "chatmail-dovecot-conf"):
        old, new = (
            contents(
                releases.public / item["packages"][name]["filename"],
                tmp_path / f"{name}-{item['version']}",
            )
            for item in (before, newest)
        )
        expected = {f"file {path} is new" for path in new.keys() - old.keys()}
        expected |= {f"file {path} is gone" for path in old.keys() - new.keys()}
        expected |= {
            f"file {path} changed" for path in new.keys() & old.keys() if new[path] != old[path]
        }
        told = {line for line in newest["differences"].get(name, []) if line.startswith("file ")}
        assert told == expected
    version = "/usr/share/chatmail-relay/chatmail_relay/version.py"
    assert f"file {version} changed" in newest["differences"]["chatmail-relay"]


def test_the_page_is_valid_and_all_it_names_is_there(releases):
    text = (releases.public / "index.html").read_text()
    page = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)
    links = [link.get("href") for link in page.iter("a")]
    assert links and all((releases.public / link).is_file() for link in links)
    shown = "".join(page.itertext())
    assert [item.text for item in page.iter("h2")] == [releases.current, releases.previous]
    assert f"URIs: {RELEASES_URI}" in shown
    for item in releases.told["releases"]:
        assert all(package["filename"] in links for package in item["packages"].values())
    with trees.tree("tools") as tree:
        listed = sandbox.run(
            tree,
            ["gpg", "--batch", "--list-keys", "--with-colons"],
            binds=signing.binds(signing.ensure_key()),
            env=signing.environment(),
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
    assert re.search(r"^fpr:+(\w+):", listed, re.MULTILINE)[1] in shown
    assert "<script" not in text and "http" not in text.replace(RELEASES_URI, "")


def test_what_is_not_right_is_told(copy, releases):
    public = copy / "public"
    deb = next(public.rglob(f"chatmail-turn-conf_{releases.current}_all.deb"))
    deb.write_bytes(deb.read_bytes()[:-1] + b"x")
    older = public / "dists/trixie/snapshots" / releases.previous
    shutil.rmtree(public / "dists/trixie/main")
    shutil.copytree(older / "main", public / "dists/trixie/main")
    index = older / "main/binary-amd64/Packages"
    text = index.read_text()
    at = text.index("Package: chatmail-turn-conf\n")
    named, by = f"Version: {releases.previous}\n", "Version: 0.0.1\n"
    index.write_text(text[:at] + text[at:].replace(named, by, 1))
    wrong = release.inspect(public, RELEASES_URI)["wrong"]
    name = f"pool/main/c/chatmail-relay/chatmail-turn-conf_{releases.previous}_all.deb"
    assert f"{name}: Version is {releases.previous}, not 0.0.1" in wrong
    said = f"{releases.previous}: chatmail-turn-conf has version 0.0.1; all of a release have one"
    assert said in wrong
    assert any("is not what the index says" in line and deb.name in line for line in wrong)
    assert any(f"trixie: is not the newest release, {releases.current}" in line for line in wrong)
    shutil.rmtree(public / "dists/trixie/snapshots")
    (public / "dists/trixie/snapshots").mkdir()
    told = release.inspect(public, RELEASES_URI)
    assert told["wrong"] == ["/public: there is no release; run make release"]


def test_a_release_that_is_not_right_is_not_published(copy, pack):
    before = (copy / "public/dists/trixie/InRelease").read_bytes()
    built = pack("9.0", changelog="8.9", conffile="/etc/turn.conf")
    with pytest.raises(release.ReleaseError) as caught:
        release.publish(copy, built, "9.0", RELEASES_URI)
    said = str(caught.value)
    assert "9.0: its changelog is of 8.9 for trixie" in said
    assert "9.0: chatmail-turn-conf has conffiles ['/etc/turn.conf'], expected []" in said
    assert (copy / "public/dists/trixie/InRelease").read_bytes() == before
    assert not (copy / "public/dists/trixie/snapshots/9.0").exists()


def test_only_the_last_releases_stay_and_none_is_replaced(copy, pack, releases, monkeypatch):
    monkeypatch.setattr(release, "KEEP", 2)
    with pytest.raises(release.ReleaseError, match=f"{releases.current} is there already"):
        release.publish(copy, paths.DEBS, releases.current, RELEASES_URI)
    told = release.publish(copy, pack("9.0"), "9.0", RELEASES_URI)
    assert told["wrong"] == []
    assert [item["version"] for item in told["releases"]] == ["9.0", releases.current]
    assert told["releases"][0]["differences"]["chatmail-dovecot-conf"] == ["is gone"]
    pool = {path.name for path in (copy / "public/pool").rglob("*.deb")}
    assert not any(f"_{releases.previous}_" in name for name in pool)
    assert {f"chatmail-relay_{v}_all.deb" for v in ("9.0", releases.current)} <= pool
    assert not (copy / "public/dists/trixie/snapshots" / releases.previous).exists()


# -- the changelog, and what git remembers ---------------------------------------------------------------

FIRST = """\
chatmail-relay (0.1.0~dev) trixie; urgency=medium

  * In development.

 -- somebody <somebody@example.org>  Tue, 24 Nov 2026 00:00:00 +0000
"""


def commit(top, subject):
    (top / "file").write_text(subject)
    run(["git", "-C", top, "add", "."])
    run(["git", "-C", top, "commit", "-q", "-m", subject])


def log(top):
    return run(["git", "-C", top, "log", "--format=%s"]).out.splitlines()


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository of git with nothing but what has a version."""
    top = tmp_path / "clone"
    texts = {release.CHANGELOG: FIRST, release.PYPROJECT: 'version = "0"\n', release.NEWS: FIRST}
    for name, text in texts.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "somebody")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "somebody@example.org")
    monkeypatch.setenv("CHATMAIL_RELEASES", str(tmp_path / "kept"))
    run(["git", "init", "-q", top])
    commit(top, "settings in one file")
    return top


def test_a_release_is_one_commit_with_a_changelog_of_the_commits_before(clone, pack, monkeypatch):
    built = []

    def build_all(uri):
        built.append(debs.Changelog.read(clone).version)
        return pack(built[-1])

    monkeypatch.setattr(repository, "build_all", build_all)
    commit(clone, "a subject so long that a line of a changelog would be longer than what is usual")
    release.release(RELEASES_URI, top=clone)
    first = (clone / "debian/changelog").read_text()
    assert log(clone)[:2] == ["Begin 0.2.0", "Release 0.1.0"]
    assert first.startswith("chatmail-relay (0.2.0~dev) trixie;")
    news = (clone / release.NEWS).read_text()
    assert news.startswith("chatmail-relay (0.1.0) trixie;") and "In development" in news
    assert "\n  * settings in one file\n  * a subject so long" in first
    assert "Tue, 24 Nov 2026 00:00:00" not in first
    dates = re.findall(r"^ -- .*>  (.*)", first, re.MULTILINE)
    assert (
        len(dates) == 2
        and news.endswith(f"  {dates[1]}\n")
        and all(date.endswith(" +0000") for date in dates)
    )
    assert max(map(len, first.splitlines())) < 81
    commit(clone, "another filter")
    told = release.release(RELEASES_URI, "0.2.1", top=clone)
    assert built == ["0.1.0", "0.2.1"]
    assert [item["version"] for item in told["releases"]] == ["0.2.1", "0.1.0"]
    assert (clone / release.NEWS).read_text() == news  # nothing was said of this one
    entry = (clone / "debian/changelog").read_text().split("chatmail-relay (0.2.1)")[1]
    assert re.findall(r"^  \* .*", entry.split(" -- ")[0], re.MULTILINE) == ["  * another filter"]
    assert run(["git", "-C", clone, "tag"]).out.split() == ["v0.1.0", "v0.2.1"]
    assert (clone / release.PYPROJECT).read_text() == 'version = "0.2.1"\n'
    for version in ("0.1.0", "0.2.1"):
        tagged = run(["git", "-C", clone, "rev-parse", f"v{version}^{{commit}}"]).out.strip()
        assert release.commit_of(clone, version) == tagged
    with pytest.raises(release.ReleaseError, match="no commit in the history made release 7"):
        release.commit_of(clone, "7")


def test_without_a_good_build_nothing_is_changed(clone, tmp_path, monkeypatch):
    def content():
        names = (release.CHANGELOG, release.PYPROJECT, release.NEWS)
        return [(clone / name).read_text() for name in names]

    def build_all(uri):
        raise debs.BuildError("a test failed")

    monkeypatch.setattr(repository, "build_all", build_all)
    before = content()
    with pytest.raises(debs.BuildError):
        release.release(RELEASES_URI, top=clone)
    assert content() == before and len(log(clone)) == 1
    with pytest.raises(release.ReleaseError, match="0.0.9 is not newer than 0.1.0~dev"):
        release.release(RELEASES_URI, "0.0.9", top=clone)
    (clone / "forgotten").write_text("")
    with pytest.raises(release.ReleaseError, match="not committed"):
        release.release(RELEASES_URI, top=clone)
    assert not (tmp_path / "kept").exists()


def test_what_was_written_by_hand_stays_in_the_changelog(clone):
    text = FIRST.replace("In development.", "Said with care.")
    assert "\n\n  * Said with care.\n\n -- " in release.finished(clone, text, "0.1.0", 0)
    begun = release.begun(text.replace("~dev", ""), "0.1.0")
    assert release.versions(begun) == ["0.1.0"]
    assert begun.startswith("chatmail-relay (0.2.0~dev)")


def test_entries_of_earlier_releases_stay_as_they_are(clone):
    older = FIRST.replace("~dev", "").replace("In development.", "First.")
    text = FIRST.replace("0.1.0", "0.2.0").replace("In development.", "Second.") + "\n" + older
    done = release.finished(clone, text, "0.2.0", 1.8e9)
    head = "chatmail-relay (0.2.0) trixie; urgency=medium\n\n  * Second.\n\n"
    author = " -- somebody <somebody@example.org>  "
    assert done == f"{head}{author}Fri, 15 Jan 2027 08:00:00 +0000\n\n{older}"
    head = "chatmail-relay (0.3.0~dev) trixie; urgency=medium\n\n  * In development.\n\n"
    begun = f"{head}{author}Fri, 15 Jan 2027 08:00:01 +0000\n\n{done}"
    assert release.begun(done, "0.2.0") == begun
