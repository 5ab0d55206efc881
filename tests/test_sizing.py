# SPDX-License-Identifier: MIT
"""Limits follow the machine: what status says of it is what the daemons were given."""

from __future__ import annotations

import json
import os
import re


def test_the_capacity_in_status_is_what_the_daemons_have(relay):
    said = json.loads(relay.exec("chatmail-relay", "status", "--json", check=False).out)
    (found,) = [item for item in said if item["what"] == "capacity"]
    sessions = found["data"]["max_imap_connections"]

    assert found["well"] and f"about {found['data']['imap_sessions']} idle" in found["detail"]
    assert found["data"]["cores"] == os.cpu_count()
    shown = relay.exec("doveconf", "-c", "/etc/chatmail/dovecot/dovecot.conf", "-n").out
    assert re.search(
        rf"^service imap-login {{[^}}]*\bclient_limit = {sessions}$", shown, re.MULTILINE
    )
    assert f"max_imap_connections = {sessions}\n" in relay.read(
        "/etc/chatmail/chatmaild/chatmail.ini"
    )
    assert relay.exec("chatmail-relay", "diff").out == ""
