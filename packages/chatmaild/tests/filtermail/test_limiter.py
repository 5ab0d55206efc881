# SPDX-License-Identifier: MIT
"""Rate limit: a burst, then one message an interval, for each sender by itself."""

import pytest

from chatmaild.filtermail.limiter import Limiter


def test_a_burst_is_allowed_and_the_next_message_is_not():
    limiter = Limiter(per_minute=60, burst=10)
    assert [limiter.allow("a", 100.0) for _ in range(11)] == [True] * 10 + [False]


def test_refusals_cost_nothing_and_one_interval_later_one_message_is_allowed():
    limiter = Limiter(per_minute=60, burst=2)
    assert limiter.allow("a", 0) and limiter.allow("a", 0)
    assert not any(limiter.allow("a", 0.99) for _ in range(100))
    assert limiter.allow("a", 1.0)
    assert not limiter.allow("a", 1.5)


def test_the_long_run_rate_is_the_limit():
    limiter = Limiter(per_minute=60, burst=10)
    sent = sum(limiter.allow("a", tick / 10) for tick in range(6000))  # ten minutes
    assert 600 <= sent <= 610


def test_senders_do_not_affect_each_other():
    limiter = Limiter(per_minute=1, burst=1)
    assert limiter.allow("a", 0)
    assert not limiter.allow("a", 1)
    assert limiter.allow("b", 1)


def test_the_table_is_bounded_and_forgets_who_is_quiet():
    limiter = Limiter(per_minute=60, burst=10, max_senders=100)
    for number in range(1000):
        assert limiter.allow(f"sender{number}", 0.0)
    assert len(limiter) == 100
    for number in range(100):
        limiter.allow(f"later{number}", 1000.0)
    assert len(limiter) <= 100
    for second in range(2000, 2200, 2):
        limiter.allow("one", float(second))
    assert len(limiter) == 1


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0), (1, 1, 0)])
def test_a_limit_of_nothing_is_an_error(arguments):
    with pytest.raises(ValueError):
        Limiter(*arguments)
