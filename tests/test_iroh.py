# SPDX-License-Identifier: MIT
"""The relay for webxdc apps: real clients of both protocols that reach each other no other way."""

import imaplib
import json
import re
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from conftest import DOMAIN, measured, new_account, rpc_program
from deltachat_rpc_client import DeltaChat, Rpc
from deltachat_rpc_client.const import EventType
from lab.mail import context
from lab.network import inside

UNIT = "chatmail-iroh-relay"
URL = f"http://{DOMAIN}"  # clients refuse a self-signed certificate here
UPGRADE = (
    f"GET /relay HTTP/1.1\r\nHost: {DOMAIN}\r\nUpgrade: iroh derp http\r\n"
    "Connection: upgrade\r\n\r\n"
).encode()
SHARE = 32  # of one address, site.conf.j2
IROH = Path(__file__).parent / "iroh_endpoint.py"


@pytest.fixture(scope="module")
def places(lab):
    """Two clients that reach the relay, but not each other."""
    return [lab.place("here", 31), lab.place("there", 32)]


@pytest.fixture
def deltas(lab, relay, places, tmp_path_factory):
    """A real client's core at each of these."""
    managers = []
    for place in places:
        folder = tmp_path_factory.mktemp("delta")
        wrapper = lab.wrapper(folder, rpc_program(), place)
        managers.append(Rpc(accounts_dir=str(folder / "accounts"), rpc_server_path=str(wrapper)))
    with managers[0] as here, managers[1] as there:
        yield DeltaChat(here), DeltaChat(there)


def http(place, address, port, request):
    """Status line and header fields of the answer to a raw request."""
    with inside(place):
        connection = socket.create_connection((address, port), 10)
    with connection, connection.makefile("rb") as stream:
        connection.sendall(request)
        status = stream.readline().decode().strip()
        fields = {}
        while line := stream.readline().decode().strip():
            name, _, value = line.partition(":")
            fields[name.lower()] = value.strip()
        return status, fields


def test_the_places_reach_the_relay_but_not_each_other(relay, places):
    for place, other in (places, places[::-1]):
        with inside(place):
            socket.create_connection((relay.address, 993), 5).close()
            with pytest.raises(OSError):
                socket.create_connection((other.ipv4, 1), 0.5)
    with inside(places[1]):
        listening = socket.create_server((places[1].ipv4, 4433))
    with listening, inside(places[0]), pytest.raises(OSError):
        socket.create_connection((places[1].ipv4, 4433), 1)


def test_nothing_runs_until_somebody_connects(relay):
    state = relay.exec("systemctl", "is-active", f"{UNIT}.socket", f"{UNIT}.service", check=False)
    assert state.out.split() == ["active", "inactive"]


def test_probes_of_clients_are_answered_without_starting_it(relay, places):
    host = f"Host: {DOMAIN}\r\nConnection: close\r\n"
    for name in ("Iroh", "Tailscale"):
        probe = f"GET /generate_204 HTTP/1.1\r\n{host}X-{name}-Challenge: ts_{DOMAIN}\r\n\r\n"
        status, fields = http(places[0], relay.address, 80, probe.encode())
        assert status == "HTTP/1.1 204 No Content"
        assert fields[f"x-{name.lower()}-response"] == f"response ts_{DOMAIN}"
        status, fields = http(places[0], relay.address, 80, probe.replace("ts_", "<").encode())
        assert status == "HTTP/1.1 204 No Content" and f"x-{name.lower()}-response" not in fields
    ping = f"GET /ping HTTP/1.1\r\n{host}\r\n"
    status, fields = http(places[0], relay.address, 80, ping.encode())
    assert status == "HTTP/1.1 200 OK" and fields["access-control-allow-origin"] == "*"
    assert relay.exec("systemctl", "is-active", UNIT, check=False).out.strip() == "inactive"


def test_two_real_clients_exchange_realtime_data(relay, deltas, tmp_path):
    app = tmp_path / "app.xdc"
    with zipfile.ZipFile(app, "w") as archive:
        archive.writestr("index.html", "<html></html>")
        archive.writestr("manifest.toml", 'name = "test"\n')
    alice, bob = (new_account(delta, name) for delta, name in zip(deltas, ("a", "b"), strict=True))
    for account in (alice, bob):
        account.set_config("webxdc_realtime_enabled", "1")
    chat = bob.secure_join(alice.get_qr_code())
    bob.wait_for_securejoin_joiner_success()
    sent = chat.send_message(text="app", file=str(app))
    while True:
        received = alice.wait_for_incoming_msg()
        if received.get_snapshot().text == "app":
            break
    received.get_snapshot().chat.accept()
    begin = time.monotonic()
    exchange(alice, received.id, bob, sent.id, b"from bob")
    seconds = time.monotonic() - begin
    exchange(bob, sent.id, alice, received.id, b"from alice")
    measured["webxdc realtime channel over the relay, from joining to the first data"] = (
        f"{seconds:.1f} s"
    )
    memory = relay.memory()[f"{UNIT}.service"]
    measured["memory (PSS) of the iroh relay with two clients"] = f"{memory:.1f} MB"
    assert memory < 40


def exchange(to, to_message, sender, message, data):
    """Both join the channel of their message; *sender* sends until *data* arrives."""
    for account, number in ((to, to_message), (sender, message)):
        account._rpc.send_webxdc_realtime_advertisement(account.id, number)
    arrived = threading.Event()

    def keep_sending():
        while not arrived.wait(0.3):  # who has not joined yet hears nothing
            sender._rpc.send_webxdc_realtime_data(sender.id, message, list(data))

    thread = threading.Thread(target=keep_sending)
    thread.start()
    try:
        while True:
            event = to.wait_for_event(EventType.WEBXDC_REALTIME_DATA)
            if bytes(event.data) == data:
                return
    finally:
        arrived.set()
        thread.join(10)


def test_two_endpoints_of_iroh_1_talk(lab, relay, places, tmp_path):
    programs = []
    for place in places:
        folder = tmp_path / place.name
        folder.mkdir()
        programs.append(str(lab.wrapper(folder, Path(sys.executable), place)))
    server = subprocess.Popen(
        [programs[0], IROH, URL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin and server.stdout
    try:
        peer = server.stdout.readline().strip()
        assert peer
        client = subprocess.run(
            [programs[1], IROH, URL, peer, "10", "1000000"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    finally:
        server.stdin.close()
        server.wait(10)
    assert client.returncode == 0, client.stderr
    connected, small, large = map(json.loads, client.stdout.splitlines())
    for answer, size in ((small, 10), (large, 1_000_000)):
        assert answer["size"] == size and answer["same"] and answer["relayed"] == [True]
    measured["iroh 1.x over the relay"] = (
        f"connected in {1000 * connected['connected']:.0f} ms, echo in "
        f"{1000 * small['seconds']:.0f} ms, 1 MB there and back in {large['seconds']:.1f} s"
    )


def test_it_went_through_the_relay_which_has_logged_numbers_only(relay):
    since = time.time() - 300
    relay.exec("systemctl", "kill", "--signal=TERM", UNIT)
    line = relay.wait_log("connections, .* frames passed on", since)
    connections, passed = int(line.split()[0]), int(line.split()[2])
    assert connections >= 4 and passed > 100
    assert relay.exec("systemctl", "is-active", f"{UNIT}.socket").out == "active\n"
    log = relay.journal("chatmail", "-u", UNIT)
    assert "10.77.0.3" not in log and "Traceback" not in log


def announced(mail):
    """The relay that METADATA names."""
    imaplib.Commands.setdefault("GETMETADATA", ("AUTH", "SELECTED"))
    session = mail.imap(mail.account())
    session._simple_command("GETMETADATA", '""', "(/shared/vendor/deltachat/irohrelay)")
    _status, data = session._untagged_response("OK", [None], "METADATA")
    session.logout()
    words = b" ".join(
        item for part in data for item in (part if isinstance(part, tuple) else (part,))
    )
    return words.decode().rstrip(")").split()[-1]


def test_one_address_holds_a_share_of_the_connections(relay, places):
    held = []
    with inside(places[0]):
        for _ in range(SHARE):
            held.append(socket.create_connection((relay.address, 80), 10))
            held[-1].sendall(UPGRADE)
            assert held[-1].recv(12) == b"HTTP/1.1 101"
    assert http(places[0], relay.address, 80, UPGRADE)[0].startswith("HTTP/1.1 429")
    assert http(places[1], relay.address, 80, UPGRADE)[0].startswith("HTTP/1.1 101")
    for connection in held:
        connection.close()


def test_one_address_may_not_try_all_the_time(relay, places):
    tries = 200
    request = f"GET /relay HTTP/1.1\r\nHost: {DOMAIN}\r\n".encode()
    with inside(places[1]):
        connection = socket.create_connection((relay.address, 80), 10)
    with connection, connection.makefile("rb") as stream:
        connection.sendall(
            (request + b"\r\n") * (tries - 1) + request + b"Connection: close\r\n\r\n"
        )
        answers = re.findall(rb"HTTP/1.1 (\d+)", stream.read())
    assert set(answers) == {b"400", b"429"} and len(answers) == tries
    assert answers.count(b"429") > tries / 4


def test_it_is_there_behind_tls_as_well(relay, places):
    with inside(places[0]):
        plain = socket.create_connection((relay.address, 443), 10)
    with context("http/1.1").wrap_socket(plain, server_hostname=DOMAIN) as connection:
        connection.sendall(UPGRADE)
        assert connection.recv(12) == b"HTTP/1.1 101"


def test_the_setting_switches_it_off_and_on(relay, places, mail):
    assert http(places[0], relay.address, 80, UPGRADE)[0].startswith("HTTP/1.1 101")
    relay.sh("chatmail-relay set iroh_relay=https://iroh.example && chatmail-relay apply")
    try:
        assert http(places[0], relay.address, 80, UPGRADE)[0].startswith("HTTP/1.1 301")
        assert announced(mail) == "https://iroh.example"
    finally:
        ini = "/etc/chatmail/chatmail.ini"
        relay.exec("sed", "-i", "s/^iroh_relay =.*/# iroh_relay =/", ini)
        relay.exec("chatmail-relay", "apply")
    assert http(places[0], relay.address, 80, UPGRADE)[0].startswith("HTTP/1.1 101")
    assert announced(mail) == URL
    relay.exec("chatmail-relay", "status")
