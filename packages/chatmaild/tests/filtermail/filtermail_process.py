# SPDX-License-Identifier: MIT
"""The filter as a process of its own, started the way systemd does, and a client of its sockets."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from filtermail_mta import content, interpret, mail_from, negotiation, packet, packets, rcpt_to
from filtermail_relay import ed25519_pem, rsa_pem
from filtermail_samples import ALICE, BOB

NAMES = ["outgoing", "incoming", "sign"]
INI = "[params]\nmail_domain = chat.example\nmailboxes_dir = {path}/mail\n{more}"

# what the service manager does: sockets from 3 on, their names, our own pid
LAUNCH = """
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid())
arguments = sys.argv[1:]
os.execv(sys.executable, [sys.executable, *arguments])
"""
PATCHED = """
import sys, chatmaild.filtermail.__main__ as service
exec(sys.argv[1])
sys.exit(service.main(sys.argv[2:]))
"""


def environment():
    """Of a process that imports what these tests import, wherever that is."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


class Service:
    """chatmaild.filtermail, started the way systemd does."""

    def __init__(
        self,
        path,
        more="",
        keys=("dkim_rsa.pem", "dkim_ed25519.pem"),
        names=NAMES,
        overrides=(),
        patch="",
    ):
        """*patch* is Python run before main(), which finds the service module as `service`."""
        self.path = path
        (path / "mail").mkdir(exist_ok=True)
        for user in ("alice", "bob"):
            folder = path / "mail" / f"{user}@chat.example"
            folder.mkdir(exist_ok=True)
            (folder / "password").write_text("{SHA512-CRYPT}$6$x")
            (folder / "enforceE2EEincoming").touch()
        (path / "chatmail.ini").write_text(INI.format(path=path, more=more))
        pems = {"dkim_rsa.pem": rsa_pem(), "dkim_ed25519.pem": ed25519_pem()}
        for key in keys:
            (path / key).write_bytes(pems[key] if key in pems else b"garbage")
        listeners = []
        for name in names:
            listener = socket.socket(socket.AF_UNIX)
            (path / f"{name}.sock").unlink(missing_ok=True)
            listener.bind(str(path / f"{name}.sock"))
            listener.listen(100)
            listeners.append(listener)
        self.log = path / "log"
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        (path / "notify").unlink(missing_ok=True)
        self.notify.bind(str(path / "notify"))
        self.notify.settimeout(20)
        variables = {
            **environment(),
            "LISTEN_FDS": str(len(names)),
            "LISTEN_FDNAMES": ":".join(names),
            "NOTIFY_SOCKET": str(path / "notify"),
            "CREDENTIALS_DIRECTORY": str(path),
            **dict(overrides),
        }

        def arrange():  # in the child: the listeners become 3, 4, 5
            high = [os.dup2(listener.fileno(), 100 + n) for n, listener in enumerate(listeners)]
            for number, fd in enumerate(high, 3):
                os.dup2(fd, number)
                os.set_inheritable(number, True)

        program = ["-c", PATCHED, patch] if patch else ["-m", "chatmaild.filtermail"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, *program, path / "chatmail.ini"],
                stderr=log,
                env=variables,
                preexec_fn=arrange,
                pass_fds=range(3, 3 + len(names)),
            )
        for listener in listeners:
            listener.close()

    def wait_ready(self):
        assert self.notify.recv(100) == b"READY=1", self.log.read_text()

    def reload(self, more):
        """What `systemctl reload` does with Type=notify-reload."""
        (self.path / "chatmail.ini").write_text(INI.format(path=self.path, more=more))
        self.process.send_signal(signal.SIGHUP)
        assert self.notify.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert self.notify.recv(100) == b"READY=1"

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.notify.close()

    def session(self, name):
        return Client(self.path / f"{name}.sock")

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def status(self, field):
        """A line of /proc/PID/status: VmRSS and VmHWM are in kB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1])
        raise AssertionError(field)


class Client:
    def __init__(self, path, negotiate=True):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        if negotiate:
            self.send(negotiation())
            assert self.receive()[0][0] == b"O"

    def send(self, data):
        self.socket.sendall(data)

    def receive(self):
        """Answers up to the first final one; [] at the end of the session."""
        data = b""
        while True:
            piece = self.socket.recv(1 << 16)
            if not piece:
                return packets(data)
            data += piece
            try:
                answers = packets(data)
            except (AssertionError, OSError):
                continue
            if answers[-1][0] in (b"c", b"y", b"d", b"O"):
                return answers

    def outcome(self):
        return interpret(b"".join(packet(command, payload) for command, payload in self.receive()))

    def submit(self, mail, sender=ALICE, recipient=BOB):
        self.send(mail_from(sender, sender))
        outcome = self.outcome()
        if outcome.reply:
            return outcome
        self.send(rcpt_to(recipient) + content(mail))
        return self.outcome()

    def is_closed(self):
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


@contextlib.contextmanager
def running(folder, ini, **options):
    """A Service that takes messages, and that no test may have ended."""
    service = Service(folder, ini, **options)
    try:
        service.wait_ready()
        yield service
        assert service.process.poll() is None, "the service has died"
    finally:
        service.stop()
