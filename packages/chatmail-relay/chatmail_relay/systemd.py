# SPDX-License-Identifier: MIT
"""Restarts and reloads by deb-systemd-invoke(1), which asks policy-rc.d and honours `disable`."""

import subprocess


def daemon_reload() -> None:
    """Make systemd read changed unit files and drop-ins; systemd's package has no trigger for it."""
    subprocess.run(["systemctl", "--system", "daemon-reload"], check=False, timeout=120)


def activate(unit: str, action: str) -> str | None:
    """Restart or reload *unit*; returns None, or what went wrong.

    A reload must not start a unit that the administrator stopped or disabled, and only `restart`
    is checked for that by deb-systemd-invoke: hence try-reload-or-restart.
    """
    verb = "restart" if action == "restart" else "try-reload-or-restart"
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
    """Properties of units as systemctl shows them: unit -> property -> value."""
    done = subprocess.run(
        ["systemctl", "show", f"--property={','.join(('Id', *names))}", "--", *units],
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = {}
    for block in done.stdout.split("\n\n"):
        pairs = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if "Id" in pairs:
            found[pairs["Id"]] = pairs
    return found
