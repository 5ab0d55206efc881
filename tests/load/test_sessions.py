# SPDX-License-Identifier: MIT
"""Thousands of IMAP sessions on one relay: all at a time, and all coming back at once."""

from __future__ import annotations

import pytest

SESSIONS = 10_000
STORM = 2_000
STORM_SECONDS = 30
#: Sessions hibernate after one minute here; the last to log in have had theirs, and those that have tried
#: in vain had a second one.
LOOKS = (5.0, 150.0)


@pytest.mark.parametrize("state", ["awake", "asleep"])
def test_a_storm_of_reconnects_after_a_restart_of_dovecot(load, state):
    """Everybody is disconnected and comes back at the same moment, again and again until Dovecot answers."""
    words = ["--asleep"] if state == "asleep" else []
    found = load.clients("storm", "--clients", str(STORM), *words)

    load.note(f"{STORM} reconnects after a restart, {state}", found)
    assert found["sessions"] == STORM
    assert found["refused"] == 0, found["replies"]
    assert found["last s"] <= STORM_SECONDS


def test_ten_thousand_sessions_at_a_time(load):
    """On 24 GB; where a process may open 20,000 files, imap-hibernate takes two processes for them."""
    assert int(load.host.exec("chatmail-relay", "get", "max_imap_connections").out) >= SESSIONS

    found = load.idle(
        "hold",
        "--clients",
        str(SESSIONS),
        "--create",
        "--at-a-time",
        "30",
        "--wait",
        *map(str, LOOKS),
    )

    awake, asleep = (found[f"after {seconds} s"] for seconds in LOOKS)
    load.note(f"{SESSIONS} IMAP sessions", f"{found['logins a second']} logins a second")
    # with what other tests have left in processes that stay
    load.note("KiB a session, soon after the logins", awake["KiB a session, all processes"])
    load.note("KiB a session, hibernated", asleep["KiB a session, all processes"])
    told = found["one message to 100 of them"]
    load.note("one message to 100 of them", told)
    assert found["sessions"] == SESSIONS and asleep["hibernated"] == SESSIONS
    assert told["lost"] == 0
