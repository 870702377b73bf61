"""The same dataset used more than once: by two runs at once, for two sinks, and plainly around."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import ray
from conftest import ids_in, snapshot
from ray.data import Dataset

from ray_resume import Checkpoint, CheckpointError, resumable, resumable_read, resumable_write

pytestmark = [pytest.mark.extended, pytest.mark.usefixtures("cluster"), pytest.mark.long]

# Ray types a UDF's argument as the union of all batch formats.
Batch: TypeAlias = Any

LEASE_WAIT_S = 120


@resumable
def keep_even_slowly(batch: Batch) -> Batch:
    time.sleep(0.05)
    mask = batch["id"] % 2 == 0
    return {name: values[mask] for name, values in batch.items()}


EVEN = list(range(0, 600, 2))


def pipeline(source: Path, tmp_path: Path) -> Dataset:
    ds = resumable_read(
        ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt", override_num_blocks=7
    )
    return ds.map_batches(keep_even_slowly)


def at_once(*jobs: Callable[[], Any]) -> list[Future[Any]]:
    """Run ``jobs`` in threads that start together; return what became of them."""
    barrier = threading.Barrier(len(jobs))

    def start(job: Callable[[], Any]) -> Any:
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(start, job) for job in jobs]
        wait(futures)
    return futures


def test_two_threads_write_one_dataset_into_one_folder(source: Path, tmp_path: Path) -> None:
    ds = pipeline(source, tmp_path)

    def job() -> Any:
        return resumable_write(ds, tmp_path / "out", lease_wait_s=LEASE_WAIT_S)

    summaries = [future.result() for future in at_once(job, job)]
    second, first = sorted(summaries, key=lambda summary: summary.sources_completed)
    assert (first.sources_completed, first.sources_skipped, first.rows_written) == (7, 0, 300)
    assert (second.sources_completed, second.sources_skipped, second.rows_written) == (0, 7, 0)
    assert first.run_id != second.run_id
    assert ids_in(tmp_path / "out") == EVEN
    files = sorted(map(str, (tmp_path / "out").iterdir()))
    assert files == Checkpoint(tmp_path / "ckpt").files()


def test_what_one_thread_could_not_finish_the_waiting_one_does(
    source: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.touch()

    @resumable
    def fails_once(batch: Batch) -> Batch:
        if 300 in batch["id"] and broken.exists():
            broken.unlink()
            raise RuntimeError("a bad moment")
        return batch

    ds = pipeline(source, tmp_path).map_batches(fails_once)

    def job() -> Any:
        return resumable_write(ds, tmp_path / "out", lease_wait_s=LEASE_WAIT_S)

    done, failed = sorted(at_once(job, job), key=lambda future: future.exception() is not None)
    assert "a bad moment" in str(failed.exception())
    summary = done.result()
    assert summary.sources_completed + summary.sources_skipped == 7
    assert summary.sources_completed >= 1
    assert ids_in(tmp_path / "out") == EVEN
    files = sorted(map(str, (tmp_path / "out").iterdir()))
    assert files == Checkpoint(tmp_path / "ckpt").files()


def test_two_threads_write_one_dataset_into_two_folders(source: Path, tmp_path: Path) -> None:
    ds = pipeline(source, tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    futures = at_once(
        lambda: resumable_write(ds, one, lease_wait_s=LEASE_WAIT_S),
        lambda: resumable_write(ds, two, lease_wait_s=LEASE_WAIT_S),
    )
    (error,) = filter(None, (future.exception() for future in futures))
    assert isinstance(error, CheckpointError)
    bound, refused = (two, one) if futures[0].exception() else (one, two)
    assert f"belongs to the output {bound}, and this run would write to {refused}" in str(error)
    assert ids_in(bound) == EVEN
    assert not refused.exists()
    assert Checkpoint(tmp_path / "ckpt").status().sink == str(bound)


def test_the_run_that_does_not_wait_is_refused(source: Path, tmp_path: Path) -> None:
    refused = tmp_path / "refused"

    @resumable
    def until_refused(batch: Batch) -> Batch:
        deadline = time.monotonic() + 60
        while not refused.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return batch

    ds = pipeline(source, tmp_path).map_batches(until_refused)

    def job_into(out: Path) -> Any:
        try:
            return resumable_write(ds, out, lease_wait_s=0)
        except CheckpointError:
            refused.touch()
            raise

    outs = [tmp_path / "one", tmp_path / "two"]
    futures = at_once(lambda: job_into(outs[0]), lambda: job_into(outs[1]))
    (error,) = filter(None, (future.exception() for future in futures))
    assert "is in use: run " in str(error)
    assert [out.exists() for out in outs] == [not future.exception() for future in futures]
    (bound,) = (out for out in outs if out.exists())
    assert ids_in(bound) == EVEN


def test_it_is_plain_ray_data_before_during_and_after_a_run(source: Path, tmp_path: Path) -> None:
    ds = pipeline(source, tmp_path)

    def look() -> None:
        assert ds.count() == 300
        batches = list(ds.iter_batches(batch_size=64))
        assert {tuple(batch) for batch in batches} == {("id", "name", "weight")}
        assert sorted(int(i) for batch in batches for i in batch["id"]) == EVEN
        assert len(ds.take(5)) == 5
        materialized = ds.materialize()
        assert materialized.schema().names == ["id", "name", "weight"]
        assert sorted(row["id"] for row in materialized.iter_rows()) == EVEN

    before = snapshot(tmp_path)
    look()
    assert snapshot(tmp_path) == before
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(resumable_write, ds, tmp_path / "out")
        during = 0
        while not run.done():
            assert ds.count() == 300
            during += 1
        assert run.result().sources_completed == 7
    assert during
    after = snapshot(tmp_path)
    look()
    assert snapshot(tmp_path) == after
    assert ids_in(tmp_path / "out") == EVEN
    assert resumable_write(ds, tmp_path / "out").sources_skipped == 7
    assert snapshot(tmp_path / "out").keys() == {
        name.removeprefix("out/") for name in after if name.startswith("out/")
    }
