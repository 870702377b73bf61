"""Why sources have failed: against a model that keeps everything, and in how little memory."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_resume.core import failure_log
from ray_resume.core.failure_log import FailureLog
from ray_resume.core.wording import counted

# It needs none of the libraries whose oldest versions are tested.
pytestmark = pytest.mark.long

FAILURES = st.tuples(
    st.integers(0, 3), st.integers(0, 4), st.integers(1, 9), st.sampled_from("abc")
)


@given(st.lists(FAILURES | st.integers(0, 3)))
def test_a_failure_log_is_like_lists(steps: list[tuple[int, int, int, str] | int]) -> None:
    """A number forgets that source. Anything else is a failure."""
    log, model = FailureLog(), dict[int, list[tuple[int, int, str]]]()
    for step in steps:
        if isinstance(step, int):
            log.forget(step)
            model.pop(step, None)
            continue
        source, total, rows, error = step
        known = model.setdefault(source, [])
        new = total not in [one[0] for one in known]
        assert log.add(source, total, rows, error) == new
        if new:
            known.append((total, rows, error))
    assert set(log.sources()) == set(model)
    for source in range(4):
        known = model.get(source, [])
        rows = sum(one[1] for one in known)
        expected = f"{counted(rows, 'row')} failed, the first in {known[0][2]}" if known else None
        assert log.why(source) == expected


def test_one_reason_for_all_is_kept_once() -> None:
    tracemalloc.start()
    log, count = FailureLog(), 20_000
    for source in range(count):
        log.add(source, 1 << 63, 7, "".join(["no such bucket ", "x" * 1000]))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 300 * count


def test_many_reasons_are_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure_log, "_ALL_CHARS", 5000)
    log = FailureLog()
    for source in range(100):
        log.add(source, 1, 1, f"{source} is bad: " + "x" * 1000)
    whole = [source for source in log.sources() if len(log.why(source) or "") > 1000]
    assert whole == [0, 1, 2, 3]
    for source in range(4, 100):
        why = log.why(source) or ""
        assert f"in {source} is bad: xxx" in why
        assert why.endswith("…")
    log.add(100, 1, 1, "short")
    assert log.why(100) == "1 row failed, the first in short"
