"""The table of operators in `examples/what_works.md`: each row, armed, beside plain Ray Data.

They are executed in this process (`local_execution`): what Ray plans, with a real ledger. What is
refused is refused before anything is started, with a message that says what and where it is.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pytest
import ray
from conftest import snapshot, write_source
from local_execution import execute, execute_armed
from model_server import Model
from page_tables import rows_of
from ray.data import ActorPoolStrategy, Dataset
from ray.data.aggregate import Count, Sum
from ray.data.datatype import DataType
from ray.data.expressions import (
    col,
    download,
    lit,
    monotonically_increasing_id,
    random,
    udf,
    uuid,
)
from refusals import DECORATE, PIPELINE, READ, SAY_IT, Refusal

from ray_resume import NonResumableError, resumable, resumable_read, resumable_write

pytestmark = pytest.mark.usefixtures("cluster")

ROWS = rows_of("Between read and write")
# Ray types a UDF's argument as the union of all batch formats.
Batch: TypeAlias = Any
types: Any = DataType


@resumable
def keep(batch: Batch) -> Batch:
    return batch


def undecorated(batch: Batch) -> Batch:
    return batch


@resumable
def doubled(batch: Batch) -> Batch:
    return {**batch, "double": batch["id"] * 2}


@resumable
def row_with_a_number(row: Batch) -> Batch:
    return {**row, "number": row["id"] % 3}


@resumable
def times(row: Batch) -> Batch:
    return [row] * (row["id"] % 3)


@resumable
def generated(batch: Batch) -> Iterator[Batch]:
    for parity in (0, 1):
        mask = batch["id"] % 2 == parity
        yield {name: values[mask] for name, values in batch.items()}


@resumable
class Adding:
    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, batch: Batch) -> Batch:
        return {**batch, "sum": batch["id"] + self.number}

    @resumable
    def method(self, batch: Batch) -> Batch:
        return {**batch, "product": batch["id"] * self.number}


@resumable
class Awaited:
    async def __call__(self, batch: Batch) -> AsyncIterator[Batch]:
        yield {**batch, "half": batch["id"] / 2}


@resumable
def of_pandas(frame: Batch) -> Batch:
    frame = frame.assign(text=frame["name"].str.upper())
    return frame[frame["id"].isin([0, 3, 12])]


@resumable
def of_pyarrow(table: pa.Table) -> pa.Table:
    table = table.append_column("length", pa.compute.utf8_length(table["name"]))
    return table.filter(pa.compute.greater(table["id"], 4))


def partial(batch: Batch, column: str) -> Batch:
    return {**batch, column: batch["weight"] + 1}


def pool(ds: Dataset) -> Dataset:
    return ds.map_batches(
        Adding, fn_constructor_args=(3,), compute=ActorPoolStrategy(size=1), batch_size=4
    )


Step = Callable[[Dataset], Dataset]
WORKS: dict[str, Step] = {
    "map_batches with a @resumable UDF": lambda ds: ds.map_batches(doubled, batch_size=7),
    "map with a @resumable UDF": lambda ds: ds.map(row_with_a_number),
    "flat_map with a @resumable UDF": lambda ds: ds.flat_map(times),
    "filter with a @resumable UDF": lambda ds: ds.filter(resumable(lambda row: row["id"] > 4)),
    "@resumable: functions": lambda ds: ds.map_batches(doubled),
    "@resumable: lambdas": lambda ds: ds.map(resumable(lambda row: {"id": row["id"] + 1})),
    "@resumable: generators": lambda ds: ds.map_batches(generated, batch_size=None),
    "@resumable: callable classes": lambda ds: ds.map_batches(Adding, fn_constructor_args=(2,)),
    "@resumable: methods": lambda ds: ds.map_batches(Adding(5).method),
    "@resumable: functools.partial": lambda ds: ds.map_batches(
        resumable(functools.partial(partial, column="x"))
    ),
    "@resumable: async classes": lambda ds: ds.map_batches(Awaited, batch_size=5),
    "@resumable: actor pools": pool,
    "batches: numpy": lambda ds: ds.map_batches(doubled, batch_format="numpy"),
    "batches: pandas": lambda ds: ds.map_batches(of_pandas, batch_format="pandas", batch_size=6),
    "batches: pyarrow": lambda ds: ds.map_batches(of_pyarrow, batch_format="pyarrow", batch_size=3),
    "select_columns": lambda ds: ds.select_columns(["weight", "id"]),
    "filter(expr=...)": lambda ds: ds.map_batches(keep).filter(expr=col("id") > 4),
    "with_column": lambda ds: ds.with_column("third", col("id") / lit(3)),
    "rename_columns": lambda ds: ds.rename_columns({"id": "name", "name": "id"}),
    "drop_columns": lambda ds: ds.drop_columns(["name"]),
    "repartition(target_num_rows_per_block=...)": lambda ds: ds.map_batches(keep).repartition(
        target_num_rows_per_block=3
    ),
    "expressions: Ray Data's own functions": lambda ds: ds.with_column(
        "upper", col("name").str.upper()
    ).filter(expr=col("id").is_in([1, 2, 17])),
}


def content(tables: list[pa.Table]) -> Counter[str]:
    """Count the rows, each with its columns in their order, and the types of these."""
    return Counter(
        str(([(field.name, str(field.type)) for field in table.schema], list(row.values())))
        for table in tables
        for row in table.to_pylist()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("operators") / "in"
    write_source(folder, files=2, rows=10)
    return folder


def check(step: Step, folder: Path, tmp_path: Path, plain: Step | None = None) -> None:
    """Compare an armed pipeline with a plain one; unarmed, it does the same."""
    ours = step(resumable_read(ray.data.read_parquet, str(folder), checkpoint=tmp_path / "ckpt"))
    expected = content(execute((plain or step)(ray.data.read_parquet(str(folder)))))
    assert expected
    assert content(execute_armed(ours)) == expected
    assert content(execute(ours)) == expected


def downloads(folder: Path, tmp_path: Path) -> None:
    """What is there, and what is not; `test_downloads` does it as a job."""
    for number in (1, 11):
        (tmp_path / f"{number}.bin").write_bytes(b"%d" % number)

    def address(row: Batch) -> Batch:
        return {"id": row["id"], "url": f"{tmp_path}/{row['id']}.bin"}

    decorated = resumable(address)
    check(
        lambda ds: ds.map(decorated).with_column("bytes", download("url")),
        folder,
        tmp_path,
    )


def processor(folder: Path, tmp_path: Path) -> None:
    """An HTTP one; `test_llm` has engines and jobs."""
    llm = pytest.importorskip("ray.data.llm", exc_type=ImportError)
    model = Model()

    def ask(row: Batch) -> Batch:
        return {"payload": {"id": row["id"], "prompt": row["name"], "model": "m"}}

    def answer(row: Batch) -> Batch:
        return {"id": row["id"], "length": row["http_response"].get("length", -1)}

    config = llm.HttpRequestProcessorConfig(url=model.url(), batch_size=4)
    plain = llm.build_processor(config, preprocess=ask, postprocess=answer)
    try:
        check(resumable(plain), folder, tmp_path, plain)
    finally:
        model.server.shutdown()
        model.server.server_close()


def drawn(expression: Any, folder: Path, tmp_path: Path) -> None:
    """Each row gets a value of its own; the other columns are plain ones."""

    def rows(ds: Dataset, run: Callable[[Dataset], list[pa.Table]]) -> list[pa.Table]:
        return run(ds.map_batches(keep).with_column("drawn", expression))

    plain = rows(ray.data.read_parquet(str(folder)), execute)
    ours = rows(
        resumable_read(ray.data.read_parquet, str(folder), checkpoint=tmp_path / "ckpt"),
        execute_armed,
    )
    assert ours[0].schema.equals(plain[0].schema)
    assert len({value for table in ours for value in table["drawn"].to_pylist()}) == 20
    both = ([table.drop_columns(["drawn"]) for table in tables] for tables in (ours, plain))
    assert len({tuple(sorted(content(tables))) for tables in both}) == 1


def plus_one_of(column: str) -> Any:
    plus_one: Any = udf(return_dtype=types.int64())(lambda values: values)
    return plus_one(col(column))


def no_dataset(make: Callable[[Dataset], Any], folder: Path, tmp_path: Path) -> None:
    ds = resumable_read(ray.data.read_parquet, str(folder), checkpoint=tmp_path / "ckpt")
    before = snapshot(tmp_path)
    value = make(ds)
    with pytest.raises(NonResumableError, match=type(value).__name__) as caught:
        resumable_write(value, tmp_path / "out")
    assert READ in str(caught.value)
    assert snapshot(tmp_path) == before


def plain_writes(folder: Path, tmp_path: Path) -> None:
    ds = resumable_read(ray.data.read_parquet, str(folder), checkpoint=tmp_path / "ckpt")
    before = snapshot(tmp_path)
    for write in (ds.write_parquet, ds.map_batches(keep).write_json, ds.sort("id").write_csv):
        with pytest.raises(NonResumableError, match=r"resumable_write\(ds, folder\)"):
            write(str(tmp_path / "out"))
    assert snapshot(tmp_path) == before


# What they return is no dataset any more.
RESULTS: dict[str, Callable[[Dataset], Any]] = {
    "iterator": lambda ds: ds.iterator(),
    "streaming_split": lambda ds: ds.streaming_split(2),
    "sum": lambda ds: ds.sum("id"),
    "unique": lambda ds: ds.unique("name"),
    "aggregate": lambda ds: ds.aggregate(Count(), Sum("id")),
}
REFUSED: dict[str, Refusal] = {
    "random_shuffle": Refusal(
        lambda ds, _: ds.map_batches(keep).random_shuffle().map_batches(keep),
        "RandomShuffle (from random_shuffle)",
        "ReadParquet -> MapBatches(keep) -> [RandomShuffle] -> MapBatches(keep) -> resumable_write",
        PIPELINE,
    ),
    "randomize_block_order": Refusal(
        lambda ds, _: ds.randomize_block_order(),
        "from randomize_block_order",
        "ReadParquet -> [RandomizeBlocks(RandomizeBlockOrder)] -> resumable_write",
        PIPELINE,
    ),
    "sort": Refusal(
        lambda ds, _: ds.sort("id"),
        "Sort (from sort",
        "ReadParquet -> [Sort] -> resumable_write",
        PIPELINE,
    ),
    "repartition": Refusal(
        lambda ds, _: ds.repartition(3),
        "Repartition (from repartition",
        "ReadParquet -> [Repartition] -> resumable_write",
        PIPELINE,
    ),
    "groupby": Refusal(
        lambda ds, _: ds.groupby("name").count(),
        "Aggregate (from groupby or an aggregation)",
        "ReadParquet -> [Aggregate] -> resumable_write",
        PIPELINE,
    ),
    "aggregate": Refusal(
        lambda ds, _: ds.groupby("id").aggregate(Count(), Sum("weight")),
        "Aggregate (from groupby or an aggregation)",
        "ReadParquet -> [Aggregate] -> resumable_write",
        PIPELINE,
    ),
    "map_groups": Refusal(
        lambda ds, _: ds.groupby("name").map_groups(keep),
        "groupby for map_groups",
        "ReadParquet -> [Repartition] -> MapBatches(keep) -> resumable_write",
        PIPELINE,
    ),
    "limit": Refusal(
        lambda ds, _: ds.limit(10),
        "Limit(limit=10)",
        "ReadParquet -> [Limit(limit=10)] -> resumable_write",
        PIPELINE,
    ),
    "union": Refusal(
        lambda ds, other: ds.map_batches(keep).union(other),
        "Union of 2 datasets",
        "ReadParquet -> MapBatches(keep) -> [Union of 2 datasets] -> resumable_write",
        PIPELINE,
    ),
    "zip": Refusal(
        lambda ds, other: ds.zip(other),
        "Zip of 2 datasets",
        "ReadParquet -> [Zip of 2 datasets] -> resumable_write",
        PIPELINE,
    ),
    "mix": Refusal(
        lambda ds, other: ds.mix(other),
        "Mix of 2 datasets",
        "ReadParquet -> [Mix of 2 datasets] -> resumable_write",
        PIPELINE,
    ),
    "join": Refusal(
        lambda ds, other: ds.join(other, join_type="inner", num_partitions=2, on=("id",)),
        "Join of 2 datasets",
        "ReadParquet -> [Join of 2 datasets] -> resumable_write",
        PIPELINE,
    ),
    "random_sample": Refusal(
        lambda ds, _: ds.random_sample(0.5),
        "MapBatches(random_sample) runs a UDF of Ray Data's own",
        "ReadParquet -> [MapBatches(random_sample)] -> resumable_write",
        SAY_IT,
    ),
    "streaming_train_test_split": Refusal(
        lambda ds, _: ds.streaming_train_test_split(0.5, split_type="random")[0],
        "MapBatches(random_split) runs a UDF of Ray Data's own",
        "ReadParquet -> [MapBatches(random_split)] -> Filter(",
        SAY_IT,
    ),
    "add_column": Refusal(
        lambda ds, _: ds.add_column("x", lambda batch: batch["id"]),
        "MapBatches(add_column) runs a UDF of Ray Data's own",
        "ReadParquet -> [MapBatches(add_column)] -> resumable_write",
        "with_column",
    ),
    "an undecorated UDF": Refusal(
        lambda ds, _: ds.map_batches(undecorated),
        "MapBatches(undecorated) runs",
        "ReadParquet -> [MapBatches(undecorated)] -> resumable_write",
        DECORATE,
    ),
    "a UDF inside an expression": Refusal(
        lambda ds, _: ds.with_column("x", plus_one_of("id")),
        "Project runs a UDF inside an expression",
        "ReadParquet -> [Project] -> resumable_write",
        SAY_IT.removeprefix("with "),
    ),
    "monotonically_increasing_id()": Refusal(
        lambda ds, _: ds.with_column("n", monotonically_increasing_id()),
        "Project uses monotonically_increasing_id(), which counts from zero again in each run",
        "ReadParquet -> [Project] -> resumable_write",
        "uuid()",
    ),
    "random(seed=...)": Refusal(
        lambda ds, _: ds.map_batches(keep).filter(expr=random(seed=3) < 0.5),
        "uses random(seed=...), whose numbers begin again in each run",
        "ReadParquet -> MapBatches(keep) -> [Filter(",
        "random() without a seed",
    ),
    "results: materialize": Refusal(
        lambda ds, _: ds.map_batches(keep).materialize().map_batches(keep),
        "a dataset that was materialized",
        "[InputData] -> MapBatches(keep) -> resumable_write",
        READ,
    ),
    "results: split": Refusal(
        lambda ds, _: ds.split(2)[0],
        "materialized, by materialize, split,",
        "[InputData] -> resumable_write",
        "not one that was materialized or split",
    ),
    "results: train_test_split": Refusal(
        lambda ds, _: ds.train_test_split(0.5)[1].map_batches(keep),
        "train_test_split",
        "[InputData] -> MapBatches(keep) -> resumable_write",
        READ,
    ),
}
CHECKS: dict[str, Callable[[Path, Path], None]] = {
    **{name: functools.partial(check, step) for name, step in WORKS.items()},
    'with_column("bytes", download("url"))': downloads,
    "processors of ray.data.llm": processor,
    "expressions: random()": functools.partial(drawn, random()),
    "expressions: uuid()": functools.partial(drawn, uuid()),
    **{name: refusal.check for name, refusal in REFUSED.items()},
    **{f"results: {name}": functools.partial(no_dataset, make) for name, make in RESULTS.items()},
    "a plain ds.write_*": plain_writes,
}
# They are executed.
EXTENDED = {f"results: {name}" for name in RESULTS if name != "iterator"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(row.name, marks=[pytest.mark.extended] if row.name in EXTENDED else [])
        for row in ROWS
    ],
)
def test_a_row_of_the_table(name: str, folder: Path, tmp_path: Path) -> None:
    assert name in CHECKS, "it is in the table, and has no test"
    CHECKS[name](folder, tmp_path)


def test_what_is_tested_is_in_the_table() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names))
    assert set(names) == set(CHECKS)
    refused = {row.name for row in ROWS if row.text.startswith("refused")}
    assert refused == {*REFUSED, *(f"results: {name}" for name in RESULTS), "a plain ds.write_*"}
