# SPDX-License-Identifier: MIT
"""Services as systemd starts them: a process of its own that is given listening sockets."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for mailstore.py, pushsink.py

# the passed sockets become descriptors 3, 4, ... as sd_listen_fds(3) wants them; then PATCH and main()
BOOT = """
import importlib, os, sys
module, patch, ini, *passed = sys.argv[1:]
for number, descriptor in enumerate([os.dup(int(item)) for item in passed], 3 + 50):
    os.dup2(descriptor, number)
for number in range(3, 3 + len(passed)):
    os.dup2(number + 50, number)
service = importlib.import_module(module)
exec(patch)
sys.exit(service.main([ini]))
"""


class Service:
    """One running service; `connect` gives a connected socket that fails after ten seconds."""

    def __init__(self, directory, module, names, ini, patch):
        self.paths = {name: str(directory / f"{name}.socket") for name in names}
        self._listening = []
        for path in self.paths.values():
            self._listening.append(socket.socket(socket.AF_UNIX))
            self._listening[-1].bind(path)
            self._listening[-1].listen(1000)
        self.log_path = directory / "log"
        self._words = [module, patch, str(ini)]
        self.process = self._start()

    def _start(self):
        numbers = [item.fileno() for item in self._listening]
        environment = {
            **os.environ,
            "LISTEN_FDS": str(len(numbers)),
            "LISTEN_FDNAMES": ":".join(self.paths),
        }
        environment.pop("LISTEN_PID", None)
        with open(self.log_path, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", BOOT, *self._words, *map(str, numbers)],
                pass_fds=numbers,
                env=environment,
                stderr=log,
            )

    def restart(self):
        """Kill the process with SIGKILL and start another; the sockets stay, as with systemd."""
        self.kill()
        self.process = self._start()

    def kill(self):
        """End the process as no program can prepare for."""
        self.process.kill()
        self.process.wait()

    def close(self):
        """End the process and its sockets."""
        self.kill()
        for item in self._listening:
            item.close()

    def connect(self, name):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(10)
        connection.connect(self.paths[name])
        return connection

    def ask(self, name, request):
        """What the service answers until it closes, after the request and an end of file."""
        with self.connect(name) as connection:
            try:
                connection.sendall(request)
                connection.shutdown(socket.SHUT_WR)
            except BrokenPipeError:
                pass
            with connection.makefile("rb") as stream:
                return stream.read()

    @property
    def log(self):
        return self.log_path.read_text()


def _starter(directory):
    """Start services with their files in *directory*; kills them in the end."""
    started = []

    def start(module, names, ini="", patch=""):
        path = directory / "chatmail.ini"
        path.write_text(
            f"[params]\nmail_domain = chat.example\nmailboxes_dir = {directory}/mail\n{ini}\n"
        )
        started.append(Service(directory, module, names, path, patch))
        return started[-1]

    yield start
    for service in started:
        service.close()


@pytest.fixture
def start_service(tmp_path):
    """Start MODULE with the sockets NAMES; settings as ini lines, *patch* is run before its main()."""
    yield from _starter(tmp_path)


@pytest.fixture(scope="module")
def start_shared_service(tmp_path_factory):
    """The same, for services that all tests of a module share."""
    yield from _starter(tmp_path_factory.mktemp("service"))
