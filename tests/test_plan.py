"""The refusals: by name, with the way out, and before anything was started or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import ray
from conftest import snapshot
from ray.data import DataContext, Dataset
from ray.data.datatype import DataType
from ray.data.expressions import col, udf

from ray_resume import (
    CheckpointError,
    NonResumableError,
    ResumeError,
    resumable,
    resumable_read,
    resumable_write,
)

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


REFUSED: dict[str, tuple[Callable[[Dataset, Dataset], Dataset], str]] = {
    "random_shuffle": (lambda ds, _: ds.random_shuffle(), "RandomShuffle"),
    "randomize_block_order": (lambda ds, _: ds.randomize_block_order(), "RandomizeBlock"),
    "sort": (lambda ds, _: ds.sort("id"), "Sort"),
    "repartition": (lambda ds, _: ds.repartition(3), "Repartition"),
    "groupby": (lambda ds, _: ds.groupby("name").count(), "Aggregate"),
    "map_groups": (lambda ds, _: ds.groupby("name").map_groups(undecorated), "Repartition"),
    "unique": (lambda ds, _: ds.groupby("id").sum("weight"), "Aggregate"),
    "limit": (lambda ds, _: ds.limit(10), "Limit"),
    "limit before a stage": (lambda ds, _: ds.limit(10).map_batches(keep), "Limit"),
    "union": (lambda ds, other: ds.union(other), "Union"),
    "union of its own branches": (
        lambda ds, _: ds.map_batches(keep).union(ds.map_batches(keep)),
        "Union",
    ),
    "zip": (lambda ds, other: ds.zip(other), "Zip"),
    "join": (
        lambda ds, other: ds.join(other, join_type="inner", num_partitions=2, on=("id",)),
        "Join",
    ),
    "random_sample": (lambda ds, _: ds.random_sample(0.5), "random_sample"),
    "undecorated function": (lambda ds, _: ds.map_batches(undecorated), "undecorated"),
    "undecorated lambda": (lambda ds, _: ds.map_batches(lambda batch: batch), "<lambda>"),
    "undecorated class": (lambda ds, _: ds.map_batches(Undecorated), "Undecorated"),
    "class derived from a decorated one": (lambda ds, _: ds.map_batches(Derived), "Derived"),
    "undecorated before a decorated one": (
        lambda ds, _: ds.map_batches(undecorated).map_batches(keep),
        "undecorated",
    ),
    "undecorated map": (lambda ds, _: ds.map(lambda row: row), "Map(<lambda>)"),
    "undecorated flat_map": (lambda ds, _: ds.flat_map(lambda row: [row]), "FlatMap(<lambda>)"),
    "undecorated filter": (lambda ds, _: ds.filter(lambda row: True), "Filter(<lambda>)"),
    "UDF in an expression": (lambda ds, _: ds.with_column("x", plus_one_of("id")), "expression"),
    "our column": (lambda ds, _: ds.with_column("__ray_resume_token", col("id")), "token"),
    "materialized": (lambda ds, _: ds.map_batches(keep).materialize(), "materialized"),
    "plain read": (lambda _, other: other.map_batches(keep), "resumable_read"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("cluster")
def test_refused_by_name_before_anything_starts(case: str, source: Path, tmp_path: Path) -> None:
    build, named = REFUSED[case]
    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
    other = ray.data.read_parquet(str(source))
    pipeline = build(ds, other)
    before = snapshot(tmp_path)
    with pytest.raises(NonResumableError) as caught:
        resumable_write(pipeline, tmp_path / "out")
    message = str(caught.value)
    assert named in message
    # Each message ends with what to do.
    assert any(
        way in message
        for way in (
            "second pipeline",
            "@resumable",
            "resumable_read(",
            "another name",
            "resumable_write",
        )
    ), message
    assert snapshot(tmp_path) == before


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("write", ["write_parquet", "write_json", "write_csv"])
def test_a_plain_write_is_refused(write: str, source: Path, tmp_path: Path) -> None:
    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
    with pytest.raises(NonResumableError, match=r"resumable_write\(ds, folder\)"):
        getattr(ds.map_batches(keep), write)(str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*"))


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
    for options in ({"shard": (0, 2)}, {"shard": "slurm"}):
        with pytest.raises(ResumeError, match=next(iter(options))):
            read(**options)
    with pytest.raises(NonResumableError, match="restart"):
        read(on_pipeline_change="restart")
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
    with pytest.raises(CheckpointError, match="local file system"):
        resumable_read(ray.data.read_parquet, str(source), checkpoint="s3://bucket/ckpt")
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
