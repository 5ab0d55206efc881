# SPDX-License-Identifier: MIT
"""How many sessions and processes a machine bears: memory, cores and open files in, sizes out.

`Machine.this` looks at the machine; all else is arithmetic over the table below. A setting of
chatmail.ini always wins over what is worked out here. Nothing here may change between two runs on
the same machine, so memory is rounded before it counts.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

KIB = 1024
MIB = 1024 * KIB

#: LimitNOFILE= of dovecot.service and chatmail-front.service; a container may allow less.
UNIT_FILES = 1 << 20
_UNLIMITED = 1 << 62

# --- what things take, and where that was measured (docs/sizing.md) ------------------------------

#: The system, and all units of the relay with nobody connected (127 MB PSS; the kernel, systemd, ssh
#: and some page cache besides).
BASE = 256 * MIB
#: An IMAP session that is awake: 195 in a shared imap process, 38 in the front, 30 in the kernel.
#: After a restart all are, so it is this that must fit, not the 75 of a hibernated one.
IMAP_AWAKE = 263 * KIB
#: A submission session: one smtpd process, its session in the filter, and its buffers.
SMTPD = 3 * MIB
#: A process that looks up passwords; idle ones end after five minutes.
AUTH_WORKER = 1331 * KIB

# what each part may take of the memory beyond BASE
IMAP_SHARE, SMTP_SHARE, AUTH_SHARE = 0.70, 0.20, 0.10

#: 10,000 idle sessions on two cores, with a storm of reconnects, were measured; no more.
IMAP_PER_CORE = 5000
#: 1,000 parallel submission sessions on two cores were measured.
SMTP_PER_CORE = 500
#: fs.inotify.max_user_instances of our sysctl file is 65535, and each hibernated session takes one.
INOTIFY_SESSIONS = 60000
#: Sessions of an imap-hibernate process, which itself takes 600 KiB.
HIBERNATED_EACH = 1000
#: Of smtpd(8) on port 25, mail from other relays: Postfix' default.
RELAY_SESSIONS = 100
#: Logins beyond the number of workers in the first instant after a start fail; 300 were slower.
AUTH_WORKERS = 100

# below these nobody would call it a relay, whatever the machine
IMAP_LEAST, SMTP_LEAST, AUTH_LEAST = 100, 20, 20

# --- the front: nginx, which gives each worker memory for all connections that it may have ----------

#: Sessions of the web, and of clients that come and go.
FRONT_OTHERS = 1024
FRONT_WORKERS = 4
#: Files of a worker beside its connections.
FRONT_FILES = 64


@dataclass(frozen=True)
class Machine:
    """What counts of a machine: *memory* in bytes, *cores*, *files* that one process may open."""

    memory: int
    cores: int
    files: int = UNIT_FILES

    @classmethod
    def this(cls, root: Path = Path("/")) -> Machine:
        """The machine or container that this runs in, as its daemons will see it."""
        return cls(_memory(root), _cores(root), _files(root))

    @property
    def steady_memory(self) -> int:
        """*memory* rounded down, in steps of a quarter of the power of two below it.

        MemTotal is a few per cent less than what is built in, and another after an update of the kernel:
        a machine of 2 GB has 1950 MB or so, and 1792 count.
        """
        step = max((1 << (self.memory.bit_length() - 1)) // 4, 1)
        return self.memory // step * step

    @property
    def front_workers(self) -> int:
        """Worker processes of the front; TLS is most of their work."""
        return min(self.cores, FRONT_WORKERS)


@dataclass(frozen=True)
class Sizes:
    """Limits that suit a machine, each for the whole of it."""

    imap: int  # sessions
    smtp: int  # submission sessions
    relays: int  # sessions on port 25, and deliveries to other relays
    auth_workers: int  # processes


def sizes(machine: Machine) -> Sizes:
    """What *machine* bears."""
    free = max(machine.steady_memory - BASE, 0)
    smtp = min(int(free * SMTP_SHARE) // SMTPD, SMTP_PER_CORE * machine.cores)
    smtp = max(_round_down(smtp), SMTP_LEAST)
    imap = min(imap_bounds(machine, smtp).values())
    workers = int(free * AUTH_SHARE) // AUTH_WORKER
    return Sizes(
        imap=max(_round_down(imap), IMAP_LEAST),
        smtp=smtp,
        relays=min(smtp, RELAY_SESSIONS),
        auth_workers=min(max(workers, AUTH_LEAST), AUTH_WORKERS),
    )


def imap_bounds(machine: Machine, smtp: int) -> dict[str, int]:
    """IMAP sessions that each resource of *machine* allows, beside *smtp* submission sessions."""
    free = max(machine.steady_memory - BASE, 0)
    return {
        "memory": int(free * IMAP_SHARE) // IMAP_AWAKE,
        "cores": IMAP_PER_CORE * machine.cores,
        "open files": _front_sessions(machine) - 2 * smtp - FRONT_OTHERS,
        "inotify instances": INOTIFY_SESSIONS,
    }


def front_connections(imap: int, smtp: int, workers: int) -> int:
    """Connections of each worker of the front: two a session, and a quarter more than its part.

    The kernel spreads clients over the workers by a hash, which is never quite even.
    """
    sessions = imap + 2 * smtp + FRONT_OTHERS
    return 2 * sessions if workers == 1 else 2 * sessions * 5 // (4 * workers)


def _front_sessions(machine: Machine) -> int:
    """The sessions for which front_connections() are as many as a worker may have files."""
    connections = machine.files - FRONT_FILES
    workers = machine.front_workers
    return connections // 2 if workers == 1 else connections * 4 * workers // (2 * 5)


def hibernate_processes(imap: int, files: int) -> int:
    """Processes of imap-hibernate, which has two files a session.

    A process does nothing else while the kernel closes the inotify instance of a session that wakes, which
    takes up to 10 ms.
    """
    return max(-(-imap // HIBERNATED_EACH), -(-2 * imap // max(files - 200, 1)))


def _round_down(number: int) -> int:
    """To two digits: nobody needs 2093 sessions rather than 2000."""
    step = 10 ** max(len(str(number)) - 2, 0)
    return number // step * step


def _memory(root: Path) -> int:
    """MemTotal, or the limit of a container's cgroup if that is less; bytes."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if root == Path("/") else []
    # a container may have its own (lxcfs); a service with ProcSubset=pid has none
    total = re.search(r"^MemTotal: +(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    if total:
        found.append(int(total[1]) * KIB)
    # only a container has this file: the root of the hierarchy knows no limit. Else it says "max"
    limit = _read(root / "sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        found.append(int(limit))
    return min(found)


def _cores(root: Path) -> int:
    """Processors, or what the cgroup's quota leaves of them, rounded up (cpu.max, cgroup-v2.rst)."""
    cores = os.cpu_count() or 1
    quota, _, period = _read(root / "sys/fs/cgroup/cpu.max").strip().partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, -(-int(quota) // int(period)))
    return max(cores, 1)


def _files(root: Path) -> int:
    """Files a daemon may open: what its unit asks for, if systemd itself may have that many."""
    limit = re.search(r"^Max open files +\S+ +(\d+)", _read(root / "proc/1/limits"), re.MULTILINE)
    return min(int(limit[1]), UNIT_FILES) if limit else UNIT_FILES


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
