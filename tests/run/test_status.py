"""The text of a status, and how it is made of counts."""

from __future__ import annotations

import pytest

from ray_resume.core.wording import duration
from ray_resume.run.progress import Counts
from ray_resume.run.status import StatusKeeper


def test_a_status_tells_all_that_is_known_and_leaves_out_the_rest() -> None:
    keeper = StatusKeeper(total=60, skipped=20, quarantined=0)
    first = keeper.of(Counts(sources=40, pass_number=1), 0.0)
    assert str(first) == "20 of 60 sources (33 %) completed, 20 of them before, 0 rows"
    for now, done in ((10.0, 5), (20.0, 10), (30.0, 15)):
        counts = Counts(
            sources=40,
            pass_number=1,
            completed=done,
            committed=done - 1,
            failed=1,
            rows_read=1000 * done,
            rows_in_flight=500,
            rows_at_risk=1500,
        )
        status = keeper.of(counts, now)
    # 24 sources are left, at one in two seconds: the failed one is not executed again.
    assert str(status) == (
        "34 of 60 sources (56 %) completed, 20 of them before, 1 failed, 15,500 rows, "
        "500 rows/s, 0.5 sources/s, 48 s left, 1,500 rows at risk"
    )


def test_a_further_pass_begins_a_new_estimate() -> None:
    keeper = StatusKeeper(total=40, skipped=0, quarantined=2)
    for now, done in ((0.0, 0), (10.0, 10), (20.0, 20)):
        status = keeper.of(Counts(sources=38, pass_number=1, completed=done), now)
    assert status.left_s == pytest.approx(18)
    status = keeper.of(Counts(sources=38, pass_number=2, completed=20), 21.0)
    assert status.left_s is None
    assert str(status).endswith("2 quarantined, 0 rows, pass 2")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.6, "1 min 0 s"),
        (125, "2 min 5 s"),
        (12_000, "3 h 20 min"),
        (187_200, "2 d 4 h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
