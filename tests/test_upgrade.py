# SPDX-License-Identifier: MIT
"""Upgrades of a relay in use: from the last release, of its daemons, interrupted, refused, undone.

One host goes through all of it, in the order of this file. What comes after this tree is its packages,
packed again with a higher version and changed templates.
"""

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import time
from collections import Counter

import pytest
from chatmail_build import paths
from conftest import keep, measured
from lab import image
from lab.mail import Mail
from lab.packages import Repository, Unpacked, append, replace
from lab.shell import wait_for
from lab.traffic import Traffic, works

NAME, NUMBER, DOMAIN = "upgraded", 62, "_upgraded.example"
DISK = 1500  # MiB
APT = ("apt-get", "-q", "--yes", "-o", "Dpkg::Use-Pty=0")
KILLS = 10
NO_REFUSAL_LONGER = 1.0  # seconds, while other tests run on the same cores

#: Daemons of a relay, by the source packages of Debian whose security updates they get.
DAEMONS = ("postfix", "dovecot", "nginx", "unbound", "coturn", "python3.13")

RUNNING = (
    "unbound.service",
    "chatmail-doveauth.service",
    "chatmail-metadata.service",
    "chatmail-filtermail.service",
    "chatmail-transport.service",
    "chatmail-metrics.service",
    "dovecot.service",
    "postfix.service",
    "nginx.service",
    "chatmail-front.service",
    "chatmail-turn.service",
)
#: Those whose code is in our packages: they restart with every version.
OWN = {unit for unit in RUNNING if re.match(r"chatmail-(?!front|turn)", unit)}

#: Templates that get a line in a new version, and where it comes to stand.
MARKED = {
    "dovecot/dovecot.conf.j2": "/etc/chatmail/dovecot/dovecot.conf",
    "nginx/site.conf.j2": "/etc/nginx/sites-enabled/chatmail.conf",
    "nginx/front.conf.j2": "/etc/chatmail/front/nginx.conf",
    "postfix/login_map.j2": "/etc/chatmail/postfix/login_map",
    "turn/turnserver.conf.j2": "/etc/chatmail/turn/turnserver.conf",
    "unbound/chatmail.conf.j2": "/etc/unbound/unbound.conf.d/chatmail.conf",
}
COMPONENTS = "usr/share/chatmail-relay/components"
BRAIN = "usr/share/chatmail-relay/chatmail_relay"


class Next:
    """Our packages with versions after this tree's, for the host that has this tree's."""

    def __init__(self, host, folder):
        self.folder = folder
        self.repository = Repository(
            host, "next", origin="Chatmail", label="Chatmail", suite="trixie"
        )
        shown = host.sh("dpkg-query -W -f '${source:Package} ${Package}\\n'").out.split("\n")
        names = [line.split()[1] for line in shown if line.startswith("chatmail-relay ")]
        self.unpacked = {
            name: Unpacked(next(paths.DEBS.glob(f"{name}_*.deb")), folder) for name in names
        }
        self.current = self.unpacked["chatmail-relay"].version
        self.number = 0

    def template(self, name):
        """The path of a template, to be changed for all versions from now on."""
        (found,) = (
            path
            for item in self.unpacked.values()
            for path in item.tree.glob(f"{COMPONENTS}/{name}")
        )
        return found

    def brain(self, name):
        """The path of a module of the brain, likewise."""
        return self.unpacked["chatmail-relay"].tree / BRAIN / name

    def mark(self):
        """Have every daemon's configuration name the version that will be packed next."""
        mark = f"lab {self.number + 1}"
        for name in MARKED:
            path = self.template(name)
            path.write_text(re.sub(r"# lab \d+\n", "", path.read_text()) + f"# {mark}\n")
        toml = self.template("postfix/component.toml")
        replace(toml, r"^smtpd_banner = .*", f'smtpd_banner = "$myhostname ESMTP {mark}"')

    def offer(self):
        """Pack the next version and let apt know of it; the version."""
        self.number += 1
        version = f"{self.current}+lab{self.number}"
        replace(self.brain("version.py"), r"^VERSION = .*", f'VERSION = "{version}"')
        target = self.folder / version
        target.mkdir()
        self.repository.offer([item.pack(version, target) for item in self.unpacked.values()])
        shutil.rmtree(target)
        return version


@pytest.fixture(scope="module")
def host(lab, releases):
    """A relay of the last release."""
    image.download(lab.tree, "unattended-upgrades")
    host = lab.host(NAME, NUMBER, names=(DOMAIN,), disk=DISK)
    shutil.copytree(releases.public, host.root / "srv/releases")
    shutil.copyfile(
        releases.public / image.KEYRING_NAME, host.root / "usr/share/keyrings" / image.KEYRING_NAME
    )
    point_at(host, f"trixie/snapshots/{releases.previous}")
    answer = f"chatmail-relay chatmail-relay/mail_domain string {DOMAIN}\n"
    host.exec("debconf-set-selections", input=answer)
    packages = ("chatmail-relay", "dovecot-chatmail")
    host.exec(*APT, "install", "--no-install-recommends", *packages, timeout=300)
    well(host)
    limits = ("max_new_addresses_per_hour", "max_load_1m", "max_user_send_per_minute")
    host.exec("chatmail-relay", "set", *(f"{name}=100000" for name in limits))
    host.exec("chatmail-relay", "apply", timeout=120)
    host.exec(*APT, "install", "--no-install-recommends", "unattended-upgrades", timeout=120)
    (source,) = paths.DEBS.glob("chatmail-apt-source_*.deb")
    origins = "etc/apt/apt.conf.d/52unattended-upgrades-chatmail"
    listed = subprocess.run(["dpkg-deb", "--fsys-tarfile", source], stdout=subprocess.PIPE).stdout
    shown = subprocess.run(["tar", "-xO", f"./{origins}"], input=listed, stdout=subprocess.PIPE)
    host.write(f"/{origins}", shown.stdout.decode())
    yield host
    lab.remove(host)


@pytest.fixture(scope="module")
def mail(lab, host):
    return Mail(lab, host.address, DOMAIN)


@pytest.fixture(scope="module")
def after(host, tmp_path_factory):
    """What comes after this tree, once it is installed."""
    return Next(host, tmp_path_factory.mktemp("next"))


def point_at(host, suite):
    """Let apt know one suite of the repository of releases."""
    sources = image.SOURCES.replace(image.INSIDE_REPO, "/srv/releases")
    text = sources.replace("Suites: trixie\n", f"Suites: {suite}\n")
    host.write("/etc/apt/sources.list.d/chatmail.sources", text)
    host.sh(image.UPDATE)


def well(host):
    wait_for(lambda: host.exec("chatmail-relay", "status", check=False).ok, 60, "status")


def installed(host, package="chatmail-relay"):
    """Its state and version, by dpkg."""
    shown = host.exec("dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", package).out
    return tuple(shown.split())


def processes(host):
    """Main process of each running unit: unit -> (pid, start time)."""
    shown = host.exec("systemctl", "show", "-p", "Id,MainPID,ExecMainStartTimestamp", *RUNNING).out
    found = {}
    for block in shown.split("\n\n"):
        values = dict(line.split("=", 1) for line in block.splitlines())
        if values["MainPID"] != "0":
            found[values["Id"]] = (values["MainPID"], values["ExecMainStartTimestamp"])
    return found


def restarted(before, after):
    """Units that ran before and have another main process now, or none."""
    return {unit for unit in before if after.get(unit) != before[unit]}


def configuration(host):
    """Content of every rendered file, by component, and of Postfix' own."""
    ledger = json.loads(host.read("/var/lib/chatmail/state/ledger.json"))["components"]
    found = {}
    for name, entry in ledger.items():
        files = list(entry["files"])
        if entry["postconf"]:
            files += ["/etc/postfix/main.cf", "/etc/postfix/master.cf"]
        shown = host.exec("sha256sum", "--", *files, check=False).out if files else ""
        found[name] = (shown, tuple(entry["units"]))
    return found


def marks(host):
    """The numbers of versions that the rendered configuration names: one, or it is half-made."""
    shown = host.exec("grep", "-h", "-o", "lab [0-9]*", *MARKED.values(), check=False).out
    found = shown.splitlines() + [""] * (len(MARKED) - len(shown.splitlines()))
    banner = host.exec("postconf", "-h", "smtpd_banner").out
    version = host.read("/etc/chatmail/chatmaild/version").split("\n")[0]
    numbers = [re.search(r"lab ?(\d+)", text) for text in (*found, banner, version)]
    return {int(number[1]) if number else 0 for number in numbers}


def test_an_upgrade_from_the_last_release_loses_nothing_and_restarts_what_changed(
    host, mail, releases
):
    assert installed(host) == ("installed", releases.previous)
    mail.account()  # services that start on demand
    point_at(host, "trixie")
    files, before = configuration(host), processes(host)
    with Traffic(mail) as traffic:
        traffic.more()
        done = host.exec("unattended-upgrade", "-v", check=False, timeout=300)
        traffic.more()
        after = processes(host)
    said = done.out + done.err
    keep("upgrade from the last release", said)
    assert done.ok and "kept back" not in said, said
    for package in ("chatmail-relay", "python3-chatmaild", "dovecot-chatmail"):
        assert installed(host, package) == ("installed", releases.current), said
    assert "ESMTP" in host.exec("postconf", "-h", "smtpd_banner").out
    changed = {
        unit
        for name, (content, units) in configuration(host).items()
        if files.get(name, ("",))[0] != content
        for unit in units
    }
    assert restarted(before, after) <= changed | OWN, said
    assert OWN & set(before) <= restarted(before, after)
    well(host)
    traffic.settle()
    measured["upgrade from the last release"] = f"{done.seconds:.1f} s; {traffic}"
    assert traffic.longest_refusal <= NO_REFUSAL_LONGER, str(traffic)


def test_a_template_that_its_daemon_refuses_changes_nothing_until_the_next_version(
    host, mail, after
):
    only = after.repository.only
    template = after.template("dovecot/dovecot.conf.j2")
    good = template.read_text()
    template.write_text(f"{good}no_such_setting = 1\n")
    greeting = mail.imap(mail.account()).welcome
    bad = after.offer()
    files, before = configuration(host), processes(host)
    with Traffic(mail) as traffic:
        done = host.exec(*APT, *only, "upgrade", timeout=300)
        traffic.more()
        assert installed(host) == ("installed", bad)
        assert "no_such_setting" in done.err and "the configuration in force stays" in done.err
        assert configuration(host) == files and restarted(before, processes(host)) == set()
        assert not host.exec("chatmail-relay", "check", check=False).ok
        template.write_text(good)
        replace(template, "^login_greeting = .*", "login_greeting = a new one")
        after.offer()
        begin = time.monotonic()
        host.exec(*APT, *only, "upgrade", timeout=300)
        measured["upgrade of our packages"] = f"{time.monotonic() - begin:.1f} s"
        traffic.more()
    assert restarted(before, processes(host)) == OWN & set(before)
    wait_for(lambda: b"a new one" in mail.imap(traffic.sender).welcome, 20, "the new greeting")
    assert b"a new one" not in greeting
    well(host)
    traffic.settle()
    measured["two upgrades of ours, one refused by Dovecot"] = str(traffic)
    assert traffic.longest_refusal <= NO_REFUSAL_LONGER, str(traffic)


CONFFILE_PROMPT = """
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.SourceFileLoader("uu", "/usr/bin/unattended-upgrade")
uu = importlib.util.module_from_spec(importlib.util.spec_from_loader("uu", loader))
loader.exec_module(uu)
print([deb for deb in sys.argv[1:] if uu.conffile_prompt(deb)])
"""


def test_unattended_upgrades_take_security_updates_and_ours_and_hold_nothing_back(
    host, mail, after, tmp_path
):
    query = "dpkg-query -W -f '${source:Package} ${Package} ${Version} ${Architecture}\\n'"
    rows = [line.split() for line in host.sh(query).out.splitlines()]
    daemons = [row[1:] for row in rows if row[0] in DAEMONS]
    assert {"postfix", "dovecot-core", "nginx", "unbound", "coturn", "python3.13-minimal"} <= {
        name for name, *_ in daemons
    }
    debs, prompting = [], []
    for name, version, architecture in daemons:
        deb = image.ARCHIVES / f"{name}_{version.replace(':', '%3a')}_{architecture}.deb"
        unpacked = Unpacked(deb, tmp_path)
        for path in unpacked.conffiles():
            append(unpacked.tree, path.lstrip("/"), "# changed by its maintainer")
        debs.append(unpacked.pack(f"{version}+lab1", tmp_path))
        prompting += [debs[-1]] if unpacked.conffiles() else []
    security = Repository(
        host, "security", origin="Debian", label="Debian-Security", suite="trixie-security"
    )
    security.offer(debs)
    inside = [f"/srv/security/{deb.name}" for deb in prompting]
    assert len(inside) >= 4
    assert host.exec("python3", "-c", CONFFILE_PROMPT, *inside).out == "[]\n"

    version = after.offer()
    with Traffic(mail) as traffic:
        traffic.more()
        done = host.exec("unattended-upgrade", "-v", check=False, timeout=400)
        traffic.more()
    said = done.out + done.err
    keep("upgrade of daemons", said)
    assert done.ok and "All upgrades installed" in said, said
    assert "needs to be upgraded manually" not in said and "kept back" not in said, said
    assert installed(host) == ("installed", version)
    for name, old, _architecture in daemons:
        assert installed(host, name) == ("installed", f"{old}+lab1"), said
    assert host.exec(*APT, "--simulate", "upgrade").out.count("\nInst ") == 0
    # what its package did not restart, our trigger did: nothing runs a program that is gone
    pids = [pid for pid, _start in processes(host).values()]
    assert len(pids) == len(set(pids)) >= 9
    programs = host.sh(f"for p in {' '.join(pids)}; do readlink /proc/$p/exe; done").out
    assert "(deleted)" not in programs and "/usr/bin/python3.13" in programs
    assert host.exec("dpkg", "--verify").out == ""
    well(host)
    traffic.settle()
    measured["unattended-upgrade of six daemons and ours"] = f"{done.seconds:.1f} s; {traffic}"


class Upgrade:
    """An upgrade that runs by itself, in a control group of its own, from the first change of dpkg's."""

    def __init__(self, host, only):
        self.host = host
        self._log = host.root / "var/log/dpkg.log"
        self._at = self._log.stat().st_size
        unit = ("systemd-run", "--scope", "--quiet", "--unit=upgrade")
        # broken by the one before: its packages are of several versions
        words = ("--fix-broken", "dist-upgrade")
        self._process = subprocess.Popen(
            host.command(*unit, *APT, *only, *words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.after_line(1)
        self.begin = time.monotonic()

    @property
    def log(self):
        """The steps that dpkg has told of."""
        with self._log.open() as log:
            log.seek(self._at)
            return log.read()

    def after_line(self, wanted):
        """Wait until dpkg has told of so many steps, or of one, or it has ended."""

        def reached():
            log = self.log
            return wanted in log if isinstance(wanted, str) else log.count("\n") >= wanted

        end = time.monotonic() + 100
        while not reached() and self._process.poll() is None:
            assert time.monotonic() < end, "dpkg takes too long"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.005)

    def after_seconds(self, seconds):
        """Wait so long, or until it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def kill(self):
        """SIGKILL to apt, dpkg and all that they have started, at once; whether they still ran."""
        scope = "/sys/fs/cgroup/system.slice/upgrade.scope/cgroup.kill"
        self.host.sh(f"echo 1 >{scope}", check=False)
        self._process.communicate(timeout=20)
        return self._process.returncode != 0

    def finish(self):
        """Let it come to its end; what it said."""
        out, _ = self._process.communicate(timeout=200)
        return out.decode()


def interrupted_at(host):
    """Where a killed upgrade was, as dpkg and the brain would find it."""
    if host.exec("test", "-e", "/var/lib/chatmail/state/journal.json", check=False).ok:
        return "within the transaction"
    state, _version = installed(host)
    # the brain comes last: what it depends on is unpacked, and configured, before
    return {
        "installed": "before the brain was unpacked",
        "unpacked": "before its postinst",
        "half-configured": "in its postinst",
    }.get(state, state)


def test_killed_at_ten_random_points_the_relay_works_with_the_old_or_the_new(host, mail, after):
    """Half of the points are equally likely in time, half among the steps that dpkg takes."""
    only = after.repository.only
    after.mark()
    after.offer()
    whole = Upgrade(host, only)
    said, steps = whole.finish(), whole.log.count("\n")
    seconds = time.monotonic() - whole.begin
    assert marks(host) == {after.number}, said
    seed = int.from_bytes(os.urandom(4))
    dice = random.Random(seed)
    points, outcomes = Counter(), Counter()
    begin = time.monotonic()
    while points.total() < KILLS:
        old = marks(host)
        after.mark()
        after.offer()
        upgrade = Upgrade(host, only)
        if points.total() % 2:
            upgrade.after_seconds(dice.uniform(0, seconds))
        else:
            upgrade.after_line(dice.randint(1, steps))
        if not upgrade.kill():
            continue  # it was quicker
        where = interrupted_at(host)
        host.exec("dpkg", "--configure", "-a", check=False, timeout=200)
        found = marks(host)
        assert found in (old, {after.number}), f"seed {seed}, {where}: {old} became {found}"
        points[where] += 1
        outcomes["old" if found == old else "new"] += 1
        works(mail)
    took = time.monotonic() - begin
    measured["upgrades killed at random points, then dpkg --configure -a"] = (
        f"{KILLS} (seed {seed}): {told(points)}; afterwards {told(outcomes)}, none half;"
        f" {took / KILLS:.1f} s each"
    )


def told(counter):
    return ", ".join(f"{count} {what}" for what, count in counter.items())


@pytest.mark.parametrize("moment", ["before dpkg begins", "in the postinst"])
def test_on_a_full_disk_the_old_configuration_stays_until_there_is_room(host, mail, after, moment):
    only = after.repository.only
    # also after what the kills left
    host.exec(*APT, *only, "--fix-broken", "dist-upgrade", timeout=200)
    known, old = mail.account(), marks(host)
    after.mark()
    after.offer()
    with contextlib.ExitStack() as stack:
        if moment == "before dpkg begins":
            stack.enter_context(host.full_disk(0))
            done = host.exec(*APT, *only, "dist-upgrade", check=False, timeout=200)
            said = done.out + done.err
        else:
            upgrade = Upgrade(host, only)
            upgrade.after_line("configure chatmail-relay")
            stack.enter_context(host.full_disk(0))
            said = upgrade.finish()
        assert "No space left on device" in said
        assert marks(host) == old, said
        mail.imap(known).logout()
    works(mail)
    host.exec("dpkg", "--configure", "-a", check=False, timeout=200)
    host.exec(*APT, *only, "--fix-broken", "dist-upgrade", timeout=200)
    # the remedy that a refused configuration names
    host.exec("chatmail-relay", "apply", timeout=100)
    assert marks(host) == {after.number}, said
    well(host)


def test_an_older_version_refuses_what_a_newer_one_keeps_and_says_why(host, mail, after, releases):
    replace(
        after.brain("stateformat.py"), r"^FORMAT = (\d+)$", lambda m: f"FORMAT = {int(m[1]) + 1}"
    )
    newer, go_on = after.offer(), (*APT, *after.repository.only, "--fix-broken", "dist-upgrade")
    host.exec(*go_on, timeout=200)
    assert installed(host) == ("installed", newer)
    number, since = host.read("/var/lib/chatmail/format").split()
    assert since == newer
    names = [f"{name}={releases.current}" for name in after.unpacked]
    files, before = configuration(host), processes(host)
    done = host.exec(*APT, "install", "--allow-downgrades", *names, check=False, timeout=200)
    said = done.out + done.err
    assert not done.ok and installed(host) == ("half-configured", releases.current)
    assert f"what is kept in /var/lib/chatmail has format {number}" in said
    assert f"Install version {newer} or newer again" in said
    assert configuration(host) == files and restarted(before, processes(host)) == set()
    works(mail)
    # a daemon's update at that time is not held up
    host.exec("dpkg-trigger", "--by-package=dovecot-core", "/usr/sbin/dovecot", check=False)
    assert configuration(host) == files
    # the remedy
    done = host.exec(*go_on, timeout=200)
    assert installed(host) == ("installed", newer), done.out + done.err
    well(host)
