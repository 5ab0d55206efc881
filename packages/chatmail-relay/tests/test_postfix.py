# SPDX-License-Identifier: MIT
"""What a change of master.cf takes."""

import pytest

from chatmail_relay import postfix

BEFORE = {
    "smtp/inet": "smtp inet n - y - 50 smtpd -o a=1",
    "lmtp/unix": "lmtp unix - - y - - lmtp",
}


@pytest.mark.parametrize(
    ("service", "line", "same"),
    [
        ("smtp/inet", "smtp inet n - y - 50 smtpd -o a=2 -o b=1", True),
        ("lmtp/unix", "lmtp unix - - y - 9 lmtp", True),
        ("smtp/inet", "smtp inet n - y - 51 smtpd -o a=1", False),
        ("submission/inet", "submission inet n - y - - smtpd", False),
        ("smtp/inet", None, False),
        ("submission/inet", None, True),
    ],
)
def test_options_and_unix_sockets_are_no_change_of_ports(service, line, same):
    after = postfix.ports(BEFORE | {service: line})
    assert (postfix.ports(BEFORE) == after) is same
