# SPDX-License-Identifier: MIT
"""Fixtures of all tests on booted containers, and what they measured."""

import contextlib
import os
import re
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chatmail_build import debs, paths, release
from deltachat_rpc_client import DeltaChat, Rpc
from lab import Lab, image
from lab.client import rpc_program
from lab.host import RELAY_UNITS, Host
from lab.inet import Internet
from lab.mail import Mail
from lab.push import PushServer
from lab.shell import LabError, wait_for

DOMAIN = "_alpha.example"
HEALTHY_SECONDS = 60
#: Test files that share hosts beside the relay.
TOGETHER = {
    "internet": ("test_acme", "test_federation", "test_inet", "test_tls"),
    "ip_relay": ("test_ip_relay", "test_selftest"),
    "releases": ("test_release", "test_upgrade"),
}

#: Takes an hour and a machine of its own; `make test-load` names it.
collect_ignore = [] if os.environ.get("CHATMAIL_TEST_LOAD") else ["load"]

_counts: dict[str, int] = {}
_largest: dict[str, tuple[float, float]] = {}  # (PSS, RSS) in MiB by unit
measured: dict[str, str] = {}
_labs: list[Lab] = []
_relays: list[Host] = []  # the one of the session, once it runs


def keep(what: str, text: str) -> None:
    """Keep what a tool said of this run, in build/log."""
    paths.LOGS.mkdir(parents=True, exist_ok=True)
    (paths.LOGS / f"{re.sub('[^a-z0-9]+', '-', what)}.txt").write_text(text)


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Network, name server and client side; at its end nothing of it may be left."""
    with Lab("tests") as running:
        _labs.append(running)
        yield running
        _labs.remove(running)


@pytest.fixture(scope="session")
def relay(lab: Lab) -> Host:
    """A relay `_alpha.example`, installed by apt from the signed repository."""
    host = lab.host("alpha", 11, names=(DOMAIN, f"www.{DOMAIN}"))
    seconds = host.install_relay(DOMAIN)
    wait_for(
        lambda: host.exec("chatmail-relay", "status", check=False).ok,
        HEALTHY_SECONDS,
        "chatmail-relay status",
    )
    measured["apt install, packages downloaded"] = f"{seconds:.1f} s"
    used = host.memory()
    assert all(used.get(unit) for unit in RELAY_UNITS), used
    total = sum(used[unit] for unit in RELAY_UNITS)
    measured["idle memory (PSS) of the relay's units"] = f"{total:.0f} MB (goal 120 MB)"
    _relays.append(host)
    # hundreds of addresses of one client, on a machine that is busy with the tests
    host.exec("chatmail-relay", "set", "max_new_addresses_per_hour=100000", "max_load_1m=1000")
    host.exec("chatmail-relay", "apply", timeout=120)
    return host


@pytest.fixture(scope="module", autouse=True)
def memory_after_each_module() -> Iterator[None]:
    """Services that start on demand are seen while they run."""
    yield
    for host in _relays:
        with contextlib.suppress(LabError):  # a test may have stopped it
            host.memory()


@pytest.fixture(scope="session")
def ip_relay(lab: Lab) -> Host:
    """A relay without a name: the IPv4 address is its mail domain."""
    host = lab.host("ip", 21)
    seconds = host.install_relay(host.address)
    measured["apt install of a relay without a name"] = f"{seconds:.1f} s"
    wait_for(
        lambda: host.exec("chatmail-relay", "status", check=False).ok,
        HEALTHY_SECONDS,
        "chatmail-relay status",
    )
    host.exec("chatmail-relay", "set", "max_new_addresses_per_hour=100000", "max_load_1m=1000")
    host.exec("chatmail-relay", "apply", timeout=120)
    return host


class Blank:
    """A machine with the packages installed and nothing configured; modules use it one after the other."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        image.download(lab.tree, "borgbackup")
        self.host = host = lab.host("blank", 63)
        host.install_relay("")
        host.sh("apt-get install -q --yes --no-install-recommends borgbackup", timeout=120)
        host.power_off()
        self._fresh = host.snapshot("fresh")
        self._used = True

    def reset(self) -> None:
        """Back to the machine on which nothing was configured."""
        self.host.restore(self._fresh)
        self._used = False

    def begin(self, domain: str) -> None:
        """Make it the relay of *domain*."""
        if self._used:
            self.reset()
        self._used = True
        self._lab.dns.set(domain, "A", self.host.address)
        settings = (
            *("max_load_1m=1000", "max_new_addresses_per_hour=100000"),
            *("max_user_send_per_minute=100000", "max_user_send_burst_size=100000"),
        )
        self.host.exec("chatmail-relay", "set", f"mail_domain={domain}", *settings)
        self.host.exec("chatmail-relay", "apply", timeout=120)
        wait_for(
            lambda: self.host.exec("chatmail-relay", "status", check=False).ok,
            HEALTHY_SECONDS,
            "chatmail-relay status",
        )


@pytest.fixture(scope="session")
def blank(lab: Lab) -> Blank:
    """A machine for the life of installations: `blank.begin(domain)`, `blank.reset()`."""
    return Blank(lab)


@pytest.fixture(scope="session")
def internet(lab: Lab) -> Internet:
    """Signed names, a certificate authority; relays of it are made by `internet_relay`."""
    begin = time.monotonic()
    made = Internet(lab)
    measured["test internet: boot, install, sign"] = f"{time.monotonic() - begin:.1f} s"
    return made


def internet_relay(internet: Internet, name: str, number: int) -> Host:
    """A relay NAME.example of the test internet with all its records and a certificate by ACME."""
    domain = f"{name}.example"
    host = internet.relay_host(domain, number)  # a host is often called like its mail domain
    host.install_relay(domain, internet.ANSWERS)
    internet.publish_zone(domain, host)
    host.exec("systemctl", "start", "chatmail-acme@now.service", timeout=120)
    wait_for(
        lambda: host.exec("chatmail-relay", "status", check=False).ok,
        HEALTHY_SECONDS,
        f"chatmail-relay status of {domain}",
    )
    return host


@pytest.fixture(scope="session")
def alpha(internet: Internet) -> Host:
    """The relay alpha.example; not the `relay` of the simple lab."""
    return internet_relay(internet, "alpha", 51)


@pytest.fixture(scope="session")
def beta(internet: Internet) -> Host:
    """The relay beta.example."""
    return internet_relay(internet, "beta", 52)


@dataclass(frozen=True)
class Releases:
    """A repository of the last release and of this tree, as `make release` makes it."""

    previous: str
    current: str
    directory: Path
    told: dict[str, Any]  # by python-debian

    @property
    def public(self) -> Path:
        """What a web server would show."""
        return self.directory / "public"


RELEASES_URI = "https://deb.example.org/"


@pytest.fixture(scope="session")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Releases:
    """The last release is built from its commit, once; this tree is what was built for all tests."""
    begin = time.monotonic()
    previous, built = release.build_previous()
    measured["build of the last release"] = f"{time.monotonic() - begin:.1f} s"
    current = debs.Changelog.read(paths.ROOT).version
    directory = tmp_path_factory.mktemp("releases") / "releases"
    begin = time.monotonic()
    release.publish(directory, built, previous, RELEASES_URI)
    told = release.publish(directory, paths.DEBS, current, RELEASES_URI)
    measured["a release added to the repository"] = f"{(time.monotonic() - begin) / 2:.1f} s"
    return Releases(previous, current, directory, told)


@pytest.fixture(scope="session")
def mail(lab: Lab, relay: Host) -> Mail:
    """Raw SMTP and IMAP to the relay."""
    return Mail(lab, relay.address, DOMAIN)


@pytest.fixture(scope="module")
def push(lab: Lab, relay: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PushServer]:
    """The notification server, where relays look for it, and trusted."""
    server = PushServer(lab, tmp_path_factory.mktemp("push"))
    server.trust(relay)
    yield server
    server.trust(relay, False)
    server.close()


@pytest.fixture(scope="module")
def delta(lab: Lab, relay: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeltaChat]:
    """The real client: an account manager that runs at the lab's client."""
    folder = tmp_path_factory.mktemp("delta")
    wrapper = lab.rpc_server(folder, rpc_program())
    with Rpc(accounts_dir=str(folder / "accounts"), rpc_server_path=str(wrapper)) as rpc:
        yield DeltaChat(rpc)


def new_account(delta: DeltaChat, name: str):
    """A real client's account, made by the relay's own code; online."""
    account = delta.add_account()
    account.set_config("displayname", name)
    account.set_config("bot", "1")  # not limited to one message a second by itself
    account.add_transport_from_qr(f"dcaccount:{DOMAIN}")
    account.bring_online()
    return account


# -- two workers (pytest-xdist) share the test files, each with a lab of its own ------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that share hosts go to one worker; the longest such group begins, what must be last ends."""
    groups = {file: group for group, files in TOGETHER.items() for file in files}
    first = next(iter(TOGETHER))

    def group(item: pytest.Item) -> str:
        return groups.get(item.path.stem, item.path.stem)

    items.sort(key=lambda item: (group(item) != first, item.path.stem.startswith("test_zz")))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """What a worker measured; what two did, as the first says, and of memory the most."""
    told = getattr(node, "workeroutput", {})
    for what, value in told.get("measured", {}).items():
        measured.setdefault(what, value)
    for unit, used in told.get("largest", {}).items():
        _largest[unit] = max(tuple(used), _largest.get(unit, (0, 0)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With a failure goes how the hosts are at that moment, who waits for what: build/log has all of it."""
    report = yield
    if report.failed:
        for host in (host for lab in _labs for host in lab.hosts if host.running):
            with contextlib.suppress(LabError):
                state = host.state(call.start)
                keep(f"{item.name} {report.when} {host.name}", state)
                report.sections.append(
                    (f"state of {host.name}", state[:9000] + state[9000:][-3000:])
                )
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count what passed, by test file."""
    name = report.location[0]
    if report.when == "call" and report.passed:
        _counts[name] = _counts.get(name, 0) + 1


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A module of tests/expected.txt that passed nothing fails a complete run."""
    for host in _relays:
        _largest.update({u: max(_largest.get(u, (0, 0)), used) for u, used in host.largest.items()})
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput.update(measured=measured, largest=_largest)
        return
    if session.config.args != [str(session.config.rootpath / "tests")] and session.config.args != [
        "tests"
    ]:
        return
    expected = (Path(__file__).parent / "expected.txt").read_text().split()
    missing = [name for name in expected if not _counts.get(name)]
    if missing:
        measured["MISSING"] = ", ".join(missing)
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was measured; the table of what ran is tools/chatmail_build/report.py's."""
    if measured:
        terminalreporter.section("measured (goals never fail a run)")
        for what, value in measured.items():
            terminalreporter.write_line(f"{what}: {value}")
    if _largest:
        terminalreporter.section("memory of each unit, the most that was seen (MB)")
        for unit, (pss, rss) in sorted(_largest.items(), key=lambda item: -item[1][0]):
            if unit.endswith(".service"):
                terminalreporter.write_line(f"{pss:8.1f} PSS {rss:8.1f} RSS  {unit}")
