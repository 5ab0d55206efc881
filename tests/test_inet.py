# SPDX-License-Identifier: MIT
"""The test internet: signed names as a relay's own unbound sees them, and nothing beyond."""

import dns.flags
import dns.message
import dns.query
import dns.rcode
import pytest
from conftest import rpc_program
from lab.client import clients
from lab.inet import ACME_DIRECTORY
from lab.network import inside

FAR = ("192.0.2.1", "2001:db8::1")  # RFC 5737, RFC 3849


def ask(host, name, kind):
    """One question to the host's own unbound, on loopback."""
    query = dns.message.make_query(name, kind, want_dnssec=True)
    with inside(host.namespace):
        return dns.query.udp(query, "127.0.0.1", timeout=10)


def values(reply):
    kind = reply.question[0].rdtype
    return [item.to_text() for rrset in reply.answer if rrset.rdtype == kind for item in rrset]


def test_names_resolve_from_the_root_and_are_validated(internet, alpha):
    reply = ask(alpha, "www.alpha.example", "AAAA")
    assert values(reply) == [alpha.namespace.ipv6]
    assert reply.flags & dns.flags.AD


def test_a_change_is_seen_at_once_also_where_nothing_was(internet, alpha):
    assert ask(alpha, "new.alpha.example", "TXT").rcode() == dns.rcode.NXDOMAIN
    internet.set("new.alpha.example", "TXT", '"first half; " "second"', '"another"')
    reply = ask(alpha, "new.alpha.example", "TXT")
    assert sorted(values(reply)) == ['"another"', '"first half; " "second"']
    assert reply.flags & dns.flags.AD
    internet.unset("new.alpha.example", "TXT")


def test_a_relay_with_another_trust_anchor_believes_nothing(internet, alpha):
    """So validation is in force, not merely reported."""
    wrong = internet.anchor[:-8] + "00000000"
    anchor = "/var/lib/unbound/root.key"
    alpha.sh(f"cp -p {anchor} /root/anchor && systemctl stop unbound && echo '{wrong}' >{anchor}")
    try:
        # not by its unit, which puts the anchor of dns-root-data back in place
        alpha.exec("unbound")
        assert ask(alpha, "alpha.example", "A").rcode() == dns.rcode.SERVFAIL
    finally:
        alpha.sh(
            f"kill $(cat /run/unbound.pid); cp -p /root/anchor {anchor}; systemctl start unbound"
        )
    assert ask(alpha, "alpha.example", "A").rcode() == dns.rcode.NOERROR


@pytest.mark.parametrize("address", FAR)
def test_there_is_no_way_out(internet, alpha, address):
    for host in (internet.host, alpha):
        done = host.exec("ip", "route", "get", address, check=False)
        assert "unreachable" in done.err, done


def test_relays_run_debians_unbound_but_for_the_roots_addresses(alpha):
    ours = {"chatmail.conf", "lab.conf", "remote-control.conf", "root-auto-trust-anchor-file.conf"}
    assert set(alpha.exec("ls", "/etc/unbound/unbound.conf.d").out.split()) == ours
    assert alpha.read("/etc/unbound/unbound.conf.d/lab.conf").split() == [
        "server:",
        "root-hints:",
        '"/usr/share/dns/root.hints"',
    ]
    changed = {line.split()[-1] for line in alpha.exec("dpkg", "--verify").out.splitlines()}
    assert changed == {"/usr/share/dns/root.key", "/usr/share/dns/root.hints"}


def test_the_certificate_authority_is_trusted_over_both_protocols(internet, alpha):
    """Without any option that would switch a check off."""
    script = (
        "import json,sys,urllib.request;"
        f"print(json.load(urllib.request.urlopen('{ACME_DIRECTORY}', timeout=10))['newOrder'])"
    )
    assert alpha.exec("python3", "-c", script).out == "https://acme.example/order-plz\n"
    assert set(values(ask(alpha, "acme.example", "A"))) == {internet.host.address}
    assert set(values(ask(alpha, "acme.example", "AAAA"))) == {internet.host.namespace.ipv6}


def test_everything_a_relay_asks_for_is_published(internet, alpha):
    done = alpha.exec("chatmail-relay", "dns", "--json", check=False)
    assert done.ok, done.out


def test_real_clients_talk_over_a_relay_with_an_ordinary_name(internet, alpha, tmp_path):
    """With TLS as strict as it is by default; it reaches the relay by the names of this internet."""
    relays = {"alpha.example": alpha}
    with clients(internet, tmp_path, rpc_program(), relays, 2) as (alice, bob):
        for account in (alice, bob):
            account.set_config("bot", "1")
            account.add_transport_from_qr("dcaccount:alpha.example")
            account.bring_online()
        chat = bob.secure_join(alice.get_qr_code())
        bob.wait_for_securejoin_joiner_success()
        chat.send_text("by an ordinary name")
        while True:
            message = alice.wait_for_incoming_msg().get_snapshot()
            if message.text == "by an ordinary name":
                break
        assert message.show_padlock
        assert alice.get_config("configured_addr").endswith("@alpha.example")
