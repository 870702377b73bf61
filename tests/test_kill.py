"""SIGKILL: of whole jobs, a driver alone, a stopped ledger, a worker between two blocks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from conftest import (
    WITHOUT_TOKENS,
    holders,
    ids_in,
    kill,
    kill_with_descendants,
    write_source,
)
from driver import rows_of

from ray_resume import Checkpoint, CheckpointError, resumable, resumable_read, resumable_write
from ray_resume.store import read_writer

DRIVER = Path(__file__).with_name("driver.py")
FILES, ROWS = 24, 200

# Ray types a UDF's argument as the union of all batch formats.
Batch: TypeAlias = Any


class Job:
    """The driver as a process of its own."""

    def __init__(self, folder: Path, address: str | None = None) -> None:
        self.source, self.checkpoint, self.out = folder / "in", folder / "ckpt", folder / "out"
        self.address = address

    def start(self) -> None:
        arguments = [self.source, self.checkpoint, self.out, *filter(None, [self.address])]
        self.process = subprocess.Popen(
            [sys.executable, str(DRIVER), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=WITHOUT_TOKENS,
        )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def committed(self) -> int:
        try:
            return Checkpoint(self.checkpoint).status().completed
        except CheckpointError:
            return 0

    def records_of(self, run_id: str) -> dict[bytes, bytes]:
        """Return what a run has committed up to now."""
        return dict(read_writer(self.checkpoint / f"{run_id}.mdb", live=True)[1])

    def wait_for_run(self, known: set[str], *, commits: int) -> str:
        """Wait for a run that is not in ``known`` to commit so much; add it, return its id."""
        found: list[str] = []

        def look() -> bool:
            runs = {store.stem for store in self.checkpoint.glob("*.mdb")} - known
            found.extend(run for run in runs if len(self.records_of(run)) >= commits)
            return bool(found)

        self.wait_for(look)
        known.add(found[0])
        return found[0]

    def files(self) -> int:
        return len(list(self.out.glob("*.parquet")))

    def kill(self, *, with_descendants: bool) -> None:
        if self.process.poll() is not None:
            return
        if with_descendants:
            kill_with_descendants(self.process.pid)
        else:
            self.process.kill()
        self.process.communicate()

    def finish(self) -> str:
        output, _ = self.process.communicate(timeout=180)
        assert self.process.returncode == 0, output
        return output

    def check(self) -> None:
        """Every row is there once, and the folder holds what the checkpoint lists, no more."""
        rows: list[tuple[int, int]] = []
        for path in self.out.iterdir():
            table = pq.ParquetFile(path).read()
            rows += zip(*(table.column(name).to_pylist() for name in ("id", "score")), strict=True)
        assert sorted(rows) == rows_of(FILES * ROWS)
        assert Checkpoint(self.checkpoint).files() == sorted(map(str, self.out.iterdir()))
        status = Checkpoint(self.checkpoint).status()
        assert (status.completed, status.pending, status.live) == (FILES, 0, 0)
        report = Checkpoint(self.checkpoint).check()
        assert report.ok, report


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """A job with its own cluster; what is left of it is killed."""
    write_source(tmp_path / "in", files=FILES, rows=ROWS)
    job = Job(tmp_path)
    yield job
    job.kill(with_descendants=True)


@pytest.fixture
def job_on_cluster(job: Job, another_cluster: str) -> Job:
    """A job on a cluster that outlives it."""
    job.address = another_cluster
    return job


@pytest.mark.long
def test_a_job_killed_with_everything_it_started_resumes(job: Job) -> None:
    moments: list[Callable[[], bool]] = [
        lambda: job.files() >= 1,
        lambda: job.committed() >= 8,
        lambda: job.committed() >= 15 and job.files() > job.committed(),
    ]
    for moment in moments:
        job.start()
        job.wait_for(moment)
        job.kill(with_descendants=True)
        assert job.committed() < FILES, "killed too late to prove anything"
    done = job.committed()
    job.start()
    assert f"{FILES - done} of {FILES} sources completed" in job.finish()
    job.check()


@pytest.mark.long
def test_the_ledger_of_a_killed_driver_commits_nothing_after_its_successor_started(
    job_on_cluster: Job,
) -> None:
    job = job_on_cluster
    runs: set[str] = set()
    for _ in range(2):
        job.start()
        old = job.wait_for_run(runs, commits=2)
        job.kill(with_descendants=False)
        job.start()
        # The successor waits until the old ledger's process is gone, and starts then.
        new = job.wait_for_run(runs, commits=0)
        left = job.records_of(old)
        job.wait_for(lambda new=new: len(job.records_of(new)) >= 2)  # type: ignore[misc]
        assert job.records_of(old) == left
        job.kill(with_descendants=False)
    job.start()
    job.finish()
    job.check()


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
    kill(ledger)
    job.start()
    job.finish()
    assert job.records_of(run_id) == left
    job.check()


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("one_source", [False, True])
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
