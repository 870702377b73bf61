"""Death at every named point: the next run, or Ray, goes on, and every row is there once."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import WITHOUT_TOKENS
from fault_jobs import JOBS, Job, write_input

import ray_resume
from ray_resume import Checkpoint, ResumeError
from ray_resume.testing import check_exactly_once, kill_at, points, rows_of, victim_of

PACKAGE = Path(ray_resume.__file__).parent
JOBS_SCRIPT = Path(__file__).with_name("fault_jobs.py")

# Which job gets a worker to which points, and how often they are passed before that.
WORKERS = [
    ("read.between_blocks", "Files", 1),
    ("read.before_seal", "Files", 1),
    ("read.after_seal", "Files", 1),
    ("stage.called", "Files", 2),
    ("stage.called", "AsyncFiles", 1),
    ("stage.between_outputs", "Files", 1),
    ("stage.between_outputs", "AsyncFiles", 0),
    ("stage.before_drain", "Files", 0),
    ("stage.before_drain", "AsyncFiles", 0),
    ("stage.after_drain", "Files", 0),
    ("stage.after_drain", "AsyncFiles", 0),
    ("stage.before_failures", "Files", 1),
    ("stage.before_failures", "AsyncFiles", 1),
    ("stage.after_failures", "Files", 1),
    ("stage.after_failures", "AsyncFiles", 1),
    ("sink.before_write", "Files", 0),
    ("sink.writing", "Files", 1),
    ("sink.written", "Files", 0),
    ("sink.before_drain", "Files", 1),
    ("sink.after_drain", "Files", 0),
    ("datasink.before_write", "Published", 0),
    ("datasink.before_drain", "Published", 1),
    ("datasink.after_drain", "Published", 0),
]

LEDGERS = [
    ("store.making", "Files", 0),
    ("store.made", "Files", 0),
    ("ledger.before_apply", "Files", 3),
    ("ledger.applied", "Files", 4),
    ("ledger.before_commit", "Files", 0),
    ("store.in_commit", "Files", 0),
    ("store.before_growth", "LongNames", 0),
    ("store.after_growth", "LongNames", 0),
    ("ledger.committed", "Files", 0),
    ("ledger.failing", "Failing", 0),
    ("letters.writing", "Files", 1),
    ("letters.written", "Files", 1),
    ("ledger.closing", "Files", 0),
    ("ledger.closed", "Files", 0),
]

# What has to be armed beside the point, so that there is something to clean up.
DRIVERS = {
    "checkpoint.writing": ("Files", ()),
    "lease.created": ("Files", ()),
    "run.leased": ("Files", ()),
    "run.bound": ("Files", ()),
    "run.before_pass": ("Files", ()),
    "run.after_pass": ("Files", ()),
    "run.before_publish": ("Published", ()),
    "run.published": ("PublishedTwice", ()),
    "run.before_close": ("Files", ()),
    "run.closed": ("Files", ()),
    "cleanup.before": ("Files", ("sink.before_drain",)),
    "cleanup.removing": ("Files", ("sink.before_drain",)),
    "cleanup.removed": ("Files", ("sink.before_drain",)),
    "cleanup.removing_letter": ("Files", ("letters.written",)),
    "lease.ending": ("Files", ()),
}

# Reached without Ray.
KEEPERS = {
    "reset.committed": "Checkpoint(path).reset(state='all')",
    "compact.merged": "Checkpoint(path).compact()",
    "compact.removing": "Checkpoint(path).compact()",
}


def job_in(folder: Path, name: str) -> Job:
    write_input(folder)
    return JOBS[name](folder)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("point", "job_name", "skip"), WORKERS)
def test_a_worker_dies(tmp_path: Path, point: str, job_name: str, skip: int) -> None:
    job = job_in(tmp_path, job_name)
    with kill_at(point, skip=skip) as fault:
        job.run()
        assert fault.victim is not None
    job.check()


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("point", "job_name", "skip"), LEDGERS)
def test_the_ledger_dies(tmp_path: Path, point: str, job_name: str, skip: int) -> None:
    job = job_in(tmp_path, job_name)
    with kill_at(point, tmp_path / "faults", skip=skip), pytest.raises(ResumeError):
        job.run()
    assert victim_of(point, tmp_path / "faults") is not None
    job.check_truth()
    job.run()
    job.check()


@pytest.mark.long
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("point", DRIVERS)
def test_the_driver_dies(tmp_path: Path, another_cluster: str, point: str) -> None:
    job_name, others = DRIVERS[point]
    job = job_in(tmp_path, job_name)
    process = subprocess.run(
        [sys.executable, JOBS_SCRIPT, job_name, tmp_path, another_cluster, point, *others],
        env=WITHOUT_TOKENS,
        capture_output=True,
        text=True,
    )
    assert victim_of(point, tmp_path / "faults") is not None, process.stderr
    job.check_truth()
    job.run()
    job.check()
