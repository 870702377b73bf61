"""Random pipelines of projections, filters and UDFs: armed and unarmed, they give what plain gives.

Most run without a cluster's scheduling (`local_execution`), which is what makes thousands of them
affordable; a few run as jobs.
"""

from __future__ import annotations

import contextlib
import random as randomness
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import ray
from local_execution import execute, execute_armed, without_shared_parts
from ray.data import Dataset
from ray.data.datatype import DataType
from ray.data.expressions import col, lit, random, uuid

from ray_resume import resumable, resumable_read, resumable_write

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.long]

types: Any = DataType
KINDS = ["csv", "parquet"]
READERS: dict[str, Any] = {"parquet": ray.data.read_parquet, "csv": ray.data.read_csv}


@dataclass
class Chain:
    """Steps of a pipeline, each of which makes a dataset of a dataset, and their description."""

    steps: list[tuple[str, Callable[[Dataset], Dataset]]] = field(default_factory=list)

    def of(self, dataset: Dataset, iterate: Callable[[Dataset], Any]) -> Dataset:
        for name, step in self.steps:
            if name == "iterate":
                iterate(dataset)
            else:
                dataset = step(dataset)
        return dataset

    def __str__(self) -> str:
        return " -> ".join(name for name, _ in self.steps)


class Builder:
    """Draws a chain, and keeps track of which columns there are: numbers or text."""

    def __init__(self, seed: int) -> None:
        self.draw = randomness.Random(seed)
        self.kinds = {"a": "number", "b": "number", "c": "text", "d": "number"}
        self.fresh = 0
        self.chain = Chain()

    def build(self) -> Chain:
        steps = [
            *[self.select] * 3,
            *[self.rename] * 4,
            *[self.swap] * 2,
            *[self.alias] * 4,
            *[self.with_column] * 4,
            *[self.repeated_expression, self.synthetic, self.cast, self.upper],
            *[self.drop] * 3,
            *[self.filter] * 7,
            *[self.filter_text, self.filter_random, self.filter_udf],
            *[self.numpy_udf, self.pandas_udf, self.pyarrow_udf, self.map_udf, self.flat_map_udf],
            *[self.repartition],
            *[self.iterate] * 4,
        ]
        for _ in range(self.draw.randint(2, 9)):
            self.draw.choice(steps)()
        return self.chain

    def add(self, name: str, step: Callable[[Dataset], Dataset]) -> None:
        self.chain.steps.append((name, step))

    def any(self, kind: str | None = None) -> str | None:
        names = [name for name, of in self.kinds.items() if kind in (None, of)]
        return self.draw.choice(names) if names else None

    def new(self) -> str:
        """Return a name for a column: a new one, or one that is or was there."""
        if self.draw.random() < 0.4:
            return self.draw.choice(["a", "b", "c", "d", *self.kinds])
        self.fresh += 1
        return f"x{self.fresh}"

    def select(self) -> None:
        names = self.draw.sample(list(self.kinds), self.draw.randint(1, len(self.kinds)))
        self.kinds = {name: self.kinds[name] for name in names}
        self.add(f"select {names}", lambda ds: ds.select_columns(names))

    def rename(self) -> None:
        old, new = self.draw.choice(list(self.kinds)), self.new()
        if new in self.kinds:
            return
        self._rename({old: new})

    def swap(self) -> None:
        if len(self.kinds) > 1:
            one, other = self.draw.sample(list(self.kinds), 2)
            self._rename({one: other, other: one})

    def _rename(self, names: dict[str, str]) -> None:
        self.kinds = {names.get(name, name): kind for name, kind in self.kinds.items()}
        self.add(f"rename {names}", lambda ds: ds.rename_columns(names))

    def alias(self) -> None:
        old, new = self.draw.choice(list(self.kinds)), self.new()
        self.kinds[new] = self.kinds[old]
        self.add(f"{new} = {old}", lambda ds: ds.with_column(new, col(old)))

    def with_column(self) -> None:
        old, new = self.any("number"), self.new()
        if old is None:
            return
        by = self.draw.randint(1, 3)
        self.kinds[new] = "number"
        self.add(f"{new} = {old} * {by} + 1", lambda ds: ds.with_column(new, col(old) * by + 1))

    def cast(self) -> None:
        old, new = self.any("number"), self.new()
        if old is not None:
            self.kinds[new] = "number"
            text = types.string()
            self.add(
                f"{new} = {old} as text and back",
                lambda ds: ds.with_column(new, col(old).cast(text).cast(types.float64())),
            )

    def upper(self) -> None:
        old, new = self.any("text"), self.new()
        if old is not None:
            self.kinds[new] = "text"
            self.add(f"{new} = upper({old})", lambda ds: ds.with_column(new, col(old).str.upper()))

    def repeated_expression(self) -> None:
        old, new = self.any("number"), self.new()
        if old is not None:
            self.kinds[new] = "number"
            twice = (col(old) + 1) * (col(old) + 1)
            self.add(f"{new} = ({old} + 1) ** 2", lambda ds: ds.with_column(new, twice))

    def synthetic(self) -> None:
        make: Any = self.draw.choice([random, uuid])
        keep = list(self.kinds)
        self.add(
            f"with {make.__name__}, without",
            lambda ds: ds.with_column("r", make()).filter(expr=~col("r").is_null()),
        )
        self.add(f"select {keep}", lambda ds: ds.select_columns(keep))

    def drop(self) -> None:
        if len(self.kinds) > 1:
            name = self.draw.choice(list(self.kinds))
            del self.kinds[name]
            self.add(f"drop {name}", lambda ds: ds.drop_columns([name]))

    def condition(self) -> tuple[str, Any] | None:
        name = self.any("number")
        if name is None:
            return None
        bound = self.draw.randint(-1, 8)
        which = self.draw.randrange(6)
        if which == 0:
            return f"{name} > {bound}", col(name) > bound
        if which == 1:
            return f"{name} % 2 == 0", (col(name) % 2) == lit(0)
        if which == 2:
            return f"{name} is null", col(name).is_null()
        if which == 3:
            return f"{name} is not null", col(name).is_not_null()
        if which == 4:
            return f"{name} in ...", col(name).is_in([bound, bound + 2, bound + 3])
        return f"not {name} <= {bound}", ~(col(name) <= bound)

    def filter(self) -> None:
        one, other = self.condition(), self.condition()
        if one is None or other is None:
            return
        both = self.draw.choice(["one", "and", "or"])
        if both == "one":
            name, expression = one
        elif both == "and":
            name, expression = f"{one[0]} & {other[0]}", one[1] & other[1]
        else:
            name, expression = f"{one[0]} | {other[0]}", one[1] | other[1]
        self.add(f"filter {name}", lambda ds: ds.filter(expr=expression))

    def filter_text(self) -> None:
        name = self.any("text")
        if name is not None:
            wanted = self.draw.choice(["p", "q", "nothing"])
            self.add(f"filter {name} == {wanted}", lambda ds: ds.filter(expr=col(name) == wanted))

    def filter_random(self) -> None:
        self.add("filter random() >= 0", lambda ds: ds.filter(expr=random() >= 0.0))

    def filter_udf(self) -> None:
        name = self.any("number")
        if name is not None:
            keep = resumable(lambda row: row[name] is not None and row[name] != 3)
            self.add(f"filter(udf of {name})", lambda ds: ds.filter(keep))

    def numpy_udf(self) -> None:
        name, new = self.draw.choice(list(self.kinds)), self.new()
        self.kinds[new] = self.kinds[name]
        udf = resumable(lambda batch: {**batch, new: batch[name]})
        size = self.draw.choice([3, 1024])
        self.add(f"numpy udf: {new} = {name}", lambda ds: ds.map_batches(udf, batch_size=size))

    def pandas_udf(self) -> None:
        name = self.any("number")
        if name is not None:
            udf = resumable(lambda frame: frame[frame[name].notna()])
            self.add(
                f"pandas udf: {name} not null",
                lambda ds: ds.map_batches(udf, batch_format="pandas", batch_size=None),
            )

    def pyarrow_udf(self) -> None:
        names = list(self.kinds)
        udf = resumable(one_to_one=True)(lambda table: table.select(names))
        self.add(
            f"pyarrow udf: select {names}",
            lambda ds: ds.map_batches(udf, batch_format="pyarrow", batch_size=4),
        )

    def map_udf(self) -> None:
        name = self.draw.choice(list(self.kinds))
        kept = [name, *(other for other in self.kinds if other != name)]
        self.kinds = {one: self.kinds[one] for one in kept}
        udf = resumable(lambda row: {one: row[one] for one in kept})
        self.add(f"map udf: {name} first", lambda ds: ds.map(udf))

    def flat_map_udf(self) -> None:
        name = self.any("number")
        if name is not None:
            udf = resumable(lambda row: [row] * (0 if row[name] is None else int(row[name]) % 3))
            self.add(f"flat_map: {name} % 3 times", lambda ds: ds.flat_map(udf))

    def repartition(self) -> None:
        rows = self.draw.randint(2, 9)
        self.add(f"repartition {rows}", lambda ds: ds.repartition(target_num_rows_per_block=rows))

    def iterate(self) -> None:
        self.add("iterate", lambda ds: ds)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chains")
    for number in range(2):
        table = pa.table(
            {
                "a": np.arange(10) + 10 * number,
                "b": (np.arange(10) * 7 + number) % 10,
                "c": ["p", "q", "r", "p", "q"] * 2,
                "d": pa.array([None, 2.5, 3.0, None, 5.0] * 2, pa.float64()),
            }
        )
        for kind in READERS:
            (folder / kind).mkdir(exist_ok=True)
        pq.write_table(table, folder / "parquet" / f"{number}.parquet")
        pyarrow.csv.write_csv(table, folder / "csv" / f"{number}.csv")
    return folder


def rows_of(tables: list[pa.Table]) -> Counter[str]:
    """Count the rows, each with its columns in their order."""
    return Counter(
        str([(name, _plain(value)) for name, value in row.items()])
        for table in tables
        for row in table.to_pylist()
    )


def _plain(value: Any) -> Any:
    # What NumPy and pandas make of a null differs from Ray's version to version.
    return None if value != value else value


def types_of(tables: list[pa.Table]) -> set[tuple[tuple[str, str], ...]]:
    """Return names and types of columns, of blocks that have values in each of them."""
    return {
        tuple((field.name, str(field.type)) for field in table.schema)
        for table in tables
        # Armed, a filter by a UDF leaves types as they are; Ray makes blocks of single rows, with
        # the type `null` for what is null in all of them.
        if all(column.null_count < len(column) for column in table.columns)
    }


def outcome(run: Callable[[], list[pa.Table]]) -> tuple[Counter[str], set[Any]] | str:
    """Return rows and types, or the error."""
    text = ""
    for context in (contextlib.nullcontext, without_shared_parts):
        try:
            with context():
                tables = run()
            return rows_of(tables), types_of(tables)
        except Exception as error:
            text = "".join(traceback.format_exception(error))
        if "does not exist in schema" not in text or not _is_about_shared_parts(text):
            break
    return text


def _is_about_shared_parts(text: str) -> bool:
    return "common_expr" in text or "__ray_data_cse" in text


def alike(one: Any, other: Any) -> bool:
    """Say whether two outcomes are the same, or both are errors."""
    return (isinstance(one, str) and isinstance(other, str)) or bool(one == other)


def check(seed: int, folder: Path, checkpoint: Path, kind: str) -> None:
    paths = str(folder / kind)
    chain = Builder(seed).build()

    def plain() -> list[pa.Table]:
        return execute(chain.of(READERS[kind](paths), execute))

    def ours(run: Callable[[Dataset], list[pa.Table]]) -> list[pa.Table]:
        return run(chain.of(resumable_read(READERS[kind], paths, checkpoint=checkpoint), execute))

    expected = outcome(plain)
    for name, run in (("unarmed", execute), ("armed", execute_armed)):
        got = outcome(lambda run=run: ours(run))  # type: ignore[misc]
        same = alike(expected, got)
        assert same, f"{seed} {kind} {name}: {chain}\n plain {expected}\n ours  {got}"


@pytest.mark.parametrize(
    "part", [0, 1, *(pytest.param(part, marks=pytest.mark.extended) for part in range(2, 6))]
)
def test_random_chains(part: int, inputs: Path, tmp_path: Path) -> None:
    for seed in range(part * 10, part * 10 + 10):
        check(seed, inputs, tmp_path / "ckpt", KINDS[seed % len(KINDS)])


@pytest.mark.parametrize("kind", READERS)
def test_columns_that_are_selected_twice_keep_the_order_of_plain_ray_data(
    kind: str, inputs: Path, tmp_path: Path
) -> None:
    paths = str(inputs / kind)

    def columns(dataset: Dataset, looks: bool) -> list[list[str]]:
        found = []
        for names in (["d", "b", "a"], ["a", "d"], ["d", "a"]):
            dataset = dataset.select_columns(names)
            if looks:
                execute(dataset)
            found.append(execute(dataset)[0].column_names)
        return found

    for looks in (True, False):
        read = resumable_read(READERS[kind], paths, checkpoint=tmp_path / "ckpt")
        assert columns(read, looks) == columns(READERS[kind](paths), looks)


@pytest.mark.extended
@pytest.mark.parametrize("kind", READERS)
def test_a_chain_as_a_job(kind: str, inputs: Path, tmp_path: Path) -> None:
    def pipeline(ds: Dataset) -> Dataset:
        ds = ds.select_columns(["a", "c", "b"]).rename_columns({"b": "d"})
        ds = ds.with_column("b", col("a")).filter(expr=random() >= 0.0)
        next(iter(ds.iter_rows()))
        ds = ds.rename_columns({"b": "d", "d": "b"}).with_column("c", col("d") * 2)
        ds = ds.filter(expr=(col("b") > 2) & (col("c") < 20)).filter(expr=random() >= 0.0)
        # Nothing is left of the second file, and what an empty block has for columns is Ray's
        # affair; parts that expressions share are evaluated on it, too.
        return ds.with_column("e", (col("d") + 1) * (col("d") + 1))

    expected = pipeline(READERS[kind](str(inputs / kind))).to_pandas()
    ds = resumable_read(READERS[kind], str(inputs / kind), checkpoint=tmp_path / "ckpt")
    assert resumable_write(pipeline(ds), tmp_path / "out").sources_completed == 2
    rows = [pq.ParquetFile(path).read() for path in (tmp_path / "out").glob("*.parquet")]
    assert 5 < len(expected) < 10
    assert rows_of(rows) == rows_of([pa.Table.from_pandas(expected, preserve_index=False)])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_many_random_chains(part: int, inputs: Path, tmp_path: Path) -> None:
    for seed in range(1000 + part * 100, 1100 + part * 100):
        check(seed, inputs, tmp_path / "ckpt", KINDS[seed % len(KINDS)])
