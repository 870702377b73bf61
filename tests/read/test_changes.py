"""Changed pipelines: how a pipeline is spelt, and what a run does when it is not the same."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import ids_in, write_source
from ray.data import Dataset
from ray.data.expressions import col

from ray_resume import (
    Checkpoint,
    PipelineChangedError,
    RunSummary,
    resumable,
    resumable_read,
    resumable_write,
)
from ray_resume.core.records import Fingerprint, Record, State, digest, encode, pipeline_of
from ray_resume.core.resume_plan import Todo, todo_of
from ray_resume.core.snapshot import Union
from ray_resume.core.sources import Source
from ray_resume.raydata import plan
from ray_resume.read.datasource import ResumableDatasource
from ray_resume.udf import stage

# What there is to do ------------------------------------------------------------------------------


def sorted_out(policy: str, **signatures: str) -> Todo:
    """Sort sources out for the pipeline "now"; "a" is completed, "q" quarantined, "f" failed."""
    states = {"a": State.COMPLETED, "q": State.QUARANTINED, "f": State.FAILED}
    records = [
        Record(name, states[name[0]], 1, "run", pipeline=pipeline_of(signature), failed_runs=2)
        for name, signature in signatures.items()
    ]
    union = Union({"run": [(digest(r.source_id), encode(r)) for r in records]})
    return todo_of(
        [Source(name, name, Fingerprint()) for name in signatures],
        union,
        on_source_change="reprocess",
        signature="now",
        on_pipeline_change=policy,
        signatures=signatures.values(),
    )


def test_another_pipeline_is_an_error_that_shows_both() -> None:
    with pytest.raises(PipelineChangedError, match=r"(?s)that 2 of.*then: old\n.*now:  now"):
        sorted_out("error", a1="old", a2="now", a3="old", a4="older")
    assert len(sorted_out("error", a1="now", q1="old", f1="old").skipped) == 1


def test_continue_keeps_what_is_there() -> None:
    todo = sorted_out("continue", a1="old", a2="now", q1="old")
    assert (len(todo.skipped), todo.quarantined, list(todo.pending)) == (2, 1, [])


def test_restart_does_anew_what_went_through_another_pipeline() -> None:
    todo = sorted_out("restart", a1="old", a2="now", q1="old", q2="now")
    assert [source.source_id for source in todo.pending] == ["a1", "q1"]
    assert (len(todo.skipped), todo.quarantined) == (1, 1)
    assert {record.failed_runs for record in todo.records.values()} == {0}


# How a pipeline is spelt --------------------------------------------------------------------------


@resumable
def clean(batch: Any) -> Any:
    return batch


@resumable
def other(batch: Any) -> Any:
    return batch


@resumable
class Score:
    def __call__(self, batch: Any) -> Any:
        return batch


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_source(tmp_path / "in", files=3, rows=5)
    return tmp_path / "in"


def read(source: Path, **options: Any) -> Dataset:
    checkpoint = source.parent / "ckpt"
    return resumable_read(ray.data.read_parquet, str(source), checkpoint=checkpoint, **options)


def signature(ds: Dataset) -> str:
    return plan.chain_of(
        ds,
        resumable_datasource=ResumableDatasource,
        is_decorated=lambda udf: stage.options_of(udf) is not None,
    ).signature()


@pytest.mark.usefixtures("cluster")
def test_a_pipeline_is_spelt_the_same_after_it_was_looked_at(source: Path) -> None:
    ds = read(source).select_columns(["id", "name"]).filter(expr=col("id") >= 0)
    ds = ds.with_column("more", col("id") + 1).rename_columns({"more": "next"})
    ds = ds.map_batches(clean).map(resumable(lambda row: row)).map_batches(Score, concurrency=1)
    ds = ds.repartition(target_num_rows_per_block=100)
    ds = ds.flat_map(resumable(lambda row: [row])).filter(resumable(lambda row: True))
    ds = ds.rename_columns({"next": "n"}).select_columns(["id", "n"]).rename_columns({"n": "m"})
    expected = (
        "read_parquet -> columns(id, name) -> filter(col('id') >= 0) -> columns(*, next) -> "
        "map_batches(clean) -> map(<lambda>) -> map_batches(Score) -> flat_map(<lambda>) -> "
        "filter(<lambda>) -> columns(id, m)"
    )
    assert signature(ds) == expected
    for _ in ds.iter_batches():
        pass
    assert signature(ds) == expected


@pytest.mark.usefixtures("cluster")
def test_policies(source: Path, tmp_path: Path) -> None:
    def run(udf: Any, policy: str | None = None, **options: Any) -> RunSummary:
        ds = read(source, **({"on_pipeline_change": policy} if policy else {}))
        return resumable_write(ds.map_batches(udf), tmp_path / "out", **options)

    assert run(clean).sources_completed == 3
    assert run(clean).sources_skipped == 3
    with pytest.raises(PipelineChangedError) as caught:
        run(other)
    then, now = inspect.cleandoc(str(caught.value)).splitlines()[1:3]
    assert then.strip() == "then: read_parquet -> map_batches(clean) -> write_parquet"
    assert now.strip() == "now:  read_parquet -> map_batches(other) -> write_parquet"
    with pytest.raises(PipelineChangedError, match="write_csv"):
        run(clean, format="csv")

    write_source(tmp_path / "more", files=4, rows=5)
    (tmp_path / "more" / "00003.parquet").rename(source / "00003.parquet")
    summary = run(other, "continue")
    assert (summary.sources_completed, summary.sources_skipped) == (1, 3)
    assert run(other, "continue").sources_skipped == 4
    with pytest.raises(PipelineChangedError, match="that 3 of"):
        run(other)

    summary = run(other, "restart")
    assert (summary.sources_completed, summary.sources_skipped) == (3, 1)
    assert ids_in(tmp_path / "out") == list(range(20))
    assert Checkpoint(tmp_path / "ckpt").files() == sorted(map(str, (tmp_path / "out").iterdir()))
    assert run(other).sources_skipped == 4


# Changed sources ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("granularity", ["file", "row_group"])
def test_a_source_that_is_rewritten_after_it_was_listed_is_not_complete(
    source: Path, tmp_path: Path, granularity: str
) -> None:
    ds = read(source, granularity=granularity)
    write_source(tmp_path / "new", files=2, rows=7)
    os.replace(tmp_path / "new" / "00001.parquet", source / "00001.parquet")
    summary = resumable_write(ds.map_batches(clean), tmp_path / "out")
    assert (summary.sources_completed, summary.sources_failed) == (2, 1)
    (failed,) = Checkpoint(tmp_path / "ckpt").sources("failed")
    assert "the source changed after it was listed" in str(failed.error)
    assert ids_in(tmp_path / "out") == [*range(5), *range(10, 15)]
    ds = read(source, granularity=granularity)
    assert resumable_write(ds.map_batches(clean), tmp_path / "out").sources_completed == 1
    assert ids_in(tmp_path / "out") == sorted([*range(5), *range(10, 15), *range(7, 14)])


@pytest.mark.usefixtures("cluster")
def test_what_is_gone_from_the_input_is_told_and_its_output_stays(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resumable_write(read(source), tmp_path / "out")
    assert "not in the input any more" not in caplog.text
    (source / "00001.parquet").unlink()
    assert resumable_write(read(source), tmp_path / "out").sources_total == 2
    assert "1 completed sources are not in the input any more" in caplog.text
    assert "00001.parquet for one" in caplog.text
    assert ids_in(tmp_path / "out") == list(range(15))
