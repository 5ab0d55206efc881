# SPDX-License-Identifier: MIT
"""Addresses: one that everybody reads the same way, or none."""

import time

import pytest

from chatmaild.filtermail.address import (
    MAX_FROM,
    AddressError,
    is_domain,
    literal_of,
    parse_envelope,
    parse_from,
    parse_ip,
)


@pytest.mark.parametrize(
    "value, address",
    [
        (" <me@chat.example>", "me@chat.example"),
        (" me@chat.example", "me@chat.example"),
        ("Me@Chat.EXAMPLE", "me@chat.example"),
        (' "Me" <me@chat.example>', "me@chat.example"),
        (' "evil@other.example, \\"x\\"" <me@chat.example>', "me@chat.example"),
        (" A. B. Me <me@chat.example>", "me@chat.example"),
        (" =?utf-8?Q?M=C3=A9?= <me@chat.example>", "me@chat.example"),
        ("\n <me@chat.example>", "me@chat.example"),
        (' "A long name"\r\n <me@chat.example>', "me@chat.example"),
        (" MAILER-DAEMON@relay.example (Mail Delivery System)", "mailer-daemon@relay.example"),
        (" Mail (x) System <mailer-daemon@relay.example>", "mailer-daemon@relay.example"),
        (" Mail Delivery System <MAILER-DAEMON@_relay.example>", "mailer-daemon@_relay.example"),
        (" <u+x.y_z-1@[192.0.2.1]>", "u+x.y_z-1@[192.0.2.1]"),
        (" <u@[IPv6:2001:db8::1]>", "u@[ipv6:2001:db8::1]"),
    ],
)
def test_one_address_is_read(value, address):
    assert parse_from(value) == address


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        " <>",
        " me",
        " @chat.example",
        " me@",
        " <me@chat.example>, <evil@other.example>",
        " me@chat.example, evil@other.example",
        " <me@chat.example> <evil@other.example>",
        " <evil@other.example> me@chat.example",
        " evil@other.example <me@chat.example>",
        " <me@chat.example> (evil@other.example)",
        " me@chat.example (evil@other.example)",
        " me@chat.example (a) (b)",
        " me@chat.example (a(b))",
        " (c) me@chat.example",
        " friends: me@chat.example;",
        ' "hidden-recipients": ;',
        " <@relay.example:me@chat.example>",
        ' "quoted local"@chat.example',
        " <.me@chat.example>",
        " <me..x@chat.example>",
        " <me.@chat.example>",
        " <me@chat..example>",
        " <me@-chat.example>",
        " <me@chat.example.>",
        " <me@chat.example",
        " me@chat.example>",
        " <<me@chat.example>>",
        " <me @chat.example>",
        " <me@chat.example >",
        " <me@[192.0.2.256]>",
        " <me@[IPv6:192.0.2.1]>",
        " <me@[2001:db8::1]>",
        " <me@[]>",
        ' "open <me@chat.example>',
        " M\xe9 <me@chat.example>",
        " <m\xe9@chat.example>",
        " <me@chat.example>\0",
        " <me@chat.example>\r\n",
        " x\n<me@chat.example>",
        " x\ry <me@chat.example>",
        " <" + "m" * 65 + "@chat.example>",
        " <me@" + "x." * 126 + "example>",
        " " * 990 + "<me@chat.example>",
        ": <me@chat.example>",
    ],
)
def test_everything_else_is_refused(value):
    with pytest.raises(AddressError):
        parse_from(value)


@pytest.mark.parametrize(
    "value",
    ["(" * 100_000, '"' * 100_000, "<" * 100_000, " \\" * 50_000, "a@" * 50_000, ", " * 50_000]
    + [("(" * 900), '"\\' * 450, "(a)" * 300 + "<", "a " * 490 + "<a@b", "a\t\n " * 240],
)
def test_garbage_costs_nothing(value):
    started = time.process_time()
    for _ in range(20):
        with pytest.raises(AddressError):
            parse_from(value)
    assert time.process_time() - started < 0.5


def test_the_longest_from_is_read():
    value = " " * (MAX_FROM - 17) + "<me@chat.example>"
    assert len(value) == MAX_FROM
    assert parse_from(value) == "me@chat.example"


@pytest.mark.parametrize(
    "path, address",
    [
        ("<>", ""),
        ("<Me@Chat.example>", "me@chat.example"),
        ("me@chat.example", "me@chat.example"),
        ("<me@chat.example.>", "me@chat.example"),
        ('<"me"@chat.example>', "me@chat.example"),
        ('<"m\\e"@chat.example>', "me@chat.example"),
        ("<@a.example,@b.example:me@chat.example>", "me@chat.example"),
        ("<postmaster>", "postmaster"),
        ("<m\xe9@chat.example>", "m\xe9@chat.example"),
        ("<me@x@chat.example>", "me@x@chat.example"),
    ],
)
def test_envelope_addresses_mean_what_they_mean_to_postfix(path, address):
    assert parse_envelope(path) == address


def test_literals_are_ip_addresses():
    assert str(literal_of("[192.0.2.1]")) == "192.0.2.1"
    assert str(literal_of("[IPv6:2001:DB8::1]")) == "2001:db8::1"
    assert literal_of("[IPv6:::ffff:192.0.2.1]") == literal_of("[192.0.2.1]")
    assert literal_of("192.0.2.1") is literal_of("[x]") is literal_of("[") is None
    assert parse_ip("fe80::1%eth0") is None


@pytest.mark.parametrize("name", ["_r7.test", "a.example", "s1._domainkey.a.example", "localhost"])
def test_domains(name):
    assert is_domain(name)


@pytest.mark.parametrize(
    "name", ["", ".", "a.", "a b", "a..b", "-a.b", "a" * 64, "é.example", "a\n"]
)
def test_not_domains(name):
    assert not is_domain(name)
