# SPDX-License-Identifier: MIT
"""Restarts and reloads by deb-systemd-invoke(1), which asks policy-rc.d and honours `disable`."""

import os
import subprocess


def daemon_reload() -> None:
    """Make systemd read changed unit files and drop-ins; systemd's package has no trigger for it."""
    subprocess.run(["systemctl", "--system", "daemon-reload"], check=False, timeout=120)


def activate(unit: str, action: str) -> str | None:
    """Restart or reload *unit*; returns None, or what went wrong.

    A reload must not start a unit that the administrator stopped or disabled, and only `restart`
    is checked for that by deb-systemd-invoke: hence try-reload-or-restart. A unit whose package is
    gone, and which may still run, is stopped. A socket's service is stopped with it, and comes back
    with the next connection: systemd refuses to start a socket while its service runs.
    """
    state = properties([unit], "LoadState", "ActiveState").get(unit, {})
    if state.get("LoadState") == "not-found":
        subprocess.run(["systemctl", "stop", unit], capture_output=True, timeout=300)
        return None
    verb = "restart" if action == "restart" else "try-reload-or-restart"
    if unit.endswith(".socket"):
        if verb != "restart" and state.get("ActiveState") != "active":
            return None
        service = f"{unit.removesuffix('.socket')}.service"
        subprocess.run(["systemctl", "stop", unit, service], capture_output=True, timeout=300)
        verb = "restart"
    # a daemon that could not start with its old configuration has met systemd's start limit
    subprocess.run(["systemctl", "reset-failed", unit], capture_output=True, timeout=60)
    try:
        done = subprocess.run(
            ["deb-systemd-invoke", verb, unit], capture_output=True, text=True, timeout=300
        )
    except subprocess.TimeoutExpired:
        return f"{verb} {unit} took longer than five minutes"
    if done.returncode:
        return f"{verb} {unit} failed: {done.stderr.strip() or f'status {done.returncode}'}"
    return None


def properties(units: list[str], *names: str) -> dict[str, dict[str, str]]:
    """Properties of units as systemctl shows them: unit -> property -> value; {} without systemd."""
    words = ["systemctl", "show", f"--property={','.join(('Id', *names))}", "--", *units]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return {}
    found = {}
    for block in done.stdout.split("\n\n"):
        pairs = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if "Id" in pairs:
            found[pairs["Id"]] = pairs
    return found


def services(units: list[str]) -> list[str]:
    """*units* with the services of sockets in place of these, each once; [] without systemd."""
    states = properties(units, "Triggers")
    found = [
        state.get("Triggers", "") if unit.endswith(".socket") else unit
        for unit, state in states.items()
    ]
    return list(dict.fromkeys(filter(None, found)))


def outdated(units: list[str]) -> list[str]:
    """Those of *units*, or services of their sockets, that run a program an upgrade has replaced since.

    A daemon's package restarts the daemon's own unit, and knows nothing of units of ours that run it.
    """
    found = []
    for unit, state in properties(services(units), "MainPID").items():
        try:
            # 0 is none; a timer has not even that
            program = os.readlink(f"/proc/{state.get('MainPID', 0)}/exe")
        except OSError:
            continue  # not running
        if program.endswith(" (deleted)"):
            found.append(unit)
    return found
