# SPDX-License-Identifier: MIT
"""How long users wait: for a message, for each other's keys, for an account."""

from __future__ import annotations

import os
import time
from pathlib import Path

from deltachat_rpc_client import DeltaChat, Rpc

from lab.client import rpc_program
from lab.mail import Idle
from lab.messages import encrypted
from people import Person

from .frame import Row, measurement, median_row, spread_rows
from .relay import DOMAIN, Bench


@measurement(2)
def delivery(bench: Bench) -> list[Row]:
    """From SMTP's 250 to the EXISTS of an idling client, one message at a time."""
    mail = bench.mail
    sender, recipient = mail.account(), mail.account()
    waited = []
    with mail.smtp(sender) as session:
        idle = Idle(mail.imap(recipient))
        for _ in range(bench.scaled(200, 5)):
            text = encrypted(sender.address, recipient.address, content=1000)
            code, said = mail.send(session, sender.address, [recipient.address], text)
            accepted = time.monotonic()
            assert code == 250, said
            waited.append(max(idle.notified() - accepted, 0.0))
        idle.close()
    return spread_rows("250 to EXISTS", waited, (10, None))


@measurement(5)
def clients(bench: Bench) -> list[Row]:
    """Two real clients on one relay: account set-up, SecureJoin, messages from one to the other."""
    bench.host  # noqa: B018  # installed before the clock runs
    return _chats(bench, "clients", (DOMAIN, DOMAIN), (70, 120))


@measurement(5)
def relays(bench: Bench) -> list[Row]:
    """Two real clients on two relays, which deliver by HTTPS: the same."""
    _host, domain = bench.peer
    return _chats(bench, "relays", (DOMAIN, domain), (None, None))


def _chats(
    bench: Bench, name: str, domains: tuple[str, str], goals: tuple[float | None, float | None]
) -> list[Row]:
    """Rounds of a new pair of accounts that get to know each other, and some messages."""
    folder = bench.folder / name
    folder.mkdir()
    wrapper = bench.lab.rpc_server(folder, rpc_program())
    set_up: list[float] = []
    joined: list[float] = []
    waited: list[float] = []
    busy: list[float] = []  # CPU of the program that both clients are
    with Rpc(accounts_dir=str(folder / "accounts"), rpc_server_path=str(wrapper)) as rpc:
        delta = DeltaChat(rpc)
        for _ in range(bench.rounds):
            pair = []
            for domain in domains:
                begin = time.monotonic()
                pair.append(_account(delta, domain))
                set_up.append(time.monotonic() - begin)
            inviter, joiner = pair
            code = inviter.get_qr_code()
            begin = time.monotonic()
            chat = joiner.secure_join(code)
            joiner.wait_for_securejoin_joiner_success()
            joined.append(time.monotonic() - begin)
            messages = bench.scaled(200, 5) // bench.rounds
            used = _cpu_seconds(rpc)
            for number in range(messages):
                text = f"message {number}"
                begin = time.monotonic()
                chat.send_text(text)
                while inviter.wait_for_incoming_msg().get_snapshot().text != text:
                    pass
                waited.append(time.monotonic() - begin)
            busy.append(1000 * (_cpu_seconds(rpc) - used) / messages)
            for account in pair:
                account.stop_io()
    return [
        median_row("account set-up until online", "s", set_up),
        median_row("SecureJoin", "s", joined),
        *spread_rows("client to client", waited, goals),
        median_row("of it, CPU of the clients", "CPU ms a message", busy),
    ]


def _cpu_seconds(rpc: Rpc) -> float:
    """What the clients' program has used, user and kernel, so far (proc(5), stat)."""
    words = Path(f"/proc/{rpc.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def _account(delta: DeltaChat, domain: str) -> Person:
    """A new account, online."""
    account = delta.add_account()
    account.set_config("bot", "1")  # not limited to one message a second by itself
    account.add_transport_from_qr(f"dcaccount:{domain}")
    account.bring_online()
    return account
