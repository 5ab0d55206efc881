# SPDX-License-Identifier: MIT
"""Is the relay well? One finding for every unit, port, certificate, queue and limit."""

import datetime
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from chatmaild import appversions, sizing
from chatmaild.config import LIVE_CERT, Config, ConfigError, explicit_values, read_settings

from . import systemd
from .apply import Plan, limits, make_plan, run_checkers
from .backup.restore import mark
from .certificate import live, self_signed, wanted
from .component import Component, load_components
from .errors import CertificateError, RenderError
from .ledger import load_ledger
from .paths import Paths
from .ports import collides, listeners
from .postfix import PostfixError
from .render import overrides

CERTIFICATE_DAYS = 14  # fewer days left than this is not well
QUEUE_LENGTH = 1000  # deferred messages
QUEUE_TIMEOUT = 60  # seconds
FINDINGS_TIMEOUT = 30  # seconds


@dataclass(frozen=True)
class Finding:
    """One thing looked at; *remedy* is what to do if it is not *well*, *data* is for programs."""

    what: str
    well: bool
    detail: str
    remedy: str = ""
    data: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        line = f"{'ok ' if self.well else 'BAD'} {self.what}: {self.detail}"
        return line if self.well or not self.remedy else f"{line}; {self.remedy}"


def check(paths: Paths, version: str) -> list[Finding]:
    """Settings valid, files as rendered, checkers content, kernel limits high enough."""
    try:
        _config, warnings = read_settings(paths.ini)
    except ConfigError as error:
        return [Finding("settings", False, str(problem)) for problem in error.problems]
    findings = [Finding("settings", False, str(problem)) for problem in warnings]
    findings.append(Finding("settings", True, f"{paths.ini} is valid"))
    plan = make_plan(paths, version)
    changes = [change.dest for change in (*plan.secrets, *plan.changes)]
    for dest in changes:
        findings.append(
            Finding("file", False, f"{dest} is not as rendered", "run chatmail-relay apply")
        )
    if not changes:
        findings.append(Finding("files", True, "all as rendered"))
    findings += _app_versions(paths)
    for path in overrides(paths, plan.components):
        findings.append(Finding("override", True, f"{path} is in force"))
    if paths.is_live:
        for component in plan.components:
            if component.check:
                reasons = run_checkers([component])
                findings.append(
                    Finding(
                        f"checker {component.name}", not reasons, "; ".join(reasons) or "content"
                    )
                )
    findings += _limits(paths, plan, version)
    return findings


def _app_versions(paths: Paths) -> Iterator[Finding]:
    path = paths.real(str(appversions.PATH))
    try:
        told = appversions.read(path)
    except appversions.Invalid as error:
        yield Finding("app versions", False, str(error), "clients are told none until it is right")
    else:
        if told is not None:
            yield Finding("app versions", True, f"{path} is valid")


def status(paths: Paths, version: str) -> list[Finding]:
    """The state of the running relay; of what runs also while the settings are not valid."""
    findings: list[Finding] = []
    plan = None
    try:
        plan = make_plan(paths, version)
    except ConfigError as error:
        findings += [Finding("settings", False, str(problem)) for problem in error.problems]
    except (RenderError, PostfixError) as error:
        findings.append(Finding("configuration", False, str(error), "run chatmail-relay check"))
    components = load_components(paths.components) if plan is None else plan.components
    findings += _pending(paths)
    findings += _units(components)
    findings += _ports(components)
    findings += _of_components(components)
    findings.append(_queue())
    if plan is not None:
        assert plan.config is not None
        findings += certificate(paths, plan.config)
        findings.append(_disk(plan.config))
        explicit = explicit_values(paths.ini)
        findings.append(capacity(sizing.Machine.this(), plan.config, explicit))
        findings += _limits(paths, plan, version)
    return findings


def _pending(paths: Paths) -> Iterator[Finding]:
    for unit, action in load_ledger(paths.state).pending.items():
        yield Finding("pending", False, f"{action} of {unit}", "run chatmail-relay apply")
    if mark(paths).exists():
        yield Finding("restore", False, "was interrupted", "run chatmail-relay restore once more")


def _units(components: list[Component]) -> Iterator[Finding]:
    units = [unit for component in components for unit in component.units]
    # what a timer starts is not up, but must not have failed
    timers = [unit for unit in units if unit.endswith(".timer")]
    runs = [state.get("Unit", "") for state in systemd.properties(timers, "Unit").values()]
    states = systemd.properties(
        [*units, *runs],
        "ActiveState",
        "SubState",
        "UnitFileState",
        "NRestarts",
        "Result",
        "TriggeredBy",
    )
    for unit in units:
        state = states.get(unit, {})
        active = state.get("ActiveState", "unknown")
        detail = f"{active} ({state.get('SubState', '')})"
        remedy = f"see systemctl status {unit} and journalctl --namespace=chatmail -u {unit}"
        if state.get("UnitFileState") in ("disabled", "masked"):
            detail += f", {state['UnitFileState']}"
            remedy = f"run systemctl enable --now {unit}"
        # a socket-activated service rests until its first connection
        resting = active == "inactive" and f"{unit.rsplit('.', 1)[0]}.socket" in states
        yield Finding(f"unit {unit}", active == "active" or resting, detail, remedy)
    yield from _sockets(
        {
            name: unit
            for unit in units
            for name in states.get(unit, {}).get("TriggeredBy", "").split()
        }
    )
    for unit in runs:
        result = states.get(unit, {}).get("Result", "unknown")
        remedy = f"see journalctl --namespace=chatmail -u {unit}"
        yield Finding(f"last run of {unit}", result == "success", result, remedy)


def _sockets(services: dict[str, str]) -> Iterator[Finding]:
    """Socket units by the service they start: whether each listens, and can be reached."""
    names = sorted(name for name in services if name.endswith(".socket"))
    states = systemd.properties(names, "ActiveState", "UnitFileState", "Listen") if names else {}
    for name in names:
        state = states.get(name, {})
        detail = state.get("ActiveState", "unknown")
        well = detail == "active"
        # "PATH (Stream)"
        path = state.get("Listen", "").partition(" (")[0]
        remedy = f"run systemctl restart {name} {services[name]}"
        if state.get("UnitFileState") in ("disabled", "masked"):
            well, detail = False, f"{detail}, {state['UnitFileState']}"
            remedy = f"run systemctl enable --now {name}"
        elif path.startswith("/") and not os.path.exists(path):
            well, detail = False, f"{path} is gone"
        yield Finding(f"socket {name}", well, detail, remedy)


def _ports(components: list[Component]) -> Iterator[Finding]:
    wanted = [item for component in components for item in component.listen]
    ports = {(item.protocol, item.port) for item in wanted}
    held = listeners(ports)
    for item in wanted:
        port = (item.protocol, item.port)
        # somebody else may have the port at another address, as systemd-resolved has 127.0.0.53:53
        there = [x for x in held if x.port == port and collides(item.address, x.address)]
        listener = next((x for x in there if x.unit == item.unit), there[0] if there else None)
        well = listener is not None and listener.unit == item.unit
        detail = "nobody listens" if listener is None else f"{listener.unit or listener.process}"
        yield Finding(
            f"port {item.port} {item.what}", well, detail, f"see systemctl status {item.unit}"
        )


#: What to do about a certificate of each way.
CERTIFICATE_REMEDY = {
    "acme": "see the line of acme",
    "external": "renew it, in the files of tls_external_cert_and_key",
    "self": "set tls = acme or external",
}


def certificate(paths: Paths, config: Config) -> Iterator[Finding]:
    """Whether what is served names the domain and is valid for two more weeks; whether it is current."""
    what, remedy = "certificate", CERTIFICATE_REMEDY[config.tls]
    pair = live(paths)
    if pair is None:
        yield Finding(what, False, f"{LIVE_CERT} cannot be used", "run chatmail-relay apply")
        return
    days = (
        pair.certificate.not_valid_after_utc - datetime.datetime.now(datetime.timezone.utc)
    ).days
    if config.tls != "self" and pair == self_signed(paths):
        yield Finding(what, False, "a temporary self-signed one, which clients refuse", remedy)
    elif not pair.is_for(config.mail_host):
        names = ", ".join(pair.names) or "nothing"
        yield Finding(what, False, f"names {names}, not {config.mail_host}", remedy)
    elif days < 0:
        yield Finding(what, False, "has expired", remedy)
    else:
        yield Finding(what, days >= CERTIFICATE_DAYS, f"valid for {days} days", remedy)
    try:
        newest = wanted(paths, config)
    except CertificateError as error:
        yield Finding("new certificate", False, f"{error}; the one before is served", "mend it")
        return
    if newest != pair:
        remedy = "run chatmail-relay certificate"
        yield Finding("new certificate", False, "is there, but not served", remedy)


def _of_components(components: list[Component]) -> Iterator[Finding]:
    """What components say of themselves: JSON, a list of objects with the fields of Finding."""
    for component in components:
        for command in component.findings:
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=FINDINGS_TIMEOUT
                )
                yield from [Finding(**item) for item in json.loads(done.stdout)]
            except (OSError, subprocess.TimeoutExpired, ValueError, TypeError) as error:
                yield Finding(
                    component.name, False, f"{' '.join(command)}: {error}", "report a bug"
                )


def _queue() -> Finding:
    try:
        done = subprocess.run(
            ["postqueue", "-j"], capture_output=True, text=True, timeout=QUEUE_TIMEOUT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("queue", False, str(error), "see systemctl status postfix")
    if done.returncode:
        return Finding("queue", False, done.stderr.strip(), "see systemctl status postfix")
    queues = [json.loads(line)["queue_name"] for line in done.stdout.splitlines()]
    deferred = queues.count("deferred")
    detail = f"{len(queues)} messages, {deferred} deferred"
    return Finding("queue", deferred < QUEUE_LENGTH, detail, "see postqueue -p")


def _disk(config: Config) -> Finding:
    place = Path(config.mailboxes_dir)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    inodes = os.statvfs(place)
    detail = f"{free // 2**20} MB free at {place}"
    well = free >= config.min_free_disk_space and (inodes.f_files == 0 or inodes.f_favail > 10000)
    return Finding("disk", well, detail, "no new addresses are made; free some space")


def capacity(machine: sizing.Machine, config: Config, explicit: dict[str, str]) -> Finding:
    """How many idle IMAP sessions the machine is expected to bear under *config*, and what limits them.

    A setting above that is the operator's business: it is said, and not bad.
    """
    limit, submission = config.max_imap_connections, config.max_smtp_connections
    bounds = sizing.imap_bounds(machine, submission)
    by, least = min(bounds.items(), key=lambda item: item[1])
    least = max(least, 0)
    allowed = ""
    if explicit.get("max_imap_connections"):
        if limit <= least:
            by, least = "max_imap_connections", limit
        else:
            allowed = f"; max_imap_connections allows {limit}"
    else:
        least = limit
    memory = machine.memory // sizing.MIB
    detail = (
        f"about {least} idle IMAP sessions, limited by {by}{allowed}; {submission} submission "
        f"sessions a port; {memory} MB of memory, cores: {machine.cores}"
    )
    data: dict[str, object] = {
        "imap_sessions": least,
        "limited_by": by,
        "max_imap_connections": limit,
        "max_smtp_connections": submission,
        "bounds": bounds,
        "memory": machine.memory,
        "cores": machine.cores,
        "open_files": machine.files,
    }
    return Finding("capacity", True, detail, data=data)


def _limits(paths: Paths, plan: Plan, version: str) -> Iterator[Finding]:
    for item in limits(paths, plan, version):
        value = "missing" if item.value is None else item.value
        detail = f"{value}, wanted at least {item.wanted}"
        yield Finding(f"limit {item.limit.sysctl}", item.is_enough, detail, item.limit.remedy)
