"""Rates and the time left, from any clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_resume.core.pace import Pace

WINDOW_S = 60.0
seconds = st.integers(1, 30).map(float)
counts = st.integers(1, 1000)


def paced(times: list[float], step: float, *, start: float = 0.0) -> Pace:
    """Return a pace whose count has grown by ``step`` at each of ``times``."""
    pace = Pace(WINDOW_S)
    pace.update(start, 0)
    for number, time in enumerate(times, 1):
        pace.update(time, number * step)
    return pace


@given(st.integers(2, 50), seconds, counts, st.floats(0, 1e6), st.floats(0, 1), counts)
def test_a_steady_pace_is_known_whatever_the_warm_up_took(
    lumps: int, every_s: float, step: int, warm_up_s: float, within: float, remaining: int
) -> None:
    times = [warm_up_s + number * every_s for number in range(lumps)]
    pace = paced(times, step)
    now = times[-1] + within * every_s
    assert pace.rate(now) == pytest.approx(step / every_s, rel=1e-3)
    assert pace.left_s(now, remaining) == pytest.approx(remaining * every_s / step, rel=1e-3)


@given(st.integers(2, 20), seconds, counts, st.lists(st.floats(0, 1e5), min_size=2))
def test_the_time_left_never_falls_while_nothing_happens(
    lumps: int, every_s: float, step: int, waits_s: list[float]
) -> None:
    pace = paced([number * every_s for number in range(lumps)], step)
    last = (lumps - 1) * every_s
    left = []
    for wait_s in sorted(waits_s):
        pace.update(last + wait_s, lumps * step)
        left.append(pace.left_s(last + wait_s, 100))
    assert left == sorted(left, key=lambda one: one or 0.0)
    # It looks as if no more was to come.
    assert (pace.left_s(last + 1e6, 100) or 0) >= 0.99 * 1e8 / ((lumps - 1) * step)


@given(seconds, counts, seconds, counts)
def test_what_was_before_the_window_does_not_count(
    slow_s: float, few: int, fast_s: float, many: int
) -> None:
    pace = paced([number * slow_s for number in range(20)], few)
    now, count = 20 * slow_s, 20.0 * few
    while now < 20 * slow_s + WINDOW_S + 2 * fast_s:
        now, count = now + fast_s, count + many
        pace.update(now, count)
    # The slow part's last growth begins the window, at most.
    assert pace.rate(now) == pytest.approx(many / fast_s)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 1000))
def test_a_time_left_is_unknown_or_no_less_than_nothing(grown: list[int], remaining: int) -> None:
    pace, count = Pace(WINDOW_S), 0
    for now, step in enumerate(grown):
        count += step
        pace.update(now, count)
        left_s = pace.left_s(now, remaining)
        assert left_s is None or left_s >= 0
        assert remaining or left_s == 0


def test_nothing_is_known_before_the_second_growth_and_after_a_new_start() -> None:
    pace = paced([5.0], 3)
    assert pace.left_s(6.0, 10) is None
    pace.update(7.0, 6)
    assert pace.left_s(7.0, 3) == pytest.approx(2.0)
    # The next pass begins with what the last one has not completed.
    pace.update(8.0, 0)
    assert pace.left_s(8.0, 3) is None
