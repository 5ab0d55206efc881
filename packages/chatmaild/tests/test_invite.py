# SPDX-License-Identifier: MIT
"""The text of QR codes and buttons."""

import pytest

from chatmaild.config import read_settings
from chatmaild.newemail import invite


@pytest.mark.parametrize(
    ("ini", "token", "text"),
    [
        ("", None, "dcaccount:chat.example"),
        ("", "t0ken", "dcaccount:chat.example"),
        ("registration = closed", None, ""),
        ("registration = closed", "t0ken", ""),
        ("registration = token", None, ""),
        ("registration = token", "t0ken", "dcaccount:https://chat.example/new?token=t0ken"),
        # what the client would invent is refused: it has to ask
        (
            "username_max_length = 8\nusername_min_length = 8",
            None,
            "dcaccount:https://chat.example/new",
        ),
        (
            "username_max_length = 12\nusername_min_length = 10",
            None,
            "dcaccount:https://chat.example/new",
        ),
        ("mail_domain = 192.0.2.1", None, "dcaccount:https://192.0.2.1/new"),
        ("password_min_length = 23", None, "dcaccount:https://chat.example/new"),
    ],
)
def test_the_code_fits_the_way_of_registration(ini, token, text):
    domain = "" if "mail_domain" in ini else "mail_domain = chat.example"
    config = read_settings("test.ini", f"[params]\n{domain}\n{ini}\n")[0]
    assert invite(config, token) == text
