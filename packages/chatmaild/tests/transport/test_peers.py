# SPDX-License-Identifier: MIT
"""What is remembered about peers, and what one peer may have."""

import asyncio

import dns.message
import dns.rcode
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatmaild.transport.limits import Exceeded, Limits
from chatmaild.transport.locate import Host, Locator, NoHost, is_elsewhere
from chatmaild.transport.peers import FORGET_SECONDS, Peers
from chatmaild.filtermail.address import parse_ip


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_a_peer_that_failed_is_asked_again_after_half_an_hour():
    clock = Clock()
    peers = Peers(clock=clock)
    assert peers.takes_https("a.example") is None
    peers.learn("a.example", True)
    assert peers.takes_https("a.example") is True and peers.known == 1
    peers.learn("a.example", False)
    clock.now += FORGET_SECONDS - 1
    assert peers.takes_https("a.example") is False and peers.known == 0
    clock.now += 1
    assert peers.takes_https("a.example") is None and len(peers) == 0


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=100))
def test_the_table_is_bounded_and_keeps_who_was_used_last(events):
    peers = Peers(max_peers=5)
    for number, takes in events:
        peers.learn(f"{number}.example", takes)
        assert peers.takes_https(f"{number}.example") is takes
        assert len(peers) <= 5


def test_who_is_used_stays():
    peers = Peers(max_peers=2)
    peers.learn("a.example", True)
    peers.learn("b.example", True)
    assert peers.takes_https("a.example")
    peers.learn("c.example", True)
    assert peers.takes_https("a.example") and peers.takes_https("b.example") is None


def test_requests_at_a_time_are_limited_for_each_peer_and_for_all():
    limits = Limits(requests=3, per_peer=2, per_minute=1000, burst=1000)
    with limits.request("192.0.2.1", 0), limits.request("192.0.2.1", 0):
        with pytest.raises(Exceeded, match="one peer"), limits.request("192.0.2.1", 0):
            pass
        with limits.request("192.0.2.2", 0):
            with pytest.raises(Exceeded, match="all"), limits.request("192.0.2.3", 0):
                pass
    with limits.request("192.0.2.1", 0):
        pass


def test_messages_a_minute_are_limited_for_each_peer():
    limits = Limits(per_minute=60, burst=3)
    for _ in range(3):
        with limits.request("192.0.2.1", 0):
            pass
    with pytest.raises(Exceeded, match="messages"), limits.request("192.0.2.1", 0):
        pass
    with limits.request("192.0.2.2", 0):
        pass
    with limits.request("192.0.2.1", 1.0):
        pass


def test_an_ipv6_network_is_one_peer():
    limits = Limits(per_minute=60, burst=1)
    with limits.request("2001:db8::1", 0):
        pass
    with pytest.raises(Exceeded), limits.request("2001:db8::ffff:2", 0):
        pass
    with limits.request("2001:db8:0:1::1", 0):
        pass


@pytest.mark.parametrize(
    "text", ["127.0.0.1", "::1", "0.0.0.0", "::", "224.0.0.1", "169.254.1.1", "fe80::1"]
)
def test_names_may_not_lead_to_ourselves(text):
    assert not is_elsewhere(parse_ip(text))


# --- the DNS ---------------------------------------------------------------------------------------


class Dns(asyncio.DatagramProtocol):
    """Answers *records*, {(name, kind): [text, ...]}; SERVFAIL for names in *broken*."""

    def __init__(self, records, broken=()):
        self._records, self._broken = records, broken

    def connection_made(self, transport):
        self._transport = transport

    def datagram_received(self, data, addr):
        query = dns.message.from_wire(data)
        answer = dns.message.make_response(query)
        name, kind = query.question[0].to_text().split()[::2]
        if name.rstrip(".") in self._broken:
            answer.set_rcode(dns.rcode.SERVFAIL)
        values = self._records.get((name.rstrip("."), kind))
        if values:
            answer.answer.append(dns.rrset.from_text_list(name, 60, "IN", kind, values))
        self._transport.sendto(answer.to_wire(), addr)


def located(domain, records, broken=(), **options):
    """The hosts of a domain with their addresses."""

    async def ask():
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(
            lambda: Dns(records, broken), local_addr=("127.0.0.1", 0)
        )
        locator = Locator(resolver=transport.get_extra_info("sockname"), **options)
        try:
            return [(host, await locator.addresses(host)) for host in await locator.hosts(domain)]
        finally:
            transport.close()

    return asyncio.run(ask())


def test_mx_hosts_come_in_the_order_of_preference_and_with_both_kinds_of_addresses():
    records = {
        ("a.example", "MX"): ["20 two.example.", "10 One.example."],
        ("one.example", "A"): ["192.0.2.1"],
        ("one.example", "AAAA"): ["2001:db8::1"],
        ("two.example", "A"): ["192.0.2.2", "192.0.2.3", "192.0.2.4"],
    }
    (one, both), (two, some) = located("a.example", records)
    assert (one, both) == (Host("one.example", True), ["2001:db8::1", "192.0.2.1"])
    assert two == Host("two.example", True) and len(some) == 2
    assert located("a.example", records, ipv6=False)[0][1] == ["192.0.2.1"]


def test_without_mx_the_domain_is_the_host_and_an_underscore_takes_any_certificate():
    records = {("_a.example", "A"): ["192.0.2.1"]}
    assert located("_a.example", records) == [(Host("_a.example", False), ["192.0.2.1"])]


@pytest.mark.parametrize(
    ("domain", "address"), [("[192.0.2.9]", "192.0.2.9"), ("[ipv6:2001:db8::9]", "2001:db8::9")]
)
def test_an_address_literal_is_its_own_host_and_takes_any_certificate(domain, address):
    assert located(domain, {}) == [(Host(address, False), [address])]


@pytest.mark.parametrize(
    ("records", "broken", "why"),
    [
        ({("a.example", "MX"): ["0 ."]}, (), "null MX"),
        ({}, ("a.example",), "DNS"),
        ({}, (), "no address"),
        ({("a.example", "A"): ["127.0.0.1"]}, (), "no address"),
        ({("a.example", "MX"): ["1 a\\032b.example."]}, (), "no usable MX"),
    ],
)
def test_where_nobody_can_be_asked(records, broken, why):
    with pytest.raises(NoHost, match=why):
        located("a.example", records, broken)
