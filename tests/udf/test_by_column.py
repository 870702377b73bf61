"""`@resumable(by=...)`: whole batches, whose rows a value of their own leads back to a source."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from direct_client import DirectClient
from hypothesis import given
from hypothesis import strategies as st
from ray.data import ActorPoolStrategy

from ray_resume import resumable, resumable_read, resumable_write
from ray_resume.core.ledger import Ledger
from ray_resume.core.messages import Drain, Event, Message, Seal
from ray_resume.core.tokens import MODULUS, token_sum, tokens
from ray_resume.raydata import blocks
from ray_resume.udf.stage import instrument

FORMS = ["numpy", "pandas", "pyarrow"]


class Desk(DirectClient):
    """Stands in for the connection to a ledger, and for a sink: with a real ledger behind it."""

    def __init__(self) -> None:
        self.ledger = Ledger("run", 5)
        self.ledger.begin_pass(1)
        self.rows: dict[int, list[Any]] = defaultdict(list)

    def send(self, *events: Event) -> None:
        self.ledger.apply(Message("run", 1, events))

    def sink(self, output: Any) -> None:
        rows, sources, values = blocks.split_tracking_columns(output)
        for source in np.unique(sources).tolist():
            here = sources == source
            self.send(Drain(source, -token_sum(values[here]) % MODULUS, int(here.sum())))
            self.rows[source] += blocks.table_of(blocks.take(rows, here)).to_pylist()

    def pending(self) -> set[int]:
        return set(self.ledger.pending())


def batch_of(rows: dict[str, Any], sources: list[int], form: str, desk: Desk) -> Any:
    numbers, values = np.array(sources, dtype=np.int32), tokens(11, 0, len(sources))
    for source in range(5):
        desk.send(Seal(source, token_sum(values[numbers == source])))
    table = pa.table(rows)
    batch: Any = table
    if form == "pandas":
        batch = table.to_pandas()
    elif form == "numpy":
        batch = {name: table[name].to_numpy() for name in table.column_names}
    return blocks.with_tracking_columns(batch, numbers, values)


def run(udf: Any, rows: dict[str, Any], sources: list[int], form: str, by: str = "key") -> Desk:
    desk = Desk()
    ready = instrument(resumable(udf, by=by), desk)  # type: ignore[arg-type]
    result = ready(batch_of(rows, sources, form, desk))
    for output in result if isinstance(result, Iterator) else [result]:
        desk.sink(output)
    return desk


KEYS: dict[str, tuple[list[Any], Any]] = {
    "text": (["a", "b", "c", None], pa.string()),
    "whole": ([1, 2, 3, 2**40], pa.int64()),
    "whole or null": ([1, 2, 3, None], pa.int64()),
    "float": ([0.5, -0.0, float("nan"), None], pa.float64()),
    "time": ([0, 1, 2, None], pa.timestamp("ms")),
}


@given(st.data())
def test_whatever_a_udf_does_each_source_gets_its_rows(data: st.DataObject) -> None:
    """Rows dropped, multiplied and shuffled, in one output or in several, in each format."""
    form = data.draw(st.sampled_from(FORMS))
    values, kind = KEYS[data.draw(st.sampled_from(sorted(KEYS)))]
    sources = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=10))
    n = len(sources)
    keys = data.draw(st.lists(st.sampled_from(values), min_size=n, max_size=n))
    copies = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    seed, generates = data.draw(st.integers(0, 99)), data.draw(st.booleans())
    calls: list[int] = []

    def work(batch: Any) -> Any:
        x = np.asarray(blocks.column(batch, "x"))
        calls.append(len(x))
        out = np.repeat(np.arange(len(x)), [copies[i] for i in x])
        np.random.default_rng(seed).shuffle(out)
        return blocks.take(batch, out)

    def generate(batch: Any) -> Iterator[Any]:
        out = work(batch)
        for part in np.array_split(np.arange(blocks.num_rows(out)), 3):
            yield blocks.take(out, part)

    rows = {"x": list(range(n)), "key": pa.array(keys, kind)}
    desk = run(generate if generates else work, rows, sources, form)
    for source in range(5):
        expected = Counter({i: copies[i] for i in range(n) if sources[i] == source})
        assert Counter(row["x"] for row in desk.rows[source]) == +expected
    assert desk.pending() == set()
    owners = defaultdict(set)
    for key, source in zip(keys, sources, strict=True):
        owners[None if key != key else key].add(source)
    assert len(calls) == 1 or any(len(of) > 1 for of in owners.values())


@pytest.mark.parametrize("form", FORMS)
def test_a_udf_that_changes_its_input_in_place(form: str) -> None:
    def reverse(batch: Any) -> Any:
        if form == "pyarrow":
            return batch.take(list(range(5, -1, -1)))
        batch["key"] = (
            batch["key"][::-1].copy() if form == "numpy" else batch["key"].to_numpy()[::-1]
        )
        batch["x"] = batch["x"][::-1].copy() if form == "numpy" else batch["x"].to_numpy()[::-1]
        return batch

    rows = {"x": [0, 1, 2, 3, 4, 5], "key": [10, 11, 12, 13, 14, 15]}
    desk = run(reverse, rows, [0, 0, 1, 1, 1, 2], form)
    assert [sorted(row["x"] for row in desk.rows[i]) for i in range(3)] == [[0, 1], [2, 3, 4], [5]]
    assert desk.pending() == set()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda batch: blocks.without_columns(batch, ("key",)), "without the column 'key'"),
        (
            lambda batch: blocks.with_column(
                blocks.without_columns(batch, ("key",)), "key", np.array([1, 7, 9])
            ),
            r"2 of 3 rows .* in no row of the call: 7, for one",
        ),
        (
            lambda batch: blocks.with_column(
                blocks.without_columns(batch, ("key",)), "key", np.array(["1", "2", "3"])
            ),
            r"came back as (large_)?string",
        ),
    ],
    ids=["missing", "other", "type"],
)
def test_rows_that_lead_nowhere_are_an_error(
    form: str, change: Callable[[Any], Any], said: str
) -> None:
    for sources in ([0, 0, 1], [0, 0, 0]):
        with pytest.raises(ValueError, match=said):
            run(change, {"key": [1, 2, 3], "x": [1, 2, 3]}, sources, form)


@pytest.mark.parametrize("form", FORMS)
def test_a_column_that_cannot_be_compared_or_is_not_there(form: str) -> None:
    nested = {"key": pa.array([[1], [2]]), "x": [1, 2]}
    with pytest.raises(ValueError, match=r"'key'.*(cannot be compared|no type in common)"):
        run(lambda batch: batch, nested, [0, 1], form)
    with pytest.raises(ValueError, match=r"batch without the column 'id'.*'key', 'x'"):
        run(lambda batch: batch, nested, [0, 1], form, by="id")


def test_what_numpy_and_pandas_make_of_values() -> None:
    rows = {"key": [b"a", b"b\0"], "x": [1, 2]}

    def fixed(batch: Any) -> Any:
        return {**batch, "key": np.array(batch["key"].tolist())}

    with pytest.raises(ValueError, match="lose a NUL"):
        run(fixed, rows, [0, 1], "numpy")
    assert run(fixed, {**rows, "key": ["a", "b"]}, [0, 1], "numpy").pending() == set()

    def categories(frame: Any) -> Any:
        return frame.assign(key=pd.Categorical(frame["key"]))[::-1]

    desk = run(categories, {"key": ["a", "b", None], "x": [1, 2, 3]}, [0, 1, 2], "pandas")
    assert [desk.rows[i][0]["x"] for i in range(3)] == [1, 2, 3]

    def listed(batch: Any) -> Any:
        return {name: list(values) for name, values in batch.items()}

    assert run(listed, {"key": [3, 4]}, [0, 1], "numpy").pending() == set()
    swapped = lambda batch: {"key": batch["key"].astype(">i8")}  # noqa: E731
    assert run(swapped, {"key": [3, 4]}, [0, 1], "numpy").pending() == set()


def test_generators_and_lists_give_values_back_as_other_udfs_do() -> None:
    def in_parts(batch: Any) -> Iterator[Any]:
        for row in range(len(batch["x"])):
            yield {name: values[row : row + 1] for name, values in batch.items()}

    def fixed(batch: Any) -> Iterator[Any]:
        yield {**batch, "key": np.array(batch["key"].tolist())}

    def listed(batch: Any) -> Iterator[Any]:
        yield {name: values.tolist() for name, values in batch.items()}

    def as_objects(batch: Any) -> Any:
        return {name: list(values) for name, values in batch.items()}

    def frame(batch: Any) -> Any:
        return pd.DataFrame(batch)

    with pytest.raises(ValueError, match="lose a NUL"):
        run(fixed, {"key": [b"a\0", b"a"], "x": [1, 2]}, [0, 1], "numpy")
    days: Any = np.array(["2024-01-01", "2024-01-02", "NaT"], "datetime64[D]")
    large = np.array([2**63, 2**64 - 1, 3], np.uint64)
    for keys, udfs in (
        (days, (in_parts, listed, as_objects, frame)),
        (large, (in_parts, listed, as_objects, frame)),
    ):
        for udf in udfs:
            desk = run(udf, {"key": pa.array(keys), "x": [1, 2, 3]}, [0, 1, 2], "numpy")
            assert desk.pending() == set(), udf
            assert [desk.rows[source][0]["x"] for source in range(3)] == [1, 2, 3], udf


# On a real cluster, beside plain Ray Data. --------------------------------------------------------


def some_order(rows: int) -> Any:
    return np.random.default_rng(rows).permutation(rows)


def sample(batch: dict[str, Any]) -> dict[str, Any]:
    order = some_order(len(batch["id"]))
    order = order[batch["id"][order] % 5 != 0]
    return {name: values[order] for name, values in batch.items()}


def explode(frame: Any) -> Iterator[Any]:
    for part in (0, 1):
        yield frame.iloc[some_order(len(frame))].assign(part=part)


class Score:
    """Drops and shuffles rows, in an actor pool."""

    def __call__(self, table: Any) -> Any:
        ids = np.asarray(table["id"])
        table = table.append_column("score", pa.array(ids * 0.5))
        order = some_order(len(ids))
        return table.take(pa.array(order[ids[order] % 7 != 0]))


class Async:
    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        for part in np.array_split(some_order(len(batch["id"])), 2):
            await asyncio.sleep(0.001)
            yield {name: values[part] for name, values in batch.items()}


def keep(row: dict[str, Any]) -> bool:
    return bool(row["id"] % 2)


@pytest.mark.extended
@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_whole_batches_beside_plain_ray_data(tmp_path: Path) -> None:
    """Tasks, generators, an actor pool and async calls, in the three formats; `filter` as ever."""
    (tmp_path / "in").mkdir()
    for number in range(30):
        table = pa.table({"id": [4 * number + i for i in range(4)]})
        pq.write_table(table, tmp_path / "in" / f"{number:03d}.parquet")

    def pipeline(ds: Any, mark: Callable[[Any, str], Any]) -> Any:
        pool: Any = {"compute": ActorPoolStrategy(size=1), "num_cpus": 0.3}
        ds = ds.map_batches(mark(sample, "path"), batch_size=40)
        ds = ds.map_batches(mark(explode, "id"), batch_size=40, batch_format="pandas")
        ds = ds.map_batches(mark(Score, "path"), batch_size=None, batch_format="pyarrow", **pool)
        return ds.map_batches(mark(Async, "id"), batch_size=40, **pool).filter(mark(keep, "none"))

    options: Any = {"include_paths": True, "override_num_blocks": 2}
    plain = pipeline(ray.data.read_parquet(str(tmp_path / "in"), **options), lambda udf, _: udf)
    expected = Counter(map(repr, plain.take_all()))
    ds = resumable_read(
        ray.data.read_parquet, str(tmp_path / "in"), checkpoint=tmp_path / "c", **options
    )
    # A class is marked itself.
    ds = pipeline(ds, lambda udf, by: resumable(udf, by=by))
    summary = resumable_write(ds, str(tmp_path / "out"), progress=False)
    assert summary.sources_completed == 30
    rows = [
        row for f in (tmp_path / "out").glob("*.parquet") for row in pq.read_table(f).to_pylist()
    ]
    assert Counter(map(repr, rows)) == expected
    assert all(stage.calls == stage.batches for stage in summary.stages[:4])
    assert summary.stages[0].calls < 10
