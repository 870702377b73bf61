"""Whole pipelines in which UDFs, rows or the ledger fail: good sources are completed."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import ray
from conftest import holders, ids_in, write_file, write_source
from parquet_job import read
from ray.exceptions import RayActorError

from ray_resume import Checkpoint, CheckpointError, ResumeError, resumable, resumable_write

pytestmark = pytest.mark.usefixtures("cluster")

# Ray types a UDF's argument as the union of all batch formats.
Batch: TypeAlias = Any


@pytest.mark.extended
@pytest.mark.long
def test_a_udf_that_fails_at_random_converges(source: Path, tmp_path: Path) -> None:
    @resumable(one_to_one=True)
    def flaky(batch: Batch) -> Batch:
        # From the operating system's randomness, which differs between workers and runs.
        if os.urandom(1)[0] < 80:
            raise ConnectionError("try again")
        return batch

    failures: list[Exception] = []
    while len(failures) < 40:
        ds = read(source, tmp_path / "ckpt", override_num_blocks=7).map_batches(flaky)
        try:
            summary = resumable_write(ds, tmp_path / "out")
            break
        except Exception as error:
            failures.append(error)
    assert all("try again" in str(error) for error in failures)
    assert summary.sources_completed + summary.sources_skipped == 7
    assert ids_in(tmp_path / "out") == list(range(600))


@pytest.mark.extended
@pytest.mark.long
def test_one_bad_row_gives_up_no_good_source(tmp_path: Path) -> None:
    write_source(tmp_path / "in", files=8, rows=5)

    @resumable(one_to_one=True)
    def poisoned(batch: Batch) -> Batch:
        if 12 in batch["id"]:
            raise ValueError("a poison row")
        return batch

    for _ in range(3):
        ds = read(tmp_path / "in", tmp_path / "ckpt", max_failed_runs=2, override_num_blocks=1)
        ds.context.max_errored_blocks = -1
        summary = resumable_write(ds.map_batches(poisoned, batch_size=None), tmp_path / "out")
    assert (summary.sources_skipped, summary.sources_quarantined) == (7, 1)
    # All are in one batch, and go down together, until each is executed alone.
    ds = read(tmp_path / "in", tmp_path / "ckpt2", max_failed_runs=1)
    ds.context.max_errored_blocks = -1
    summary = resumable_write(ds.map_batches(poisoned, batch_size=40), tmp_path / "out2")
    assert (summary.sources_completed, summary.sources_quarantined) == (7, 1)


def test_wrong_rows_of_one_to_one_commit_nothing_of_their_sources(
    source: Path, tmp_path: Path
) -> None:
    @resumable(one_to_one=True)
    def loses_one(batch: Batch) -> Batch:
        return {name: values[1:] for name, values in batch.items()}

    with pytest.raises(Exception, match="returned 99 rows for 100 rows"):
        resumable_write(read(source, tmp_path / "ckpt").map_batches(loses_one), tmp_path / "out")
    assert [r.rows for r in Checkpoint(tmp_path / "ckpt").sources("completed") if r.rows] == []
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.extended
def test_rows_that_ray_drops_count_as_failed_and_are_quarantined_in_the_end(
    source: Path, tmp_path: Path
) -> None:
    @resumable
    def poisoned(batch: Batch) -> Batch:
        if 250 in batch["id"]:
            raise ValueError("a poison row")
        return batch

    def job() -> Any:
        ds = read(source, tmp_path / "ckpt", override_num_blocks=7, max_failed_runs=2)
        ds.context.max_errored_blocks = -1
        return resumable_write(ds.map_batches(poisoned), tmp_path / "out")

    first = job()
    assert (first.sources_completed, first.sources_failed, first.sources_pending) == (6, 1, 0)
    (failed,) = Checkpoint(tmp_path / "ckpt").sources("failed")
    assert failed.source_id.endswith("00002.parquet")
    assert failed.error is not None
    assert "rows unaccounted for" in failed.error
    second = job()
    assert (second.sources_skipped, second.sources_quarantined) == (6, 1)
    third = job()
    assert (third.sources_skipped, third.sources_quarantined, third.sources_total) == (6, 1, 7)
    (quarantined,) = Checkpoint(tmp_path / "ckpt").sources("quarantined")
    assert quarantined.failed_runs == 2
    assert ids_in(tmp_path / "out") == [*range(200), *range(300, 600)]
    write_file(source / "00002.parquet", 1000, 1010)
    assert job().sources_completed == 1, "it was mended, so it is tried again"
    assert ids_in(tmp_path / "out") == [*range(200), *range(300, 600), *range(1000, 1010)]


def test_if_the_ledger_dies_the_run_fails_loudly_and_the_next_goes_on(
    source: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"

    @resumable
    def slow(batch: Batch) -> Batch:
        time.sleep(0.3)
        # However slow the machine, the last file is not done before the ledger dies.
        deadline = time.monotonic() + 20
        while 599 in batch["id"] and not killed.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return batch

    def kill_the_ledger() -> None:
        while not (leases := list((tmp_path / "ckpt").glob("*.lease"))):
            time.sleep(0.02)
        while Checkpoint(tmp_path / "ckpt").status().completed < 2:
            time.sleep(0.02)
        for process in holders(leases[0]):
            if process.pid != os.getpid():
                process.kill()
        killed.touch()

    ds = read(source, tmp_path / "ckpt", override_num_blocks=7).map_batches(slow)
    killer = threading.Thread(target=kill_the_ledger)
    killer.start()
    with pytest.raises(ResumeError, match="Run the same script again"):
        resumable_write(ds, tmp_path / "out")
    killer.join()
    assert not list((tmp_path / "ckpt").glob("*.lease"))
    done = Checkpoint(tmp_path / "ckpt").status().completed
    assert 2 <= done < 7
    assert resumable_write(ds, tmp_path / "out").sources_skipped == done
    assert ids_in(tmp_path / "out") == list(range(600))


def test_the_ledgers_start_up_errors_reach_the_user(tmp_path: Path) -> None:
    from ray_resume.checkpoint.claims import Owner
    from ray_resume.checkpoint.local.backend import LocalLedgerBinding
    from ray_resume.checkpoint.local.lease import Lease
    from ray_resume.core.sources import SourceTable
    from ray_resume.run.ledger_actor import LedgerStart
    from ray_resume.run.run_spec import RunSpec

    spec = RunSpec(
        run_id="cccccccccccc",
        binding=LocalLedgerBinding(
            str(tmp_path), str(tmp_path / "cccccccccccc.lease"), "cccccccccccc"
        ),
        sources=SourceTable.of([]),
        records={},
        max_failed_runs=3,
        first_sequence=0,
        signature="",
        header={},
    )
    lease = Lease.hold_unclaimed(tmp_path, Owner.here("dddddddddddd"))
    start = LedgerStart(spec, lease)
    with pytest.raises(CheckpointError, match=r"cccccccccccc\.lease is gone"):
        start.wait()
    # Workers do not go on for a ledger that commits nothing.
    with pytest.raises(RayActorError):
        ray.get(start.handle.flush.remote())
