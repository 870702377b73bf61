"""SIGKILL: of whole jobs, a driver alone, a stopped ledger, a worker between two blocks."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import psutil
import pytest
import ray
from conftest import holders, ids_in, write_source
from driver import FILES, scored
from forking_driver import CHILD_FILE
from job import Job, signal_each
from places import SCRIPTS

from ray_resume import Checkpoint, CheckpointError, resumable, resumable_read, resumable_write

pytestmark = pytest.mark.long

# Ray types a UDF's argument as the union of all batch formats.
Batch: TypeAlias = Any


@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_a_job_killed_with_everything_it_started_resumes(job: Job) -> None:
    job.start()
    job.wait_for(lambda: job.files() >= 1)
    job.kill(with_descendants=True)
    assert job.committed() < FILES, "killed too late to prove anything"
    done = job.committed()
    (killed,) = Checkpoint(job.checkpoint).runs()
    assert (killed.outcome, killed.sources_completed, killed.pid) == (
        "killed",
        done,
        job.process.pid,
    )
    assert killed.ended_at is not None
    assert 0 <= time.time() - killed.ended_at < 60
    ds = resumable_read(ray.data.read_parquet, job.source, checkpoint=job.checkpoint)
    summary = resumable_write(scored(ds.select_columns(["id"])), job.out)
    assert (summary.sources_completed, summary.sources_skipped) == (FILES - done, done)
    job.check()
    first, second = Checkpoint(job.checkpoint).runs()
    assert first == killed
    assert (second.outcome, second.sources_completed) == ("completed", FILES - done)
    assert (second.sources_skipped, second.sources_total) == (done, FILES)


@pytest.mark.extended
@pytest.mark.long
def test_the_ledger_of_a_killed_driver_commits_nothing_after_its_successor_started(
    job_on_cluster: Job,
) -> None:
    job = job_on_cluster
    runs: set[str] = set()
    job.start()
    old = job.wait_for_run(runs, commits=2)
    job.kill(with_descendants=False)
    job.start()
    # The successor waits until the old ledger's process is gone, and starts then.
    new = job.wait_for_run(runs, commits=0)
    left = job.records_of(old)
    job.wait_for(lambda: len(job.records_of(new)) >= 2)
    assert job.records_of(old) == left
    job.finish()
    job.check()


@pytest.mark.extended
@pytest.mark.long
def test_a_child_that_a_killed_driver_forked_keeps_nothing_of_its_lease(
    job_on_cluster: Job,
) -> None:
    """Ray takes the driver for alive, since the child has its connections."""
    job = job_on_cluster
    job.start([sys.executable, str(SCRIPTS / "forking_driver.py")])
    old = job.wait_for_run(set(), commits=1)
    child_file = job.checkpoint.parent / CHILD_FILE
    job.wait_for(child_file.exists)
    child = psutil.Process(int(child_file.read_text()))
    try:
        job.kill(with_descendants=False)
        left = job.records_of(old)
        assert len(left) < FILES
        job.start()
        # A run that finds the lease taken is refused after half a minute.
        job.finish()
        assert child.is_running()
        job.check()
    finally:
        child.kill()


@pytest.mark.extended
@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_a_stopped_ledger_keeps_its_successor_out(job_on_cluster: Job) -> None:
    job = job_on_cluster
    job.start()
    run_id = job.wait_for_run(set(), commits=3)
    lease = job.checkpoint / f"{run_id}.lease"
    (ledger,) = (p for p in holders(lease) if p.pid != job.process.pid)
    ledger.send_signal(signal.SIGSTOP)
    left = job.records_of(run_id)
    assert 3 <= len(left) < FILES
    job.kill(with_descendants=False)
    ds = resumable_read(ray.data.read_parquet, str(job.source), checkpoint=job.checkpoint)
    refused = 0
    while ledger.is_running() and refused < 3:
        with pytest.raises(CheckpointError, match=run_id):
            resumable_write(ds, job.out, lease_wait_s=0.2)
        refused += 1
    signal_each([ledger], signal.SIGKILL)
    job.start()
    job.finish()
    assert job.records_of(run_id) == left
    job.check()


@pytest.mark.extended
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("one_source", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_worker_killed_between_two_blocks_of_a_shuffling_udf(
    tmp_path: Path, one_source: bool
) -> None:
    """Ray consumes some blocks of each execution; the rows of both never add up to a source."""
    write_source(tmp_path / "in", files=1 if one_source else 4, rows=400)
    marks = tmp_path / "marks"
    marks.mkdir()

    @resumable
    def shuffle(batch: Batch) -> Iterator[Batch]:
        # What the user seeds must not matter: shares come from the operating system.
        import random

        np.random.seed(0)
        random.seed(0)
        order = np.random.default_rng(int.from_bytes(os.urandom(4), "big")).permutation(400)
        for number, part in enumerate(np.array_split(order, 10)):
            if number == 5 and batch["id"][0] == 0 and not (marks / "killed").exists():
                deadline = time.monotonic() + 60
                while not (marks / "consumed").exists():
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                (marks / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield {name: values[part] for name, values in batch.items()}

    @resumable
    def consume(batch: Batch) -> Batch:
        if (batch["id"] < 400).any():
            (marks / "consumed").touch()
        return batch

    ds = resumable_read(ray.data.read_parquet, str(tmp_path / "in"), checkpoint=tmp_path / "ckpt")
    # A block for each piece that the UDF yields, and two operators that Ray does not fuse.
    ds.context.target_max_block_size = 500
    ds = ds.map_batches(shuffle, batch_size=400, num_cpus=0.5)
    ds = ds.map_batches(consume, batch_size=None, num_cpus=0.6)
    summary = resumable_write(ds, tmp_path / "out")

    assert (marks / "killed").exists()
    assert summary.sources_completed == summary.sources_total
    assert ids_in(tmp_path / "out") == list(range(400 if one_source else 1600))
    assert len(Checkpoint(tmp_path / "ckpt").files()) == len(list((tmp_path / "out").iterdir()))
