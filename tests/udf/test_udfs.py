"""The UDF table: every kind of UDF and every built-in operator that may stand in a pipeline.

Chained into few pipelines, since each costs seconds; each kind is seen in what a row says.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from conftest import ids_in, write_source
from ray.data import ActorPoolStrategy
from ray.data.expressions import col

from ray_resume import resumable, resumable_read, resumable_write

pytestmark = pytest.mark.usefixtures("cluster")


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [
        row for path in folder.glob("*.parquet") for row in pq.ParquetFile(path).read().to_pylist()
    ]


def read(tmp_path: Path, **options: Any) -> Any:
    return resumable_read(
        ray.data.read_parquet, str(tmp_path / "in"), checkpoint=tmp_path / "ckpt", **options
    )


@resumable
def double(row: dict[str, Any], *, by: int = 2) -> dict[str, Any]:
    return {**row, "double": row["id"] * by}


@resumable
class IsNotFifth:
    def __init__(self, divisor: int) -> None:
        self.divisor = divisor

    def __call__(self, row: dict[str, Any]) -> bool:
        return bool(row["id"] % self.divisor)


@resumable
def repeat(row: dict[str, Any]) -> Any:
    if row["id"] % 4 == 0:
        return None
    if row["id"] % 4 == 1:
        return []
    return ({**row, "copy": copy} for copy in range(row["id"] % 4))


class Model:
    @resumable
    def method(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "method": batch["id"] + 1}


def test_row_wise_udfs(tmp_path: Path) -> None:
    write_source(tmp_path / "in", files=4, rows=50)
    ds = (
        read(tmp_path)
        .map(double, fn_kwargs={"by": 3})
        .filter(IsNotFifth, fn_constructor_args=(5,), compute=ActorPoolStrategy(size=1))
        .flat_map(repeat, num_cpus=0.5)
        .filter(resumable(lambda row: row["copy"] != 2))
        .map_batches(Model().method)
        .map_batches(
            resumable(functools.partial(lambda batch, key: {**batch, key: batch["id"]}, key="k"))
        )
    )
    summary = resumable_write(ds, tmp_path / "out")
    expected = sorted(
        (i, i * 3, copy, i + 1, i)
        for i in range(200)
        if i % 5
        for copy in range(min(i % 4, 2))
        if i % 4 > 1
    )
    rows = rows_in(tmp_path / "out")
    assert sorted((r["id"], r["double"], r["copy"], r["method"], r["k"]) for r in rows) == expected
    assert (summary.sources_completed, summary.rows_read) == (4, 200)


def test_built_in_operators(tmp_path: Path) -> None:
    write_source(tmp_path / "in", files=4, rows=50)
    ds = (
        read(tmp_path)
        .select_columns(["weight", "id"])
        .filter(expr=col("id") >= 60)
        .with_column("twice", col("id") * 2)
        .rename_columns({"weight": "mass"})
        .map_batches(resumable(lambda batch: batch), batch_format="pandas")
        .filter(expr=(col("id") != 77) & (col("mass") < 20))
        .drop_columns(["mass"])
        .repartition(target_num_rows_per_block=7)
        .filter(expr="id != 78")
    )
    plain = sorted(row["id"] for row in ds.take_all())
    expected = [i for i in range(60, 140) if i not in (77, 78)]
    assert plain == expected, "not armed, it is the user's pipeline"
    summary = resumable_write(ds, tmp_path / "out")
    assert sorted((r["id"], r["twice"]) for r in rows_in(tmp_path / "out")) == [
        (i, 2 * i) for i in expected
    ]
    assert summary.sources_completed == summary.sources_total == 4
    assert summary.rows_read == 140, "the first filter is the reader's business"
    assert set(rows_in(tmp_path / "out")[0]) == {"id", "twice"}


@pytest.mark.parametrize("granularity", ["file", "row_group"])
def test_partition_predicates_rule_out_whole_files(tmp_path: Path, granularity: str) -> None:
    for part in ("a", "b"):
        write_source(tmp_path / "in" / f"part={part}", files=2, rows=10)
    ds = read(tmp_path, granularity=granularity)
    ds = ds.filter(expr=(col("part") == "b") & (col("id") > 4)).select_columns(["id"])
    summary = resumable_write(ds, tmp_path / "out")
    assert ids_in(tmp_path / "out") == list(range(5, 20))
    assert (summary.sources_completed, summary.rows_read) == (4, 15)


@resumable
class Coroutine:
    async def __call__(self, batch: dict[str, Any]) -> dict[str, Any] | None:
        await asyncio.sleep(0.001)
        mask = batch["id"] % 3 != 0
        return {name: values[mask] for name, values in batch.items()} if mask.any() else None


@resumable(origin="position")
class AsyncGenerator:
    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        for part in np.array_split(np.random.permutation(len(batch["id"])), 3):
            await asyncio.sleep(0.001)
            yield {name: values[part] for name, values in batch.items()}


@resumable
class AsyncRow:
    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(0.001)
        return {"id": row["id"]}


def test_async_udfs(tmp_path: Path) -> None:
    write_source(tmp_path / "in", files=4, rows=50)
    ds = (
        read(tmp_path)
        .map_batches(Coroutine, batch_size=30, compute=ActorPoolStrategy(size=1), num_cpus=0.3)
        .map_batches(AsyncGenerator, batch_size=45, compute=ActorPoolStrategy(size=1), num_cpus=0.4)
        .map(AsyncRow, compute=ActorPoolStrategy(size=1), num_cpus=0.5)
    )
    assert resumable_write(ds, tmp_path / "out").sources_completed == 4
    assert ids_in(tmp_path / "out") == [i for i in range(200) if i % 3]


@resumable
class InOneThread:
    """Fails if Ray's promise is broken that a class's calls run in one thread."""

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.threads.add(threading.get_ident())
        assert len(self.threads) == 1, "the UDF was called in several threads"
        assert threading.current_thread() is not threading.main_thread()
        return batch


@pytest.mark.extended
def test_a_class_is_called_in_the_thread_that_ray_gives_it(tmp_path: Path) -> None:
    write_source(tmp_path / "in", files=4, rows=50)
    ds = read(tmp_path).map_batches(
        InOneThread,
        batch_size=30,
        compute=ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=4),
    )
    assert resumable_write(ds, tmp_path / "out").sources_completed == 4
    assert ids_in(tmp_path / "out") == list(range(200))


@resumable
def exotic(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Tensors, nested and null columns."""
    n = len(batch["id"])
    yield {
        "id": batch["id"],
        "tensor": np.arange(n * 6).reshape(n, 2, 3),
        "nested": [{"a": int(i), "b": [str(i)]} for i in batch["id"]],
        "nothing": [None] * n,
        "some": [None if i % 2 else float(i) for i in batch["id"]],
    }


@resumable(one_to_one=True)
def odd_index(frame: Any) -> Any:
    frame.index = [7] * len(frame)
    return frame


def test_exotic_columns_and_odd_indices(tmp_path: Path) -> None:
    write_source(tmp_path / "in", files=3, rows=20)
    ds = (
        read(tmp_path)
        .map_batches(exotic, batch_size=None)
        .map_batches(odd_index, batch_format="pandas", batch_size=25, zero_copy_batch=False)
        .map_batches(
            resumable(origin="at")(lambda table: table.slice(3)),
            batch_format="pyarrow",
            batch_size=25,
        )
    )
    assert resumable_write(ds, tmp_path / "out").sources_completed == 3
    rows = rows_in(tmp_path / "out")
    assert len(rows) == 60 - 3 * 3
    assert all(row["nested"] == {"a": row["id"], "b": [str(row["id"])]} for row in rows)
    assert all(row["nothing"] is None for row in rows)
