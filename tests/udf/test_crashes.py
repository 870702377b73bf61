"""Rows that kill their worker: they fail alone, and the job ends."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import ids_in, write_source
from ray.data import ActorPoolStrategy, Dataset
from udf_job import FILES, ROWS, run

from ray_resume import Checkpoint, resumable

# Ray Data starts Ray to estimate the size of a block of rows.
pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def source(tmp_path: Path) -> None:
    write_source(tmp_path / "in", files=FILES, rows=ROWS)


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize(
    "how",
    [
        "a task",
        pytest.param("an actor", marks=pytest.mark.slow),
        # Ray takes these for the actor's wish, and starts no other.
        pytest.param("sys.exit", marks=[pytest.mark.extended, pytest.mark.long]),
        pytest.param("exit_actor in async", marks=[pytest.mark.extended, pytest.mark.long]),
    ],
)
def test_a_row_that_kills_its_worker_fails_alone(tmp_path: Path, how: str) -> None:
    @resumable(one_to_one=True)
    class Deadly:
        def __call__(self, batch: Any) -> Any:
            if 55 in batch["id"]:
                if how == "sys.exit":
                    sys.exit(0)
                os.kill(os.getpid(), signal.SIGSEGV)
            return batch

    # Such an exit is no failure of a row.
    @resumable(one_to_one=True, on_error="mark_failed")
    class AsyncDeadly:
        async def __call__(self, batch: Any) -> Any:
            if 55 in batch["id"]:
                ray.actor.exit_actor()  # type: ignore[no-untyped-call]
            yield batch

    def chain(ds: Dataset) -> Dataset:
        if how == "a task":
            return ds.map_batches(resumable(Deadly().__call__, one_to_one=True))
        udf: Any = AsyncDeadly if how == "exit_actor in async" else Deadly
        return ds.map_batches(udf, compute=ActorPoolStrategy(size=1), num_cpus=0.5)

    summary = run(tmp_path, chain, max_failed_runs=1)
    assert (summary.sources_completed, summary.sources_quarantined) == (FILES - 1, 1)
    assert "1 source is quarantined" in str(summary)
    (record,) = Checkpoint(tmp_path / "ckpt").sources("quarantined")
    assert record.source_id.endswith("00002.parquet")
    assert "a worker died whenever it was executed" in str(record.error)
    assert ids_in(tmp_path / "out") == [i for i in range(FILES * ROWS) if i // ROWS != 2]


@pytest.mark.slow
def test_half_of_all_sources_kill_their_worker_and_the_job_ends(tmp_path: Path) -> None:
    write_source(tmp_path / "in", files=40, rows=2)

    @resumable
    def deadly(batch: Any) -> Any:
        if (batch["id"] // 2 % 2).any():
            os.kill(os.getpid(), signal.SIGKILL)
        return batch

    first, second = (
        run(tmp_path, lambda ds: ds.map_batches(deadly), max_failed_runs=1) for _ in range(2)
    )
    assert (first.sources_completed, first.sources_quarantined) == (20, 20)
    assert "20 sources got lost although each was executed alone. The first is" in str(first)
    assert len(first.lost_alone) == 20
    assert all("a worker died whenever" in how for how in first.lost_alone.values())
    # Nothing is left to do.
    assert (second.sources_skipped, second.sources_quarantined) == (20, 20)
    assert ids_in(tmp_path / "out") == [i for i in range(80) if i // 2 % 2 == 0]


@pytest.mark.slow
@pytest.mark.usefixtures("source")
def test_after_a_crash_an_error_of_the_user_is_raised_all_the_same(tmp_path: Path) -> None:
    @resumable
    def deadly(batch: Any) -> Any:
        if 15 in batch["id"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if 115 in batch["id"]:
            # Not before the crash has ended the first pass.
            time.sleep(20)
            raise ValueError("bad row 115")
        return batch

    with pytest.raises(Exception, match="bad row 115"):
        run(tmp_path, lambda ds: ds.map_batches(deadly, num_cpus=2))
    assert Checkpoint(tmp_path / "ckpt").status().completed == FILES - 2
