# SPDX-License-Identifier: MIT
"""The sizes of machines, and where memory, cores and files are read."""

import os

import pytest
from chatmaild import config, sizing
from chatmaild.sizing import AUTH_WORKER, BASE, IMAP_AWAKE, MIB, SMTPD, Machine, sizes

GIB = 1024 * MIB


@pytest.mark.parametrize(
    ("memory", "cores", "imap", "smtp", "auth_workers"),
    [
        (512 * MIB, 1, 690, 20, 20),
        (512 * MIB, 2, 690, 20, 20),
        (1 * GIB, 1, 2000, 51, 59),
        (1 * GIB, 2, 2000, 51, 59),
        (2 * GIB, 1, 4800, 110, 100),
        (2 * GIB, 2, 4800, 110, 100),
        (24 * GIB, 1, 5000, 500, 100),
        (24 * GIB, 2, 10000, 1000, 100),
        (24 * GIB, 16, 60000, 1600, 100),
    ],
)
def test_sizes_follow_memory_and_cores(memory, cores, imap, smtp, auth_workers):
    found = sizes(Machine(memory, cores))
    assert (found.imap, found.smtp, found.auth_workers) == (imap, smtp, auth_workers)
    assert found.relays == min(smtp, 100)


@pytest.mark.parametrize("memory", [512 * MIB, 1 * GIB, 2 * GIB, 24 * GIB])
@pytest.mark.parametrize("cores", [1, 2, 16])
def test_what_is_allowed_fits_into_the_memory(memory, cores):
    found = sizes(Machine(memory, cores))
    least = found.smtp == sizing.SMTP_LEAST  # promised, whatever it takes
    used = BASE + found.imap * IMAP_AWAKE + found.auth_workers * AUTH_WORKER
    assert used + (0 if least else found.smtp * SMTPD) <= memory * 1.02


@pytest.mark.parametrize(("cores", "imap"), [(1, 7900), (2, 12000)])
def test_open_files_bound_the_sessions(cores, imap, monkeypatch):
    monkeypatch.setattr(sizing, "IMAP_PER_CORE", 100_000)
    machine = Machine(24 * GIB, cores, files=20_000)
    found = sizes(machine)
    assert found.imap == imap
    files = sizing.front_connections(found.imap, found.smtp, machine.front_workers)
    assert 18_000 < files + sizing.FRONT_FILES <= 20_000


@pytest.mark.parametrize("files", [1024, 20_000, 1 << 20])
@pytest.mark.parametrize("imap", [10, 9_900, 10_000, 60_000])
def test_hibernating_sessions_have_files_enough(imap, files):
    processes = sizing.hibernate_processes(imap, files)
    assert processes >= 1
    assert 2 * imap / processes <= files
    assert imap / processes <= 1000


def test_a_tiny_machine_gets_the_least_that_makes_sense():
    found = sizes(Machine(64 * MIB, 1, files=100))
    assert (found.imap, found.smtp, found.auth_workers) == (100, 20, 20)


@pytest.mark.parametrize("nominal", [1, 2, 4, 8, 16, 24, 32, 48, 64])
def test_an_update_of_the_kernel_does_not_change_the_sizes(nominal):
    # of the nominal gigabytes the kernel keeps two to six per cent
    totals = [int(nominal * GIB * part) for part in (0.94, 0.95, 0.96, 0.97, 0.98)]
    assert len({sizes(Machine(total, 2)) for total in totals}) == 1


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:       24683840 kB\nMemFree:        20000000 kB\n"
LIMITS = "Limit   Soft Limit   Hard Limit   Units\nMax open files   1024   20000   files\n"


@pytest.mark.parametrize(
    ("limit", "memory"),
    [
        (None, 24683840 * 1024),
        ("max\n", 24683840 * 1024),
        ("1073741824\n", GIB),
        ("99999999999999\n", 24683840 * 1024),
    ],
)
def test_memory_is_that_of_the_machine_or_the_containers_limit(tmp_path, limit, memory):
    files = {"proc/meminfo": MEMINFO}
    if limit is not None:
        files["sys/fs/cgroup/memory.max"] = limit
    assert Machine.this(tree(tmp_path, files)).memory == memory


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000\n", 16), ("150000 100000\n", 2), ("1000 100000\n", 1)]
)
def test_cores_are_those_of_the_machine_or_the_containers_quota(
    tmp_path, monkeypatch, quota, cores
):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    files = {"proc/meminfo": MEMINFO, "sys/fs/cgroup/cpu.max": quota}
    assert Machine.this(tree(tmp_path, files)).cores == cores


def test_files_are_what_systemd_itself_may_open(tmp_path):
    machine = Machine.this(tree(tmp_path, {"proc/meminfo": MEMINFO, "proc/1/limits": LIMITS}))
    assert machine.files == 20_000


def test_files_are_at_most_what_the_units_ask_for(tmp_path):
    limits = LIMITS.replace("20000", "1073741816")
    machine = Machine.this(tree(tmp_path, {"proc/meminfo": MEMINFO, "proc/1/limits": limits}))
    assert machine.files == sizing.UNIT_FILES


def test_this_machine_has_memory_and_cores():
    machine = Machine.this()
    assert machine.memory > 64 * MIB and machine.cores >= 1 and machine.files >= 256


# -- in the settings ---------------------------------------------------------------------------


def settings(monkeypatch, text, machine):
    monkeypatch.setattr(Machine, "this", classmethod(lambda cls, root=None: machine))
    return config.read_settings("test.ini", f"[params]\nmail_domain = a.example\n{text}")[0]


def test_unset_limits_are_the_machines(monkeypatch):
    found = settings(monkeypatch, "", Machine(1 * GIB, 2))
    assert (found.max_imap_connections, found.max_smtp_connections) == (2000, 51)
    assert found.max_connections_per_client == 400


def test_an_empty_limit_is_an_unset_one(monkeypatch):
    found = settings(monkeypatch, "max_imap_connections =", Machine(1 * GIB, 2))
    assert found.max_imap_connections == 2000


def test_a_limit_that_is_set_wins(monkeypatch):
    text = "max_imap_connections = 50000\nmax_smtp_connections = 7\n"
    found = settings(monkeypatch, text, Machine(1 * GIB, 2))
    assert (found.max_imap_connections, found.max_smtp_connections) == (50000, 7)
