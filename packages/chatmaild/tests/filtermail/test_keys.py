# SPDX-License-Identifier: MIT
"""Key lookups, over real UDP and TCP, with a small DNS server on loopback."""

import asyncio
import contextlib
import socket
import struct

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
from filtermail_relay import ed25519_pem, public
from test_dkim import ED25519, record_of

from chatmaild.filtermail import keys, resolver
from chatmaild.filtermail.keys import KeyStore, LookupFailed

RECORD = record_of(ED25519).decode()
NAME = "s._domainkey.a.example"
KEY = public(ed25519_pem()).key.public_bytes_raw()


def txt(text, name=NAME, ttl=300):
    pieces = " ".join(f'"{text[at : at + 250]}"' for at in range(0, len(text), 250))
    return dns.rrset.from_text(name + ".", ttl, "IN", "TXT", pieces)


class Resolver:
    """Answers with what `answer(query, over_tcp)` returns; None says nothing."""

    def __init__(self, answer):
        self.answer = answer
        self.questions = []  # (name, over_tcp)

    @contextlib.asynccontextmanager
    async def running(self):
        loop = asyncio.get_running_loop()
        outer = self

        class Udp(asyncio.DatagramProtocol):
            def connection_made(self, transport):
                self.transport = transport

            def datagram_received(self, data, addr):
                for wire in outer.wires(data, False):
                    self.transport.sendto(wire, addr)

        async def tcp(reader, writer):
            (size,) = struct.unpack(">H", await reader.readexactly(2))
            for wire in outer.wires(await reader.readexactly(size), True):
                writer.write(struct.pack(">H", len(wire)) + wire)
            await writer.drain()
            writer.close()

        udp_socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp_socket.bind(("127.0.0.1", 0))
        address = udp_socket.getsockname()
        transport, _ = await loop.create_datagram_endpoint(Udp, sock=udp_socket)
        server = await asyncio.start_server(tcp, *address)
        try:
            yield address
        finally:
            transport.close()
            server.close()

    def wires(self, data, over_tcp):
        query = dns.message.from_wire(data)
        self.questions.append((query.question[0].name.to_text(True), over_tcp))
        answer = self.answer(query, over_tcp)
        if answer is None:
            return []
        answers = answer if isinstance(answer, list) else [answer]
        return [a if isinstance(a, bytes) else a.to_wire() for a in answers]


def respond(query, *rrsets, rcode=dns.rcode.NOERROR, authority=()):
    response = dns.message.make_response(query)
    response.answer.extend(rrsets)
    response.authority.extend(authority)
    response.set_rcode(rcode)
    return response


def ask(answer, *names, timeout=2.0, clock=None, store_out=None):
    """What get_all() says of *names* (NAME), and the questions the resolver was asked."""

    async def run():
        resolver = Resolver(answer)
        async with resolver.running() as address:
            store = KeyStore(address, timeout, *([clock] if clock else []))
            if store_out is not None:
                store_out.append(store)
            return await store.get_all(names or (NAME,)), resolver.questions

    return asyncio.run(run())


def test_a_key_is_found():
    found, questions = ask(lambda query, tcp: respond(query, txt(RECORD)))
    assert found[NAME][0].key.public_bytes_raw() == KEY
    assert questions == [(NAME, False)]


def test_strings_are_joined_and_unusable_records_left_out():
    split = dns.rrset.from_text(
        NAME + ".", 300, "IN", "TXT", '"v=spf1 -all"', f'"{RECORD[:20]}" "{RECORD[20:]}"', '"x"'
    )
    found, _ = ask(lambda query, tcp: respond(query, split))
    assert len(found[NAME]) == 1


def test_only_so_many_records_are_considered():
    texts = [f'"v=DKIM1; n={number}; {RECORD[8:]}"' for number in range(9)]
    many = dns.rrset.from_text(NAME + ".", 300, "IN", "TXT", *texts)
    found, _ = ask(lambda query, tcp: respond(query, many))
    assert len(found[NAME]) == keys.MAX_RECORDS


def test_an_alias_is_followed():
    alias = dns.rrset.from_text(NAME + ".", 300, "IN", "CNAME", "k.provider.example.")
    found, _ = ask(lambda query, tcp: respond(query, alias, txt(RECORD, "k.provider.example")))
    assert len(found[NAME]) == 1


def test_a_truncated_answer_is_asked_for_again_over_tcp():
    def answer(query, over_tcp):
        response = respond(query, txt(RECORD)) if over_tcp else respond(query)
        response.flags |= 0 if over_tcp else dns.flags.TC
        return response

    found, questions = ask(answer)
    assert len(found[NAME]) == 1
    assert questions == [(NAME, False), (NAME, True)]


@pytest.mark.parametrize(
    "answer",
    [
        lambda query, tcp: respond(query, rcode=dns.rcode.NXDOMAIN),
        lambda query, tcp: respond(query),
        lambda query, tcp: respond(query, txt("v=DKIM1; p=")),
        lambda query, tcp: respond(query, txt("hello")),
        lambda query, tcp: respond(query, txt(RECORD, "other.example")),
        lambda query, tcp: respond(query, dns.rrset.from_text(NAME + ".", 9, "IN", "A", "1.2.3.4")),
        lambda query, tcp: respond(
            query, dns.rrset.from_text(NAME + ".", 9, "IN", "CNAME", "nowhere.example.")
        ),
    ],
)
def test_no_usable_key_is_an_answer(answer):
    assert ask(answer)[0] == {NAME: ()}


def _loop(query, tcp):
    return respond(
        query, *(
            dns.rrset.from_text(a, 9, "IN", "CNAME", b)
            for a, b in ((NAME + ".", "x.example."), ("x.example.", NAME + "."))
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    "answer",
    [
        lambda query, tcp: respond(query, rcode=dns.rcode.SERVFAIL),
        lambda query, tcp: respond(query, rcode=dns.rcode.REFUSED),
        lambda query, tcp: None,
        lambda query, tcp: b"garbage",
        lambda query, tcp: b"",
        lambda query, tcp: b"\0" * 12,
        lambda query, tcp: query,
        lambda query, tcp: respond(dns.message.make_query(NAME, "TXT"), txt(RECORD)),  # other id
        lambda query, tcp: respond(
            dns.message.make_query("x.example", "TXT", id=query.id), txt(RECORD)
        ),
        _loop,
    ],
)
def test_what_is_no_answer_is_a_temporary_failure(answer):
    assert ask(answer, timeout=0.2)[0] == {NAME: None}


def test_garbage_before_the_answer_does_not_disturb():
    found, _ = ask(lambda query, tcp: [b"garbage", b"", query, respond(query, txt(RECORD))])
    assert len(found[NAME]) == 1


def test_tcp_that_fails_is_a_temporary_failure():
    def answer(query, over_tcp):
        response = respond(query)
        response.flags |= dns.flags.TC
        return b"garbage" if over_tcp else response

    assert ask(answer)[0] == {NAME: None}


def test_no_resolver_is_a_temporary_failure():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused:
        unused.bind(("127.0.0.1", 0))
        address = unused.getsockname()

    async def run():
        return await KeyStore(address, 2.0).get_all((NAME,))

    assert asyncio.run(run()) == {NAME: None}


def test_an_unanswered_question_is_repeated(monkeypatch):
    monkeypatch.setattr(resolver, "RESEND_AFTER", 0.05)
    seen = []

    def answer(query, over_tcp):
        seen.append(query.id)
        return respond(query, txt(RECORD)) if len(seen) == 3 else None

    found, questions = ask(answer)
    assert len(found[NAME]) == 1 and len(questions) == 3


def serve(answer, step, clock=lambda: 0.0, timeout=2.0):
    """Run `step(store, resolver)` beside a resolver."""

    async def run():
        resolver = Resolver(answer)
        async with resolver.running() as address:
            return await step(KeyStore(address, timeout, clock), resolver)

    return asyncio.run(run())


def test_a_key_is_remembered_as_long_as_the_dns_says():
    now = [0.0]

    async def step(store, resolver):
        counts = []
        for now[0] in (0, 299, 301):
            assert len(await store.get(NAME)) == 1
            counts.append(len(resolver.questions))
        return counts

    counts = serve(lambda q, t: respond(q, txt(RECORD, ttl=300)), step, lambda: now[0])
    assert counts == [1, 1, 2]


def test_an_old_key_is_asked_for_once_more_but_not_for_every_message():
    now = [0.0]
    records = [record_of(ED25519).decode(), "v=DKIM1; p="]

    def answer(query, tcp):
        return respond(query, txt(records[0], ttl=10**6))

    async def step(store, resolver):
        assert not store.may_refresh((NAME,))  # nothing is known that could be old
        await store.get(NAME)
        now[0] = keys.REFRESH_AFTER - 1
        assert not store.may_refresh((NAME,))
        now[0] = keys.REFRESH_AFTER + 1
        del records[0]  # the key is withdrawn
        assert store.may_refresh((NAME,))
        assert len(await store.get(NAME)) == 1
        assert await store.refresh((NAME,)) == {NAME: ()}
        return len(resolver.questions)

    assert serve(answer, step, lambda: now[0]) == 2


def test_a_flood_of_doubts_costs_one_question_a_name_and_interval():
    """Whether the resolver says the same again or nothing at all."""
    now = [0.0]

    async def step(store, resolver):
        await store.get(NAME)
        for now[0] in (100, 100 + keys.REFRESH_AFTER / 2, 200, 1000, 1001):
            for _ in range(50):
                if store.may_refresh((NAME,)):
                    found = await asyncio.gather(*(store.refresh((NAME,)) for _ in range(20)))
                    assert all(len(answers[NAME]) == 1 for answers in found)
        return len(resolver.questions)

    answer = lambda q, t: respond(q, txt(RECORD, ttl=10**6)) if now[0] < 1000 else None  # noqa: E731
    assert serve(answer, step, lambda: now[0], timeout=0.2) == 4


def test_who_doubts_while_the_question_is_under_way_waits_for_its_answer():
    now = [0.0]
    records = [RECORD, "v=DKIM1; p="]

    async def step(store, resolver):
        await store.get(NAME)
        now[0] = keys.REFRESH_AFTER
        first = asyncio.create_task(store.refresh((NAME,)))
        await asyncio.wait([first], timeout=0)
        assert store.may_refresh((NAME,))
        del records[0]
        assert await store.refresh((NAME,)) == await first == {NAME: ()}
        return len(resolver.questions)

    assert serve(lambda q, t: respond(q, txt(records[0])), step, lambda: now[0]) == 2


def test_a_new_key_that_is_not_to_be_remembered_replaces_the_old_one_all_the_same():
    now = [0.0]

    async def step(store, resolver):
        await store.get(NAME)
        now[0] = keys.REFRESH_AFTER
        assert len((await store.refresh((NAME,)))[NAME]) == 1
        return len(store)

    answer = lambda q, t: respond(q, txt(RECORD, ttl=0 if now[0] else 999))  # noqa: E731
    assert serve(answer, step, lambda: now[0]) == 0


def test_no_key_is_remembered_briefly_and_failure_not_at_all():
    now = [0.0]
    soa = dns.rrset.from_text("a.example.", 9999, "IN", "SOA", "a. b. 1 2 3 4 9999")
    rcodes = [dns.rcode.NXDOMAIN, dns.rcode.SERVFAIL, dns.rcode.NXDOMAIN]

    def answer(query, tcp):
        return respond(query, rcode=rcodes.pop(0), authority=[soa])

    async def step(store, resolver):
        assert await store.get(NAME) == ()
        now[0] = keys.NEGATIVE_TTL - 1
        assert await store.get(NAME) == ()
        now[0] = keys.NEGATIVE_TTL + 1
        with pytest.raises(LookupFailed):
            await store.get(NAME)
        assert await store.get(NAME) == ()
        return len(resolver.questions)

    assert serve(answer, step, lambda: now[0]) == 3


def test_a_ttl_of_zero_is_not_remembered_and_a_huge_one_not_for_ever():
    now = [0.0]

    async def step(store, resolver):
        for now[0] in (0, keys.MAX_TTL + 1):
            await store.get(NAME)
            await store.get(NAME)
        return len(resolver.questions)

    assert serve(lambda q, t: respond(q, txt(RECORD, ttl=0)), step, lambda: now[0]) == 4
    assert serve(lambda q, t: respond(q, txt(RECORD, ttl=10**8)), step, lambda: now[0]) == 2


def test_who_asks_at_the_same_time_shares_one_question():
    async def step(store, resolver):
        found = await asyncio.gather(*(store.get(NAME) for _ in range(50)))
        assert {len(keys) for keys in found} == {1}
        return resolver.questions

    assert serve(lambda q, t: respond(q, txt(RECORD)), step) == [(NAME, False)]


def test_who_gives_up_does_not_take_the_answer_from_others():
    async def step(store, resolver):
        first = asyncio.create_task(store.get(NAME))
        second = asyncio.create_task(store.get(NAME))
        await asyncio.wait([first], timeout=0)
        first.cancel()
        return len(await second)

    assert serve(lambda q, t: respond(q, txt(RECORD)), step) == 1


def test_the_cache_is_bounded_and_forgets_what_was_not_used(monkeypatch):
    monkeypatch.setattr(keys, "MAX_ENTRIES", 3)

    async def step(store, resolver):
        for name in ("a", "b", "c", "a", "d"):
            await store.get(f"{name}.example")
        assert len(store) == 3
        before = len(resolver.questions)
        await store.get("a.example")
        assert len(resolver.questions) == before
        await store.get("b.example")
        assert len(resolver.questions) == before + 1

    serve(lambda q, t: respond(q, txt(RECORD, q.question[0].name.to_text(True))), step)


def test_questions_at_a_time_are_bounded_and_so_is_the_queue(monkeypatch):
    monkeypatch.setattr(keys, "MAX_QUESTIONS", 4)
    monkeypatch.setattr(keys, "MAX_WAITING", 6)

    async def step(store, resolver):
        names = tuple(f"n{number}.example" for number in range(20))
        task = asyncio.create_task(store.get_all(names))
        await asyncio.wait([task], timeout=0.1)
        assert len(resolver.questions) == 4
        found = await task
        assert set(found.values()) == {None}
        assert not store._running

    serve(lambda q, t: None, step, timeout=0.3)


def test_a_store_that_took_any_answer_would_be_noticed(monkeypatch):
    """The tests above can fail: seed the defect they are there for."""
    monkeypatch.setattr(dns.message.Message, "is_response", lambda self, other: True)
    other = lambda query, tcp: respond(dns.message.make_query(NAME, "TXT"), txt(RECORD))  # noqa: E731
    assert ask(other, timeout=0.5)[0] != {NAME: None}
