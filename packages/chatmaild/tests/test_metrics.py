# SPDX-License-Identifier: MIT
"""Counting, the OpenMetrics text, and the socket."""

import asyncio
import socket
import threading

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from chatmaild import metrics
from chatmaild.metrics import Counter, Gauge, Histogram


def lines(registry):
    return metrics.exposition(registry).splitlines()


def test_a_counter_without_labels_begins_at_zero_and_grows():
    registry = []
    counter = Counter("chatmail_made", "Things made.", registry=registry)
    assert "chatmail_made_total 0" in lines(registry)
    counter.inc()
    counter.inc(by=2)
    assert lines(registry) == [
        "# TYPE chatmail_made counter",
        "# HELP chatmail_made Things made.",
        "chatmail_made_total 3",
        "# EOF",
    ]


def test_labels_are_values_in_the_order_of_their_names():
    registry = []
    counter = Counter("chatmail_mail", "Mail.", ("direction", "verdict"), registry=registry)
    counter.inc("incoming", "accepted")
    counter.inc("incoming", 'so "called"\n\\')
    assert 'chatmail_mail_total{direction="incoming",verdict="accepted"} 1' in lines(registry)
    assert r'verdict="so \"called\"\n\\"} 1' in metrics.exposition(registry)
    assert counter.value("incoming", "accepted") == 1
    assert counter.numbers()["incoming", "accepted"] == 1
    with pytest.raises(ValueError):
        counter.inc("incoming")


def test_series_beyond_the_bound_are_counted_together():
    registry = []
    counter = Counter("chatmail_many", "Many.", ("who",), registry=registry)
    for number in range(10 * metrics.MAX_SERIES):
        counter.inc(str(number))
    counter.inc("0")
    series = [line for line in lines(registry) if line.startswith("chatmail_many_total")]
    assert len(series) == metrics.MAX_SERIES + 1
    assert counter.value("0") == 2
    assert counter.value("other") == 9 * metrics.MAX_SERIES


def test_a_gauge_is_set_or_read_when_asked():
    registry = []
    Gauge("chatmail_set", "Set.", ("kind",), registry=registry).set(2.5, "a")
    answers = iter([7, None])
    gauge = Gauge("chatmail_read", "Read.", read=lambda: next(answers), registry=registry)
    text = metrics.exposition(registry)
    assert 'chatmail_set{kind="a"} 2.5\n' in text and "chatmail_read 7\n" in text
    assert "chatmail_read 7" not in metrics.exposition(registry)

    def fail():
        raise OSError

    gauge.read = fail
    assert "\nchatmail_read " not in metrics.exposition(registry)


def test_a_histogram_counts_each_number_in_all_buckets_above_it():
    registry = []
    histogram = Histogram("chatmail_seconds", "Wait.", buckets=(0.5, 1), registry=registry)
    for number in (0.1, 0.5, 0.75, 3):
        histogram.observe(number)
    assert lines(registry)[2:] == [
        'chatmail_seconds_bucket{le="0.5"} 2',
        'chatmail_seconds_bucket{le="1.0"} 3',
        'chatmail_seconds_bucket{le="+Inf"} 4',
        "chatmail_seconds_count 4",
        "chatmail_seconds_sum 4.35",
        "# EOF",
    ]


def test_a_strict_reader_takes_all_kinds():
    registry = []
    Counter("chatmail_a", 'A "quoted"\nhelp.', ("x",), registry=registry).inc('1"\n\\')
    Gauge("chatmail_b", "B.", registry=registry).set(1e9)
    histogram = Histogram("chatmail_c_seconds", "C.", ("x",), buckets=(0.1, 10), registry=registry)
    histogram.observe(0.05, "y")
    families = list(text_string_to_metric_families(metrics.exposition(registry)))
    assert [(item.name, item.type) for item in families] == [
        ("chatmail_a", "counter"),
        ("chatmail_b", "gauge"),
        ("chatmail_c_seconds", "histogram"),
    ]
    assert families[0].samples[0].labels == {"x": '1"\n\\'}
    assert families[1].samples[0].value == 1e9


def test_threads_lose_no_count():
    counter = Counter("chatmail_threads", "Threads.", registry=[])
    threads = [
        threading.Thread(target=lambda: [counter.inc() for _ in range(5000)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.value() == 40000


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
def test_who_connects_is_told_everything_and_the_socket_outlives_the_service(tmp_path, family):
    registry = []
    Counter("chatmail_made", "Things made.", registry=registry).inc()
    listening = socket.socket(family)
    listening.bind(str(tmp_path / "m") if family == socket.AF_UNIX else ("127.0.0.1", 0))
    listening.setblocking(False)
    address = listening.getsockname()

    def ask():
        with socket.socket(family) as client:
            client.settimeout(10)
            client.connect(address)
            with client.makefile("r") as stream:
                return stream.read()

    async def run():
        assert await metrics.start_server({}) is None
        server = await metrics.start_server({"metrics": listening}, registry)
        text = await asyncio.to_thread(ask)
        server.close()
        return text

    assert asyncio.run(run()) == metrics.exposition(registry)
    assert family == socket.AF_INET or (tmp_path / "m").exists()
