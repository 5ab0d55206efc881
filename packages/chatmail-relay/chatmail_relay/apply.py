# SPDX-License-Identifier: MIT
"""From settings to running daemons, as one transaction: render, install, check, commit, activate.

Order of events, and what a kill at each point leaves:

1. the lock is taken, the journal of a dead run is rolled back or finished;
2. everything is rendered; nothing on disk has changed yet, any error ends here;
3. the transaction installs all files and the new ledger, the owners' checkers run, a refusal rolls
   everything back;
4. after the commit the units that the ledger names as pending are restarted or reloaded, each
   struck off when done: the next run does what is left.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import hashlib
import os
import subprocess
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from chatmaild.config import DEFAULT_PATH, SELF_SIGNED_CERT, Config, explicit_values, read_settings

from . import certificate, postfix, stateformat, systemd
from .component import ACTIVATIONS, Component, Limit, load_components
from .errors import CertificateError
from .ledger import LEDGER_NAME, Entry, Ledger, ledger_path, load_ledger, remember
from .paths import Paths
from .ports import foreign_listeners
from .render import Rendered, context, render
from .secrets import missing_secrets
from .transaction import Change, Transaction, differs, write_file

CHECK_TIMEOUT = 120  # seconds; postfix check walks the queue directories


class Refused(Exception):
    """The new configuration was refused; the one before is in force. args: one line a reason."""

    def __init__(self, reasons: list[str]):
        super().__init__("\n".join(reasons))
        self.reasons = reasons


class NotConfigured(Exception):
    """No mail domain is set: a valid state in which nothing is rendered."""


@dataclass
class Plan:
    """What an apply would do. *secrets* are keys to be made first, *changes* the transaction."""

    ledger: Ledger
    secrets: list[Change] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    changed_components: list[Component] = field(default_factory=list)
    components: list[Component] = field(default_factory=list)
    config: Config | None = None

    @classmethod
    def nothing(cls) -> Plan:
        """The plan that does nothing."""
        return cls(Ledger())

    @property
    def is_empty(self) -> bool:
        """Whether the machine is already as wanted."""
        return not (self.secrets or self.changes or self.ledger.pending)


@contextlib.contextmanager
def lock(paths: Paths) -> Iterator[None]:
    """One brain at a time; a second one waits (dpkg and an operator may meet)."""
    os.makedirs(paths.state, 0o700, exist_ok=True)
    with open(paths.state / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_configured(paths: Paths) -> bool:
    """Whether a mail domain is set."""
    return bool(explicit_values(paths.ini).get("mail_domain"))


def make_plan(paths: Paths, version: str) -> Plan:
    """Compare what the settings want with what is on disk; changes nothing.

    Raises NotConfigured, ConfigError, ComponentError, RenderError, PostfixError, LedgerError,
    StateError.
    """
    stateformat.check(paths, version)
    old = load_ledger(paths.state)
    if not is_configured(paths) and not old.components:
        raise NotConfigured
    config, _warnings = read_settings(paths.ini)
    components = load_components(paths.components)
    values = context(config, explicit_values(paths.ini), version)
    rendered = {item.name: render(paths, item, values) for item in components}
    plan = Plan(
        Ledger(pending=dict(old.pending)),
        [] if paths.is_image else missing_secrets(paths, config),
        components=components,
        config=config,
    )
    wanted = {dest for item in rendered.values() for dest in item.files}
    for component in components:
        _plan_files(paths, plan, old, component, rendered[component.name], wanted)
    for name in set(old.components) - set(rendered):
        _plan_removal(paths, plan, old.components[name], wanted)
    now = any(item.postconf or item.master for item in rendered.values())
    if now or any(entry.postconf or entry.master for entry in old.components.values()):
        _plan_postfix(paths, plan, old, components, rendered)
    new = Change(ledger_path(paths.state), plan.ledger.to_json(), 0o600)
    if differs(new):
        plan.changes.append(new)
    book = stateformat.change(paths, version)
    if book is not None:
        plan.changes.append(book)
    return plan


def _need(plan: Plan, component: Component, action: str, units: list[str] | None = None) -> None:
    """Note that *component* changed in a way that takes *action* of *units*, or of all it has."""
    if component not in plan.changed_components:
        plan.changed_components.append(component)
    for unit in component.units if units is None else units:
        _pend(plan, unit, action)


def _pend(plan: Plan, unit: str, action: str) -> None:
    have = plan.ledger.pending.get(unit, ACTIVATIONS[0])
    plan.ledger.pending[unit] = max(have, action, key=ACTIVATIONS.index)


def _plan_files(
    paths: Paths,
    plan: Plan,
    old: Ledger,
    component: Component,
    rendered: Rendered,
    wanted: set[str],
) -> None:
    """Files of one component; one that left it but is *wanted* by another stays."""
    before = old.components.get(component.name, Entry())
    known = old.files
    entry = Entry(units=list(component.units))
    units = {item.dest: item.units for item in component.files}
    for dest, (content, mode, action) in rendered.files.items():
        change = Change(paths.real(dest), content, mode)
        entry.files[dest] = known[dest] if dest in known else remember(change.dest)
        if differs(change):
            plan.changes.append(change)
            _need(plan, component, action, units.get(dest))
    for dest in set(before.files) - wanted:
        plan.changes.append(_restored(paths, dest, before.files[dest]))
        _need(plan, component, "restart", units.get(dest))
    for unit in set(component.units) - set(before.units):
        _pend(plan, unit, "restart")  # new here: a reload would not start it
    entry.postconf = dict(before.postconf)
    entry.master = dict(before.master)
    plan.ledger.components[component.name] = entry


def _plan_removal(
    paths: Paths, plan: Plan, entry: Entry, wanted: Container[str] = frozenset()
) -> None:
    """A component whose package is gone: put back what was there before it."""
    for dest, before in entry.files.items():
        if dest in wanted:
            continue
        change = _restored(paths, dest, before)
        if differs(change):
            plan.changes.append(change)
    for unit in entry.units:
        _pend(plan, unit, "restart")


def _restored(paths: Paths, dest: str, before: dict[str, object] | None) -> Change:
    """The change that gives *dest* back what stood there before us."""
    if before is None or "text" not in before:
        return Change(paths.real(dest), None)
    content = str(before["text"]).encode("utf-8", "surrogateescape")
    mode, uid, gid = (int(str(before[key])) for key in ("mode", "uid", "gid"))
    return Change(paths.real(dest), content, mode, uid, gid)


def _plan_postfix(
    paths: Paths,
    plan: Plan,
    old: Ledger,
    components: list[Component],
    rendered: dict[str, Rendered],
) -> None:
    """Work out main.cf and master.cf: wanted keys set, keys no longer wanted put back."""
    if not postfix.is_installed(paths):
        return
    with postfix.Staging(paths) as staging:
        main, master = staging.main_values(), staging.master_lines()
        want_main: dict[str, str | None] = {}
        want_master: dict[str, str | None] = {}
        # what stood there before any component: one may set a key of another anew
        first_main: dict[str, str | None] = dict(main)
        first_master: dict[str, str | None] = dict(master)
        for entry in old.components.values():
            want_main |= entry.postconf
            want_master |= entry.master
        first_main |= want_main
        first_master |= want_master
        for name, item in rendered.items():
            entry = plan.ledger.components[name]
            entry.postconf = {key: first_main.get(key) for key in item.postconf}
            entry.master = {key: first_master.get(key) for key in item.master}
            want_main |= item.postconf
            want_master |= item.master
        staging.set_main(want_main)
        staging.set_master(want_master)
        changes = [change for change in staging.changes() if differs(change)]
    plan.changes += changes
    # options in master.cf are read by each new process
    new_ports = postfix.ports(master) != postfix.ports(master | want_master)
    restart = new_ports or _needs_restart(main, want_main)
    for component in components:
        if changes and (component.postconf or component.master):
            _need(plan, component, "restart" if restart else component.activate)


def _needs_restart(main: dict[str, str], wanted: dict[str, str | None]) -> bool:
    keys = ("inet_interfaces", "inet_protocols", "myhostname", "queue_directory")
    return any(key in wanted and wanted[key] != main.get(key) for key in keys)


def image_mark(paths: Paths) -> Path:
    """A file that says: rendered in an image, to be finished where it boots."""
    return paths.state / "image"


def apply(
    paths: Paths,
    version: str,
    *,
    check_all: bool = False,
    boot: bool = False,
    restart_all: bool = False,
) -> Plan:
    """Make the machine as the settings say and return what was done.

    *check_all* is for the time after a daemon's upgrade: the checkers of unchanged components are asked
    too, and units that run a replaced program are restarted. *boot*: nothing of the relay runs yet, it all
    starts afterwards by itself. *restart_all*: what the daemons read was changed under them. Raises
    Refused when a checker or a foreign listener objects, and what make_plan raises; everything is
    then as before. A unit that does not come up is a Refused as well, after the commit: its reason
    says so, and it stays pending.
    """
    with lock(paths):
        stateformat.check(paths, version)
        Transaction(paths.state).recover()
        plan = make_plan(paths, version)
        live = paths.is_live and not boot
        if live and not load_ledger(paths.state).components:
            foreign = foreign_listeners(plan.components)
            if foreign:
                raise Refused(foreign)
        for secret in plan.secrets:
            os.makedirs(secret.dest.parent, 0o700, exist_ok=True)
            write_file(secret)
        if any(
            secret.dest.parent != paths.real(SELF_SIGNED_CERT).parent for secret in plan.secrets
        ):
            restart_all = True
        if restart_all:
            for component in plan.components:
                for unit in component.units:
                    _pend(plan, unit, "restart")
        if paths.is_image:
            write_file(Change(image_mark(paths), b""))
        else:
            _install_certificate(paths, plan)
        if check_all and live:
            for unit in systemd.outdated([u for item in plan.components for u in item.units]):
                _pend(plan, unit, "restart")
        to_check = plan.components if check_all else plan.changed_components

        def verify() -> None:
            reasons = run_checkers(to_check) if live else []
            if reasons:
                raise Refused(reasons)

        if plan.changes:
            Transaction(paths.state).run(plan.changes, verify)
            for change in plan.changes:
                if change.content is None:
                    _remove_empty(paths, change.dest.parent)
        else:
            verify()
        if boot and paths.is_live:
            systemd.daemon_reload()
        _activate_pending(paths, plan, live)
        return plan


def _install_certificate(paths: Paths, plan: Plan) -> bool:
    """Serve what plan.config wants; whether that is new. Raises Refused, with the remedy."""
    assert plan.config is not None
    try:
        pair = certificate.wanted(paths, plan.config)
    except CertificateError as error:
        raise Refused(
            [f"{error}. Mend it, or run 'chatmail-relay set tls=acme' (or self)"]
        ) from error
    if not certificate.install(paths, pair):
        return False
    for component in plan.components:
        for unit in component.certificate:
            _pend(plan, unit, "reload")
    return True


def take_certificate(paths: Paths) -> bool:
    """Serve a new certificate of the way in force; whether there was one.

    The settings are those of the last apply: what was edited since is not in force. Raises Refused if the
    new one cannot be used; the one before is then still served.
    """
    with lock(paths):
        Transaction(paths.state).recover()
        ledger = load_ledger(paths.state)
        if not ledger.components:
            raise NotConfigured
        config, _warnings = read_settings(paths.real(str(DEFAULT_PATH)))
        plan = Plan(ledger, components=load_components(paths.components), config=config)
        if not _install_certificate(paths, plan):
            return False
        _save_ledger(paths, ledger)
        _activate_pending(paths, plan, paths.is_live)
        return True


def _activate_pending(paths: Paths, plan: Plan, live: bool) -> None:
    pending = plan.ledger.pending
    if not pending:
        return
    if live:
        systemd.daemon_reload()
        order = [unit for component in plan.components for unit in component.units]
        reasons = []
        for unit in sorted(pending, key=lambda unit: order.index(unit) if unit in order else -1):
            failure = systemd.activate(unit, pending[unit])
            if failure:
                reasons.append(f"{failure}; see systemctl status {unit}")
                continue
            del pending[unit]
            _save_ledger(paths, plan.ledger)
        if reasons:
            raise Refused(reasons)
    else:
        # an image, or its boot: nothing runs, everything will start with the new configuration
        pending.clear()
        _save_ledger(paths, plan.ledger)


def _save_ledger(paths: Paths, ledger: Ledger) -> None:
    write_file(Change(ledger_path(paths.state), ledger.to_json(), 0o600))


def unapply(paths: Paths) -> list[str]:
    """Put back everything the ledger names, and let the units see it; returns the components."""
    with lock(paths):
        Transaction(paths.state).recover()
        old = load_ledger(paths.state)
        plan = Plan(Ledger())
        for entry in old.components.values():
            _plan_removal(paths, plan, entry)
        if any(entry.postconf or entry.master for entry in old.components.values()):
            _plan_postfix(paths, plan, old, [], {})
        plan.changes = [change for change in plan.changes if differs(change)]
        plan.changes.append(Change(ledger_path(paths.state), None))
        Transaction(paths.state).run(plan.changes)
        for dest in old.files:
            _remove_empty(paths, paths.real(dest).parent)
        if paths.is_live:
            systemd.daemon_reload()
            for unit in plan.ledger.pending:
                systemd.activate(unit, "restart")
        return sorted(old.components)


def _remove_empty(paths: Paths, folder: Path) -> None:
    """Remove *folder* and those above it as far as they are ours and empty."""
    ours = tuple(map(paths.real, ("/etc/chatmail", "/etc/systemd/system", "/var/lib/chatmail")))
    while any(base in folder.parents for base in ours):
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


def recover(paths: Paths) -> str | None:
    """Repair what a killed run left (at boot, before the daemons start); the state found."""
    with lock(paths):
        return Transaction(paths.state).recover()


def run_checkers(components: list[Component]) -> list[str]:
    """Ask every owner's program about its configuration; one reason a refusal, warnings count."""
    reasons = []
    for component in components:
        for command in component.check:
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=CHECK_TIMEOUT
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                reasons.append(f"{component.name}: {error}")
                continue
            said = [
                line
                for line in done.stderr.splitlines()
                if line.strip() and not any(p.search(line) for p in component.check_ignore)
            ]
            if done.returncode or said:
                text = "; ".join(said) or f"status {done.returncode}"
                reasons.append(f"{component.name}: {' '.join(command)}: {text}")
    return reasons


@dataclass(frozen=True)
class LimitFinding:
    """A kernel limit as it is and as it should be."""

    limit: Limit
    value: int | None
    wanted: int

    @property
    def is_enough(self) -> bool:
        """Whether the kernel allows what the settings promise."""
        return self.value is not None and self.value >= self.wanted


def limits(paths: Paths, plan: Plan, version: str) -> list[LimitFinding]:
    """All kernel limits that components name, compared with this kernel's."""
    assert plan.config is not None
    values = context(plan.config, explicit_values(paths.ini), version)
    env = jinja2.Environment(undefined=jinja2.StrictUndefined)
    findings = []
    for component in plan.components:
        for limit in component.limits:
            wanted = int(env.from_string(limit.at_least).render(values))
            path = Path("/proc/sys") / limit.sysctl.replace(".", "/")
            value = int(path.read_text().split()[0]) if path.exists() else None
            findings.append(LimitFinding(limit, value, wanted))
    return findings


def shown_changes(plan: Plan) -> list[Change]:
    """The changes of files that an administrator knows of: all but the brain's own books."""
    books = (LEDGER_NAME, stateformat.NAME)
    return [change for change in plan.changes if change.dest.name not in books]


def diff(plan: Plan) -> list[str]:
    """What *plan* would change, as unified diffs; keys are named, never shown."""
    lines = [f"new secret {change.dest}" for change in plan.secrets]
    for change in shown_changes(plan):
        lines += difflib.unified_diff(
            _lines(change.dest.read_bytes() if change.dest.is_file() else None),
            _lines(change.content),
            str(change.dest) if os.path.lexists(change.dest) else "/dev/null",
            str(change.dest) if change.content is not None else "/dev/null",
            lineterm="",
        )
    lines += [f"{action} {unit}" for unit, action in plan.ledger.pending.items()]
    return lines


def _lines(content: bytes | None) -> list[str]:
    if content is None:
        return []
    try:
        return content.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        return [f"binary, SHA-256 {hashlib.sha256(content).hexdigest()}"]
