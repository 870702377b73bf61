"""The refusals: by name, with the way out, and before anything was started or written."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import pytest
import ray
from conftest import ids_in, snapshot
from ray.data import DataContext, Dataset, SaveMode
from ray.data.datatype import DataType
from ray.data.expressions import (
    col,
    random,
    udf,
)
from refusals import DECORATE, PIPELINE, READ, SAY_IT, Refusal

from ray_resume import (
    CheckpointError,
    NonResumableError,
    ResumeError,
    resumable,
    resumable_read,
    resumable_write,
)
from ray_resume.raydata import plan
from ray_resume.raydata.expressions import describe
from ray_resume.read.datasource import ResumableDatasource

# Ray types a UDF's argument as the union of all batch formats.
Batch: TypeAlias = Any


@resumable
def keep(batch: Batch) -> Batch:
    return batch


def undecorated(batch: Batch) -> Batch:
    return batch


class Undecorated:
    def __call__(self, batch: Batch) -> Batch:
        return batch


@resumable
class Decorated:
    def __call__(self, batch: Batch) -> Batch:
        return batch


class Derived(Decorated):
    pass


def plus_one_of(column: str) -> Any:
    types: Any = DataType
    plus_one: Any = udf(return_dtype=types.int64())(lambda values: values)
    return plus_one(col(column))


@resumable(sink=True)
def send(batch: Batch) -> Batch:
    return batch


OTHERS: dict[str, Refusal] = {
    "the first of two": Refusal(
        lambda ds, _: ds.sort("id").random_shuffle(),
        "Sort (from sort",
        "ReadParquet -> [Sort] -> RandomShuffle -> resumable_write",
        PIPELINE,
    ),
    "limit before a stage": Refusal(
        lambda ds, _: ds.limit(10).map_batches(keep),
        "Limit(limit=10)",
        "ReadParquet -> [Limit(limit=10)] -> MapBatches(keep) -> resumable_write",
        PIPELINE,
    ),
    "union below a plain read": Refusal(
        lambda ds, other: other.union(ds),
        "Union of 2 datasets",
        " -> [Union of 2 datasets] -> resumable_write",
        PIPELINE,
    ),
    "union of its own branches": Refusal(
        lambda ds, _: ds.map_batches(keep).union(ds.map_batches(keep)).map(keep),
        "Union of 2 datasets",
        "ReadParquet -> MapBatches(keep) -> [Union of 2 datasets] -> Map(keep) -> resumable_write",
        PIPELINE,
    ),
    "undecorated lambda": Refusal(
        lambda ds, _: ds.select_columns(["id"]).map_batches(lambda batch: batch),
        "MapBatches(<lambda>) runs",
        "ReadParquet -> Project -> [MapBatches(<lambda>)] -> resumable_write",
        DECORATE,
    ),
    "undecorated class": Refusal(
        lambda ds, _: ds.map_batches(Undecorated),
        "MapBatches(Undecorated) runs",
        "ReadParquet -> [MapBatches(Undecorated)] -> resumable_write",
        DECORATE,
    ),
    "class derived from a decorated one": Refusal(
        lambda ds, _: ds.map_batches(Derived),
        "MapBatches(Derived) runs",
        "ReadParquet -> [MapBatches(Derived)] -> resumable_write",
        DECORATE,
    ),
    "undecorated before a decorated one": Refusal(
        lambda ds, _: ds.map_batches(undecorated).map_batches(keep),
        "MapBatches(undecorated) runs",
        "ReadParquet -> [MapBatches(undecorated)] -> MapBatches(keep) -> resumable_write",
        DECORATE,
    ),
    "undecorated map": Refusal(
        lambda ds, _: ds.map(lambda row: row),
        "Map(<lambda>) runs",
        "ReadParquet -> [Map(<lambda>)] -> resumable_write",
        DECORATE,
    ),
    "undecorated flat_map": Refusal(
        lambda ds, _: ds.flat_map(lambda row: [row]),
        "FlatMap(<lambda>) runs",
        "ReadParquet -> [FlatMap(<lambda>)] -> resumable_write",
        DECORATE,
    ),
    "undecorated filter": Refusal(
        lambda ds, _: ds.filter(lambda row: True),
        "Filter(<lambda>) runs",
        "ReadParquet -> [Filter(<lambda>)] -> resumable_write",
        DECORATE,
    ),
    "UDF in the expression of a filter": Refusal(
        lambda ds, _: ds.map_batches(keep).filter(expr=plus_one_of("id") > 3),
        "runs a UDF inside an expression",
        "ReadParquet -> MapBatches(keep) -> [Filter(",
        SAY_IT.removeprefix("with "),
    ),
    "our column": Refusal(
        lambda ds, _: ds.with_column("__ray_resume_token", col("id")),
        "Project makes a column called __ray_resume_token",
        "ReadParquet -> [Project] -> resumable_write",
        "Give it another name",
    ),
    "plain read": Refusal(
        lambda _, other: other.map_batches(keep),
        "The pipeline starts with Read",
        "] -> MapBatches(keep) -> resumable_write",
        READ,
    ),
    "rows from memory": Refusal(
        lambda *_: ray.data.from_items([{"id": 1}]).map_batches(keep),
        "The pipeline starts with FromItems",
        "[FromItems] -> MapBatches(keep) -> resumable_write",
        READ,
    ),
    "a sink that is not the last": Refusal(
        lambda ds, _: ds.map_batches(send).map_batches(keep),
        "MapBatches(send) is decorated with @resumable(sink=True)",
        "ReadParquet -> [MapBatches(send)] -> MapBatches(keep) -> resumable_write",
        "Make it the last operator",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.usefixtures("cluster")
def test_refused_by_name_and_place_before_anything_starts(
    case: str, source: Path, tmp_path: Path
) -> None:
    OTHERS[case].check(source, tmp_path)


@pytest.mark.usefixtures("cluster")
def test_of_a_long_pipeline_only_the_surroundings_are_told(source: Path, tmp_path: Path) -> None:
    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
    for number in range(12):
        ds = ds.sort("id") if number == 6 else ds.filter(expr=col("name") != str(number) * 100)
    with pytest.raises(NonResumableError) as caught:
        resumable_write(ds, tmp_path / "out")
    (where,) = re.findall(r"here: (.*)\. Write", str(caught.value))
    names = where.split(" -> ")
    assert [names[0], names[1], names[5], names[9], names[10]] == [
        *("ReadParquet", "...", "[Sort]", "...", "resumable_write")
    ]
    filters = [names[i] for i in (2, 3, 4, 6, 7, 8)]
    assert all(name.startswith("Filter(col('name')") and len(name) < 80 for name in filters)
    assert len(names) == 11


@pytest.mark.usefixtures("cluster")
def test_a_plain_write_is_refused_before_it_touches_the_folder(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious.parquet").write_bytes(b"precious")
    before = snapshot(tmp_path)
    pipeline = ds.map_batches(keep)
    writes: list[Callable[[], Any]] = [
        lambda: pipeline.write_parquet(str(tmp_path / "out")),
        lambda: pipeline.write_json(str(tmp_path / "out")),
        lambda: pipeline.write_csv(str(full), mode=SaveMode.OVERWRITE),
        lambda: pipeline.materialize().write_parquet(str(tmp_path / "out")),
        lambda: pipeline.sort("id").write_parquet(str(tmp_path / "out")),
    ]
    for write in writes:
        with pytest.raises(NonResumableError, match=r"resumable_write\(ds, folder\)") as caught:
            write()
        assert type(caught.value) is NonResumableError
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None
    assert "-> [write]" in str(caught.value)
    assert "user code" not in caplog.text
    assert snapshot(tmp_path) == before
    # Others write as ever, beside it.
    ray.data.range(3).write_parquet(str(tmp_path / "other"))
    assert ids_in(tmp_path / "other") == [0, 1, 2]


@pytest.mark.usefixtures("cluster")
def test_rays_own_checkpointing_beside_ours_is_refused(source: Path, tmp_path: Path) -> None:
    from ray.data.checkpoint import CheckpointConfig

    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
    ds.context.checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=str(tmp_path / "rays")
    )
    with pytest.raises(NonResumableError, match="checkpoint_config"):
        resumable_write(ds, tmp_path / "out")


@pytest.mark.usefixtures("cluster")
def test_bad_arguments_of_the_write(source: Path, tmp_path: Path) -> None:
    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="compresion"):
        resumable_write(ds, tmp_path / "out", compresion="zstd")
    with pytest.raises(ValueError, match="xlsx"):
        resumable_write(ds, tmp_path / "out", format="xlsx")
    with pytest.raises(NonResumableError, match="folder"):
        resumable_write(ds, 3)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="is a file"):
        resumable_write(ds, source / "00001.parquet")
    for inside in (source, source / "out"):
        with pytest.raises(CheckpointError, match="is in the input"):
            resumable_write(ds, inside)
    after = {name: value for name, value in snapshot(tmp_path).items() if "ckpt" not in name}
    assert after == {name: value for name, value in before.items() if "ckpt" not in name}


@pytest.mark.usefixtures("cluster")
def test_bad_arguments_of_the_read(source: Path, tmp_path: Path) -> None:
    def read(reader: Any = None, **options: Any) -> Dataset:
        return resumable_read(
            reader or ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt", **options
        )

    with pytest.raises(ValueError, match="on_source_change"):
        read(on_source_change="ignor")
    with pytest.raises(ValueError, match="max_failed_runs"):
        read(max_failed_runs=0)
    with pytest.raises(ValueError, match="less than the count"):
        read(shard=(2, 2))
    with pytest.raises(ResumeError, match="SLURM_ARRAY_TASK_ID"):
        read(shard="slurm")
    with pytest.raises(TypeError, match="source_id is for a Datasource"):
        read(source_id=lambda task, index: "x")
    for_files: list[dict[str, Any]] = [{"granularity": "row_group"}, {"source_root": "/"}]
    for options in for_files:
        with pytest.raises(TypeError, match="readers for files alone"):
            resumable_read(lambda key: None, keys=[1], checkpoint=tmp_path / "ckpt", **options)
    with pytest.raises(FileNotFoundError, match="png"):
        read(ray.data.read_images)
    with pytest.raises(NonResumableError, match="undecorated"):
        read(undecorated)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        resumable_read(ray.data.read_parquet, str(source), checkpoint="what://bucket/ckpt")
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.usefixtures("cluster")
def test_the_users_dataset_and_context_stay_as_they_were(source: Path, tmp_path: Path) -> None:
    context = DataContext.get_current()
    before = dict(vars(context))
    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
    ds = ds.map_batches(keep)
    dag, callbacks = ds._logical_plan.dag, list(ds.context.custom_execution_callback_classes)
    resumable_write(ds, tmp_path / "out")
    assert ds._logical_plan.dag is dag
    assert ds.context.custom_execution_callback_classes == callbacks
    assert dict(vars(context)) == before
    assert context.custom_execution_callback_classes == []


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("iterated", [False, True])
def test_nothing_at_random_is_pushed_into_a_read(
    iterated: bool, source: Path, tmp_path: Path
) -> None:
    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
    ds = ds.filter(expr=col("id") >= 0).filter(expr=random() >= 0.0)
    if iterated:
        ds.take(1)
    chain = plan.validate(
        ds, resumable_datasource=ResumableDatasource, is_decorated=lambda _: True
    ).optimized()
    datasource: Any = chain.datasource
    assert [*map(describe, datasource._predicates)] == ["(id >= 0)"]
    assert [*map(describe, (operator.predicate_expr for operator in chain.operators))] == [
        "(random() >= 0.0)"
    ]
    # Nor does a read take it that is asked to.
    assert datasource.apply_predicate(random() >= 0.0) is datasource


@pytest.mark.usefixtures("cluster")
def test_a_reader_that_runs_code_of_the_user_gets_fresh_tokens(
    source: Path, tmp_path: Path
) -> None:
    cases: list[tuple[bool, Any]] = [(True, {}), (False, {"_block_udf": lambda block: block})]
    for repeatable, options in cases:
        ds = resumable_read(
            ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt", **options
        )
        chain = plan.validate(
            ds, resumable_datasource=ResumableDatasource, is_decorated=lambda _: True
        )
        datasource: Any = chain.datasource
        assert datasource.input.repeatable is repeatable


@pytest.mark.usefixtures("cluster")
def test_what_was_meant_is_in_the_message(source: Path, tmp_path: Path) -> None:
    class Own(ray.data.Datasource):
        pass

    def read(*args: Any, **options: Any) -> Any:
        return resumable_read(*args, checkpoint=tmp_path / "ckpt", **options)

    folder = str(source)
    parquet = ray.data.read_parquet
    ds = read(parquet, folder)
    swapped: Any = resumable_write
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (
            lambda: read(parquet(folder)),
            NonResumableError,
            "called already. Pass the reader itself, with its arguments after it: "
            'resumable_read(ray.data.read_parquet, "in/", checkpoint=...)',
        ),
        (
            lambda: read(folder, ray.data.read_csv),
            NonResumableError,
            "Pass the reader first: resumable_read(ray.data.read_csv, '/",
        ),
        (lambda: read([folder]), NonResumableError, "resumable_read(ray.data.read_parquet, ['/"),
        (lambda: read(Own), NonResumableError, "Pass an object of it: resumable_read(Own(...)"),
        (
            lambda: read(functools.partial(parquet, columns=["id"]), folder),
            NonResumableError,
            "Pass the reader itself, with all of its arguments after it: "
            "resumable_read(ray.data.read_parquet, ...",
        ),
        (
            lambda: read(pd.read_parquet, folder),
            NonResumableError,
            "pandas.read_parquet is not one of Ray Data's readers. Did you mean "
            "ray.data.read_parquet?",
        ),
        (lambda: read(ray.data.range, 3), NonResumableError, "or anything else by keys"),
        (lambda: read(print, 3), NonResumableError, "print has no sources that are the same"),
        (lambda: read(parquet), TypeError, "ray.data.read_parquet: missing a required argument"),
        (lambda: read(keep, folder, keys=["a"]), TypeError, f"It has no use for {folder!r}"),
        (
            lambda: resumable_read(parquet, folder, checkpoint=ds),
            TypeError,
            "checkpoint must be a directory, a URI or a ray_resume.Checkpoint, not a Dataset",
        ),
        (
            lambda: swapped(str(tmp_path / "out"), ds),
            NonResumableError,
            "resumable_write(ds, '/",
        ),
        (lambda: resumable(ds), NonResumableError, "needs a function or a class, not"),
    ]
    before = snapshot(tmp_path)
    for call, kind, words in cases:
        with pytest.raises(kind) as caught:
            call()
        assert words in str(caught.value), words
        assert caught.value.__cause__ is None
    assert snapshot(tmp_path) == before


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("known", [True, False])
def test_errors_of_the_sink_stand_alone(known: bool, source: Path, tmp_path: Path) -> None:
    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
    ds = ds.select_columns(["id", "name"]) if known else ds.map_batches(keep)
    for columns, words in (
        (["nope"], "names 'nope', and the rows have"),
        (["id", "name"], "every"),
    ):
        if not known and words == "every":
            continue
        with pytest.raises(ResumeError, match=words) as caught:
            resumable_write(ds, tmp_path / "out", partition_cols=columns)
        assert type(caught.value) is ResumeError
        assert caught.value.__cause__ is None
        assert len(str(caught.value).splitlines()) == 1
    if (
        known
        and plan.validate(
            ds, resumable_datasource=ResumableDatasource, is_decorated=lambda _: True
        ).schema()
    ):
        assert not (tmp_path / "out").exists(), "nothing was started"


def test_help_names_all_that_is_served() -> None:
    text = inspect.getdoc(resumable) or ""
    for word in (
        *("map_batches", "map``", "flat_map", "filter", "numpy", "pandas", "pyarrow", "generator"),
        *("class", "async", "partial", "method", "lambda", "expr=", "contract", "later call"),
        *("one_to_one:", "origin:", "sink:", "on_error:", "isolate:", "Raises:", "Example"),
    ):
        assert word in text, word
