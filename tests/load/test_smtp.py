# SPDX-License-Identifier: MIT
"""Many SMTP sessions, slow ones, and useless ones, while others want to be served."""

from __future__ import annotations

SESSIONS = 1_000
SLOW = 250  # connections to each port, of one address
SLOW_SECONDS = 5
FLOOD = 60  # connections to port 25, of two addresses


def test_a_thousand_submission_sessions_at_a_time(load):
    """All are logged in before the first of them sends; then each does."""
    assert int(load.host.exec("chatmail-relay", "get", "max_smtp_connections").out) >= SESSIONS

    found = load.clients("smtp", "--clients", str(SESSIONS), "--each", "100")

    load.note(f"{SESSIONS} submission sessions", found)
    assert found["errors"] == 0, found["replies"]
    assert found["smtpd processes"] >= SESSIONS


def test_slow_clients_on_every_port_do_not_keep_others_out(load):
    """A byte a second, and back as soon as the relay has had enough of it."""
    found = load.clients(
        *("loris", "--clients", str(SLOW), "--each", str(SLOW)), "--rounds", "10", "--settle", "10"
    )

    load.note(f"{SLOW} slow clients on each port, held", found["slow connections held"])
    held = {port for port, count in found["slow connections held"].items() if count >= 25}
    assert held == {"25", "80", "143", "443", "465", "587", "993"}
    for what, seconds in found["meanwhile"].items():
        quiet = found["quiet"][what]["median ms"]
        load.note(f"slow clients: {what}", f"median {seconds['median ms']} ms (quiet: {quiet} ms)")
        assert seconds["max ms"] < 1000 * SLOW_SECONDS, what


def test_a_flood_of_junk_on_25_does_not_slow_submission(load):
    """As fast as the relay answers; quiet and flood in turn."""
    words = ("--clients", str(FLOOD), "--each", "40", "--rounds", "20", "--turns", "4")
    found = load.clients("flood", *words, "--settle", "3")

    quiet, flood = found["quiet"], found["flood"]
    load.note("submission, quiet", quiet)
    load.note("submission while junk floods 25", flood)
    load.note("junk that was refused", found["junk"])
    assert sum(count for _, count in found["junk"]) > 100
    assert flood["p95 ms"] < 2 * quiet["p95 ms"]
    assert flood["max ms"] < 1000  # the pause of in_flow_delay
