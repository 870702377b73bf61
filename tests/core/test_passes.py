"""Which sources are executed again, and which are found to do the damage."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_resume.core.passes import MAX_FURTHER_PASSES, MIN_ALONE, PassPlan, PassSchedule

# It needs none of the libraries whose oldest versions are tested.
pytestmark = pytest.mark.long


def again(sources: Sequence[int], *, ignoring: int = 0) -> PassPlan:
    return PassPlan(list(sources), isolated=True, ignore_crashes=ignoring)


def test_one_pass_is_enough_if_nothing_got_lost() -> None:
    schedule = PassSchedule(3)
    assert schedule.next() == PassPlan(range(3))
    schedule.record_result([])
    assert schedule.next() is None
    assert (schedule.lost_alone, schedule.not_tried) == ({}, [])


def test_what_got_lost_is_executed_again_then_alone() -> None:
    schedule = PassSchedule(5)
    schedule.record_result([1, 2, 3])
    assert schedule.next() == again([1, 2, 3])
    schedule.record_result([2, 3])
    assert schedule.next() == again([2])
    schedule.record_result([2, 3])
    assert schedule.next() == again([3])
    schedule.record_result([2])
    assert schedule.next() is None
    assert schedule.lost_alone == {2: None}


def test_a_source_with_failed_rows_is_not_executed_again() -> None:
    schedule = PassSchedule(3)
    schedule.record_result([0, 1], failed=[1])
    assert schedule.next() == again([0])
    schedule.record_result([1], failed=[1])
    assert schedule.next() is None
    assert schedule.lost_alone == {}


def test_after_a_crash_the_others_go_on_and_the_culprit_is_found() -> None:
    schedule = PassSchedule(100)
    schedule.record_result(range(10, 100), crash="worker died")
    assert schedule.next() == again(range(10, 100), ignoring=64)
    schedule.record_result([50, 60])
    assert schedule.next() == again([50])
    schedule.record_result([50, 60], crash="worker died")
    assert schedule.next() == again([60])
    schedule.record_result([50])
    assert schedule.next() is None
    assert schedule.lost_alone == {50: "worker died"}


def test_a_single_source_is_not_executed_more_often_than_needed() -> None:
    schedule = PassSchedule(1)
    schedule.record_result([0], crash="worker died")
    assert schedule.next() == again([0])
    schedule.record_result([0], crash="worker died")
    assert schedule.next() is None
    assert schedule.lost_alone == {0: "worker died"}


def test_sources_without_a_failed_run_come_first_and_others_are_not_split() -> None:
    schedule = PassSchedule(6, failed_runs=[2, 1, 0, 0, 0, 0].__getitem__)
    schedule.record_result(range(6), crash="worker died")
    assert schedule.next() == again(range(6), ignoring=64)
    schedule.record_result([0, 1, 2, 3, 4])
    alone: list[int] = []
    while (plan := schedule.next()) is not None:
        if len(plan.sources) == 1:
            alone += plan.sources
        else:
            # Those that failed before need no group to be suspected.
            assert not set(plan.sources) & {0, 1}
        schedule.record_result([0, 1, 2, 3, 4], crash="worker died")
    assert alone == [2, 3, 4, 1, 0]


def test_a_broken_environment_costs_little_and_blames_few() -> None:
    schedule = PassSchedule(10_000)
    passes = 0
    while (plan := schedule.next()) is not None:
        passes += 1
        assert plan.ignore_crashes <= 500
        schedule.record_result(range(10_000), crash="worker died")
    assert passes == 1 + 1 + 4 + MIN_ALONE + 1
    assert len(schedule.lost_alone) == MIN_ALONE
    assert len(schedule.not_tried) == 10_000 - MIN_ALONE


def test_an_error_that_was_ignored_is_raised_in_the_end() -> None:
    schedule = PassSchedule(100)
    plans = []
    while (plan := schedule.next()) is not None:
        plans.append(plan)
        # One source completes, so that as many as possible are executed alone.
        schedule.record_result(range(1, 100), crash="worker died")
    assert len(plans) == 1 + MAX_FURTHER_PASSES
    assert schedule.not_tried
    # The last pass ignores nothing, and nothing that is lost in it counts.
    assert plans[-1] == again(schedule.not_tried)
    assert not schedule.lost_alone.keys() & set(schedule.not_tried)
    assert {*schedule.lost_alone, *schedule.not_tried} == set(range(1, 100))


@settings(max_examples=50)
@given(st.integers(1, 40), st.data())
def test_it_ends_and_blames_only_what_got_lost_alone(count: int, data: st.DataObject) -> None:
    runs = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    schedule = PassSchedule(count, failed_runs=runs.__getitem__)
    pending = set(range(count))
    passes = 0
    while (plan := schedule.next()) is not None:
        passes += 1
        assert plan.sources
        assert set(plan.sources) <= pending
        assert len(set(plan.sources)) == len(plan.sources)
        pending -= data.draw(st.sets(st.sampled_from(sorted(plan.sources))))
        some = st.sets(st.sampled_from(sorted(pending))) if pending else st.just(set[int]())
        failed = data.draw(some)
        crash = data.draw(st.sampled_from([None, "crash"]))
        before = dict(schedule.lost_alone)
        schedule.record_result(pending, failed=failed, crash=crash)
        new = schedule.lost_alone.keys() - before.keys()
        assert new <= set(plan.sources) & pending - failed
        assert not new or (len(plan.sources) == 1 and passes > 1 and not plan.ignore_crashes)
    assert passes <= 1 + MAX_FURTHER_PASSES
    assert set(schedule.not_tried) <= pending


# --- Whole jobs, run after run ---

Lose = Callable[[Sequence[int], set[int]], set[int]]
"""Return what gets lost of the sources of a pass, given the ones that kill their worker."""


def only_it(sources: Sequence[int], poison: set[int]) -> set[int]:
    return poison.intersection(sources)


def its_batch(sources: Sequence[int], poison: set[int]) -> set[int]:
    batches = [sources[start : start + 5] for start in range(0, len(sources), 5)]
    return {s for batch in batches if poison.intersection(batch) for s in batch}


def everything(sources: Sequence[int], poison: set[int]) -> set[int]:
    return set(sources) if poison.intersection(sources) else set()


@dataclass
class Job:
    """A job of ``count`` sources, some of which kill their worker whenever they are executed."""

    count: int
    poison: Collection[int]
    lose: Lose
    max_failed_runs: int = 3
    failed_runs: dict[int, int] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    runs: list[PassSchedule] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)

    def left(self) -> list[int]:
        """Return the sources that are neither complete nor quarantined."""
        failed = self.failed_runs
        return [
            source
            for source in range(self.count)
            if source not in self.done and failed.get(source, 0) < self.max_failed_runs
        ]

    def run(self) -> PassSchedule:
        """Execute the passes of a run, and record what it counts."""
        sources = self.left()
        poison = {number for number, source in enumerate(sources) if source in self.poison}
        failed = [self.failed_runs.get(source, 0) for source in sources]
        schedule = PassSchedule(len(sources), failed_runs=failed.__getitem__)
        pending = set(range(len(sources)))
        passes = 0
        while (plan := schedule.next()) is not None:
            passes += 1
            lost = self.lose(plan.sources, poison)
            crash = None
            if len(poison.intersection(plan.sources)) > plan.ignore_crashes:
                # The pass ends before it has come to what is behind the first one.
                first = min(plan.sources.index(source) for source in poison & set(plan.sources))
                lost = lost.union(plan.sources[first:])
                crash = "worker died"
            pending -= set(plan.sources) - lost
            schedule.record_result(pending, crash=crash)
        assert passes <= 1 + MAX_FURTHER_PASSES
        for number in schedule.lost_alone:
            assert sources[number] in self.poison, "an innocent source is blamed"
            self.failed_runs[sources[number]] = failed[number] + 1
        self.done |= {source for number, source in enumerate(sources) if number not in pending}
        self.runs.append(schedule)
        self.passes.append(passes)
        return schedule


losses = st.sampled_from([only_it, its_batch, everything])


@given(st.integers(1, 120), st.sets(st.integers(0, 119)), losses, st.integers(1, 3))
def test_enough_runs_quarantine_all_that_do_damage_and_complete_all_others(
    count: int, poison: set[int], lose: Lose, max_failed_runs: int
) -> None:
    job = Job(count, {source for source in poison if source < count}, lose, max_failed_runs)
    while left := len(job.left()):
        before = sum(job.failed_runs.values()) + len(job.done)
        job.run()
        # Each run executes so many alone, and all of them are completed or counted.
        after = sum(job.failed_runs.values()) + len(job.done)
        assert after - before >= min(left, MIN_ALONE)
    assert job.done == set(range(count)) - set(job.poison)
    assert len(job.runs) <= max_failed_runs * (1 + count // MIN_ALONE)


@pytest.mark.parametrize("order", [range(40), [*range(0, 40, 2), *range(1, 40, 2)]])
def test_twenty_of_forty_that_kill_their_worker(order: Iterable[int]) -> None:
    job = Job(40, set([*order][:20]), only_it)
    job.run()
    assert job.done == set(range(40)) - set(job.poison), "all others complete in the first run"
    assert job.failed_runs == dict.fromkeys(job.poison, 1), "and each is found out in it"
    job.run()
    job.run()
    assert job.left() == []
    # The first, one of all that got lost, and each alone.
    assert job.passes == [1 + 1 + 20] * 3


@given(st.integers(2, 1000), st.data())
def test_one_that_takes_all_others_with_it_is_found_in_one_run(
    count: int, data: st.DataObject
) -> None:
    job = Job(count, {data.draw(st.integers(0, count - 1))}, everything)
    job.run()
    assert job.failed_runs == dict.fromkeys(job.poison, 1)
    assert len(job.done) == count - 1
    assert job.passes[0] <= 4 + 2 * (count - 1).bit_length()


@given(st.integers(1, 200), st.sets(st.integers(0, 199), max_size=MIN_ALONE))
def test_a_few_that_die_alone_are_found_in_as_many_passes(count: int, poison: set[int]) -> None:
    job = Job(count, {source for source in poison if source < count}, only_it)
    job.run()
    assert job.failed_runs == dict.fromkeys(job.poison, 1)
    assert len(job.done) == count - len(job.poison)
    assert job.passes[0] <= 1 + 1 + 2 + len(job.poison)


# --- Row ranges: sources that come to be while their file is read ---


@dataclass
class FileJob:
    """A job over a file of ``count`` ranges, some of which kill the worker that works on them.

    The end of the file is source 0 of a run until it is found. The ranges that were found before
    come after it. A task works on the ranges of the file in their order.
    """

    count: int
    poison: Collection[int]
    max_failed_runs: int = 3
    found: int = 0
    has_end: bool = False
    failed_runs: dict[int, int] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)
    passes: list[int] = field(default_factory=list)

    def is_over(self) -> bool:
        return self.has_end and all(
            number in self.done or self.failed_runs.get(number, 0) >= self.max_failed_runs
            for number in range(self.count)
        )

    def run(self, *, together: bool) -> None:
        """Execute the passes of a run. ``together``: a task in which one is lost loses all."""
        # The number of each source's range; -1 is the end of the file.
        known: list[int] = [] if self.has_end else [-1]
        known += [
            number
            for number in range(self.found)
            if number not in self.done and self.failed_runs.get(number, 0) < self.max_failed_runs
        ]
        failed = [self.failed_runs.get(number, 0) for number in known]
        schedule = PassSchedule(
            len(known), failed_runs=lambda source: failed[source] if source < len(failed) else 0
        )
        completed: set[int] = set()
        passes = 0
        while (plan := schedule.next()) is not None:
            passes += 1
            ranges = {known[source] for source in plan.sources}
            assert ranges.isdisjoint(completed)
            assert -1 in ranges or all(number < self.found for number in ranges)
            new = range(self.found, self.count) if -1 in ranges else range(0)
            crash, here = None, set[int]()
            for number in sorted((ranges - {-1}) | set(new)):
                if number >= self.found:
                    self.found = number + 1
                    known.append(number)
                if number in self.poison:
                    crash = "worker died"
                    break
                here.add(number)
            if crash is None and -1 in ranges:
                here.add(-1)
                self.has_end = True
            if crash is None or not together:
                completed |= here
            pending = {source for source, number in enumerate(known) if number not in completed}
            schedule.record_result(pending, known=len(known), crash=crash)
        assert passes <= 1 + MAX_FURTHER_PASSES
        assert set(schedule.not_tried) <= set(range(len(known)))
        for source in schedule.lost_alone:
            number = known[source]
            assert number in self.poison, "an innocent range is blamed"
            self.failed_runs[number] = self.failed_runs.get(number, 0) + 1
        self.done |= completed - {-1}
        self.passes.append(passes)


@given(st.integers(1, 60), st.sets(st.integers(0, 59), max_size=12), st.booleans())
def test_a_file_whose_ranges_do_damage_is_read_to_its_end(
    count: int, poison: set[int], together: bool
) -> None:
    job = FileJob(count, {number for number in poison if number < count})
    for _ in range(200):
        if job.is_over():
            break
        job.run(together=together)
    assert job.is_over()
    assert job.done == set(range(count)) - set(job.poison)


def test_ranges_that_come_with_others_are_executed_alone_before_they_are_blamed() -> None:
    schedule = PassSchedule(1)
    # The read of the file found three ranges, and the worker died at the third.
    schedule.record_result([0, 3], known=4, crash="worker died")
    assert schedule.next() == again([0, 3], ignoring=64)
    # It found two more, and died again.
    schedule.record_result([0, 3, 5], known=6, crash="worker died")
    plans = []
    known = 6
    while (plan := schedule.next()) is not None:
        plans.append(list(plan.sources))
        if plan.sources[0] == 0 and known == 6:
            known = 7
            schedule.record_result([0, 3, 5, 6], known=known, crash="worker died")
        else:
            schedule.record_result([0, 3, 5, 6][: known - 3], known=known, crash="worker died")
    alone = {plan[0] for plan in plans if len(plan) == 1}
    assert alone == {0, 3, 5, 6}
    assert set(schedule.lost_alone) == {0, 3, 5, 6}
