# SPDX-License-Identifier: MIT
"""Two people with the real client on one relay, who have a chat."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltachat_rpc_client import DeltaChat, Rpc
from lab import Lab
from lab.client import rpc_program

Person = Any  # deltachat_rpc_client.Account, which has no types


@contextmanager
def people_of(lab: Lab, folder: Path, domain: str) -> Iterator[list[Person]]:
    """Alice and Bob, online; the accounts are kept below *folder*."""
    wrapper = lab.rpc_server(folder, rpc_program())
    with Rpc(accounts_dir=str(folder / "accounts"), rpc_server_path=str(wrapper)) as rpc:
        delta = DeltaChat(rpc)
        made = []
        for name in ("Alice", "Bob"):
            account = delta.add_account()
            account.set_config("displayname", name)
            account.add_transport_from_qr(f"dcaccount:{domain}")
            account.bring_online()
            made.append(account)
        alice, bob = made
        bob.secure_join(alice.get_qr_code())
        alice.wait_for_securejoin_inviter_success()
        bob.wait_for_securejoin_joiner_success()
        yield made


def say(sender: Person, receiver: Person, text: str) -> float:
    """A message of one to the other; the seconds until it was there."""
    begin = time.monotonic()
    sender.create_chat(receiver).send_text(text)
    while receiver.wait_for_incoming_msg().get_snapshot().text != text:
        pass
    return time.monotonic() - begin
