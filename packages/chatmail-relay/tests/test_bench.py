# SPDX-License-Identifier: MIT
"""`chatmail-relay bench` without a relay; tests/test_bench_command.py lets it loose on a real one."""

import contextlib
import http.server
import imaplib
import json
import os
import random
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from chatmail_relay import accounts as administration
from chatmail_relay import bench as package
from chatmail_relay import cli, systemd
from chatmail_relay.bench import accounts, command, frame, limits, machine, mail, usage
from chatmail_relay.paths import Paths
from chatmail_relay.selftest import accounts as throw_away
from chatmail_relay.selftest import net
from chatmail_relay.selftest.report import Wrong
from chatmaild.config import read_settings
from chatmaild.filtermail.limiter import Limiter

DOMAIN = "_a.example"
TARGET = net.Target(DOMAIN, DOMAIN, ("127.0.0.1",))
PACKAGE = Path(__file__).resolve().parents[1]


@pytest.fixture
def root(tmp_path):
    """A machine with settings, and nothing that runs; `root(settings)`."""

    def make(lines=""):
        ini = tmp_path / "etc/chatmail/chatmail.ini"
        ini.parent.mkdir(parents=True, exist_ok=True)
        ini.write_text(f"[params]\nmail_domain = {DOMAIN}\n{lines}")
        (tmp_path / "var/lib/chatmail/doveauth").mkdir(parents=True, exist_ok=True)
        return str(tmp_path)

    make()
    return make


@pytest.fixture
def bench(root):
    """What measurements get, with real mailboxes; `bench(settings)`."""

    def make(lines="", messages=10):
        relay = administration.Relay(Paths(Path(root(lines))))
        made = throw_away.Accounts(TARGET, relay, uses=None)
        senders = limits.Senders(made, relay.config)
        return frame.Bench(relay, TARGET, made, senders, ["toy.service"], messages)

    return make


class Clock:
    """Time that passes by sleeping only."""

    def __init__(self):
        self.now = 1000.0
        self.slept = []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= 0
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(time, "monotonic", made.monotonic)
    monkeypatch.setattr(time, "sleep", made.sleep)
    return made


# --- the relay's limits -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_an_allowance_keeps_within_what_the_relay_counts(seed):
    dice = random.Random(seed)
    per_minute, burst = dice.choice([1, 7, 60, 100000]), dice.choice([1, 2, 10, 1000])
    limiter, allowance = Limiter(per_minute, burst), limits.Allowance(60 / per_minute, burst)
    now = 5000.0
    for _ in range(100):
        count = dice.randint(1, burst)
        now += allowance.wait(count, now)
        for _ in range(count):
            now += dice.random() / 10
            assert limiter.allow("a@b", now)
            now += dice.random() / 10  # until its answer is here
            allowance.take(now)


def test_an_allowance_does_not_wait_without_need():
    allowance = limits.Allowance(1.0, 3)
    assert allowance.wait(3, 50.0) == 0
    for _ in range(3):
        allowance.take(50.0)
    assert allowance.wait(1, 50.0) == 1 and allowance.wait(3, 50.5) == 2.5
    assert allowance.wait(3, 53.0) == 0


def test_messages_are_shared_among_as_many_accounts_as_the_burst_wants(bench, clock):
    made = bench("max_user_send_burst_size = 10")
    shares = []
    for sender, count in made.senders.shares(25):
        shares.append((sender.account.address, count))
        for _ in range(count):
            sender.allowance.take(clock.now)
    assert [count for _address, count in shares] == [10, 10, 5]
    assert len({address for address, _count in shares}) == 3 and clock.slept == []
    assert len(made.accounts.made) == 3


def test_beyond_the_most_accounts_messages_wait_their_turn(bench, clock):
    made = bench("max_user_send_burst_size = 1\nmax_user_send_per_minute = 60")
    for sender, _count in made.senders.shares(3 * limits.MOST_SENDERS):
        sender.allowance.take(clock.now)
    assert len(made.accounts.made) == limits.MOST_SENDERS
    assert sum(clock.slept) == pytest.approx(2.0)


@pytest.fixture
def metrics(monkeypatch):
    """What the relay counts; the test changes it."""
    told = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            lines = ["# TYPE chatmail_accounts_refused counter"]
            name = "chatmail_accounts_refused_total"
            lines += [f'{name}{{reason="{reason}"}} {count}' for reason, count in told.items()]
            self.send_response(200)
            self.end_headers()
            self.wfile.write("\n".join([*lines, "# EOF", ""]).encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    monkeypatch.setattr(limits, "METRICS_PORT", server.server_port)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield told
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("source", "limited by max_new_addresses_per_hour = 60"),
        ("load", "limited by max_load_1m = 5"),
        ("memory", "limited by min_available_memory"),
        ("disk", "limited by min_free_disk_space"),
        ("closed", "refused"),
    ],
)
def test_the_limit_that_refuses_is_named(bench, metrics, reason, words):
    config = bench().relay.config
    metrics.update(source=3, load=1, memory=1, disk=1)
    before = limits.refusals()
    metrics[reason] = metrics.get(reason, 0) + 1
    assert str(limits.refused(before, config)).startswith(words)


def test_metrics_that_are_no_http_are_a_trouble(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(limits, "METRICS_PORT", server.getsockname()[1])

        def answer():
            connection = server.accept()[0]
            with connection:
                connection.recv(4096)
                connection.sendall(b"no\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(Wrong, match="metrics on port .* cannot be read: no"):
            limits.refusals()
        thread.join()
    with pytest.raises(Wrong, match="cannot be read: .*refused"):
        limits.refusals()


# --- figures ----------------------------------------------------------------------------------------


def result(measure, figures=("a",), part="memory"):
    units = dict.fromkeys(figures, "s")
    made = frame.Result(frame.Measurement(part, units, lambda _bench: measure))
    made.begin(None)
    return made


def test_the_median_of_the_rounds_counts():
    numbers = iter([3.0, 1.0, 1000.0])
    made = result(lambda: {"a": [next(numbers)]})
    for _ in range(3):
        made.add_round()
    (row,) = made.rows()
    assert row.as_data() == {
        "part": "memory",
        "name": "a",
        "unit": "s",
        "median": 3.0,
        "p95": None,
        "least": 1.0,
        "most": 1000.0,
        "rounds": 3,
        "samples": [3.0, 1.0, 1000.0],
        "trouble": "",
    }
    head, line = frame.table([row])
    assert head.split() == ["median", "p95", "least", "most", "unit"]
    assert line.split() == ["memory:", "a", "3", "-", "1", "1,000", "s"]


def test_the_95th_percentile_needs_samples():
    numbers = [float(number) for number in range(100)]
    assert frame.Row("p", "a", "ms", 1, tuple(numbers), "").p95 == 95.0
    assert frame.Row("p", "a", "ms", 1, tuple(numbers[: frame.LEAST_FOR_P95 - 1]), "").p95 is None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Wrong("limited by x", "wait"), "limited by x; wait"),
        (ConnectionRefusedError(111, "refused"), "[Errno 111] refused; see chatmail-relay status"),
        (administration.AccountError("no user"), "no user; see chatmail-relay status"),
    ],
)
def test_after_a_trouble_the_rounds_before_count_and_none_is_tried_again(error, words):
    asked = []

    def measure():
        asked.append(1)
        if len(asked) == 3:
            raise error
        return {"a": [2.0], "b": [4.0]}

    made = result(measure, ("a", "b"))
    for _ in range(5):
        made.add_round()
    assert len(asked) == 3
    for row in made.rows():
        assert (row.rounds, len(row.samples), row.trouble) == (2, 2, words)
    assert frame.table(made.rows())[-1] == f"memory: after 2 rounds: {words}"
    assert len(frame.table(made.rows())) == 4  # said once


def test_what_cannot_be_prepared_has_no_figure():
    def begin(_bench):
        raise Wrong("registration is closed")

    made = frame.Result(frame.Measurement("new", {"a": "s"}, begin))
    made.begin(None)
    made.add_round()
    (row,) = made.rows()
    assert row.as_data()["median"] is None and row.trouble == "registration is closed"


# --- what units use ---------------------------------------------------------------------------------


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Two services that run and one that does not."""
    one = tmp_path / "cgroup/system.slice/one.service"
    two = tmp_path / "cgroup/system.slice/system-two.slice/two@x.service"
    (one / "inner").mkdir(parents=True)
    two.mkdir(parents=True)
    for group, microseconds, processes in ((one, 1_500_000, "11"), (two, 250_000, "13\n14")):
        (group / "cpu.stat").write_text(f"usage_usec {microseconds}\nuser_usec 1\n")
        (group / "cgroup.procs").write_text(f"{processes}\n")
    (one / "inner/cgroup.procs").write_text("12\n")
    for process in (11, 12, 13):  # 14 has ended
        (tmp_path / f"proc/{process}").mkdir(parents=True)
        (tmp_path / f"proc/{process}/smaps_rollup").write_text("Rss: 9999 kB\nPss:  1024 kB\n")
    monkeypatch.setattr(usage, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(usage, "PROC", tmp_path / "proc")
    states = {
        "one.service": {"ControlGroup": "/system.slice/one.service"},
        "two@x.service": {"ControlGroup": "/system.slice/system-two.slice/two@x.service"},
        "off.service": {"ControlGroup": ""},
        "gone.service": {"ControlGroup": "/system.slice/gone.service"},
    }
    monkeypatch.setattr(systemd, "properties", lambda units, *_: {u: states[u] for u in units})
    return list(states)


def test_processor_time_and_memory_are_those_of_the_units_that_run(groups):
    assert usage.cpu_seconds(groups) == {"one.service": 1.5, "two@x.service": 0.25}
    assert usage.memory(groups) == 3.0


def test_without_control_groups_there_is_no_figure(groups):
    for read in (usage.cpu_seconds, usage.memory):
        with pytest.raises(Wrong, match="no control groups"):
            read(["off.service", "gone.service"])


def test_a_unit_that_was_started_counts_from_its_start():
    before = {"a": 5.0, "restarted": 9.0, "stopped": 3.0}
    after = {"a": 5.5, "restarted": 1.0, "new": 0.25}
    assert usage.spent(before, after) == 1.75


# --- accounts ---------------------------------------------------------------------------------------


@pytest.fixture
def imap(monkeypatch):
    """Every login, in a list; the test says in `limit` how many new addresses there may be."""

    class Session:
        logins = []
        limit = 1000
        closed = 0
        over = False

        def __init__(self, target, port):
            assert (target, port) == (TARGET, 993)

        def login(self, address, password):
            if len({*self.logins, address}) > Session.limit:
                raise imaplib.IMAP4.error("[AUTHENTICATIONFAILED] Authentication failed.")
            self.logins.append(address)

        def logout(self):
            self.shutdown()

        def shutdown(self):
            assert not self.over  # imaplib's fails the second time
            self.over = True
            Session.closed += 1

    monkeypatch.setattr(throw_away, "Imap", Session)
    return Session


def begun(measurements, part, figure, made):
    (found,) = [item for item in measurements if item.part == part and figure in item.figures]
    running = frame.Result(found)
    running.begin(made)
    return running


def test_logins_to_an_address_that_is_there_make_no_other(bench, imap):
    made = bench()
    running = begun(accounts.MEASUREMENTS, "logins", "existing address", made)
    running.add_round()
    assert running.trouble == "" and len(imap.logins) == 1 + accounts.LOGINS
    assert set(imap.logins) == set(made.relay.mail.taken())
    assert imap.closed == len(imap.logins)


def test_new_addresses_are_limited_and_that_is_said_and_no_figure(bench, imap, metrics):
    made = bench()
    running = begun(accounts.MEASUREMENTS, "logins", "new address", made)
    imap.limit = accounts.NEW_ADDRESSES + 2
    running.add_round()
    metrics["source"] = 1
    running.add_round()
    running.add_round()
    (row,) = running.rows()
    words = "limited by max_new_addresses_per_hour = 60; try again in an hour"
    assert (row.rounds, len(row.samples), row.trouble) == (1, 1, words)
    assert imap.closed == len(imap.logins) + 1  # the refused one as well


def test_what_is_made_by_login_is_deleted_if_the_relay_made_it(bench, imap):
    made = bench()
    addresses = [made.accounts.by_first_login().address for _ in range(3)]
    made.relay.mail.create(addresses[0], "x" * 22)
    assert command.clean_up(made.accounts) == ""
    assert list(made.relay.mail.taken()) == []


def test_with_tokens_new_addresses_are_reserved_and_the_token_goes(bench):
    made = bench("registration = token")
    account = made.accounts.by_first_login()
    made.relay.tokens.claim(account.address, account.password, time.time())
    (token,) = made.relay.tokens.tokens(time.time())
    assert token.max_uses is None and accounts.web.new_path(token.token).endswith(token.token)
    assert command.clean_up(made.accounts) == ""
    assert made.relay.tokens.tokens(time.time()) == []


@pytest.mark.parametrize("figure", ["new address", "one after the other"])
def test_a_relay_that_is_closed_gives_no_new_addresses(bench, imap, figure):
    made = bench("registration = closed")
    running = begun(
        accounts.MEASUREMENTS, "logins" if figure == "new address" else "new", figure, made
    )
    running.add_round()
    assert running.trouble == "registration is closed" and imap.logins == []


@pytest.fixture
def web(monkeypatch, clock):
    """Answers of /new, taken from a list that the test fills; none left is a good one."""
    answers = []
    good = json.dumps({"email": f"x@{DOMAIN}", "password": "p"}).encode()

    def ask(_connection, target, path, method):
        assert (target, path, method) == (TARGET, "/new", "POST")
        clock.now += 0.01
        return answers.pop(0) if answers else net.Answer(200, "application/json", good, "")

    monkeypatch.setattr(accounts, "http_connection", lambda target, port: socket.socket())
    monkeypatch.setattr(accounts, "ask", ask)
    return answers


def test_requests_for_new_keep_to_the_pace_of_the_web_server(bench, web, clock):
    running = begun(accounts.MEASUREMENTS, "new", "one after the other", bench())
    running.add_round()
    running.add_round()
    (row,) = running.rows()
    assert row.samples == pytest.approx((100.0, 100.0))
    # the first five are free, and two more each second
    assert sum(clock.slept) == pytest.approx(2.5, abs=0.1)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            net.Answer(429, "application/json", b'{"reason": "too many"}', ""),
            "limited by max_new_addresses_per_hour = 60; try again in an hour",
        ),
        (net.Answer(429, "text/html", b"", ""), "limited by the web server; try again in a minute"),
        (
            net.Answer(503, "application/json", b'{"reason": "too busy"}', ""),
            "/new answers 503: too busy",
        ),
    ],
)
def test_an_answer_of_new_that_is_no_account_is_no_figure(bench, web, answer, words):
    running = begun(accounts.MEASUREMENTS, "new", "one after the other", bench())
    running.add_round()
    web.append(answer)
    running.add_round()
    (row,) = running.rows()
    assert (row.rounds, row.trouble) == (1, words)


# --- mail -------------------------------------------------------------------------------------------


class Inbox:
    """The client's side of IDLE, and a server that says what the test wants."""

    def __init__(self):
        self.sock, self._server = socket.socketpair()
        self.tags = 0

    def say(self, text):
        self._server.sendall(text)

    def _new_tag(self):
        self.tags += 1
        return b"A%d" % self.tags

    def send(self, data):
        assert data in (b"A%d IDLE\r\n" % self.tags, b"DONE\r\n")
        self.say(b"+ idling\r\n" if b"IDLE" in data else b"A%d OK Idle completed.\r\n" % self.tags)

    def close(self):
        for item in (self.sock, self._server):
            item.close()


@pytest.fixture
def inbox():
    with contextlib.closing(Inbox()) as made:
        yield made


def test_a_client_in_idle_hears_of_mail_until_it_ends(inbox):
    waiting = mail.Idle(inbox)
    assert not waiting.for_mail(0.01) and waiting.exists == 0
    inbox.say(b"* OK Still here\r\n* 3 EX")
    inbox.say(b"ISTS\r\n* 0 RECENT\r\n")
    assert waiting.for_mail(5) and waiting.exists == 3
    inbox.say(b"* 1 RECENT\r\n* 4 EXISTS\r\n")
    assert waiting.end() and waiting.exists == 4


def test_a_session_that_is_over_is_a_trouble(inbox):
    waiting = mail.Idle(inbox)
    inbox._server.close()
    with pytest.raises(Wrong, match="the server ended the session during IDLE"):
        waiting.for_mail(5)


def test_a_server_that_is_silent_is_a_trouble(inbox, monkeypatch):
    monkeypatch.setattr("chatmail_relay.selftest.mail.STEP_SECONDS", 0.02)
    inbox.send = lambda data: None
    with pytest.raises(TimeoutError):
        mail.Idle(inbox)


def test_all_messages_are_waited_for_and_not_for_ever(inbox, monkeypatch):
    monkeypatch.setattr(mail, "LOOK_SECONDS", 0.01)
    waiting = mail.Idle(inbox)
    inbox.say(b"* 2 EXISTS\r\n")
    mail._arrive(inbox, waiting, 2)
    monkeypatch.setattr(mail, "DELIVERY_SECONDS", 0.05)
    with pytest.raises(Wrong, match="not there after"):
        mail._arrive(inbox, mail.Idle(inbox), 3)


@pytest.mark.parametrize("figure", ["delivery", "submission"])
def test_a_message_that_is_refused_is_no_figure(bench, monkeypatch, figure, inbox):
    inbox.response = lambda code: (code, [b"0"])
    inbox.shutdown = lambda: None
    monkeypatch.setattr(throw_away.Account, "imap", lambda self: inbox)
    monkeypatch.setattr(throw_away.Account, "smtp", lambda self: socket.socket())
    monkeypatch.setattr(mail, "send", lambda *_: (450, "4.7.1 Too much mail"))
    monkeypatch.setattr(usage, "cpu_seconds", lambda units: {})
    (found,) = [item for item in mail.MEASUREMENTS if item.part == figure]
    running = frame.Result(found)
    running.begin(bench())
    running.add_round()
    assert running.trouble == "a message is refused: 450 4.7.1 Too much mail"
    assert running.rounds == 0


# --- the machine ------------------------------------------------------------------------------------


def test_the_passes_over_the_mailboxes_change_nothing(bench):
    made = bench()
    store = Path(made.relay.mail.path)
    running = begun(machine.MEASUREMENTS, "storage", "fsreport", made)
    running.add_round()
    assert running.trouble == "there are no mailboxes yet"
    made.accounts.by_root()
    folder = next(store.iterdir()) / "cur"
    folder.mkdir()
    for number in range(50):
        message = folder / f"{number}.host,S=1:2,S"
        message.write_text("x")
        os.utime(message, (0, 0))  # expire would delete it
    before = sorted(store.rglob("*"))
    running = begun(machine.MEASUREMENTS, "storage", "fsreport", made)
    running.add_round()
    assert running.trouble == "" and sorted(store.rglob("*")) == before
    found = {row.name: row.samples[0] for row in running.rows()}
    files = sum(path.is_file() for path in before)
    assert found["fsreport, files"] == pytest.approx(1000 * files / found["fsreport"])
    assert found["fsreport, of the walk"] == pytest.approx(
        found["fsreport"] / found["os.scandir walk"]
    )
    assert machine._walk(store) == files


def test_mailboxes_without_files_give_no_figure(bench):
    made = bench()
    Path(made.relay.mail.path).mkdir(parents=True)
    running = begun(machine.MEASUREMENTS, "storage", "fsreport", made)
    running.add_round()
    assert running.trouble == "there are no files in the mailboxes yet"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo '{\"changed\": []}'", ""),
        ("[ $1 != diff ]", "there is something to do; see chatmail-relay diff"),
        ("[ $1 = diff ] || { echo no way >&2; exit 1; }", "apply failed: no way"),
        ('echo \'{"changed": ["nginx"]}\'', "apply has changed nginx"),
    ],
)
def test_apply_is_measured_only_if_there_is_nothing_to_do(
    bench, tmp_path, monkeypatch, script, words
):
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\n[ "$2" = --json ] || exit 2\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setattr(machine, "PROGRAM", str(program))
    running = begun(machine.MEASUREMENTS, "apply", "nothing to do", bench())
    running.add_round()
    assert running.trouble == words and running.rounds == int(not words)


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture
def run(root, bench, monkeypatch):
    """`run(words, measurements)`: the exit status; `run.made` are the accounts."""
    made = bench()
    monkeypatch.setattr(command, "_bench", lambda paths, messages: made)

    def start(words, measurements):
        monkeypatch.setattr(command, "MEASUREMENTS", measurements)
        return cli.main(["bench", *words], root=root())

    start.made = made
    return start


def counting(part, order):
    """A measurement that makes an account and notes when it is asked."""

    def begin(made):
        made.accounts.by_root()

        def measure():
            order.append(part)
            return {"a": [1.0]}

        return measure

    return frame.Measurement(part, {"a": "s"}, begin)


def left(run):
    return list(run.made.relay.mail.taken())


def test_all_parts_are_measured_in_rounds_and_nothing_stays(run, capsys):
    order = []
    parts = tuple(counting(part, order) for part in ("memory", "apply", "new"))
    assert run(["--rounds=4"], parts) == 0
    rounds = [tuple(order[at : at + 3]) for at in range(0, 12, 3)]
    assert {tuple(sorted(names)) for names in rounds} == {("apply", "memory", "new")}
    assert len(set(rounds)) > 1
    assert left(run) == []
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_parts_may_be_named(run, capsys):
    order = []
    parts = tuple(counting(part, order) for part in ("memory", "apply", "new"))
    assert run(["new", "apply", "--json"], parts) == 0
    assert set(order) == {"new", "apply"} and len(order) == 2 * package.ROUNDS
    rows = json.loads(capsys.readouterr().out)
    assert [(row["part"], row["rounds"]) for row in rows] == [("apply", 5), ("new", 5)]


def breaking(what):
    """A measurement that makes an account and then does *what*."""

    def begin(made):
        made.accounts.by_root()

        def measure():
            what()
            return {"a": [1.0]}

        return measure

    return frame.Measurement("logins", {"a": "s"}, begin)


def fail():
    raise Wrong("limited by x", "wait")


def test_what_could_not_be_measured_is_status_1_and_the_rest_is_there(run, capsys):
    assert run(["--rounds=2"], (breaking(fail), counting("memory", []))) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ["logins:", "a", "-", "-", "-", "-", "s"]
    assert out[2].split()[:3] == ["memory:", "a", "1"]
    assert out[3] == "logins: after 0 rounds: limited by x; wait"
    assert left(run) == []


def test_the_time_is_bounded_wherever_it_waits_and_nothing_stays(run, capsys):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        parts = (breaking(lambda: silent.recv(9)), breaking(fail))
        assert run(["--timeout=0.3", "--json"], parts) == 1
    rows = json.loads(capsys.readouterr().out)
    assert "not done after 0.3 s" in {row["trouble"] for row in rows}
    assert left(run) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_says_what_it_has_and_leaves_nothing(run, capsys, number):
    parts = (breaking(lambda: os.kill(os.getpid(), number)),)
    before = signal.signal(number, signal.default_int_handler)  # a build in the background
    try:
        assert run(["--json"], parts) == 130
    finally:
        signal.signal(number, before)
    out, err = capsys.readouterr()
    assert [row["trouble"] for row in json.loads(out)] == ["interrupted"]
    assert "cleaning up" in err and left(run) == []


def test_an_error_of_ours_leaves_nothing_either(run):
    def defect():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run([], (breaking(defect),))
    assert left(run) == []


def test_accounts_that_stay_are_told_and_status_1(run, monkeypatch, capsys):
    def delete(self, address):
        raise administration.AccountError("in use")

    monkeypatch.setattr(administration.Relay, "delete", delete)
    assert run([], (counting("memory", []),)) == 1
    assert "cleaning up: 1 of 1 accounts are left; see chatmail-relay user list" in (
        capsys.readouterr().err
    )


def test_progress_is_for_terminals(run, monkeypatch, capsys):
    monkeypatch.setattr("chatmaild.progress.SECONDS", 0)
    run(["--rounds=1"], (counting("memory", []),))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    run(["--rounds=1"], (counting("memory", []),))
    assert "round 1 of 1: memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "word",
    ["--rounds=0", "--rounds=21", "--rounds=x", "--rounds=-1", "--messages=0", "--messages=101"]
    + ["--timeout=0", "--timeout=86400", "latency"],
)
def test_what_is_out_of_bounds_is_wrong_usage(root, word, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", word], root=root())
    assert re.search("a number|no such part", capsys.readouterr().err)


def test_without_settings_it_says_how_to_go_on(tmp_path, capsys):
    assert cli.main(["bench"], root=str(tmp_path)) == 1
    assert "not configured yet" in capsys.readouterr().out


def test_it_is_for_root_and_for_a_machine_that_runs(root, monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cli.main(["bench"], root=root()) == 1
    assert "root measures the relay" in capsys.readouterr().err
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert cli.main(["bench"], root=root()) == 1
    assert "no services run here" in capsys.readouterr().err


class Certificate:
    """Of bytes, as tls and certificate have them."""

    def __init__(self, der):
        self.certificate, self._der = self, der

    def public_bytes(self, _encoding):
        return self._der


@pytest.fixture
def served(monkeypatch):
    """What a connection to the relay shows, and what is in force; `served.asked` is at which addresses."""
    asked = []

    def set_up(there, here, addresses=("192.0.2.1",)):
        def resolve(name, own):
            assert own
            if not addresses:
                raise Wrong(f"{name} has no address")
            return addresses

        def secure(target, port, *alpn):
            asked.append(target.addresses)
            if isinstance(there, OSError):
                raise there
            return socket.socket()

        monkeypatch.setattr(command, "resolve", resolve)
        monkeypatch.setattr(command, "secure", secure)
        monkeypatch.setattr(command.tls, "peer", lambda connection: there)
        monkeypatch.setattr(command, "live", lambda paths: here)
        return command._target(None, DOMAIN)

    set_up.asked = asked
    return set_up


def test_the_relay_is_asked_at_its_public_address_or_on_loopback(served):
    assert served(b"x", Certificate(b"x")).addresses == ("192.0.2.1",)
    assert served(b"x", Certificate(b"x"), ()).addresses == ("127.0.0.1",)


@pytest.mark.parametrize(
    ("there", "here", "words"),
    [
        (b"x", Certificate(b"y"), "another certificate than this machine; see chatmail-relay dns"),
        (b"x", None, "another certificate"),
        (ConnectionRefusedError(111, "refused"), None, "port 443: .*; see chatmail-relay status"),
    ],
)
def test_another_machine_is_not_measured(served, there, here, words):
    with pytest.raises(package.BenchError, match=words):
        served(there, here)


def test_an_address_that_is_not_reached_from_within_is_not_needed(served):
    with pytest.raises(package.BenchError):
        served(TimeoutError("timed out"), Certificate(b"x"))
    assert served.asked == [("192.0.2.1",), ("127.0.0.1",)]


def test_every_part_is_measured_completed_and_in_the_manual():
    assert {item.part for item in command.MEASUREMENTS} == set(package.PARTS)
    names = [(item.part, name) for item in command.MEASUREMENTS for name in item.figures]
    assert len(names) == len(set(names))
    completion = (PACKAGE / "completion/chatmail-relay").read_text()
    assert " ".join(sorted(package.PARTS)) in completion
    manual = (PACKAGE / "man/chatmail-relay.8").read_text()
    assert all(f"\n.B {part}\n" in manual for part in package.PARTS)


def test_the_usual_rounds_are_within_the_usual_limit_of_new_addresses(root):
    most = read_settings(Path(root()) / "etc/chatmail/chatmail.ini")[0].max_new_addresses_per_hour
    assert package.ROUNDS * max(accounts.NEW_ADDRESSES, accounts.REQUESTS) <= most
