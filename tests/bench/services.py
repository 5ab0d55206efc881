# SPDX-License-Identifier: MIT
"""Installation, `apply`, the clean-up of the mail store, push notifications."""

from __future__ import annotations

import json
import shutil
import smtplib
import subprocess
import sys
import time
from typing import Any

from lab.messages import encrypted
from lab.push import PushServer

from . import storage as store
from .frame import Row, measurement, median_row, paired_row
from .relay import CPU, DOMAIN, Bench

TOKENS = 32  # devices of one user
MAILBOX = f"/var/lib/chatmail/mail/{DOMAIN}"


@measurement(2)
def install(bench: Bench) -> list[Row]:
    """From the start of apt-get install, packages downloaded, to the first message that has arrived."""
    bench.host  # noqa: B018  # is installed now, if it was not before
    return [
        Row("apt-get install", "s", bench.install_seconds),
        Row("first message received", "s", bench.message_seconds, goal=60),
    ]


@measurement(1)
def apply(bench: Bench) -> list[Row]:
    """`chatmail-relay apply` with nothing to do."""
    words = ("chatmail-relay", "apply")
    seconds = [bench.host.exec(*words, timeout=120).seconds for _ in range(bench.rounds)]
    return [median_row("apply", "s", seconds)]


@measurement(5)
def storage(bench: Bench) -> list[Row]:
    """Expire and the report over many messages, against a walk that stats every file."""
    messages = bench.scaled(1_000_000, 200_000)
    room = shutil.disk_usage("/dev/shm").free > store.ROOM * messages
    folder = "/dev/shm" if room else str(bench.folder)
    command = [sys.executable, store.__file__, str(messages), folder, str(bench.rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    rows = []
    for name, budget in ((store.EXPIRE, 1.5), (store.REPORT, None)):
        spent, walk = (found[item]["CPU seconds"] for item in (name, store.WALKING))
        label = f"{name}, {messages:,} messages"
        rows.append(paired_row(label, "CPU s", spent, walk, budget=budget))
        rows.append(Row(f"{label}, peak", "MB", found[name]["peak MB"], budget=60))
    deleting = found[store.DELETING]
    return [*rows, Row(store.DELETING, "CPU s", deleting["CPU seconds"][0])]


@measurement(2)
def pushes(bench: Bench) -> list[Row]:
    """Notifications of devices, all told at once; the notification server is the lab's, in Python."""
    host, mail = bench.host, bench.mail
    users = [mail.account() for _ in range(bench.scaled(32, 2))]
    server = PushServer(bench.lab, bench.folder)
    server.trust(host)
    try:
        for number, user in enumerate(users):
            tokens = {f"bench-{number}-{item}": int(time.time()) for item in range(TOKENS)}
            path = f"{MAILBOX}/{user.address}/metadata.json"
            host.write(path, json.dumps({"devicetoken": tokens}), 0o600)
            host.exec("chown", "_chatmail:_chatmail", path)
        rates, spent = [], []
        count = TOKENS * len(users)
        for _ in range(bench.rounds):
            server.tokens.clear()
            with CPU(host) as used:
                seconds = _notify(bench, server, [user.address for user in users], count)
            rates.append(count / seconds)
            spent.append(1000 * used.units["chatmail-metadata.service"] / count)
    finally:
        server.trust(host, False)
        server.close()
    return [
        median_row("notifications", "pushes/s", rates),
        median_row("notifications, the notifier alone", "CPU ms a push", spent),
    ]


def _notify(bench: Bench, server: PushServer, users: list[str], count: int) -> float:
    """One message to all of *users*; the seconds from its acceptance to the last notification."""
    mail = bench.mail
    sender = mail.account()
    with mail.smtp(sender) as session:
        code, text = mail.send(session, sender.address, users, encrypted(sender.address, users[0]))
        if code != 250:
            raise smtplib.SMTPResponseException(code, text.encode())
        begin = time.perf_counter()
        server.wait_for(lambda seen: len(seen) >= count, 60)
    return time.perf_counter() - begin
