# SPDX-License-Identifier: MIT
"""Is the relay well? One finding for every unit, port, certificate, queue and limit."""

import datetime
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chatmaild import appversions
from chatmaild.config import Config, ConfigError, read_settings
from cryptography import x509

from . import systemd
from .apply import Plan, limits, make_plan, run_checkers
from .component import Component, load_components
from .errors import RenderError
from .ledger import load_ledger
from .paths import Paths
from .ports import listeners
from .postfix import PostfixError
from .render import overrides

CERTIFICATE_DAYS = 14  # fewer days left than this is not well
QUEUE_LENGTH = 1000  # deferred messages
QUEUE_TIMEOUT = 60  # seconds


@dataclass(frozen=True)
class Finding:
    """One thing looked at; *remedy* is what to do if it is not *well*."""

    what: str
    well: bool
    detail: str
    remedy: str = ""

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
    findings.append(_queue())
    if plan is not None:
        assert plan.config is not None
        findings.append(certificate(plan.config))
        findings.append(_disk(plan.config))
        findings += _limits(paths, plan, version)
    return findings


def _pending(paths: Paths) -> Iterator[Finding]:
    for unit, action in load_ledger(paths.state).pending.items():
        yield Finding("pending", False, f"{action} of {unit}", "run chatmail-relay apply")


def _units(components: list[Component]) -> Iterator[Finding]:
    units = [unit for component in components for unit in component.units]
    # what a timer starts is not up, but must not have failed
    runs = [f"{unit.removesuffix('.timer')}.service" for unit in units if unit.endswith(".timer")]
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
    held = {listener.port: listener for listener in listeners(ports)}
    for item in wanted:
        listener = held.get((item.protocol, item.port))
        well = listener is not None and listener.unit == item.unit
        detail = "nobody listens" if listener is None else f"{listener.unit or listener.process}"
        yield Finding(
            f"port {item.port} {item.what}", well, detail, f"see systemctl status {item.unit}"
        )


def certificate(config: Config) -> Finding:
    """Whether the certificate can be read, names the domain and is valid for two more weeks."""
    what, path = "certificate", Path(config.tls_cert)
    try:
        cert = x509.load_pem_x509_certificate(path.read_bytes())
        extension = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = extension.value.get_values_for_type(x509.DNSName)
        names += map(str, extension.value.get_values_for_type(x509.IPAddress))
    except (OSError, ValueError, x509.ExtensionNotFound) as error:
        return Finding(what, False, f"{path}: {error}", "set tls_external_cert_and_key")
    wildcard = "*." + config.mail_host.partition(".")[2]
    if config.mail_host not in names and (config.is_ip_relay or wildcard not in names):
        return Finding(what, False, f"{path} does not name {config.mail_host}", "get one that does")
    days = (cert.not_valid_after_utc - datetime.datetime.now(datetime.timezone.utc)).days
    detail = f"{path} is valid for {days} days"
    return Finding(what, days >= CERTIFICATE_DAYS, detail, "renew it")


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


def _limits(paths: Paths, plan: Plan, version: str) -> Iterator[Finding]:
    for item in limits(paths, plan, version):
        value = "missing" if item.value is None else item.value
        detail = f"{value}, wanted at least {item.wanted}"
        yield Finding(f"limit {item.limit.sysctl}", item.is_enough, detail, item.limit.remedy)
