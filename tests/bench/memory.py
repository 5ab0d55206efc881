# SPDX-License-Identifier: MIT
"""Memory: of the idle relay, of idle sessions, of the filter with large messages in flight."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from lab.host import RELAY_UNITS

from . import mailpath
from .frame import Row, measurement
from .relay import Bench, healthy

FILTER = "chatmail-filtermail.service"
LARGE, IN_FLIGHT = 20_000_000, 4


@measurement(1)
def idle_memory(bench: Bench) -> list[Row]:
    """All processes of the relay, right after their start."""
    host = bench.host
    host.exec("systemctl", "restart", *RELAY_UNITS)
    healthy(host)
    used = host.memory()
    units = {unit: used.get(unit, 0.0) for unit in RELAY_UNITS}
    missing = [unit for unit, size in units.items() if not size]
    assert not missing, f"not running: {missing}"
    return [Row("idle relay", "MiB PSS", sum(units.values()), budget=120, detail=units)]


@measurement(1)
def filter_memory(bench: Bench) -> list[Row]:
    """The filter's peak while four messages of 20 MB pass at the same time, three times."""
    host = bench.host
    with mailpath.path(bench, mailpath.OUTGOING) as way:
        pid = host.exec("systemctl", "show", "-P", "MainPID", FILTER).out.strip()
        host.sh(f"echo 5 >/proc/{pid}/clear_refs")  # its peak begins anew, proc(5)
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            list(pool.map(lambda _: way.submit("product", LARGE, 3, 3), range(IN_FLIGHT)))
        way.drain()
        peak = host.exec("awk", "/^VmHWM/ { print $2 }", f"/proc/{pid}/status").out
    return [Row("filter, 4 x 20 MB in flight, peak RSS", "MiB", int(peak) / 1024, budget=40)]
