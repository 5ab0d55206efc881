# SPDX-License-Identifier: MIT
"""The limit of new addresses for one source: what a source is, its hour, and the table's bound."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatmaild import sources
from chatmaild.sources import HOUR, MAX_SOURCES, SourceLimiter, source_of


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("fe80::1%eth0", "fe80::2", True),
        ("", "unknown", True),
        ("", "0.0.0.0", False),
    ],
)
def test_a_source_is_an_ipv4_address_or_a_network_of_64_bits(one, other, same):
    assert (source_of(one) == source_of(other)) == same


@given(st.text())
def test_whatever_is_no_address_is_one_source(text):
    assert len(source_of(text)) in (0, 4, 8)


def test_each_source_has_its_share_of_an_hour():
    limiter = SourceLimiter(60)
    assert all(limiter.take("192.0.2.1", second) for second in range(60))
    assert not limiter.take("192.0.2.1", 60)
    assert limiter.take("192.0.2.2", 60)
    assert not limiter.take("192.0.2.1", HOUR - 1)
    assert limiter.take("192.0.2.1", HOUR)


def test_what_came_to_nothing_is_given_back():
    limiter = SourceLimiter(1)
    assert limiter.take("192.0.2.1", 0)
    limiter.give_back("192.0.2.1")
    assert limiter.take("192.0.2.1", 1)
    limiter.give_back("198.51.100.1")
    assert not limiter.take("192.0.2.1", 2)


def test_old_sources_are_forgotten():
    limiter = SourceLimiter(60)
    for number in range(100):
        limiter.take(f"192.0.2.{number}", 0)
    limiter.take("198.51.100.1", HOUR)
    assert len(limiter) == 1


def test_any_number_of_sources_takes_a_bounded_amount_of_memory(monkeypatch):
    monkeypatch.setattr(sources, "source_of", bytes.fromhex)  # tracing makes the real one slow
    limiter = SourceLimiter(60)
    tracemalloc.start()
    try:
        for number in range(MAX_SOURCES * 3):
            assert limiter.take(f"20010db8{number:08x}", 0)
        used, _peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(limiter) == MAX_SOURCES
    assert used < 4_000_000, used
