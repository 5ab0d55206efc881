# SPDX-License-Identifier: MIT
"""The notifier as a process: events in, requests out to a real server, whatever that does."""

import asyncio
import contextlib
import datetime
import json
import select
import socket
import ssl
import threading
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from pushsink import Sink

from chatmaild import notifier
from chatmaild.devicetokens import DeviceTokens
from chatmaild.notifier import MAX_CONNECTIONS, MAX_LINE, EventReader, Notifier, recipient
from chatmaild.pushqueue import Queue
from chatmaild.users import MailStore

ALICE = "alice1234@chat.example"
BOB = "bob123456@chat.example"
SOON = "from chatmaild import pushqueue\npushqueue.RETRY_SECONDS = (0.02, 0.03, 0.04, 0.05)\n"


def event(user=ALICE, sender=BOB, **more):
    """One line as Dovecot 2.4 writes it."""
    fields = {"user": user, "mail_from": f"<{sender}>", "message_from": f"<{sender}>"}
    data = {
        "event": "mail_delivery_finished",
        "hostname": "alpha",
        "start_time": "2026-01-01T00:00:00.000000Z",
        "end_time": "2026-01-01T00:00:00.000000Z",
        "categories": ["local-delivery"],
        "fields": {**fields, **more},
    }
    return json.dumps(data).encode() + b"\n"


# --- lines of Dovecot -------------------------------------------------------------------------------


def test_the_recipient_of_a_delivery_is_told():
    assert recipient(event()) == ALICE


@pytest.mark.parametrize(
    "fields",
    [
        {"sender": ALICE},
        {"sender": ALICE.upper()},
        {"message_from": f'"Alice" <{ALICE}>'},
        {"message_from": ALICE},
        {"message_from": "", "mail_from": ALICE},
        {"user": ""},
        {"user": 3},
        {"message_from": ["x"]},
        {"error": "no space"},
    ],
)
def test_own_copies_failures_and_nonsense_wake_nobody(fields):
    assert recipient(event(**fields)) is None


def test_who_only_looks_like_the_user_is_somebody_else():
    assert recipient(event(sender=f"x{ALICE}")) == ALICE
    assert recipient(event(message_from=f"<{BOB}>", mail_from=ALICE)) == ALICE


@pytest.mark.parametrize(
    "line",
    [b"", b"x", b"[]", b"{}", b'{"event": "mail_delivery_finished"}', b"[" * 100000, b"\xff" * 9]
    + [event().replace(b"mail_delivery_finished", b"imap_command_finished")],
)
def test_other_lines_are_passed_over(line):
    assert recipient(line) is None


@settings(deadline=None)
@given(
    st.lists(
        st.binary(max_size=40).map(lambda text: text.replace(b"\n", b""))
        | st.sampled_from([event()[:-1], event(sender=ALICE)[:-1], b"x" * (MAX_LINE + 1)])
    ),
    st.lists(st.integers(1, 100_000)),
)
def test_however_lines_are_cut_the_same_users_come_out(lines, sizes):
    data = b"".join(line + b"\n" for line in lines)
    reader, found, place = EventReader(), [], 0
    for size in [*sizes, len(data)]:
        found += reader.receive(data[place : place + size])
        place += size
    assert found == [ALICE] * lines.count(event()[:-1])


def test_an_endless_line_is_not_kept():
    reader = EventReader()
    for _ in range(100):
        assert list(reader.receive(b"x" * 65536)) == []
        assert sum(len(part) for part in reader._parts) <= MAX_LINE
    assert list(reader.receive(b"\n" + event())) == [ALICE]


def test_a_line_of_the_greatest_length_is_read():
    line = event(more="x")
    line = line.replace(b'"x"', b'"' + b"x" * (MAX_LINE - len(line) + 2) + b'"')
    assert len(line) == MAX_LINE + 1
    assert list(EventReader().receive(line)) == [ALICE]
    longer = line.replace(b'"xx', b'"xxx')
    assert list(EventReader().receive(longer + event(user=BOB, sender=ALICE))) == [BOB]


# --- the process ------------------------------------------------------------------------------------


@pytest.fixture
def sink():
    sink = Sink()
    yield sink
    sink.close()


@pytest.fixture
def store(tmp_path):
    store = MailStore(tmp_path / "mail")
    store.create(ALICE, "secret")
    store.create(BOB, "secret")
    return store


@pytest.fixture
def tokens(store):
    tokens = DeviceTokens(store)
    tokens.add(ALICE, "openpgp:alice=")
    return tokens


class Process:
    """The service, and what tests say to it."""

    def __init__(self, service):
        self.service = service

    def tell(self, *lines):
        """Connect as Dovecot does, write *lines*, and leave."""
        with self.service.connect("events") as connection:
            connection.sendall(b"".join(lines))

    def numbers(self):
        """All samples without labels, and those with one by (name, value of the label)."""
        found = {}
        text = self.service.ask("metrics", b"").decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = (sample.name, *sample.labels.values()) if sample.labels else sample.name
                found[key] = sample.value
        return found

    def wait(self, name, value, seconds=20):
        """Ask for a number until it is *value*."""
        deadline = time.monotonic() + seconds
        while (now := self.numbers().get(name)) != value:
            assert time.monotonic() < deadline, f"{name} is {now}\n{self.service.log}"


@pytest.fixture
def start(start_service, tokens, tmp_path):
    """Start the service with a URL of a notification server."""

    def start(url, patch="", ini=""):
        queue = str(tmp_path / "queue.sqlite")
        place = f"from pathlib import Path; service.QUEUE = Path({queue!r})\n"
        names = ["metadata", "lastlogin", "events", "metrics"]
        ini = f"notification_url = {url}\n{ini}"
        return Process(start_service("chatmaild.metadata", names, ini, place + patch))

    return start


@pytest.fixture
def process(start, sink):
    return start(sink.url, SOON)


def test_the_raw_token_is_posted_over_one_connection(process, sink):
    process.tell(event())
    assert sink.wait_for(1) == ["openpgp:alice="]
    process.wait("chatmail_notifier_queue", 0)
    for count in range(2, 6):
        process.tell(event())
        sink.wait_for(count)
        process.wait("chatmail_notifier_seconds_count", count)  # the last thing done for an answer
    assert set(sink.tokens) == {"openpgp:alice="} and len(sink.tokens) == 5
    assert sink.paths == {"/notify"}
    assert sink.connections == 1
    numbers = process.numbers()
    assert numbers["chatmail_notifier_deliveries_total"] == 5
    assert numbers["chatmail_notifier_requests_total", "200"] == 5
    assert 0 < numbers["chatmail_notifier_seconds_sum"] < 20


def test_every_token_of_the_user_is_posted_and_nobody_elses(process, sink, tokens):
    tokens.add(ALICE, "second")
    tokens.add(BOB, "bobs")
    process.tell(event(), event(user="nobody123@chat.example"), event(user="../x@y"))
    sink.wait_for(2)
    process.wait("chatmail_notifier_queue", 0)
    assert sorted(sink.tokens) == ["openpgp:alice=", "second"]


def test_an_own_copy_wakes_nobody(process, sink, tokens):
    tokens.add(BOB, "bobs")
    process.tell(event(sender=ALICE), event(user=BOB, sender=ALICE))
    sink.wait_for(1)
    process.wait("chatmail_notifier_queue", 0)
    assert sink.tokens == ["bobs"]


def test_gone_removes_the_token_from_the_user_and_from_no_other(process, sink, tokens):
    tokens.add(ALICE, "gone")
    tokens.add(BOB, "gone")
    sink.answers["gone"] = 410
    process.tell(event())
    sink.wait_for(2)
    process.wait("chatmail_notifier_queue", 0)
    assert tokens.get(ALICE) == ["openpgp:alice="] and tokens.get(BOB) == ["gone"]
    process.tell(event())
    sink.wait_for(3)
    process.wait("chatmail_notifier_queue", 0)
    assert sink.tokens.count("gone") == 1


@pytest.mark.parametrize("failure", [500, 404, 301, 307, "close", "garbage"])
def test_after_any_other_answer_it_is_tried_again(process, sink, failure):
    sink.answers["openpgp:alice="] = [failure, failure, 200, 200, 200]
    process.tell(event())
    process.wait(("chatmail_notifier_requests_total", "200"), 1)
    assert set(sink.tokens) == {"openpgp:alice="} and sink.paths == {"/notify"}
    process.wait("chatmail_notifier_queue", 0)
    assert process.service.log.count("Notification request failed") >= (failure != "close")


def test_after_five_tries_it_is_given_up_and_said(process, sink):
    sink.default = 503
    process.tell(event())
    process.wait(("chatmail_notifier_dropped_total", "deadline"), 1)
    assert len(sink.tokens) == 5
    process.wait("chatmail_notifier_queue", 0)
    assert "notification exceeded deadline, 1 given up" in process.service.log


def test_a_server_that_is_not_there_is_tried_again(start, sink):
    free = socket.socket()
    free.bind(("127.0.0.1", 0))
    process = start(f"http://127.0.0.1:{free.getsockname()[1]}/")
    process.tell(event())
    process.wait(("chatmail_notifier_requests_total", "unreachable"), 1)
    assert process.numbers()["chatmail_notifier_queue"] == 1
    free.close()


def test_a_name_that_cannot_be_resolved_is_tried_again(start):
    process = start("https://notifications.invalid/notify")
    process.tell(event())
    process.wait(("chatmail_notifier_requests_total", "unreachable"), 1)
    assert process.numbers()["chatmail_notifier_queue"] == 1


def test_an_answer_without_end_is_not_read(process, sink):
    sink.default = "flood"
    process.tell(event())
    process.wait(("chatmail_notifier_requests_total", "200"), 1)
    process.wait("chatmail_notifier_queue", 0)


def test_a_service_without_a_server_still_answers_the_dictionaries(start):
    process = start("")
    assert process.service.ask("metadata", b"Lnonsense\t\n") == b"N\n"


def test_neither_tokens_nor_addresses_are_logged(process, sink):
    sink.default = 500
    process.tell(event(), b"nonsense\n", event(user="../x@y"))
    process.wait(("chatmail_notifier_dropped_total", "deadline"), 1)
    log = process.service.log
    assert "Notification request failed, will try again: 500" in log
    assert "alice" not in log and "openpgp" not in log and "chat.example" not in log


# --- what survives ----------------------------------------------------------------------------------


def many(tokens, count):
    """Tokens for Alice and Bob, 32 at most for one user; returned as they will be posted."""
    wanted = []
    for user in (ALICE, BOB):
        for number in range(count // 2):
            tokens.add(user, f"{user[:3]}-{number:02}".ljust(600, "x"))
    for user in (ALICE, BOB):
        wanted += tokens.get(user)
    return set(wanted)


def test_a_kill_loses_nothing_that_was_queued(start, sink, tokens):
    """SIGKILL while the server hangs, then while it answers, at other moments each time."""
    wanted = many(tokens, 60)
    sink.default = "hang"
    process = start(sink.url)
    process.tell(event(), event(user=BOB, sender=ALICE))
    process.wait("chatmail_notifier_queue", len(wanted))
    process.service.restart()
    process.wait("chatmail_notifier_queue", len(wanted))
    process.service.kill()
    sink.default = 200
    answered = set()
    for count in (1, 7, 30):
        sink.tokens.clear()
        process.service.restart()
        sink.wait_for(count)
        process.service.kill()
        answered |= set(sink.tokens)
    sink.tokens.clear()
    process.service.restart()
    process.wait("chatmail_notifier_queue", 0)
    assert answered | set(sink.tokens) == wanted


def test_notifications_of_another_relay_are_sent(start, sink, store, tokens):
    folder = store.path / "pending_notifications"
    folder.mkdir()
    now = int(time.time())
    files = {
        "0" * 32: f"{ALICE}\n{now}\nfirst",
        "1" * 32: f"{ALICE}\n{now - 4 * 3600}\nsecond",
        "2" * 32: f"{ALICE}\n{now - 6 * 3600}\ntoo old",
        "3" * 32 + ".tmp": f"{ALICE}\n{now}\nhalf",
        "4" * 32: "nonsense",
        "5" * 32: f"{ALICE}\nyesterday\nx",
        "6" * 32: f"{ALICE}\n{now}\n\xe9",
        "7" * 32: "",
    }
    for name, content in files.items():
        (folder / name).write_text(content, "utf-8")
    process = start(sink.url)
    process.wait(("chatmail_notifier_requests_total", "200"), 2)
    assert sorted(sink.tokens) == ["first", "second"]
    assert not folder.exists()
    assert "2 notifications of another relay" in process.service.log


# --- bounds -----------------------------------------------------------------------------------------


def test_a_burst_is_merged_and_keeps_nobody_waiting(process, sink, tokens):
    """20,000 deliveries at once; a look-up meanwhile takes its usual time."""
    sink.default = 0.05
    lines = event() * 20_000
    telling = threading.Thread(target=process.tell, args=(lines,))
    begin = time.monotonic()
    telling.start()
    longest = 0.0
    while telling.is_alive():
        asked = time.monotonic()
        assert process.service.ask("metadata", b"Lnonsense\t\n") == b"N\n"
        longest = max(longest, time.monotonic() - asked)
    process.wait("chatmail_notifier_deliveries_total", 20_000)
    assert time.monotonic() - begin < 20
    assert longest < 1
    process.wait("chatmail_notifier_queue", 0)
    assert len(sink.tokens) < 1000


def test_requests_at_a_time_are_bounded(start, sink, tokens):
    wanted = many(tokens, 60)
    sink.default = "hang"
    process = start(sink.url)
    process.tell(event(), event(user=BOB, sender=ALICE))
    sink.wait_for(notifier.FIRST_REQUESTS)
    process.wait("chatmail_notifier_queue", len(wanted))
    assert sink.most_busy == notifier.FIRST_REQUESTS < len(wanted)


def test_connections_are_bounded_and_a_closed_one_makes_room(process, sink):
    held = [process.service.connect("events") for _ in range(MAX_CONNECTIONS)]
    for connection in held:
        connection.sendall(event(sender=ALICE))
    with process.service.connect("events") as one_more:
        assert one_more.recv(1) == b""
    held.pop().close()

    def told():
        with process.service.connect("events") as connection:
            connection.sendall(event())
            return bool(select.select([connection], [], [], 0.2)[0])

    while told():
        pass
    assert sink.wait_for(1) == ["openpgp:alice="]
    for connection in held:
        connection.close()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.binary(max_size=200) | st.sampled_from([b"\n", b"{", b"x" * 70_000])))
def test_any_bytes_end_nothing(shared, chunks):
    with contextlib.suppress(BrokenPipeError):
        shared.tell(*chunks)
    assert shared.service.ask("metadata", b"Lnonsense\t\n") == b"N\n"


@pytest.fixture(scope="module")
def shared(start_shared_service, tmp_path_factory):
    queue = str(tmp_path_factory.mktemp("queue") / "queue.sqlite")
    place = f"from pathlib import Path; service.QUEUE = Path({queue!r})\n"
    names = ["metadata", "lastlogin", "events", "metrics"]
    return Process(start_shared_service("chatmaild.metadata", names, "", place))


# --- no waiting behind others -----------------------------------------------------------------------


@contextlib.asynccontextmanager
async def running(tokens, sink, queue, **settings):
    push = Notifier(tokens, notifier.NotificationServer(sink.url), queue, **settings)
    task = asyncio.create_task(push.serve())
    try:
        yield push
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("retries", [False, True])
def test_tokens_that_hang_do_not_keep_others_waiting(tokens, sink, tmp_path, retries):
    """Five times as many as there are slots, as first tries or as later ones."""
    hanging = [(BOB, f"hang-{number}") for number in range(20)]
    sink.answers.update({token: "hang" for _, token in hanging})
    queue = Queue(tmp_path / "queue.sqlite")
    queue.put(hanging)
    if retries:
        for item in queue.take(False, 99):
            queue.failed(item)
        queue._now = lambda: time.time() + 9  # the first retries are due now
    queue.close()  # it is for one thread

    async def run():
        async with running(tokens, sink, queue, slots=(4, 4), patience=0.1) as push:
            await asyncio.to_thread(sink.wait_for, 4)
            begin = time.monotonic()
            await push.deliveries([ALICE])
            await asyncio.to_thread(sink.wait_until, lambda: "openpgp:alice=" in sink.tokens)
            return time.monotonic() - begin

    waited = asyncio.run(run())
    # all five rounds of hanging first tries give way before; later tries have slots of their own
    assert waited < (0.5 if retries else 3)
    assert sink.most_busy <= 8


def test_without_others_waiting_a_slow_answer_is_waited_for(tokens, sink, tmp_path):
    sink.answers["openpgp:alice="] = 0.5

    async def run():
        queue = Queue(tmp_path / "queue.sqlite")
        async with running(tokens, sink, queue, slots=(1, 1), patience=0.01) as push:
            await push.deliveries([ALICE])
            await asyncio.to_thread(sink.wait_until, lambda: sink.tokens and not sink.busy)
            while queue.length:
                await asyncio.sleep(0)

    asyncio.run(run())
    assert sink.tokens == ["openpgp:alice="]


def test_an_answer_that_does_not_come_in_time_is_a_failure(tokens, sink, tmp_path):
    sink.default = "hang"

    async def run():
        queue = Queue(tmp_path / "queue.sqlite")
        async with running(tokens, sink, queue, request_seconds=0.1) as push:
            before = notifier.REQUESTS.value("timeout")
            await push.deliveries([ALICE])
            while notifier.REQUESTS.value("timeout") == before:
                await asyncio.sleep(0)
            assert queue.length == 1

    asyncio.run(run())


# --- TLS and proxy ----------------------------------------------------------------------------------


def certificate(folder):
    """A self-signed certificate for 127.0.0.1; paths of certificate and key."""
    import ipaddress

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "sink")])
    now = datetime.datetime.now(datetime.timezone.utc)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, False)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def secure_sink(tmp_path):
    cert, key = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    sink = Sink(context)
    yield sink
    sink.close()


def test_a_server_nobody_vouches_for_gets_no_token(start, secure_sink):
    process = start(secure_sink.url)
    process.tell(event())
    process.wait(("chatmail_notifier_requests_total", "unreachable"), 1)
    assert secure_sink.tokens == []
    assert "certificate verify failed" in process.service.log


def test_tls_of_a_trusted_server_and_through_a_proxy(start, secure_sink, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    asked = []
    listening = socket.create_server(("127.0.0.1", 0))

    def proxy():
        client, _ = listening.accept()
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += client.recv(4096)
        asked.append(head.split(b"\r\n")[0].decode())
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        server = socket.create_connection(("127.0.0.1", secure_sink.port))
        pairs = {client: server, server: client}
        while True:
            for source in select.select(pairs, [], [])[0]:
                data = source.recv(65536)
                if not data:
                    client.close()
                    server.close()
                    return
                pairs[source].sendall(data)

    thread = threading.Thread(target=proxy)
    thread.start()
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    process = start(secure_sink.url, ini=f"notification_proxy = {address}")
    process.tell(event())
    process.wait(("chatmail_notifier_requests_total", "200"), 1)
    assert secure_sink.tokens == ["openpgp:alice="]
    assert asked == [f"CONNECT 127.0.0.1:{secure_sink.port} HTTP/1.1"]
    process.service.kill()
    thread.join(10)
    listening.close()
