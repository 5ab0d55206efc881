# SPDX-License-Identifier: MIT
"""The collector as a process: its sources are sockets and files in a temporary directory."""

import re
import socket
import threading

import pytest

from chatmaild import doveauth, export, fsreport, metadata, metrics
from chatmaild.filtermail import policy


class Source:
    """A listening unix socket that says *text* to each who connects, or nothing for ever."""

    def __init__(self, path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.text = text
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(str(path))
        self.listening.listen()
        self.silent = []
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            connection, _ = self.listening.accept()
            if self.text is None:
                self.silent.append(connection)
                continue
            with connection:
                connection.sendall(self.text.encode())


@pytest.fixture
def collector(tmp_path, start_service):
    (tmp_path / "files").mkdir()
    patch = (
        "from pathlib import Path\n"
        f"service.RUN = Path({str(tmp_path / 'run')!r})\n"
        f"service.DOVECOT = Path({str(tmp_path / 'dovecot')!r})\n"
        f"service.FILES = Path({str(tmp_path / 'files')!r})\n"
        f"service.UNITS = Path({str(tmp_path / 'units')!r})\n"
        "service.SOURCE_SECONDS = 0.3\n"
    )
    return start_service("chatmaild.export", ["http"], patch=patch)


def ask(service, request=b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"):
    head, _, body = service.ask("http", request).partition(b"\r\n\r\n")
    return head.decode(), body.decode()


def test_services_files_and_units_are_told_as_one(tmp_path, collector):
    Source(
        tmp_path / "run/doveauth/metrics.socket",
        "# TYPE chatmail_made counter\nchatmail_made_total 4\n# EOF\n",
    )
    (tmp_path / "files/report.prom").write_text("# TYPE chatmail_used gauge\nchatmail_used 9\n")
    for unit in ("chatmail-doveauth", "ssh"):
        folder = tmp_path / f"units/{unit}.service"
        folder.mkdir(parents=True)
        (folder / "memory.current").write_text("4096\n")
        (folder / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\n")
    head, body = ask(collector)
    assert head.startswith("HTTP/1.1 200 ") and export.CONTENT_TYPE in head
    lines = body.splitlines()
    assert 'chatmail_up{service="doveauth"} 1' in lines
    assert "chatmail_made_total 4" in lines and "chatmail_used 9" in lines
    assert 'chatmail_unit_memory_bytes{unit="chatmail-doveauth"} 4096' in lines
    assert 'chatmail_unit_cpu_seconds_total{unit="chatmail-doveauth"} 1.5' in lines
    assert "ssh" not in body and lines[-1] == "# EOF"


def test_no_two_sources_have_a_metric_of_one_name():
    services = (doveauth, metadata, policy)
    ours = [
        item.name
        for service in services
        for item in vars(service).values()
        if isinstance(item, metrics.Metric)
    ]
    report = re.findall("^# TYPE ([a-z_]+) ", fsreport.as_textfile(fsreport.Report()), re.MULTILINE)
    assert {"chatmail_accounts_created", "chatmail_accounts"} < {*ours, *report}
    assert sorted(ours + report) == sorted({*ours, *report})


def test_a_silent_source_and_a_dead_one_cost_the_others_nothing(tmp_path, collector):
    Source(tmp_path / "run/good/metrics.socket", "# TYPE chatmail_a gauge\nchatmail_a 1\n")
    Source(tmp_path / "run/silent/metrics.socket", None)
    dead = tmp_path / "run/dead/metrics.socket"
    dead.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(dead))
    lines = ask(collector)[1].splitlines()
    assert 'chatmail_up{service="good"} 1' in lines and "chatmail_a 1" in lines
    assert 'chatmail_up{service="silent"} 0' in lines
    assert 'chatmail_up{service="dead"} 0' in lines


@pytest.mark.parametrize(
    "request_, status",
    [
        (b"GET / HTTP/1.1\r\n\r\n", "404"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", "405"),
        (b"nonsense\r\n\r\n", "400"),
    ],
)
def test_anything_else_is_refused(collector, request_, status):
    assert ask(collector, request_)[0].split()[1] == status


def test_it_ends_when_nobody_asks(start_service):
    service = start_service("chatmaild.export", ["http"], patch="service.IDLE_SECONDS = 0.0")
    assert service.process.wait(10) == 0
