"""Values and types: what an armed UDF gives is what plain Ray Data makes of the same UDF."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from beside_plain import Ledger, content, plain, resumed, resumed_async
from ray.data.block import BlockAccessor
from ray.data.expressions import col
from ray.data.extensions import ArrowPythonObjectArray, ArrowTensorArray

from ray_resume import resumable, resumable_read, resumable_write
from ray_resume.testing import rows_of

pytestmark = pytest.mark.usefixtures("cluster")

Row = dict[str, Any]


def frame_of(table: pa.Table) -> Any:
    return BlockAccessor.for_block(table).to_pandas()


# UDFs that use their values again: each is made anew for either side. -----------------------------


def one_dict() -> Callable[[Row], Row]:
    out: Row = {}

    def fill(row: Row) -> Row:
        out["id"], out["text"] = row["id"], str(row["text"]) * 2
        return out

    return fill


def one_nested_dict() -> Callable[[Row], Row]:
    numbers, array, inner = [0], np.zeros(2), {"k": 0}
    out: Row = {"list": numbers, "array": array, "dict": inner}

    def fill(row: Row) -> Row:
        numbers[:], array[:], inner["k"] = [row["id"]], row["id"], row["id"]
        return out

    return fill


def one_dict_yielded() -> Callable[[Row], Iterator[Row]]:
    out: Row = {}

    def fill(row: Row) -> Iterator[Row]:
        for copy in range(3):
            out["id"], out["copy"] = row["id"], copy
            yield out

    return fill


def one_list() -> Callable[[Row], list[Row]]:
    out: list[Row] = [{}]

    def fill(row: Row) -> list[Row]:
        out[0]["id"] = row["id"]
        return out

    return fill


def changes_its_row(row: Row) -> bool:
    row["id"] = -row["id"]
    row["new"] = row.pop("text")
    return bool(row["id"] != -2)


ROW_UDFS: list[tuple[str, Callable[[], Any]]] = [
    ("map", one_dict),
    ("map", one_nested_dict),
    ("flat_map", one_dict_yielded),
    ("flat_map", one_list),
    ("flat_map", lambda: lambda row: np.array([{"id": row["id"]}, {"id": 0}], dtype=object)),
    ("flat_map", lambda: lambda row: np.array([1, 2])),
    ("flat_map", lambda: lambda row: ({"id": 1},) * (row["id"] % 2)),
    ("filter", lambda: changes_its_row),
    ("filter", lambda: lambda row: row["id"] != 2),
    ("filter", lambda: lambda row: None),
    ("filter", lambda: lambda row: np.bool_(row["id"] % 2 == 0)),
    ("filter", lambda: lambda row: np.array([1, 2])),
]

ROWS = pa.table(
    {
        "id": pa.array([1, 2, 3], pa.int32()),
        "text": pa.array(["a", None, "c"], pa.large_string()),
        "word": pa.array(["x", "y", "x"]).dictionary_encode(),
        "list": pa.array([[1], None, []], pa.list_(pa.int16())),
        "at": pa.array([1, 2, None], pa.timestamp("ms", "UTC")),
        "price": pa.array([Decimal("1.10"), None, Decimal(3)], pa.decimal128(10, 2)),
        "weight": pa.array([1, None, 2.5], pa.float32()),
    }
)


@pytest.mark.filterwarnings("ignore:no explicit representation of timezones")
@pytest.mark.parametrize(("kind", "make"), ROW_UDFS)
def test_row_wise_udfs_may_use_their_values_again_and_change_their_rows(
    kind: str, make: Callable[[], Any]
) -> None:
    for block in (ROWS, frame_of(ROWS)):
        expected = content(lambda: plain(kind, make(), [block]))  # noqa: B023
        assert content(lambda: resumed(kind, make(), [block])) == expected  # noqa: B023
        by_source = content(lambda: resumed(kind, make(), [block], sources=np.arange))  # noqa: B023
        assert by_source == expected


class AsyncRow:
    def __init__(self) -> None:
        self.out: Row = {}

    async def __call__(self, row: Row) -> Row:
        await asyncio.sleep(0.001 * (row["id"] % 3))
        self.out["id"] = row["id"]
        return self.out


class AsyncRows:
    def __init__(self) -> None:
        self.out: Row = {}

    async def __call__(self, row: Row) -> AsyncIterator[Row]:
        for copy in range(2):
            self.out.update(id=row["id"], copy=copy)
            yield self.out
            await asyncio.sleep(0.001 * (row["id"] % 3))


class AsyncBatch:
    def __init__(self) -> None:
        self.out: dict[str, Any] = {"id": np.zeros(1, np.int64), "text": [""], "deep": [[0]]}

    async def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.out["id"][:] = batch["id"]
        self.out["text"][:] = self.out["deep"][0][:] = [str(batch["id"][0])]
        return self.out


@pytest.mark.parametrize(
    ("kind", "udf", "copies"),
    [("map", AsyncRow, 1), ("map", AsyncRows, 2), ("flat_map", AsyncRows, 2)],
)
def test_async_udfs_may_use_their_values_again(kind: str, udf: type, copies: int) -> None:
    """Rows are taken as they leave the UDF; plain Ray Data takes them later, and gets others."""
    table = pa.table({"id": np.arange(50)})
    rows = [row["id"] for row in resumed_async(kind, udf, table)]
    assert rows == [number for number in range(50) for _ in range(copies)]


def test_async_batches_may_use_their_values_again() -> None:
    table = pa.table({"id": np.arange(5)})
    rows = resumed_async("map_batches", AsyncBatch, table, sources=np.arange)
    assert [row["id"] for row in rows] == list(range(5))
    assert [row["text"] for row in rows] == list("01234") == [str(row["deep"][0]) for row in rows]


def test_what_a_generator_uses_again_is_kept_though_it_is_held_back() -> None:
    """Numbers too: Ray's conversion shares their memory."""
    numbers, frame = np.zeros(2, np.int64), pd.DataFrame({"id": [0, 0]})

    def arrays(batch: Any) -> Iterator[dict[str, Any]]:
        for at in range(0, 6, 2):
            numbers[:] = batch["id"][at : at + 2]
            yield {"id": numbers}

    def frames(batch: Any) -> Iterator[Any]:
        for at in range(0, 6, 2):
            frame.loc[:, "id"] = batch["id"][at : at + 2]
            yield frame

    for udf in (arrays, frames):
        outputs = resumed("map_batches", udf, [pa.table({"id": np.arange(6)})], "numpy")
        ids = [row["id"] for output in outputs for row in output.to_pylist()]
        assert ids == list(range(6)), udf.__name__


# Types. -------------------------------------------------------------------------------------------

STAMPS = [0, 1, None, 3, 4, 5]
COLUMNS: dict[str, Any] = {
    "int8": pa.array([1, 2, None, 4, 5, 6], pa.int8()),
    "uint64": pa.array([1, 2**64 - 1, None, 4, 5, 6], pa.uint64()),
    "float16": pa.array(np.arange(6, dtype=np.float16)),
    "float32": pa.array([1, 2.5, None, 4, 5, float("nan")], pa.float32()),
    "bool": pa.array([True, False, None, True, True, False]),
    "string": pa.array(["a", "", None, "d", "é", "f"]),
    "large_string": pa.array(["a", "", None, "d", "é", "f"], pa.large_string()),
    "string_view": pa.array(["a", "", None, "d", "é", "longer than 12"], pa.string_view()),
    "binary": pa.array([b"a", b"\0", None, b"d", b"", b"f"]),
    "large_binary": pa.array([b"a", b"\0", None, b"d", b"", b"f"], pa.large_binary()),
    "binary_view": pa.array([b"a", b"\0", None, b"d", b"", b"f"], pa.binary_view()),
    "fixed_binary": pa.array([b"ab", b"cd", None, b"ef", b"gh", b"ij"], pa.binary(2)),
    "dictionary": pa.array(["a", "b", None, "a", "b", "c"]).dictionary_encode(),
    "dictionary_of_ints": pa.DictionaryArray.from_arrays(
        pa.array([0, 1, None, 0, 1, 0], pa.int8()), pa.array([10, 20])
    ),
    "decimal": pa.array([Decimal(i) if i != 2 else None for i in range(6)], pa.decimal128(10, 2)),
    "decimal256": pa.array([Decimal(i) if i != 2 else None for i in range(6)], pa.decimal256(40)),
    "date32": pa.array(STAMPS, pa.date32()),
    "date64": pa.array([stamp and stamp * 86_400_000 for stamp in STAMPS], pa.date64()),
    "time32": pa.array(STAMPS, pa.time32("s")),
    "time64": pa.array(STAMPS, pa.time64("ns")),
    "seconds": pa.array(STAMPS, pa.timestamp("s")),
    "nanoseconds": pa.array(STAMPS, pa.timestamp("ns")),
    "zoned": pa.array(STAMPS, pa.timestamp("us", "Europe/Berlin")),
    "duration": pa.array([dt.timedelta(1), None] * 3, pa.duration("us")),
    "interval": pa.array([(1, 2, 3)] * 5 + [None], pa.month_day_nano_interval()),
    "list": pa.array([[1], [2, 3], None, [], [None], [6]], pa.list_(pa.int16())),
    "large_list": pa.array([[1], [2, 3], None, [], [None], [6]], pa.large_list(pa.int16())),
    "fixed_list": pa.array([[1, 2]] * 5 + [None], pa.list_(pa.int32(), 2)),
    "list_of_strings": pa.array([["a"], ["b", "c"], None, [], [None], ["f"]]),
    "list_of_lists": pa.array([[[1]], [[2], []], None, [], [None], [[6]]]),
    "list_of_structs": pa.array([[{"a": 1}], [], None, [{"a": 4}], [{"a": None}], [None]]),
    "struct": pa.array(
        [{"a": 1, "b": "x"}, {"a": None, "b": "y"}, None, {"a": 4}, {"b": "z"}, {"a": 6, "b": "w"}],
        pa.struct([("a", pa.int16()), ("b", pa.large_string())]),
    ),
    "map": pa.array(
        [[("k", 1)], [], None, [("k", 4)], [("a", 5), ("b", None)], []],
        pa.map_(pa.string(), pa.int32()),
    ),
    "run_ends": pa.RunEndEncodedArray.from_arrays(
        pa.array([2, 4, 6], pa.int32()), pa.array(["a", None, "c"])
    ),
    "null": pa.nulls(6),
    "fixed_tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(
        np.arange(12, dtype=np.float32).reshape(6, 2)
    ),
    "tensor": ArrowTensorArray.from_numpy(np.arange(24, dtype=np.float32).reshape(6, 2, 2)),
    "ragged": ArrowTensorArray.from_numpy(np.array([np.arange(i) for i in range(6)], dtype=object)),
    "objects": ArrowPythonObjectArray.from_objects([1, "a", None, {"x": 1}, (1, 2), [3]]),
}

# Ray Data's own formats, or the kernels that its filter uses, fail for these, and ours need not.
BETTER = {"string_view", "binary_view", "run_ends"}

FEW = ["string_view", "dictionary", "list", "struct", "zoned", "objects", "null"]


def in_thirds(count: int) -> Any:
    return np.arange(count) * 3 // max(count, 1)


def by_turns(count: int) -> Any:
    return np.arange(count) % 2


CUTS: list[tuple[Callable[[int], Any], dict[str, Any]]] = [
    (np.zeros, {}),
    (in_thirds, {}),
    (by_turns, {}),
    (in_thirds, {"one_to_one": True}),
    (by_turns, {"origin": "o"}),
]


def differences(name: str, block: Any) -> list[str]:
    """Say where an armed operator gives other types or rows of a block than plain Ray Data."""
    found = []

    def compare(what: str, expected: Any, got: Any) -> None:
        if expected != got and not (name in BETTER and isinstance(expected, type)):
            found.append(f"{name}, {what}: {expected} and {got}")

    for expression in ((col("k") != 1) & (col("k") != 4), col("k") > 9, col("c").is_not_null()):
        compare(
            f"filter({expression})",
            content(lambda: plain("filter(expr)", expression, [block])),  # noqa: B023
            content(lambda: resumed("filter(expr)", expression, [block])),  # noqa: B023
        )
    rows: list[tuple[str, Any]] = [
        ("filter", lambda row: row["k"] not in (1, 4)),
        ("map", lambda row: row),
        ("flat_map", lambda row: [row, row]),
    ]
    for kind, udf in rows:
        compare(
            kind,
            content(lambda: plain(kind, udf, [block])),  # noqa: B023
            content(lambda: resumed(kind, udf, [block], sources=in_thirds)),  # noqa: B023
        )
    for form in ("numpy", "pandas", "pyarrow", None):
        # A batch of several sources is cut into calls; Ray Data sees one output all the same.
        for sources, options in CUTS:
            for udf in (lambda batch: batch, lambda batch: (piece for piece in [batch])):
                ordered = sources is not by_turns
                expected = content(
                    lambda: plain("map_batches", udf, [block], form),  # noqa: B023
                    ordered=ordered,
                )
                got = content(
                    lambda: resumed("map_batches", udf, [block], form, sources=sources, **options),  # noqa: B023
                    ordered=ordered,
                )
                compare(f"{form}, {sources}, {options}", expected, got)
    for form in ("numpy", "pandas", "pyarrow"):
        ledger = Ledger()
        letters = content(
            lambda: resumed(
                "map_batches",
                fail,
                [block],
                form,  # noqa: B023
                ledger=ledger,  # noqa: B023
                on_error="dead_letter",
            )
        )
        format_works = not isinstance(
            content(lambda: plain("map_batches", lambda batch: batch, [block], form)),  # noqa: B023
            type,
        )
        if format_works and sum(len(letter.errors) for letter in ledger.letters) != 6:
            found.append(f"{name}, dead letter, {form}: {letters}")
    return found


def fail(batch: Any) -> Any:
    raise ValueError("as it should")


def blocks_of(name: str) -> Iterator[Any]:
    table = pa.table({"k": np.arange(6), "c": COLUMNS[name]})
    try:
        assert table.nbytes
    except pa.ArrowTypeError as error:
        pytest.skip(f"Ray Data asks for the size of each block: {error}")
    yield table
    yield pa.concat_tables([table.slice(0, 2), table.slice(2)])
    yield frame_of(table)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FEW)
def test_types_that_are_easily_changed(name: str) -> None:
    assert differences(name, next(blocks_of(name))) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COLUMNS)
def test_every_type_in_every_stage(name: str) -> None:
    assert [found for block in blocks_of(name) for found in differences(name, block)] == []


# Whole pipelines. ---------------------------------------------------------------------------------


def sorted_rows(rows: Any) -> list[str]:
    return sorted(repr(sorted(row.items(), key=str)) for row in rows)


def test_one_pipeline_beside_plain(tmp_path: Path) -> None:
    """Small files share batches, and a UDF for numpy gets lists of which one file has a null."""
    (tmp_path / "in").mkdir()
    for number in range(4):
        lists = [[number], None, [1, 2]] if number == 2 else [[number]] * 3
        table = pa.table({"id": np.arange(3) + 3 * number, "list": lists})
        pq.write_table(table, tmp_path / "in" / f"{number}.parquet")

    def chain(ds: Any) -> Any:
        return (
            ds.filter(resumable(lambda row: row.update(new=-row["id"]) or row["id"] != 4))
            .map_batches(resumable(lambda batch: batch))
            .map(resumable(one_dict_of_lists()))
            .flat_map(resumable(one_dict_yielded()))
        )

    folder = str(tmp_path / "in")
    ds = resumable_read(ray.data.read_parquet, folder, checkpoint=tmp_path / "ckpt")
    resumable_write(chain(ds), tmp_path / "out")
    expected = sorted_rows(chain(ray.data.read_parquet(folder)).take_all())
    assert sorted_rows(rows_of(tmp_path / "ckpt")) == expected
    assert len(expected) == 33


def one_dict_of_lists() -> Callable[[Row], Row]:
    out: Row = {}

    def fill(row: Row) -> Row:
        values = row["list"]
        out.update(row, list=None if values is None else list(values))
        return out

    return fill


class Load:
    """Made where it is used: what travels to a worker is read-only there."""

    def __init__(self) -> None:
        self.arrays: dict[str, Any] = {}
        self.frame: Any = None

    def __call__(self, key: int) -> Iterator[Any]:
        if self.frame is None:
            self.arrays = {"id": np.zeros(2, np.int64), "text": [""] * 2}
            self.frame = pd.DataFrame({"id": [0, 0], "text": ["", ""]})
        for part in range(3):
            ids = [10 * key + 2 * part, 10 * key + 2 * part + 1]
            self.arrays["id"][:] = ids
            self.arrays["text"][:] = self.frame["text"] = list(map(str, ids))
            self.frame.loc[:, "id"] = ids
            yield self.frame if key % 2 else self.arrays


@pytest.mark.long
def test_a_loader_may_use_its_values_again(tmp_path: Path) -> None:
    """One dict of arrays, or one frame, for all keys."""
    ds = resumable_read(Load(), keys=range(6), checkpoint=tmp_path / "ckpt", override_num_blocks=1)
    expected = [(i, str(i)) for key in range(6) for i in range(10 * key, 10 * key + 6)]
    assert sorted((row["id"], row["text"]) for row in ds.take_all()) == expected
    resumable_write(ds, tmp_path / "out")
    rows = rows_of(tmp_path / "ckpt")
    assert sorted((row["id"], row["text"]) for row in rows) == expected
