"""Several drivers at once: on one cluster, and on clusters of their own with one checkpoint."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import write_source
from driver import FILES, ROWS, rows_of
from job import Job

from ray_resume import Checkpoint, CheckpointError
from ray_resume.testing import check_exactly_once

pytestmark = [pytest.mark.extended, pytest.mark.long]


@pytest.fixture
def two_jobs(tmp_path: Path) -> Iterator[tuple[Job, Job]]:
    """Two jobs with input of their own; what is left of them is killed."""
    jobs = Job(tmp_path / "one"), Job(tmp_path / "two")
    for job in jobs:
        write_source(job.source, files=FILES, rows=ROWS)
    yield jobs
    for job in jobs:
        if hasattr(job, "process"):
            job.kill(with_descendants=True)


def runs_at_work(job: Job) -> int:
    try:
        return Checkpoint(job.checkpoint).status().live
    except CheckpointError:
        return 0


@pytest.mark.slow
def test_two_pipelines_on_one_cluster(two_jobs: tuple[Job, Job], another_cluster: str) -> None:
    for job in two_jobs:
        job.address = another_cluster
        job.start()
    two_jobs[0].wait_for(lambda: all(map(runs_at_work, two_jobs)))
    for job in two_jobs:
        assert f"{FILES} of {FILES} sources completed" in job.finish()
        job.check()


@pytest.mark.slow
def test_two_clusters_work_on_one_checkpoint_with_other_sources(two_jobs: tuple[Job, Job]) -> None:
    one, two = two_jobs
    # The second half of all files, under names of their own.
    shutil.rmtree(two.source)
    write_source(one.source, files=2 * FILES, rows=ROWS)
    two.source.mkdir()
    for path in sorted(one.source.iterdir())[FILES:]:
        path.rename(two.source / path.name)
    two.checkpoint, two.out = one.checkpoint, one.out
    for job in two_jobs:
        job.start()
    one.wait_for(lambda: runs_at_work(one) == 2)
    for told in (job.finish() for job in two_jobs):
        assert f"{FILES} of {FILES} sources completed" in told
    check_exactly_once(
        one.checkpoint, ({"id": i, "score": score} for i, score in rows_of(2 * FILES * ROWS))
    )
    assert Checkpoint(one.checkpoint).files() == sorted(map(str, one.out.iterdir()))


@pytest.mark.slow
def test_of_two_clusters_with_the_same_sources_one_waits(two_jobs: tuple[Job, Job]) -> None:
    one, two = two_jobs
    two.source, two.checkpoint, two.out = one.source, one.checkpoint, one.out
    one.start()
    one.wait_for(lambda: one.committed() >= 1)
    two.start()
    told = one.finish() + two.finish()
    assert sorted(map(int, re.findall(rf"(\d+) of {FILES} sources completed", told))) == [0, FILES]
    assert f"{FILES} were done before" in told
    one.check()


@pytest.mark.slow
def test_what_a_killed_cluster_left_another_one_does(two_jobs: tuple[Job, Job]) -> None:
    one, two = two_jobs
    two.source, two.checkpoint, two.out = one.source, one.checkpoint, one.out
    one.start()
    one.wait_for(lambda: one.committed() >= 1)
    two.start()
    two.wait_for(lambda: one.committed() >= 4)
    one.kill(with_descendants=True)
    done = one.committed()
    assert f"{FILES - done} of {FILES} sources completed" in two.finish()
    two.check()
