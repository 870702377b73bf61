"""Numbers of each stage: in the summary, in the history, and as a warning about cut batches."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from conftest import ids_in

from ray_resume import Checkpoint, mark_failed, resumable, resumable_read, resumable_write
from ray_resume.core.stages import Stage, StageCount, StageNumbers, added, by_name, cut_batches


@resumable
def is_even(row: dict[str, Any]) -> bool:
    return bool(row["id"] % 2 == 0)


@resumable
def twice(batch: Any) -> Any:
    half = len(batch["id"]) // 2
    for part in (slice(0, half), slice(half, None)):
        yield {name: np.repeat(column[part], 2) for name, column in batch.items()}


@resumable(one_to_one=True, on_error="dead_letter")
class Embed:
    """Fails for the two rows of one id; sleeps for a known time."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.02)
        mark_failed("bad", batch["id"] == 42)
        return batch


@pytest.mark.usefixtures("cluster", "source")
def test_each_stage_has_the_numbers_of_the_rows_that_went_through_it(tmp_path: Path) -> None:
    ds = resumable_read(ray.data.read_parquet, str(tmp_path / "in"), checkpoint=tmp_path / "c")
    ds = ds.filter(is_even).map_batches(twice, batch_size=60)
    ds = ds.map_batches(Embed, batch_size=50, concurrency=2).map_batches(twice)
    summary = resumable_write(ds, str(tmp_path / "out"))
    assert len(ids_in(tmp_path / "out")) == 4 * 300 - 4

    even, first, embed, last = summary.stages
    assert [stage.name for stage in summary.stages] == [
        "filter(is_even)",
        "map_batches(twice)",
        "map_batches(Embed)",
        "map_batches(twice)",
    ]
    assert (even.rows_in, even.rows_out, even.calls) == (600, 300, 600)
    assert (first.rows_in, first.rows_out) == (300, 600)
    # Whole batches, but for each task's last.
    assert (embed.rows_in, embed.rows_out, embed.rows_dead_lettered) == (600, 598, 2)
    assert embed.calls == embed.batches >= 12
    assert 0.02 * embed.calls <= embed.udf_s < 0.1 * embed.calls
    assert (last.rows_in, last.rows_out) == (598, 1196)
    assert {stage.rows_failed for stage in summary.stages} == {0}

    (run,) = Checkpoint(tmp_path / "c").runs()
    assert run.stages == by_name(summary.stages)
    assert run.stages["map_batches(twice) #2"]["rows_out"] == 1196
    for operator in ("ReadParquet", "MapBatches(Embed)", "Write"):
        assert operator in summary.stats
    assert "Remote wall time" in summary.stats


@resumable(on_error="mark_failed")
def embed_each(batch: Any) -> Any:
    if 7 in batch["id"]:
        raise ValueError("bad")
    return batch


@pytest.mark.usefixtures("cluster", "source")
def test_a_warning_tells_of_batches_that_are_cut_by_source(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inputs: dict[str, Any] = {"checkpoint": tmp_path / "c", "keys": list(range(40))}
    ds = resumable_read(lambda key: {"id": [key]}, override_num_blocks=1, **inputs)
    ds = ds.map_batches(embed_each, batch_size=16)
    summary = resumable_write(ds, str(tmp_path / "out"))
    (embed,) = summary.stages
    assert (embed.calls, embed.rows_in, embed.rows_out, embed.rows_failed) == (40, 40, 39, 1)
    (warning,) = [r.getMessage() for r in caplog.records if " gets 1 row " in r.getMessage()]
    assert "map_batches(embed_each) gets 1 row a call, batch_size=16: a batch has " in warning
    assert f"(40 calls for {embed.batches} batches)" in warning
    assert "@resumable(by=...), one_to_one=True or origin= keeps batches whole" in warning


def test_only_batches_that_are_cut_small_are_worth_a_warning() -> None:
    by_source, whole = Stage("s", 16, by_source=True), Stage("s", 16)
    assert cut_batches(by_source, StageCount(batches=4, calls=60, rows_in=60)) is not None
    assert cut_batches(whole, StageCount(batches=4, calls=60, rows_in=60)) is None
    assert cut_batches(by_source, StageCount(batches=4, calls=5, rows_in=60)) is None
    assert cut_batches(by_source, StageCount()) is None
    # Ray gives whole blocks, of many large sources here.
    blocks = StageCount(batches=4, calls=60, rows_in=60_000)
    assert cut_batches(Stage("s", None, by_source=True), blocks) is None
    shared = cut_batches(
        Stage("s", 16, by_column="label"), StageCount(batches=4, calls=60, rows_in=60)
    )
    assert shared is not None
    assert "about 15 sources in a batch share values of 'label'" in shared


def test_counts_add_up_and_have_names() -> None:
    count = StageCount(1, 2, 3, 4, 5, 6, 0.5)
    assert added(count, count) == StageCount(2, 4, 6, 8, 10, 12, 1.0)
    numbers = [StageNumbers("a", rows_in=1), StageNumbers("b"), StageNumbers("a", rows_in=2)]
    assert [(name, value["rows_in"]) for name, value in by_name(numbers).items()] == [
        ("a", 1),
        ("b", 0),
        ("a #2", 2),
    ]
