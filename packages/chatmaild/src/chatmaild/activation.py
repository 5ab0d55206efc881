# SPDX-License-Identifier: MIT
"""What every service needs of systemd: its sockets, the ready message, a log that knows levels.

All services are socket-activated: the sockets exist from boot, so a restart of a service is a short
wait for its peers and never a refused connection. Protocols: sd_listen_fds(3), sd_notify(3),
sd-daemon(3).
"""

import logging
import os
import socket
import sys
from collections.abc import Collection

FIRST_FD = 3  # SD_LISTEN_FDS_START

# sd-daemon(3): a "<N>" prefix on a line of stderr is its syslog priority
_PRIORITY = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}


class ActivationError(Exception):
    """The service was not started by its socket units."""


def listen_sockets(
    *names: str, optional: Collection[str] = (), kept: str = ""
) -> dict[str, socket.socket]:
    """Take over the listening sockets systemd passes, by the FileDescriptorName= of their units.

    Each of *names* must have been passed exactly once, each of *optional* at most once, and nothing
    else may have been but connections that an earlier process gave to `keep` under the name *kept*:
    they are "KEPT 0", "KEPT 1", ... of the result. Raises ActivationError with the names otherwise: a
    service that lacks one of its sockets would look healthy and answer nobody.

    Serve them with asyncio's start_server or create_server: from Python 3.13 on, start_unix_server
    removes the file of a socket, which is systemd's, when it ends.
    """
    if os.environ.get("LISTEN_PID") not in (None, str(os.getpid())):
        raise ActivationError("LISTEN_PID is another process's: start me by my systemd units")
    count = int(os.environ.get("LISTEN_FDS", "0"))
    passed = os.environ.get("LISTEN_FDNAMES", "").split(":") if count else []
    extra = set(optional) & set(passed)
    listening = [name for name in passed if not kept or name != kept]
    if sorted(listening) != sorted({*names, *extra}) or len(passed) != count:
        raise ActivationError(
            f"expected the sockets {', '.join(names)} from systemd, got: {', '.join(passed) or 'none'}"
        )
    for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(variable, None)
    sockets: dict[str, socket.socket] = {}
    for number, name in enumerate(passed, FIRST_FD):
        os.set_inheritable(number, False)
        sock = socket.socket(fileno=number)
        sock.setblocking(False)
        sockets[name if name != kept else f"{name} {len(sockets)}"] = sock
    return sockets


def keep(descriptor: int, name: str) -> None:
    """Let systemd hold a socket for the next process of this service (FileDescriptorStoreMax=).

    What a peer writes between two processes waits for the second one, be the first killed or
    restarted; and so does who connects, if it listens. A connection is dropped when its peer closes it.
    """
    notify(f"FDSTORE=1\nFDNAME={name}", descriptor)


def notify(state: str, descriptor: int | None = None) -> None:
    """Send *state* ("READY=1", "STOPPING=1", ...) to systemd; do nothing when there is none."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        socket.send_fds(sock, [state.encode()], [] if descriptor is None else [descriptor])


class _PriorityFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        prefix = f"<{_PRIORITY.get(record.levelname, 6)}>"
        return "\n".join(prefix + line for line in text.splitlines())


def setup_logging(level: int = logging.INFO) -> None:
    """Log to stderr with syslog priorities if it is the journal, plainly otherwise."""
    # what no format of ours names is not looked up for each line (logging HOWTO, "Optimization")
    logging._srcfile = None  # type: ignore[attr-defined]
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.logAsyncioTasks = False  # type: ignore[attr-defined]  # since Python 3.12
    handler = logging.StreamHandler(sys.stderr)
    if os.environ.get("JOURNAL_STREAM"):
        handler.setFormatter(_PriorityFormatter("%(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
