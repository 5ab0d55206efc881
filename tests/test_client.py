# SPDX-License-Identifier: MIT
"""Two real Delta Chat clients on a freshly installed relay."""

import statistics
import threading
import time

import pytest
from conftest import DOMAIN, measured, new_account
from deltachat_rpc_client import JsonRpcError
from deltachat_rpc_client.const import EventType

PINGS = 20
GROUP = 10


@pytest.fixture(scope="module")
def pair(delta):
    """Alice and Bob, who verified each other by SecureJoin."""
    alice, bob = new_account(delta, "alice"), new_account(delta, "bob")
    chat = bob.secure_join(alice.get_qr_code())
    bob.wait_for_securejoin_joiner_success()
    return alice, bob, chat


def receive(account, text):
    """Wait for the message with *text*, which must be encrypted."""
    while True:
        message = account.wait_for_incoming_msg().get_snapshot()
        if message.text == text:
            assert message.show_padlock
            return message


def test_securejoin_and_text_in_both_directions(pair):
    alice, bob, chat = pair
    chat.send_text("hello alice")
    receive(alice, "hello alice")
    alice.create_chat(bob).send_text("hello bob")
    receive(bob, "hello bob")


@pytest.mark.parametrize("size", [1_000_000, 20_000_000])
def test_a_file_arrives_whole(pair, tmp_path, size):
    alice, bob, chat = pair
    path = tmp_path / f"{size}.bin"
    content = b"0123456789abcdef" * (size // 16)
    path.write_bytes(content)
    chat.send_message(file=str(path), text=f"file {size}")
    while True:
        message = alice.wait_for_incoming_msg()
        snapshot = message.get_snapshot()
        if snapshot.text != f"file {size}":
            continue
        while snapshot.download_state != "Done":
            if snapshot.download_state == "Available":
                message.download_full() if hasattr(
                    message, "download_full"
                ) else alice._rpc.download_full_message(alice.id, message.id)
            event = alice.wait_for_event()
            if event.kind == EventType.MSGS_CHANGED:
                snapshot = message.get_snapshot()
        break
    with open(snapshot.file, "rb") as file:
        assert file.read() == content


def test_median_delivery_time_is_measured(pair):
    alice, bob, chat = pair
    times = []
    for number in range(PINGS):
        begin = time.monotonic()
        chat.send_text(f"ping {number}")
        receive(alice, f"ping {number}")
        times.append(time.monotonic() - begin)
        time_to_refill = 0.6  # the relay's own limit: ten at once, then one a second
        threading.Event().wait(time_to_refill)
    median = statistics.median(times) * 1000
    measured[f"delivery client to client, median of {PINGS}"] = f"{median:.0f} ms"
    assert len(times) == PINGS


def test_ten_accounts_are_made_at_once(delta):
    accounts = [delta.add_account() for _ in range(GROUP)]
    errors = []

    def configure(account):
        try:
            account.add_transport_from_qr(f"dcaccount:{DOMAIN}")
        except JsonRpcError as error:
            errors.append(error)

    threads = [threading.Thread(target=configure, args=(account,)) for account in accounts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    addresses = {account.get_config("configured_addr") for account in accounts}
    assert len(addresses) == GROUP and all(a.endswith(f"@{DOMAIN}") for a in addresses)


def test_a_client_logs_in_again_and_a_wrong_password_is_refused(delta, mail):
    known = mail.account()
    name = known.address

    def login(password):
        account = delta.add_account()
        account.add_transport_from_qr(f"dclogin:{name}?p={password}&v=1&ic=3")

    login(known.password)
    with pytest.raises(JsonRpcError):
        login("another-password-of-22c")


def test_a_client_that_only_reaches_port_443_sends_and_receives(delta, mail):
    """The real client with both servers on port 443, told apart by ALPN."""
    known = mail.account()
    account = delta.add_account()
    account.set_config("bot", "1")
    login = f"dclogin:{known.address}?p={known.password}&v=1&ic=3"
    servers = f"ih={DOMAIN}&ip=443&is=ssl&sh={DOMAIN}&sp=443&ss=ssl"
    account.add_transport_from_qr(f"{login}&{servers}")
    account.bring_online()
    peer = new_account(delta, "peer")
    chat = account.secure_join(peer.get_qr_code())
    account.wait_for_securejoin_joiner_success()
    chat.send_text("by port 443")
    receive(peer, "by port 443")
    (transport,) = account.list_transports()
    assert (transport["imapPort"], transport["smtpPort"]) == (443, 443)
