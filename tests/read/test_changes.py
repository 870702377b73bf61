"""Changed pipelines: how a pipeline is spelt, and what a run does when it is not the same."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from conftest import ids_in, write_source
from ray.data import Dataset
from ray.data.expressions import col
from snapshots import snapshot_of

from ray_resume import (
    Checkpoint,
    PipelineChangedError,
    RunSummary,
    resumable,
    resumable_read,
    resumable_write,
)
from ray_resume.core.records import Fingerprint, Record, State, pipeline_hash
from ray_resume.core.resume_plan import ResumePlan, plan_resume
from ray_resume.core.sources import Source
from ray_resume.raydata import plan
from ray_resume.raydata.signature import Signature, signature_of
from ray_resume.read.datasource import ResumableDatasource
from ray_resume.udf.decorator import options_of

# What there is to do ------------------------------------------------------------------------------


def sorted_out(policy: str, on_code_change: str = "warn", **signatures: str) -> ResumePlan:
    """Sort sources out for the pipeline "now"; "a" is completed, "q" quarantined, "f" failed."""
    states = {"a": State.COMPLETED, "q": State.QUARANTINED, "f": State.FAILED}
    records = [
        Record(
            name,
            states[name[0]],
            1,
            "run",
            pipeline=pipeline_hash(*signature.split("/")),
            failed_runs=2,
        )
        for name, signature in signatures.items()
    ]
    snapshot = snapshot_of({"run": records})
    return plan_resume(
        [Source(name, name, Fingerprint()) for name in signatures],
        snapshot,
        on_source_change="reprocess",
        signature="now",
        on_pipeline_change=policy,
        code="code",
        on_code_change=on_code_change,
        signatures=signatures.values(),
    )


def test_another_pipeline_is_an_error_that_shows_both() -> None:
    with pytest.raises(PipelineChangedError, match=r"(?s)that 2 of.*then: old\n.*now:  now"):
        sorted_out("error", a1="old", a2="now", a3="old", a4="older")
    assert len(sorted_out("error", a1="now", q1="old", f1="old").skipped) == 1


def test_continue_keeps_what_is_there() -> None:
    resume_plan = sorted_out("continue", a1="old", a2="now", q1="old")
    assert (len(resume_plan.skipped), resume_plan.quarantined, list(resume_plan.pending)) == (
        2,
        1,
        [],
    )


def test_restart_does_anew_what_went_through_another_pipeline() -> None:
    resume_plan = sorted_out("restart", a1="old", a2="now", q1="old", q2="now")
    assert [source.source_id for source in resume_plan.pending] == ["a1", "q1"]
    assert (len(resume_plan.skipped), resume_plan.quarantined) == (1, 1)
    assert {record.failed_runs for record in resume_plan.records.values()} == {0}


def test_other_code_is_told_or_done_anew() -> None:
    states = {
        "a1": "now/code",
        "a2": "now/other",
        "a3": "now",
        "a4": "now/other",
        "q1": "now/other",
    }
    resume_plan = sorted_out("error", **states)
    assert (len(resume_plan.skipped), resume_plan.quarantined, list(resume_plan.pending)) == (
        4,
        1,
        [],
    )
    assert [record.source_id for record in resume_plan.recoded] == ["a2", "a4"]
    resume_plan = sorted_out("error", "reprocess", **states)
    assert sorted(source.source_id for source in resume_plan.pending) == ["a2", "a4", "q1"]
    assert {record.failed_runs for record in resume_plan.records.values()} == {0}
    assert len(resume_plan.recoded) == 0
    # What went through another pipeline is not told of twice.
    assert len(sorted_out("continue", a1="old/other").recoded) == 0


def test_a_record_of_an_older_version_is_shown_with_its_signature() -> None:
    old = hashlib.blake2b(b"old", digest_size=8).digest()
    record = Record("a", State.COMPLETED, 1, "run", pipeline=old)
    with pytest.raises(PipelineChangedError, match=r"(?s)then: old\n.*now:  now"):
        plan_resume(
            [Source("a", "a", Fingerprint())],
            snapshot_of({"run": [record]}),
            on_source_change="reprocess",
            signature="now",
            on_pipeline_change="error",
            signatures=["old", "older"],
        )
    resume_plan = plan_resume(
        [Source("a", "a", Fingerprint())],
        snapshot_of({"run": [record]}),
        on_source_change="reprocess",
        signature="old",
        code="code",
        on_pipeline_change="error",
        on_code_change="reprocess",
    )
    assert len(resume_plan.skipped) == 1, (
        "the same text is the same pipeline, and its code is not known"
    )


def test_of_a_long_pipeline_the_first_difference_is_named() -> None:
    steps = [f"map(f{number})" for number in range(9)]
    old, now = " -> ".join(steps), "now"
    with pytest.raises(PipelineChangedError) as caught:
        sorted_out("error", a1=old)
    assert "first difference" not in str(caught.value)
    record = Record("a", State.COMPLETED, 1, "run", pipeline=pipeline_hash(old))
    steps[4] = "map(g, by=3)"
    with pytest.raises(PipelineChangedError, match=r"step 5: map\(f4\) then, map\(g, by=3\) now"):
        plan_resume(
            [Source("a", "a", Fingerprint())],
            snapshot_of({"run": [record]}),
            on_source_change="reprocess",
            signature=" -> ".join(steps),
            on_pipeline_change="error",
            signatures=[old, now],
        )


# What describes a pipeline ------------------------------------------------------------------------


def scale(batch: Any, *, by: Any, api_key: str, **_: Any) -> Any:
    return batch


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


def signature(ds: Dataset) -> Signature:
    chain = plan.validate(
        ds,
        resumable_datasource=ResumableDatasource,
        is_decorated=lambda udf: options_of(udf) is not None,
    ).optimized()
    datasource: Any = chain.datasource
    return signature_of(
        chain,
        read=datasource.options.reader.text,
        read_udfs=datasource.options.reader.udfs,
        predicates=datasource.predicates,
        columns=datasource.selected_columns,
        input_names=datasource.column_names,
        write="write",
    )


@pytest.mark.extended
@pytest.mark.usefixtures("cluster")
def test_a_pipeline_is_described_the_same_after_it_was_looked_at(source: Path) -> None:
    ds = read(source).select_columns(["id", "name"]).filter(expr=col("id") >= 0)
    ds = ds.with_column("more", col("id") + 1).rename_columns({"more": "next"})
    ds = ds.filter(expr=(col("next") > 0) & (col("id") < 10**6))
    ds = (
        ds.map_batches(clean)
        .map(resumable(lambda row: row))
        .map_batches(Score, compute=ray.data.ActorPoolStrategy(size=1))
    )
    ds = ds.repartition(target_num_rows_per_block=100)
    ds = ds.flat_map(resumable(lambda row: [row])).filter(resumable(lambda row: True))
    ds = ds.rename_columns({"next": "n"}).filter(expr=col("n") > 0)
    ds = ds.select_columns(["id", "n"]).rename_columns({"n": "m"})
    expected = (
        "read_parquet -> filter((id + 1 > 0) & (id < 1000000) & (id >= 0)) -> "
        "columns(id, name, next=(id + 1)) -> map_batches(clean) -> map(<lambda>) -> "
        "map_batches(Score) -> flat_map(<lambda>) -> filter(<lambda>) -> filter((next > 0)) -> "
        "columns(id, m=next) -> write"
    ).replace("(id + 1 > 0)", "((id + 1) > 0)")
    assert signature(ds).text == expected
    code = signature(ds).code
    assert [name for name, _ in code.udfs] == [
        *("map_batches(clean)", "map(<lambda>)", "map_batches(Score)"),
        *("flat_map(<lambda>)", "filter(<lambda>)"),
    ]
    for _ in ds.iter_batches():
        pass
    assert signature(ds) == Signature(expected, code)


@pytest.mark.usefixtures("cluster")
def test_what_a_pipeline_is_told_is_in_its_signature_and_no_secret(source: Path) -> None:
    secret = "sk-verysecret"

    def text(**options: Any) -> str:
        udf = resumable(functools.partial(scale, by=options.pop("by", 2), api_key=secret))
        ds = read(source, **options.pop("read", {}))
        return signature(ds.map_batches(udf, **options)).text

    usual = text(fn_kwargs={"name": "a", "hf_token": secret})
    assert secret not in usual
    assert usual == text(fn_kwargs={"name": "a", "hf_token": "another"})
    others = [
        text(fn_kwargs={"name": "b", "hf_token": secret}),
        text(fn_args=("a",)),
        text(by=3),
        text(by=2),
        text(by={"x": [1, 2]}),
        text(by=np.arange(3)),
        text(read={"include_paths": True}),
        text(read={"partitioning": None}),
        text(read={"arrow_parquet_args": {"batch_size": 3}, "columns": ["id"]}),
    ]
    assert len({usual, *others[:-2], others[-1]}) == len(others)
    assert "include_paths=True" in others[6]
    assert "columns=['id']" in others[8]
    ds = read(source).map_batches(Score, fn_constructor_args=(1, secret), num_cpus=0.1)
    made = signature(ds).text
    assert secret not in made
    assert made != signature(read(source).map_batches(Score, fn_constructor_args=(2, secret))).text


@pytest.mark.extended
@pytest.mark.long
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
    versioned = resumable(inspect.unwrap(clean), version="v2")
    with pytest.raises(PipelineChangedError, match=r"now:  .*map_batches\(clean, version=v2\) ->"):
        run(versioned)
    with pytest.raises(PipelineChangedError, match="write_csv"):
        run(clean, format="csv")
    with pytest.raises(PipelineChangedError, match=r"write_parquet\(partition_cols=\[name\]\)"):
        run(clean, partition_cols=["name"])
    with pytest.raises(PipelineChangedError, match=r"write_parquet\(compression=gzip\)"):
        run(clean, compression="gzip")

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
@pytest.mark.parametrize(
    "granularity",
    ["file", pytest.param("row_group", marks=[pytest.mark.extended, pytest.mark.long])],
)
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


@pytest.mark.extended
@pytest.mark.long
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


# Changed code -------------------------------------------------------------------------------------


@pytest.mark.extended
@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_other_code_is_noted_and_processed_again_if_asked(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(factor: int, **options: Any) -> RunSummary:
        caplog.clear()
        udf = resumable(lambda batch: {"id": batch["id"] * factor})
        return resumable_write(read(source, **options).map_batches(udf), tmp_path / "out")

    assert run(1).sources_completed == 3
    assert run(1).sources_skipped == 3
    assert "other code" not in caplog.text
    assert run(10).sources_skipped == 3
    assert caplog.text.count("other code") == 1
    assert "3 of the completed sources went through other code than this run's" in caplog.text
    assert "in map_batches(<lambda>), " in caplog.text
    assert 'on_code_change="reprocess"' in caplog.text
    assert run(10, on_code_change="ignore").sources_skipped == 3
    assert "other code" not in caplog.text
    assert ids_in(tmp_path / "out") == list(range(15))
    assert run(10, on_code_change="reprocess").sources_completed == 3
    assert ids_in(tmp_path / "out") == list(range(0, 150, 10))
    assert run(10).sources_skipped == 3
    assert "other code" not in caplog.text
