# SPDX-License-Identifier: MIT
"""The TURN server: who may use it, for what, and that nobody else may at any time."""

import base64
import hashlib
import hmac
import json
import re
import socket
import threading
import time

import pytest
from conftest import DOMAIN, measured, new_account
from lab.shell import run

UNIT = "chatmail-turn.service"
SECRET = "/var/lib/chatmail/keys/turn/secret"
DAYS = 5 * 86400  # seconds
KEY = "/shared/vendor/deltachat/turn"
PEER = "11.77.0.2"  # an address of the internet, as far as the lab's hosts know
PEER_PORT = 3480
DENIED = ("127.0.0.1", "0.0.0.0", "10.77.0.11", "10.77.0.2", "172.16.0.1", "192.168.1.1")
DENIED += ("100.64.0.1", "169.254.169.254", "224.0.0.1", "255.255.255.255")
DENIED_IPV6 = ("::1", "::", "::ffff:127.0.0.1", "::ffff:10.77.0.11", "::ffff:11.77.0.2", "::7f00:1")
DENIED_IPV6 += ("64:ff9b::7f00:1", "2002:7f00:1::1", "fd77::11", "fe80::1", "ff02::1")


def credentials(secret, valid_for=DAYS):
    """Name and password as chatmail-metadata makes them, from the TURN REST API's draft."""
    name = str(int(time.time()) + valid_for)
    digest = hmac.new(secret.encode(), name.encode(), hashlib.sha1).digest()
    return name, base64.b64encode(digest).decode()


@pytest.fixture(scope="module")
def good(relay):
    return credentials(relay.read(SECRET))


@pytest.fixture
def told(mail):
    """Host, port, name and password as the relay tells them a client."""
    return mail.metadata(mail.account(), KEY).split(":")


@pytest.fixture(scope="module")
def peer(lab, relay):
    """A host of the internet that sends every packet back."""
    run(["ip", "-n", lab.client.name, "addr", "add", f"{PEER}/32", "dev", "host0"])
    relay.exec("ip", "route", "add", f"{PEER}/32", "dev", "host0")
    with lab.at_client():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((PEER, PEER_PORT))

    def echo():
        while True:
            data, sender = sock.recvfrom(2048)
            if data == b"end":
                return
            sock.sendto(data, sender)

    thread = threading.Thread(target=echo, daemon=True)
    thread.start()
    yield PEER
    with lab.at_client(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
        last.sendto(b"end", (PEER, PEER_PORT))
    thread.join(5)
    sock.close()
    relay.exec("ip", "route", "del", f"{PEER}/32", "dev", "host0")
    run(["ip", "-n", lab.client.name, "addr", "del", f"{PEER}/32", "dev", "host0"])


@pytest.fixture(scope="module")
def turn(lab, relay):
    """Run coturn's test client: the relay's files, but the client's place in the network."""

    def uclient(name_and_password, to, *options, server=relay.address):
        name, password = name_and_password
        # -c: no second allocation for RTCP; -n, -m: packets, clients
        words = ("-c", "-u", name, "-w", password, "-e", to, "-r", str(PEER_PORT))
        command = relay.command("turnutils_uclient", *words, *options, server)
        place = command.index("-n", command.index("nsenter"))
        command[place] = f"--net={lab.client.path}"
        done = run(command, check=False, timeout=30)
        return done.out + done.err

    return uclient


def test_credentials_of_the_relay_are_accepted_and_data_is_relayed(turn, peer, good):
    said = turn(good, peer, "-n", "2", "-m", "1")
    assert "tot_send_msgs=2, tot_recv_msgs=2" in said, said


def test_clients_are_told_credentials_that_are_accepted(turn, peer, told):
    host, port, name, password = told
    assert (host, port) == (DOMAIN, "3478")
    assert DAYS - 60 < int(name) - time.time() <= DAYS
    said = turn((name, password), peer, "-n", "1", "-m", "1")
    assert "tot_send_msgs=1, tot_recv_msgs=1" in said, said


def test_a_real_client_offers_them_to_its_calls(delta, relay):
    servers = new_account(delta, "caller").ice_servers()
    ours = [server for server in servers if server.get("credential")]
    assert ours, servers
    name, secret = ours[0]["username"], relay.read(SECRET)
    made = hmac.new(secret.encode(), name.encode(), hashlib.sha1).digest()
    assert ours[0]["credential"] == base64.b64encode(made).decode()
    assert any(url.startswith(f"turn:{relay.address}:3478") for url in ours[0]["urls"]), servers


def test_a_new_secret_is_in_force_after_a_restart(turn, peer, mail, relay):
    old = relay.read(SECRET)
    try:
        for secret in ("a-new-secret", ""):
            relay.exec("sh", "-c", f"printf %s '{secret}' >{SECRET}")
            relay.exec("systemctl", "restart", "chatmail-metadata.service")
            if not secret:
                assert mail.metadata(mail.account(), KEY) is None
                break
            relay.exec("systemctl", "restart", UNIT)
            name, password = mail.metadata(mail.account(), KEY).split(":")[2:]
            said = turn((name, password), peer, "-n", "1", "-m", "1")
            assert "tot_send_msgs=1, tot_recv_msgs=1" in said, said
    finally:
        relay.exec("sh", "-c", f"printf %s '{old}' >{SECRET}")
        relay.exec("systemctl", "restart", UNIT, "chatmail-metadata.service")


def test_over_ipv6_too(turn, peer, good, relay):
    said = turn(good, peer, "-n", "1", "-m", "1", server=relay.namespace.ipv6)
    assert "tot_send_msgs=1, tot_recv_msgs=1" in said, said


def test_wrong_expired_and_foreign_credentials_are_refused(turn, peer, relay):
    secret = relay.read(SECRET)
    name, password = credentials(secret)
    later = str(int(name) + 1)
    for bad in (
        (name, "wrong"),
        (later, password),
        credentials(secret, -10),
        credentials("north"),
        ("", ""),
    ):
        said = turn(bad, peer, "-n", "1", "-m", "1")
        assert "Cannot complete Allocation" in said, (bad, said)


@pytest.mark.parametrize(("option", "denied"), [("-X", DENIED), ("-x", DENIED_IPV6)])
def test_nothing_is_relayed_into_private_networks(turn, good, option, denied):
    passed = [to for to in denied if "403 (Forbidden IP)" not in turn(good, to, option, "-n", "1")]
    assert passed == []


def test_one_name_has_a_bounded_number_of_allocations(turn, peer, good):
    assert "486 (Allocation Quota Reached)" in turn(good, peer, "-n", "1", "-m", "61")


def test_the_log_has_no_addresses(relay, lab):
    """After all of the above: good clients, wrong ones, and peers in networks of theirs."""
    log = relay.journal("chatmail", "-u", UNIT)
    assert "Cannot find credentials" in log
    seen = (lab.client.ipv4, lab.client.ipv6, PEER, "192.168.1.1", "172.16.0.1", "2002:7f00:1::1")
    assert [address for address in seen if re.search(rf"{re.escape(address)}\b", log)] == []


def test_the_port_range_is_a_setting_and_bounds_the_allocations(turn, peer, good, relay):
    relay.exec("chatmail-relay", "set", "turn_port_range=50000-50009")
    relay.exec("chatmail-relay", "apply", timeout=120)
    try:
        # this client asks for even ports with the odd ones above, at random
        assert "tot_recv_msgs=2" in turn(good, peer, "-n", "1", "-m", "2")
        said = turn(good, peer, "-n", "1", "-m", "11")
        assert re.search(r"error (508 .Cannot create socket|486 .Allocation Quota)", said), said
    finally:
        relay.exec("chatmail-relay", "set", "turn_port_range=49152-65535")
        relay.exec("chatmail-relay", "apply", timeout=120)


def test_with_disable_ipv6_nothing_is_offered_on_it(relay):
    def on_ipv6():
        return ":0D96 " in relay.read("/proc/net/udp6")  # 3478

    assert on_ipv6()
    relay.exec("chatmail-relay", "set", "disable_ipv6=true")
    shown = relay.exec("chatmail-relay", "diff", check=False).out
    relay.exec("chatmail-relay", "set", "disable_ipv6=false")
    assert "+# no IPv6" in shown.splitlines()
    # this line alone, as a whole apply restarts everything
    relay.sh("sed -i '1a # no IPv6' /etc/chatmail/turn/turnserver.conf")
    relay.exec("systemctl", "restart", UNIT)
    assert not on_ipv6()
    relay.exec("chatmail-relay", "apply", timeout=120)
    assert on_ipv6()


def test_debians_open_relay_was_never_started(relay):
    """Not by coturn's postinst either, which ran before the relay was configured."""
    wanted = "ConditionResult=no\nActiveState=inactive\nActiveEnterTimestampMonotonic=0\n"
    names = "ConditionResult,ActiveState,ActiveEnterTimestampMonotonic,ConditionTimestampMonotonic"
    shown = relay.exec("systemctl", "show", f"--property={names}", "coturn.service").out
    asked = int(re.search(r"ConditionTimestampMonotonic=(\d+)\n", shown)[1])
    assert asked > 0
    assert sorted(wanted.split()) == sorted(
        line for line in shown.split() if not line.startswith("ConditionTimestamp")
    )


def test_status_knows_the_unit_and_the_port(relay):
    def findings():
        done = relay.exec("chatmail-relay", "status", "--json", check=False)
        return {finding["what"]: finding["well"] for finding in json.loads(done.out)}

    names = (f"unit {UNIT}", "port 3478 TURN")
    assert all(findings()[name] for name in names)
    relay.exec("systemctl", "stop", UNIT)
    try:
        assert not any(findings()[name] for name in names)
    finally:
        relay.exec("systemctl", "start", UNIT)


def test_after_an_upgrade_of_coturn_the_new_program_runs(relay):
    def pid():
        return relay.exec("systemctl", "show", "-P", "MainPID", UNIT).out.strip()

    before = pid()
    relay.sh("cp -a /usr/bin/turnserver /usr/bin/.new && mv /usr/bin/.new /usr/bin/turnserver")
    relay.exec("dpkg-trigger", "--no-await", "--by-package=coturn", "/usr/bin/turnserver")
    relay.exec("dpkg", "--configure", "--pending", timeout=120)
    assert pid() != before
    assert "(deleted)" not in relay.exec("readlink", f"/proc/{pid()}/exe").out


def test_memory_is_measured(relay):
    used = relay.memory()[UNIT]
    measured["memory (PSS) of the TURN server after use"] = f"{used:.1f} MB"
    assert used < 30
