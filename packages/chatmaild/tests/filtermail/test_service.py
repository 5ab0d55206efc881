# SPDX-License-Identifier: MIT
"""The real process: socket activation, sessions over unix sockets, limits, signals."""

import ast
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filtermail_mta import (
    content,
    interpret,
    macros,
    mail_from,
    negotiation,
    packet,
    packets,
    rcpt_to,
)
from filtermail_relay import ed25519_pem, rsa_pem, signed
from filtermail_samples import ALICE, BOB, REMOTE, armor, encrypted, encrypted_mail, plain_mail

NAMES = ["outgoing", "incoming", "sign"]
INI = "[params]\nmail_domain = chat.example\nmailboxes_dir = {path}/mail\n{more}"

# what the service manager does: sockets from 3 on, their names, our own pid
LAUNCH = """
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid())
arguments = sys.argv[1:]
os.execv(sys.executable, [sys.executable, *arguments])
"""


def environment():
    """Of a process that imports what these tests import, wherever that is."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


class Service:
    """chatmaild.filtermail, started the way systemd does."""

    def __init__(self, path, more="", keys=("dkim_rsa.pem",), names=NAMES, overrides=()):
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

        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, "-m", "chatmaild.filtermail", path / "chatmail.ini"],
                stderr=log,
                env=variables,
                preexec_fn=arrange,
                pass_fds=range(3, 3 + len(names)),
            )
        for listener in listeners:
            listener.close()

    def wait_ready(self):
        assert self.notify.recv(100) == b"READY=1", self.log.read_text()

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.notify.close()

    def session(self, name):
        return Client(self.path / f"{name}.sock")

    def status(self, field):
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


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """One process for the tests that do not end it."""
    result = Service(
        tmp_path_factory.mktemp("filtermail"), "max_user_send_burst_size = 1000\n",
        keys=["dkim_rsa.pem", "dkim_ed25519.pem"],
    )  # fmt: skip
    try:
        result.wait_ready()
        yield result
        assert result.process.poll() is None, "the service has died"
    finally:
        result.stop()


def test_mail_is_judged_over_the_real_sockets(service):
    session = service.session("outgoing")
    outcome = session.submit(encrypted_mail())
    assert outcome.reply == ""
    assert [b"s=chatmail;" in value for _, _, value in outcome.inserted] == [True, False]
    assert b"s=chatmail-ed25519;" in outcome.inserted[1][2]
    assert session.submit(plain_mail()).reply.startswith("523 ")
    assert session.submit(encrypted_mail(BOB), ALICE).reply.startswith("554 ")


def test_incoming_and_sign_sockets_are_what_their_names_say(service):
    session = service.session("incoming")
    session.send(packet(b"C", b"x\0U") + mail_from(REMOTE) + rcpt_to("nobody@chat.example"))
    assert session.outcome().reply.startswith("550 5.1.1")
    session.send(rcpt_to(BOB))
    assert session.outcome().reply == ""
    session.send(content(encrypted_mail(REMOTE)))
    assert session.outcome().reply == "554 5.7.1 No valid DKIM signature found"
    session = service.session("sign")
    session.send(
        mail_from("") + rcpt_to(REMOTE) + content(plain_mail("MAILER-DAEMON@chat.example"))
    )
    assert len(session.outcome().inserted) == 2


def test_without_a_resolver_signed_mail_is_delayed(service):
    """Where packages are built nothing listens on port 53, or it does not know key.invalid."""
    session = service.session("incoming")
    session.send(packet(b"C", b"x\0U") + mail_from(REMOTE) + rcpt_to(BOB))
    assert session.outcome().reply == ""
    mail = signed(encrypted_mail("carol@key.invalid"), "key.invalid")
    session.send(content(mail))
    assert session.outcome().reply[:9] in ("451 4.7.5", "554 5.7.1")


def test_a_large_message_in_many_pieces_does_not_grow_the_process(service):
    body = armor(encrypted(18_000_000), checksum=b"")
    mail = encrypted_mail(text=body)
    session = service.session("outgoing")
    assert session.submit(encrypted_mail()).reply == ""
    before = service.status("VmHWM")
    assert session.submit(mail).reply == ""
    assert service.status("VmHWM") - before < 3000  # kB


def test_garbage_ends_one_session_and_no_other(service):
    other = service.session("outgoing")
    for garbage in (b"\0\0\0\0", b"GET / HTTP/1.0\r\n\r\n", os.urandom(5000), packet(b"E")):
        session = service.session("outgoing")
        session.send(garbage)
        if garbage[:4] != b"\0\0\0\0" and len(garbage) == 5000:
            session.socket.shutdown(socket.SHUT_WR)
        assert session.is_closed()
    assert other.submit(encrypted_mail()).reply == ""


def test_a_peer_that_does_not_read_is_not_read_from(service):
    session = service.session("outgoing")
    session.socket.setblocking(False)
    before = service.status("VmRSS")
    sent = 0
    data = packet(b"H", b"x\0") * 10_000
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline and sent < 80_000_000:
        try:
            sent += session.socket.send(data)
        except BlockingIOError:
            time.sleep(0.01)
    assert sent < 20_000_000
    assert service.status("VmRSS") - before < 20_000  # kB
    other = service.session("outgoing")
    assert other.submit(encrypted_mail()).reply == ""


def test_many_sessions_at_a_time_are_served(service):
    sessions = [service.session("outgoing") for _ in range(200)]
    for session in sessions:
        session.send(macros(b"M", auth_authen=ALICE) + packet(b"M", b"<alice@chat.example>\0"))
    assert [session.outcome().reply for session in sessions] == [""] * 200


def test_a_session_that_ends_in_the_middle_leaves_nothing_behind(service):
    session = service.session("outgoing")
    session.send(mail_from(ALICE, ALICE) + rcpt_to(BOB) + content(encrypted_mail())[:-5])
    session.socket.close()
    assert service.session("outgoing").submit(encrypted_mail()).reply == ""


def test_the_log_says_what_happened_and_to_nobody(service):
    session = service.session("outgoing")
    session.submit(encrypted_mail())
    session.submit(plain_mail())
    log = service.log.read_text()
    assert "entering serving loop" in log
    assert "Outgoing: encrypted mail accepted" in log
    assert "Outgoing: refused, unencrypted mail" in log
    for word in ("alice", "bob", "carol", "example", "Traceback"):
        assert word not in log


@pytest.fixture
def start(tmp_path):
    services = []

    def make(*arguments, **options):
        services.append(Service(tmp_path, *arguments, **options))
        return services[-1]

    yield make
    for service in services:
        service.stop()


def test_sigterm_ends_idle_sessions_and_lets_a_message_finish(start):
    service = start()
    service.wait_ready()
    idle = service.session("outgoing")
    busy = service.session("outgoing")
    busy.send(mail_from(ALICE, ALICE))
    assert busy.outcome().reply == ""
    service.process.send_signal(signal.SIGTERM)
    assert idle.is_closed()
    busy.send(rcpt_to(BOB) + content(encrypted_mail()))
    assert busy.outcome().reply == ""
    assert busy.is_closed()
    assert service.process.wait(10) == 0


def test_sigterm_does_not_wait_for_a_message_for_ever(start, tmp_path):
    service = start()
    service.wait_ready()
    busy = service.session("outgoing")
    busy.send(mail_from(ALICE, ALICE))
    assert busy.outcome().reply == ""
    started = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(15) == 0
    assert 3 < time.monotonic() - started < 10
    assert "1 messages under way" in service.log.read_text()


def test_sessions_beyond_the_limit_are_closed_at_once(start):
    service = start("max_smtp_connections = 5\n")  # 3 * 5 + 200
    service.wait_ready()
    sessions = [service.session("outgoing") for _ in range(215)]
    assert Client(service.path / "outgoing.sock", negotiate=False).is_closed()
    sessions.pop().socket.close()
    assert sessions[0].submit(encrypted_mail()).reply == ""
    assert service.session("outgoing").submit(encrypted_mail()).reply == ""


@pytest.mark.parametrize(
    "options, words",
    [
        ({"keys": []}, ["dkim_rsa.pem is missing", "chatmail-relay apply"]),
        ({"keys": ["dkim_rsa.pem"], "names": ["outgoing"]}, ["expected the sockets"]),
        ({"more": "mail_domain = \n"}, ["chatmail.ini"]),
        ({"overrides": {"CREDENTIALS_DIRECTORY": ""}}, ["CREDENTIALS_DIRECTORY"]),
    ],
)
def test_what_is_missing_is_said_and_the_service_does_not_start(start, options, words):
    service = start(**options)
    assert service.process.wait(20) == 1
    log = service.log.read_text()
    assert all(word in log for word in words) and "Traceback" not in log


def test_a_broken_key_is_said(start, tmp_path):
    (tmp_path / "dkim_ed25519.pem").write_text("garbage")
    service = start()
    assert service.process.wait(20) == 1
    assert "dkim_ed25519.pem: not an unencrypted private key" in service.log.read_text()


def test_nothing_that_judges_mail_loads_the_email_package():
    """dnspython loads it, by importlib.metadata; nobody uses it."""
    code = "import sys, chatmaild.filtermail.policy; print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True)
    modules = ast.literal_eval(out.stdout.decode())
    assert "chatmaild.filtermail.milter" in modules
    assert not {"email", "smtplib", "http", "asyncio"} & set(modules)
