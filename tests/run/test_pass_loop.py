"""Many passes of real runs: a real ledger and checkpoint, and sources that "kill" their worker."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, WorkerCrashedError

from ray_resume import Checkpoint, RunSummary
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.core.identity import ids_of
from ray_resume.core.messages import Drain, Seal
from ray_resume.core.planning import Listing, Policies
from ray_resume.core.sources import Source, SourceTable
from ray_resume.core.tokens import MODULUS
from ray_resume.run.output import Output
from ray_resume.run.pass_loop import Pass
from ray_resume.run.run import Run
from ray_resume.run.run_plan import RunPlan

pytestmark = pytest.mark.usefixtures("cluster")

CRASH = "A worker died."


class Job:
    """A job of ``count`` sources of one row; :meth:`run` is one run of it.

    What Ray Data would do is done here at once: sources are read and drained one after the other.
    """

    def __init__(self, path: Path, count: int, poison: Collection[int]) -> None:
        self.path, self.poison = path, {f"source {number:02d}" for number in poison}
        self.sources = SourceTable.of(
            [Source(f"source {number:02d}", f"source {number:02d}") for number in range(count)]
        )
        self.passes: list[list[str]] = []

    def run(self, before: Callable[[str, Pass], None] = lambda source_id, this: None) -> RunSummary:
        """Execute a run; ``before`` is called with each source before it is executed."""

        def run_pass(this: Pass) -> None:
            ids = [source.source_id for source in this.sources]
            self.passes.append(ids)
            ignored = 0
            for number, source_id in zip(this.plan.sources, ids, strict=True):
                before(source_id, this)
                if source_id in self.poison:
                    ignored += 1
                    if ignored > this.plan.ignore_crashes:
                        raise WorkerCrashedError(CRASH)
                    continue
                this.client.send(Seal(number, 7, rows=1), Drain(number, -7 % MODULUS, rows=1))

        storage = LocalBackend(self.path)
        storage.ensure()
        plan = RunPlan(
            storage=storage,
            listing=Listing(self.sources, self.sources, ids_of("key")),
            policies=Policies(),
            output=Output("somewhere"),
            table=None,
            signature="read>write",
        )
        return Run(plan).execute(run_pass, lease_wait_s=5)

    def failed_runs(self) -> dict[str, int]:
        """Return in how many runs sources have failed, of those that have in any."""
        records = Checkpoint(self.path).sources()
        return {record.source_id: record.failed_runs for record in records if record.failed_runs}


@pytest.mark.extended
@pytest.mark.long
def test_many_poison_sources_are_quarantined_and_all_others_complete(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(tmp_path / "ckpt", 40, range(1, 40, 2))
    with caplog.at_level(logging.WARNING):
        first = job.run()
    assert (first.sources_completed, first.sources_failed) == (20, 20)
    assert set(first.lost_alone) == job.poison
    assert job.failed_runs() == dict.fromkeys(job.poison, 1)
    assert all("a worker died whenever" in how for how in first.lost_alone.values())
    assert "20 sources got lost although each was executed alone" in str(first)
    assert "The first is source 01: rows unaccounted for: a worker died" in str(first)
    assert "source 39 got lost although it was executed alone" in caplog.text
    second = job.run()
    assert (second.sources_skipped, second.sources_failed) == (20, 20)
    third = job.run()
    assert (third.sources_failed, third.sources_quarantined) == (0, 20)
    passes = len(job.passes)
    last = job.run()
    assert (last.sources_quarantined, last.sources_pending, len(job.passes)) == (20, 0, passes)
    assert passes == 3 * 22


@pytest.mark.extended
@pytest.mark.long
def test_what_was_not_tried_is_said_and_comes_first_in_the_next_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(tmp_path / "ckpt", 60, range(30))
    with caplog.at_level(logging.WARNING):
        first = job.run()
    tried = set(first.lost_alone)
    assert (first.sources_completed, len(tried), first.sources_not_tried) == (30, 20, 10)
    assert "10 sources got lost with others, and were not executed alone" in str(first)
    assert "10 sources got lost with others" in caplog.text
    assert "source 20, source 21, source 22, ..." in caplog.text
    assert job.failed_runs() == dict.fromkeys(tried, 1)
    job.passes.clear()
    second = job.run()
    alone = [sources[0] for sources in job.passes if len(sources) == 1]
    assert set(second.lost_alone) == set(alone)
    # Nothing completes in this run, so it tries few that no run has tried.
    fresh = [source_id for source_id in alone if source_id not in tried]
    assert len(fresh) == 8
    assert alone[:8] == fresh


@pytest.mark.parametrize(
    "error",
    [ValueError("bad row"), pytest.param(KeyboardInterrupt(), marks=pytest.mark.extended)],
)
def test_a_source_that_got_lost_alone_counts_whatever_ends_the_run(
    tmp_path: Path, error: BaseException
) -> None:
    job = Job(tmp_path / "ckpt", 6, [1, 3])

    def fail(source_id: str, this: Pass) -> None:
        if source_id == "source 03" and len(this.plan.sources) == 1:
            raise error

    with pytest.raises(type(error)):
        job.run(fail)
    # The other one was not executed alone, and what raises is the user's to mend.
    assert job.failed_runs() == {"source 01": 1}
    assert Checkpoint(job.path).status().completed == 4
    summary = job.run()
    assert job.failed_runs() == {"source 01": 2, "source 03": 1}
    assert set(summary.lost_alone) == job.poison


@pytest.mark.extended
@pytest.mark.long
def test_an_error_that_was_ignored_ends_the_run_at_last(tmp_path: Path) -> None:
    job = Job(tmp_path / "ckpt", 60, range(30))

    def fail(source_id: str, this: Pass) -> None:
        # A pass that ignores crashes drops the block with it, as Ray Data does.
        if source_id == "source 20" and not this.plan.ignore_crashes:
            raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"):
        job.run(fail)
    assert job.passes[-1] == [f"source {number:02d}" for number in range(20, 30)]
    assert job.failed_runs() == {f"source {number:02d}": 1 for number in range(20)}
    assert Checkpoint(job.path).status().completed == 30


def test_a_constructor_that_raises_is_an_error_of_the_user(tmp_path: Path) -> None:
    class Broken:
        def __init__(self) -> None:
            raise ValueError("no model here")

        def call(self) -> None:
            pass

    remote_class: Any = ray.remote(Broken)
    with pytest.raises(ActorDiedError) as died:
        ray.get(remote_class.remote().call.remote())

    def fail(source_id: str, this: Pass) -> None:
        raise died.value

    job = Job(tmp_path / "ckpt", 6, [])
    with pytest.raises(ActorDiedError, match="no model here"):
        job.run(fail)
    assert len(job.passes) == 1
    assert job.failed_runs() == {}
