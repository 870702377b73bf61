"""Which sources are executed again, and which are found to do the damage."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ray_resume.core.passes import MAX_PASSES, MAX_SUSPECTS, PassPlan, Schedule


def test_one_pass_is_enough_if_nothing_got_lost() -> None:
    schedule = Schedule(3)
    assert schedule.next() == PassPlan(range(3))
    schedule.ended([])
    assert schedule.next() is None


def test_what_got_lost_is_executed_again_then_alone() -> None:
    schedule = Schedule(5)
    schedule.ended([1, 2, 3])
    assert schedule.next() == PassPlan([1, 2, 3], isolated=True)
    schedule.ended([2, 3])
    assert schedule.next() == PassPlan([2, 3], isolated=True)
    schedule.ended([2, 3])
    assert schedule.next() == PassPlan([2], isolated=True)
    schedule.ended([2, 3])
    assert schedule.next() == PassPlan([3], isolated=True)
    schedule.ended([2])
    assert schedule.next() is None
    assert schedule.lost == {2: None}


def test_a_source_with_failed_rows_is_not_executed_again() -> None:
    schedule = Schedule(3)
    schedule.ended([0, 1], failed=[1])
    assert schedule.next() == PassPlan([0], isolated=True)
    schedule.ended([1], failed=[1])
    assert schedule.next() is None
    assert schedule.lost == {}


def test_those_who_wait_for_others_are_executed_again_and_never_to_blame() -> None:
    schedule = Schedule(3)
    schedule.ended([0, 1, 2], failed=[1], waiting=[0])
    assert schedule.next() == PassPlan([0, 2], isolated=True)
    schedule.ended([0, 1, 2], failed=[1], waiting=[0])
    assert schedule.next() == PassPlan([2], isolated=True)
    schedule.ended([0, 1, 2], failed=[1], waiting=[])
    assert schedule.next() is None
    assert schedule.lost == {2: None}


def test_after_a_crash_the_others_go_on_and_the_culprit_is_found() -> None:
    schedule = Schedule(100)
    schedule.ended(range(10, 100), crash="worker died")
    assert schedule.next() == PassPlan(list(range(10, 100)), isolated=True, tolerant=True)
    schedule.ended([50, 60])
    assert schedule.next() == PassPlan([50, 60], isolated=True)
    schedule.ended([50, 60], crash="worker died")
    assert schedule.next() == PassPlan([50], isolated=True)
    schedule.ended([50, 60], crash="worker died")
    assert schedule.next() == PassPlan([60], isolated=True)
    schedule.ended([50])
    assert schedule.next() is None
    assert schedule.lost == {50: "worker died"}


def test_a_single_source_is_not_executed_more_often_than_needed() -> None:
    schedule = Schedule(1)
    schedule.ended([0], crash="worker died")
    assert schedule.next() == PassPlan([0], isolated=True)
    schedule.ended([0], crash="worker died")
    assert schedule.next() is None
    assert schedule.lost == {0: "worker died"}


def test_many_that_got_lost_are_not_tried_one_by_one() -> None:
    schedule = Schedule(MAX_SUSPECTS + 1)
    everything = range(MAX_SUSPECTS + 1)
    schedule.ended(everything)
    schedule.ended(everything)
    assert schedule.next() is None
    assert schedule.lost == {}


def test_an_error_that_was_tolerated_is_raised_in_the_end() -> None:
    schedule = Schedule(MAX_SUSPECTS + 1)
    everything = range(MAX_SUSPECTS + 1)
    schedule.ended(everything, crash="worker died")
    schedule.ended(everything)
    assert schedule.next() == PassPlan(list(everything), isolated=True, tolerant=False)
    schedule.ended(everything)
    assert schedule.next() is None


@given(st.integers(1, 30), st.data())
def test_it_ends_and_blames_only_what_got_lost_alone(count: int, data: st.DataObject) -> None:
    schedule = Schedule(count)
    pending = set(range(count))
    passes = 0
    while (plan := schedule.next()) is not None:
        passes += 1
        assert plan.sources
        assert set(plan.sources) <= pending
        pending -= data.draw(st.sets(st.sampled_from(sorted(plan.sources))))
        some = st.sets(st.sampled_from(sorted(pending))) if pending else st.just(set[int]())
        failed = data.draw(some)
        crash = data.draw(st.sampled_from([None, "crash"]))
        before = dict(schedule.lost)
        schedule.ended(pending, failed=failed, waiting=data.draw(some) - failed, crash=crash)
        new = schedule.lost.keys() - before.keys()
        assert new <= set(plan.sources) & pending - failed
        assert not new or (len(plan.sources) == 1 and passes > 1)
    assert passes <= MAX_PASSES + MAX_SUSPECTS
