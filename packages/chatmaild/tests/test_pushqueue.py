# SPDX-License-Identifier: MIT
"""The durable queue: order, merging, retries, bounds of memory and disk, and what a kill leaves."""

import errno
import os
import random
import sqlite3
import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from chatmaild.pushqueue import DEADLINE, MAX_LENGTH, RETRY_SECONDS, Queue

ALICE = "alice1234@chat.example"
BOB = "bob123456@chat.example"
NOW = 1_800_000_000


class Clock:
    now = NOW

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metadata" / "queue.sqlite"


@pytest.fixture
def queue(path, clock):
    return Queue(path, clock)


def tokens(items):
    return [item.token for item in items]


def test_what_is_put_is_taken_in_order_and_once(queue):
    queue.put([(ALICE, "a"), (BOB, "b")])
    queue.put([(ALICE, "c")])
    first, second = queue.take(False, 2)
    assert (first.user, first.token, second.user, second.token) == (ALICE, "a", BOB, "b")
    assert tokens(queue.take(False, 9)) == ["c"]
    assert queue.take(False, 9) == [] and queue.due(False) is None
    assert queue.length == 3
    queue.done(first)
    queue.done(second)
    assert queue.length == 1


def test_nothing_is_opened_or_made_before_there_is_something(queue, path):
    queue.open()
    queue.put([])
    assert queue.take(False, 1) == [] and queue.due(True) is None and queue.length == 0
    assert not path.parent.exists()


def test_a_token_that_waits_for_its_first_try_stands_for_later_messages(queue, clock):
    queue.put([(ALICE, "a"), (ALICE, "b")])
    clock.now += DEADLINE
    queue.put([(ALICE, "a"), (ALICE, "a"), (BOB, "a")])
    assert (queue.length, queue.merged) == (3, 2)
    clock.now += 1  # of "b" the last message is too old, of "a" the first
    assert [(item.user, item.token) for item in queue.take(False, 9)] == [(ALICE, "a"), (BOB, "a")]
    assert queue.expired == 1


def test_a_message_that_comes_while_the_token_is_sent_is_sent_for_itself(queue):
    queue.put([(ALICE, "a")])
    (first,) = queue.take(False, 1)
    queue.put([(ALICE, "a")])
    assert queue.length == 1 and queue.merged == 0
    (second,) = queue.take(False, 1)
    queue.done(first)
    assert queue.length == 1
    queue.failed(first)
    assert queue.take(False, 1) == [] and queue.take(True, 1) == []
    queue.done(second)
    assert queue.length == 0


def test_a_failed_one_is_tried_again_8_64_512_4096_seconds_later_and_then_dropped(queue, clock):
    assert RETRY_SECONDS == (8, 64, 512, 4096)
    queue.put([(ALICE, "a")])
    (item,) = queue.take(False, 1)
    for seconds in (8, 64, 512, 4096):
        assert queue.failed(item)
        assert queue.due(True) == clock.now + seconds
        clock.now += seconds - 1
        assert queue.take(True, 1) == []
        clock.now += 1
        assert queue.take(False, 1) == []
        (item,) = queue.take(True, 1)
    assert item.tries == 4
    assert not queue.failed(item)
    assert (queue.length, queue.expired) == (0, 1)


def test_a_try_that_would_come_after_the_deadline_is_not_made(queue, clock):
    queue.put([(ALICE, "a")])
    (item,) = queue.take(False, 1)
    clock.now += DEADLINE - 7
    assert not queue.failed(item)
    assert (queue.length, queue.expired) == (0, 1)


def test_many_that_are_too_old_do_not_hide_the_others(queue, clock):
    queue.put([(ALICE, str(number)) for number in range(100)])
    clock.now += DEADLINE + 1
    queue.put([(ALICE, "new")])
    assert tokens(queue.take(False, 3)) == ["new"]
    assert queue.expired == 100


def test_a_new_message_makes_a_waiting_retry_due_at_once(queue, clock):
    queue.put([(ALICE, "a")])
    queue.failed(queue.take(False, 1)[0])
    queue.put([(ALICE, "a")])
    assert queue.length == 1
    (item,) = queue.take(False, 1)
    assert item.tries == 0
    clock.now += 9
    assert queue.take(True, 1) == []


def test_all_is_there_for_the_next_process(queue, path, clock):
    queue.put([(ALICE, "a"), (ALICE, "b"), (ALICE, "c")])
    first, second, _third = queue.take(False, 3)
    queue.done(first)
    queue.failed(second)
    queue.close()
    again = Queue(path, clock)
    again.open()
    assert again.length == 2
    assert tokens(again.take(False, 9)) == ["c"]
    clock.now += 8
    assert tokens(again.take(True, 9)) == ["b"]


def test_the_oldest_give_way_when_there_are_too_many(path, clock):
    queue = Queue(path, clock, max_length=100)
    for number in range(150):
        queue.put([(ALICE, str(number))])
    assert (queue.length, queue.overflown) == (100, 50)
    assert tokens(queue.take(False, 999)) == [str(number) for number in range(50, 150)]


def test_the_file_has_a_bound_and_the_newest_are_in_it(path, clock):
    bound = 1 << 20
    queue = Queue(path, clock, max_bytes=bound)
    count = 1000
    for number in range(count):  # four times the bound
        queue.put([(ALICE, f"{number:04}".ljust(4096, "x"))])
        assert path.stat().st_size <= bound
    assert queue.length + queue.overflown == count
    assert queue.overflown > count / 2
    kept = tokens(queue.take(False, count))
    assert [int(token[:4]) for token in kept] == list(range(count - len(kept), count))


def test_the_file_shrinks_again(path, queue):
    queue.put([(ALICE, f"{number:04}".ljust(600, "x")) for number in range(3000)])
    for item in queue.take(False, 3000):
        queue.done(item)
    queue.close()
    assert path.stat().st_size < 100_000
    assert sorted(item.name for item in path.parent.iterdir()) == ["queue.sqlite"]


FILL = """
import resource, sys
from chatmaild.pushqueue import Queue
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
queue = Queue(sys.argv[1])
queue.put([("alice@chat.example", "first")])
before = peak()
for number in range(0, int(sys.argv[2]), 50):
    queue.put([("alice@chat.example", f"{item:06}".ljust(700, "x")) for item in range(number, number + 50)])
items = queue.take(False, 64)
for item in items:
    queue.failed(item)
print(queue.length, queue.overflown, peak() - before)
"""


def test_memory_does_not_grow_with_more_than_the_greatest_number(path):
    """A tenth more than may be queued, of tokens of a real one's size."""
    count = MAX_LENGTH + MAX_LENGTH // 10
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(path), str(count)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    length, overflown, grown = map(int, done.stdout.split())
    assert length == MAX_LENGTH and overflown == count + 1 - MAX_LENGTH
    assert grown < 4096, f"{grown} KiB"
    assert path.stat().st_size < 200 << 20


def test_a_clock_that_went_ahead_keeps_nothing_waiting(path, clock):
    queue = Queue(path, clock)
    clock.now = NOW + 10**6
    queue.put([(ALICE, "a"), (ALICE, "b")])
    queue.failed(queue.take(False, 1)[0])
    queue.close()
    clock.now = NOW
    again = Queue(path, clock)
    again.open()
    assert tokens(again.take(False, 9)) == ["b"] and tokens(again.take(True, 9)) == ["a"]


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + b"x" * 10000])
def test_a_damaged_file_is_set_aside(path, clock, caplog, content):
    path.parent.mkdir()
    path.write_bytes(content)
    queue = Queue(path, clock)
    queue.open()
    assert f"set aside as {path}.damaged" in caplog.text
    assert (path.parent / "queue.sqlite.damaged").read_bytes() == content
    queue.put([(ALICE, "a")])
    assert tokens(queue.take(False, 1)) == ["a"]


def test_a_file_that_is_damaged_later_is_found_out(path, clock, caplog):
    queue = Queue(path, clock)
    queue.put([(ALICE, f"{number:05}".ljust(600, "x")) for number in range(2000)])
    queue.close()
    with open(path, "r+b") as file:
        file.seek(4096 * 50)
        file.write(os.urandom(4096 * 200))
    again = Queue(path, clock)
    again.open()
    assert again.length == 0 and "set aside" in caplog.text
    again.put([(ALICE, "a")])
    assert again.length == 1


def test_a_disk_that_fails_is_an_error_and_no_end(path, clock):
    path.parent.mkdir()
    path.mkdir()
    queue = Queue(path, clock)
    with pytest.raises(OSError) as failed:
        queue.put([(ALICE, "a")])
    assert failed.value.errno == errno.EIO
    path.rmdir()
    queue.put([(ALICE, "a")])
    assert queue.length == 1


def test_a_full_disk_takes_nothing_back_that_was_promised(path, clock):
    queue = Queue(path, clock)
    queue.put([(ALICE, "a")])
    queue._database.execute("PRAGMA max_page_count = 1")
    with pytest.raises(OSError) as failed:
        queue.put([(ALICE, f"{number:05}".ljust(4096, "x")) for number in range(50)])
    assert failed.value.errno == errno.ENOSPC
    assert queue.length + queue.overflown == 1
    queue._database.execute("PRAGMA max_page_count = 1000")
    queue.put([(ALICE, "b")])
    assert tokens(queue.take(False, 9))[-1] == "b"


class Model(RuleBasedStateMachine):
    """Against the simplest queue there is: a dict of (user, token)."""

    users = st.sampled_from([ALICE, BOB])
    names = st.sampled_from("abc")

    @initialize()
    def begin(self):
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.clock = Clock()
        self.queue = Queue(f"{self.folder.name}/queue.sqlite", self.clock)
        self.model = {}  # key -> [tries, due, in flight]
        self.flying = []

    @rule(user=users, token=names)
    def put(self, user, token):
        self.queue.put([(user, token)])
        known = self.model.get((user, token))
        if known is None or known[0] or known[2]:
            self.model[user, token] = [0, self.clock.now, False]

    @rule(again=st.booleans(), count=st.integers(1, 3))
    def take(self, again, count):
        taken = self.queue.take(again, count)
        due = [
            key
            for key, (tries, due, flying) in self.model.items()
            if bool(tries) == again and due <= self.clock.now and not flying
        ]
        assert len(taken) == min(count, len(due))
        for item in taken:
            assert (item.user, item.token) in due
            entry = self.model[item.user, item.token]
            entry[2] = True
            self.flying.append((item, entry))

    @rule(ok=st.booleans(), choice=st.integers(0, 99))
    def settle(self, ok, choice):
        if not self.flying:
            return
        item, entry = self.flying.pop(choice % len(self.flying))
        current = self.model.get((item.user, item.token)) is entry
        entry[2] = False
        if ok:
            self.queue.done(item)
            if current:
                del self.model[item.user, item.token]
        else:
            self.queue.failed(item)
            if current and item.tries == len(RETRY_SECONDS):
                del self.model[item.user, item.token]
            elif current:
                entry[0] += 1
                entry[1] = self.clock.now + RETRY_SECONDS[item.tries]

    @rule(seconds=st.sampled_from([1, 8, 64, 512]))
    def wait(self, seconds):
        self.clock.now += seconds

    @rule()
    def restart(self):
        self.queue.close()
        self.queue = Queue(f"{self.folder.name}/queue.sqlite", self.clock)
        self.queue.open()
        self.flying.clear()
        for entry in self.model.values():
            entry[2] = False

    @invariant()
    def nothing_is_lost(self):
        assert self.queue.length == len(self.model)
        for again in (False, True):
            waiting = [d for t, d, flying in self.model.values() if bool(t) == again and not flying]
            assert self.queue.due(again) == min(waiting, default=None)

    def teardown(self):
        self.queue.close()
        self.folder.cleanup()


Model.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
TestAgainstTheModel = Model.TestCase


WORK = """
import sys
from chatmaild.pushqueue import Queue
queue = Queue(sys.argv[1])
queue.open()
begin = int(sys.argv[2])
for number in range(begin, begin + 100000):
    queue.put([("alice@chat.example", f"{number:07}".ljust(600, "x"))])
    print("put", number, flush=True)
    if number % 3 == 0:
        (item,) = queue.take(False, 1)
        queue.done(item)
        print("done", int(item.token[:7]), flush=True)
"""


def test_a_kill_at_any_point_loses_nothing_that_was_queued_and_revives_nothing(path):
    """Twenty processes, one after the other, each killed wherever it happens to be."""
    chance = random.Random(4)
    put, done = set(), set()
    for begin in range(0, 20 * 100000, 100000):
        process = subprocess.Popen(
            [sys.executable, "-c", WORK, str(path), str(begin)], stdout=subprocess.PIPE, text=True
        )
        said = "".join(process.stdout.readline() for _ in range(chance.randrange(1, 300)))
        process.kill()
        said += process.stdout.read()
        process.stdout.close()
        process.wait()
        # what follows the last line end was cut off by the kill
        for word, number in (line.split() for line in said.split("\n")[:-1]):
            (put if word == "put" else done).add(int(number))
        with sqlite3.connect(path) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            rows = database.execute("SELECT token FROM queue").fetchall()
        kept = {int(token[:7]) for (token,) in rows}
        database.close()
        # the last step may have been made and not been told of: one put, or one done
        assert len(put - done - kept) <= 1, sorted(put - done - kept)
        assert kept & done == set()
        assert len(kept - put) <= 1
        put |= kept
        done |= put - kept
    assert len(put) > 1000
