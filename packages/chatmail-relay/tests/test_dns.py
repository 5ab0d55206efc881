# SPDX-License-Identifier: MIT
"""The DNS records of a relay, asked of real name servers on loopback."""

import dataclasses
import json
import socket
import threading
from types import SimpleNamespace

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.zone
import pytest
from chatmaild.config import read_settings

from chatmail_relay import cli
from chatmail_relay.dns import command, records
from chatmail_relay.dns.compare import compare, rdata
from chatmail_relay.dns.lookup import Lookup
from chatmail_relay.dns.records import Record, quoted, wanted, zone

DOMAIN = "chat.example.org"
KEY = "v=DKIM1;k=rsa;p=" + "QUJD" * 90 + ";s=email;t=s"
ADDRESSES = ["8.8.4.4", "2001:4860:4860::8844"]
SERVERS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")  # the resolver and two authoritative servers
HEAD = """\
$ORIGIN example.org.
@ 60 IN SOA ns1 admin 1 60 60 60 60
@ 60 IN NS ns1
@ 60 IN NS ns2
ns1 60 IN A 127.0.0.2
ns2 60 IN A 127.0.0.3
"""


def config(**settings):
    values = {"mail_domain": DOMAIN, "tls_external_cert_and_key": "/c.pem /k.pem"} | settings
    lines = [f"{key} = {value}" for key, value in values.items()]
    return read_settings("test.ini", "\n".join(["[params]", *lines, ""]))[0]


def need(**settings):
    return wanted(config(**settings), {"chatmail": KEY}, ADDRESSES)


def find(kind, name=DOMAIN):
    return next(r for r in need() if (r.kind, r.name) == (kind, name))


class NameServer:
    """Answers over UDP from a zone; as a resolver if the question wants recursion."""

    def __init__(self, address, port, text):
        self.text = text
        self.silent = self.bogus = self.signed = False
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((address, port))
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                data, peer = self.socket.recvfrom(4096)
            except OSError:
                return
            if not self.silent:
                self.socket.sendto(self.answer(dns.message.from_wire(data)).to_wire(), peer)

    def answer(self, query):
        reply = dns.message.make_response(query)
        reply.flags |= dns.flags.AA
        if self.signed:
            reply.flags |= dns.flags.AD
        if self.bogus and not query.flags & dns.flags.CD:
            reply.set_rcode(dns.rcode.SERVFAIL)
            return reply
        question = query.question[0]
        held = dns.zone.from_text(self.text, "example.org", relativize=False)
        name = question.name
        while True:
            alias = held.get_rrset(name, "CNAME")
            found = held.get_rrset(name, question.rdtype)
            if found is not None or alias is None:
                break
            reply.answer.append(alias)
            name = alias[0].target
        if found is not None:
            reply.answer.append(found)
        elif held.get_node(name) is None:
            reply.set_rcode(dns.rcode.NXDOMAIN)
        return reply

    def close(self):
        self.socket.close()


@pytest.fixture
def servers():
    """Three servers that know nothing of the relay yet; a free port that all three share."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = [NameServer(address, port, HEAD) for address in SERVERS]
    yield SimpleNamespace(all=made, resolver=made[0], first=made[1], second=made[2], port=port)
    for server in made:
        server.close()


@pytest.fixture
def lookup(servers, monkeypatch):
    monkeypatch.setattr("chatmail_relay.dns.lookup.TIMEOUT", 0.5)
    return Lookup([SERVERS[0]], servers.port)


def publish(servers, text):
    for server in servers:
        server.text = HEAD + text


def full_zone(without=()):
    lines = zone([r for r in need() if r.kind != "PTR"]).splitlines()
    return "\n".join(line for line in lines if not any(word in line for word in without)) + "\n"


def test_the_zone_file_holds_every_record_and_can_be_read():
    made = dns.zone.from_text(HEAD + full_zone(), "example.org", relativize=False)
    held = {
        (str(name).rstrip("."), dns.rdatatype.to_text(data.rdtype))
        for name, _ttl, data in made.iterate_rdatas()
    }
    assert {(r.name, r.kind) for r in need() if r.kind != "PTR"} <= held


def test_texts_are_split_where_dns_demands_it():
    strings = rdata("TXT", quoted(KEY)).strings
    assert max(map(len, strings)) == 255 and b"".join(strings).decode() == KEY


def test_a_complete_zone_is_well(servers, lookup):
    publish(servers.all, full_zone())
    for record in need():
        if record.kind != "PTR":
            verdict = command.judge(record, lookup)
            assert verdict.state == "ok", verdict.lines()
            assert {str(answer.server) for answer in verdict.answers} == {
                "127.0.0.1",
                "ns1.example.org (127.0.0.2)",
                "ns2.example.org (127.0.0.3)",
            }


def test_a_missing_record_is_named_with_what_to_set(servers, lookup):
    publish(servers.all, full_zone(without=["MX"]))
    verdict = command.judge(find("MX"), lookup)
    assert verdict.state == "wrong"
    text = "\n".join(verdict.lines())
    assert "is missing at ns1.example.org (127.0.0.2), ns2.example.org (127.0.0.3)" in text
    assert f"set: {DOMAIN}. 3600 IN MX 10 {DOMAIN}." in text


def test_the_server_that_differs_is_named(servers, lookup):
    publish(servers.all, full_zone())
    servers.second.text = HEAD + full_zone().replace("10 chat", "10 old")
    verdict = command.judge(find("MX"), lookup)
    assert verdict.state == "wrong"
    assert verdict.problems == ["says 10 old.example.org. at ns2.example.org (127.0.0.3)"]


def test_a_resolver_that_is_behind_is_no_error(servers, lookup):
    publish(servers.all, full_zone())
    servers.resolver.text = HEAD
    verdict = command.judge(find("MX"), lookup)
    assert verdict.state == "spreading"
    assert verdict.problems == ["is missing at 127.0.0.1"]


def test_a_server_that_is_silent_is_named(servers, lookup):
    publish(servers.all, full_zone())
    servers.second.silent = True
    verdict = command.judge(find("MX"), lookup)
    assert verdict.state == "wrong"
    assert verdict.problems == ["no answer at ns2.example.org (127.0.0.3)"]


def test_a_zone_that_nobody_serves(servers, lookup):
    servers.resolver.silent = True
    verdict = command.judge(find("MX"), lookup)
    assert verdict.state == "wrong"
    assert f"no name server is known for {DOMAIN}" in verdict.problems


def test_an_address_is_as_good_as_an_alias_if_it_is_the_relays(servers, lookup):
    www = f"www.{DOMAIN}"
    text = full_zone(without=["www."])
    publish(servers.all, f"{text}{www}. 60 IN A 8.8.4.4\n")
    assert command.judge(find("CNAME", www), lookup).state == "ok"
    publish(servers.all, f"{text}{www}. 60 IN A 9.9.9.9\n")
    assert command.judge(find("CNAME", www), lookup).state == "wrong"


@pytest.mark.parametrize(
    "kind, name, values, problem",
    [
        ("A", DOMAIN, ["8.8.4.4"], ""),
        ("A", DOMAIN, ["8.8.8.8"], "says 8.8.8.8"),
        ("A", DOMAIN, ["8.8.4.4", "8.8.8.8"], "also points to 8.8.8.8"),
        ("AAAA", DOMAIN, ["2001:4860:4860:0:0:0:0:8844"], ""),
        ("MX", DOMAIN, [f"5 {DOMAIN.upper()}."], ""),
        ("MX", DOMAIN, [f"10 {DOMAIN}.", "20 other.example."], ""),
        ("MX", DOMAIN, [f"10 {DOMAIN}.", "5 other.example."], "is preferred"),
        ("MX", DOMAIN, ["0 ."], "says 0 ."),
        ("TXT", DOMAIN, ['"v=spf1 mx -all"'], ""),
        ("TXT", DOMAIN, ['"v=spf1" " a ~all"', '"google-site-verification=x"'], ""),
        ("TXT", DOMAIN, ['"v=spf1 a +all"'], "lets everybody send"),
        ("TXT", DOMAIN, ['"v=spf1 -all"'], "names no sender"),
        ("TXT", DOMAIN, ['"v=spf1 a ~all"', '"v=spf1 mx ~all"'], "there are 2 records"),
        ("TXT", DOMAIN, ['"something"'], 'says "something"'),
        ("TXT", f"_dmarc.{DOMAIN}", ['"v=DMARC1; p=reject; aspf=s; adkim=s; rua=mailto:x@y"'], ""),
        (
            "TXT",
            f"_dmarc.{DOMAIN}",
            ['"v=DMARC1; p=none; aspf=s; adkim=s"'],
            "p=none, wanted p=reject",
        ),
        ("TXT", f"_dmarc.{DOMAIN}", ['"v=DMARC1; p=reject; aspf=s"'], "adkim=not set"),
        ("TXT", f"_mta-sts.{DOMAIN}", ['"v=STSv1; id=20260101T000000;"'], ""),
        ("TXT", f"_mta-sts.{DOMAIN}", ['"v=STSv1; id=;"'], "is not valid"),
        ("SRV", f"_imaps._tcp.{DOMAIN}", [f"10 5 993 {DOMAIN}."], ""),
        ("SRV", f"_imaps._tcp.{DOMAIN}", [f"0 1 143 {DOMAIN}."], "says 0 1 143"),
        ("SRV", f"_imaps._tcp.{DOMAIN}", ["0 0 0 ."], "says 0 0 0 ."),
        ("A", DOMAIN, [], "is missing"),
    ],
)
def test_records_are_compared_by_what_they_mean(kind, name, values, problem):
    said = compare(find(kind, name), [rdata(kind, value) for value in values])
    assert said.startswith(problem) if not problem else problem in said
    assert bool(said) == bool(problem)


@pytest.mark.parametrize(
    "published, problem",
    [
        (KEY, ""),
        (KEY.replace("v=DKIM1;k=rsa;", "k=rsa; v=DKIM1; "), "says"),  # RFC 6376: v= comes first
        (KEY.replace(";", " ; ").replace("k=rsa ;", ""), ""),
        ("v=DKIM1; p=" + "QUJD" * 90, ""),
        (KEY.replace("QUJD", "QUJE", 1), "holds another key"),
        ("v=DKIM1; p=", "revoked"),
        (KEY.replace("t=s", "t=y:s"), "it is a test"),
        (KEY.replace("s=email", "s=other"), "does not include mail"),
        (KEY.replace("k=rsa", "k=ed25519"), "not the kind of this key"),
    ],
)
def test_dkim_keys_are_compared_by_their_tags(published, problem):
    record = find("TXT", f"chatmail._domainkey.{DOMAIN}")
    parts = " ".join(f'"{published[at : at + 100]}"' for at in range(0, len(published), 100))
    said = compare(record, [rdata("TXT", parts)])
    assert problem in said and bool(said) == bool(problem)


def test_caa_is_compared_with_its_parameters():
    account = "https://acme-v02.api.letsencrypt.org/acme/acct/1"
    (record,) = (r for r in wanted(config(), {}, ADDRESSES, account) if r.kind == "CAA")

    def said(*values):
        return compare(record, [rdata("CAA", value) for value in values])

    good = f'128 issue "letsencrypt.org; accounturi={account}"'
    assert said(good, '0 iodef "mailto:a@b.example"') == ""
    assert "also allows" in said(good, '0 issue "letsencrypt.org"')
    assert "says" in said('0 issue ";"')
    assert said() == "is missing"


def test_of_a_ca_whose_name_is_not_known_no_caa_is_asked():
    records = wanted(config(), {}, ADDRESSES, "https://acme.example/acct/1")
    assert not [record for record in records if record.kind == "CAA"]


def test_a_relay_with_its_own_certificate_needs_no_mta_sts():
    assert not any("mta-sts" in record.name for record in need(tls="self"))


def test_behind_nat_any_address_counts():
    (record,) = (r for r in wanted(config(), {}, []) if r.kind == "A")
    assert compare(record, [rdata("A", "8.8.8.8")]) == ""
    assert compare(record, []) == "is missing"


@pytest.fixture
def root(tmp_path, monkeypatch, servers):
    """A configured relay whose resolver is ours."""
    real = Lookup
    monkeypatch.setattr(command, "Lookup", lambda resolvers: real(resolvers, servers.port))
    monkeypatch.setattr(command, "own_addresses", lambda: ADDRESSES)
    monkeypatch.setattr(command, "dkim_texts", lambda paths, config: {"chatmail": KEY})
    monkeypatch.setattr("chatmail_relay.dns.lookup.TIMEOUT", 0.5)
    ini = tmp_path / "etc/chatmail/chatmail.ini"
    ini.parent.mkdir(parents=True)
    ini.write_text(
        f"[params]\nmail_domain = {DOMAIN}\ntls = external\n"
        "tls_external_cert_and_key = /etc/cert.pem /etc/key.pem\n"
    )
    return str(tmp_path)


def test_the_command_tells_by_its_exit_status(root, servers, capsys):
    assert cli.main(["dns"], root=root) == 1
    assert "BAD required    MX" in capsys.readouterr().out
    publish(servers.all, full_zone(without=["SRV"]))
    assert cli.main(["dns", "--json"], root=root) == 0  # recommended ones do not count
    said = json.loads(capsys.readouterr().out)
    assert {item["state"] for item in said if item["type"] == "SRV"} == {"wrong"}
    assert {item["state"] for item in said if item["type"] == "MX"} == {"ok"}


def test_the_command_waits_until_all_is_there(root, servers, monkeypatch, capsys):
    monkeypatch.setattr(command, "pause", lambda seconds: publish(servers.all, full_zone()))
    assert cli.main(["dns", "--watch"], root=root) == 0
    assert "to go; asking again" in capsys.readouterr().err


def test_the_command_prints_a_zone_without_asking(root, servers, capsys):
    for server in servers.all:
        server.silent = True
    assert cli.main(["dns", "--zone"], root=root) == 0
    shown = capsys.readouterr().out
    assert f"_dmarc.{DOMAIN}." in shown and "; Required DNS entries" in shown


def test_keys_are_told_from_their_files(tmp_path):
    from chatmail_relay.paths import Paths
    from chatmail_relay.secrets import missing_secrets

    settings = config(dkim_ed25519="true")
    paths = Paths(tmp_path)
    for change in missing_secrets(paths, settings):
        change.dest.parent.mkdir(parents=True, exist_ok=True)
        change.dest.write_bytes(change.content)
    texts = records.dkim_texts(paths, settings)
    assert set(texts) == {"chatmail", "chatmail-ed25519"}
    assert texts["chatmail"].startswith("v=DKIM1;k=rsa;p=MII")
    assert len(texts["chatmail-ed25519"]) < 90


def test_a_malformed_resolver_is_refused(root):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["dns", "--resolver", "not-an-address"], root=root)


def test_a_record_line_is_one_of_a_zone_file():
    assert Record("a.example", "A", "8.8.8.8", True, "").line().split() == [
        "a.example.", "3600", "IN", "A", "8.8.8.8",
    ]  # fmt: skip


# --- relays of other kinds ----------------------------------------------------------------------------


def test_an_address_in_place_of_the_domain_needs_no_record(root, capsys):
    ini = f"{root}/etc/chatmail/chatmail.ini"
    with open(ini, "w") as file:
        file.write("[params]\nmail_domain = 192.0.2.1\n")
    assert cli.main(["dns"], root=root) == 0
    assert capsys.readouterr().out == "The mail domain is an address: it needs no DNS.\n"
    assert cli.main(["dns", "--json"], root=root) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert cli.main(["dns", "--zone"], root=root) == 0
    dns.zone.from_text(HEAD + capsys.readouterr().out, "example.org")
    assert wanted(config(mail_domain="192.0.2.1"), {}, ADDRESSES) == []


def test_a_name_with_an_underscore_needs_its_address_and_key_only():
    records = wanted(config(mail_domain="_a.example", tls="self"), {"chatmail": KEY}, ADDRESSES)
    required = [(record.kind, record.name) for record in records if record.required]
    assert required == [
        ("A", "_a.example"),
        ("AAAA", "_a.example"),
        ("TXT", "chatmail._domainkey._a.example"),
    ]


def test_without_ipv6_no_such_address_may_be_published(servers, lookup):
    records = wanted(config(disable_ipv6="true"), {}, ADDRESSES)
    assert [record.value for record in records if record.kind in ("A", "AAAA")] == ["8.8.4.4", "-"]
    (record,) = (record for record in records if record.kind == "AAAA")
    assert command.judge(record, lookup).state == "ok"
    publish(servers.all, f"{DOMAIN}. 60 IN AAAA 2001:4860:4860::8844\n")
    verdict = command.judge(record, lookup)
    assert verdict.state == "wrong"
    assert f"remove: {DOMAIN}. AAAA" in "\n".join(verdict.lines())


def test_behind_nat_an_address_of_either_kind_counts(servers, lookup):
    (record,) = (record for record in wanted(config(), {}, []) if record.kind == "A")
    assert command.judge(record, lookup).state == "wrong"
    publish(servers.all, f"{DOMAIN}. 60 IN AAAA 2001:4860:4860::8844\n")
    assert command.judge(record, lookup).state == "ok"


# --- DNSSEC -------------------------------------------------------------------------------------------


def test_what_a_resolver_cannot_validate_is_wrong(servers, lookup):
    publish(servers.all, full_zone())
    servers.resolver.bogus = True
    verdict = command.judge(find("MX"), lookup)
    assert verdict.state == "wrong"
    assert "SERVFAIL at 127.0.0.1" in verdict.problems
    assert "DNSSEC" in verdict.problems[-1]


TLSA = "3 1 1 " + "ab" * 32


@pytest.mark.parametrize("signed", [True, False])
def test_the_key_of_the_certificate_is_asked_for_in_signed_zones_only(
    root, servers, monkeypatch, capsys, signed
):
    monkeypatch.setattr(command, "tlsa_text", lambda paths, config: TLSA)
    publish(servers.all, full_zone())
    servers.resolver.signed = signed
    cli.main(["dns", "--json"], root=root)
    found = [item for item in json.loads(capsys.readouterr().out) if item["type"] == "TLSA"]
    assert [item["state"] for item in found] == (["wrong"] if signed else [])
    if signed:
        publish(servers.all, f"{full_zone()}_25._tcp.{DOMAIN}. 60 IN TLSA {TLSA}\n")
        cli.main(["dns", "--json"], root=root)
        found = [item for item in json.loads(capsys.readouterr().out) if item["type"] == "TLSA"]
        assert [item["state"] for item in found] == ["ok"]


def test_in_the_zone_file_it_is_a_comment():
    text = zone(wanted(config(), {}, ADDRESSES, None, TLSA))
    assert f"; _25._tcp.{DOMAIN}." in text and TLSA in text
    made = dns.zone.from_text(HEAD + text.split("8.8.4.4.in")[0], "example.org", relativize=False)
    assert made.get_node(f"_25._tcp.{DOMAIN}.") is None


def test_the_hash_is_that_of_the_public_key(tmp_path):
    from chatmail_relay.paths import Paths
    from chatmail_relay.secrets import missing_secrets

    settings, paths = config(tls="self"), Paths(tmp_path)
    assert records.tlsa_text(paths, settings) is None  # no certificate yet
    for change in missing_secrets(paths, settings):
        change.dest.parent.mkdir(parents=True, exist_ok=True)
        change.dest.write_bytes(change.content)
    first = records.tlsa_text(paths, settings)
    assert first.startswith("3 1 1 ") and len(first) == 6 + 64
    paths.real(settings.certificate_source[0]).unlink()
    for change in missing_secrets(paths, settings):  # a new certificate for the old key
        change.dest.write_bytes(change.content)
    assert records.tlsa_text(paths, settings) == first
    acme = dataclasses.replace(settings, tls="acme")
    assert records.tlsa_text(paths, acme) is None


def test_the_account_is_asked_of_acmetool(tmp_path, monkeypatch):
    program = tmp_path / "acmetool"
    program.write_text('#!/bin/sh\n[ "$1" = account-url ] && echo https://ca.example/acct/7\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    acme = dataclasses.replace(config(), tls="acme")
    assert records.account_uri(acme) == "https://ca.example/acct/7"
    assert records.account_uri(config()) is None
    program.unlink()
    assert records.account_uri(acme) is None


# --- what is printed ----------------------------------------------------------------------------------


def test_the_table_has_the_required_records_first(root, servers, capsys):
    publish(servers.all, full_zone())
    assert cli.main(["dns"], root=root) == 0
    rows = [
        line.split() for line in capsys.readouterr().out.splitlines() if line[:3] in ("ok ", "bad")
    ]
    needs = [row[1] for row in rows]
    assert needs == sorted(needs, reverse=True) and set(needs) == {"required", "recommended"}
    assert ["ok", "required", "MX", DOMAIN, "10", f"{DOMAIN}."] in rows


def test_every_answer_is_told_if_asked_for(root, servers, capsys):
    publish(servers.all, full_zone())
    servers.second.text = HEAD
    assert cli.main(["dns", "--verbose"], root=root) == 1
    said = capsys.readouterr().out
    assert f"ns1.example.org (127.0.0.2) answers: 10 {DOMAIN}." in said
    assert "ns2.example.org (127.0.0.3) answers: NXDOMAIN" in said
    assert f"127.0.0.1 answers: 10 {DOMAIN}." in said


def test_ctrl_c_ends_the_watch(root, servers, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "pause", interrupt)
    assert cli.main(["dns", "--watch"], root=root) == 130
