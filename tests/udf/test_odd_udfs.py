"""UDFs that return odd things: as plain Ray Data takes or refuses them, decorated and armed."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import enum
import fractions
import types
import uuid
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from beside_plain import content, plain, resumed

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.filterwarnings("ignore"),
]

TABLE = pa.table({"id": np.arange(6), "s": list("abcdef")})


class SubDict(dict[str, Any]):
    pass


class Typed(TypedDict):
    id: Any


@dataclasses.dataclass
class Data:
    id: int = 1


Named = collections.namedtuple("Named", "id")


class View(Mapping[str, Any]):
    def __init__(self, of: Mapping[str, Any]) -> None:
        self._of = of

    def __getitem__(self, key: str) -> Any:
        return self._of[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)


class ArrayLike:
    def __init__(self, values: Any) -> None:
        self.values = values
        self.shape, self.dtype = values.shape, values.dtype

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.asarray(self.values)

    def __len__(self) -> int:
        return len(self.values)


class SubFrame(pd.DataFrame):
    pass


class Colour(enum.Enum):
    RED = 1


def yields(*values: Any) -> Iterator[Any]:
    yield from values


def divide(number: Any) -> Any:
    return 1 / (number - number)


# What is made of the ids of a batch.
BATCHES: dict[str, Callable[[Any], Any]] = {
    "empty dict": lambda ids: {},
    "scalars": lambda ids: {"a": 1},
    "string": lambda ids: {"a": "abcdef"},
    "unequal": lambda ids: {"a": ids, "b": ids[:1]},
    "0-d": lambda ids: {"a": np.array(5)},
    "list of rows": lambda ids: [{"a": 1}],
    "array": lambda ids: ids,
    "text": lambda ids: "abc",
    "number": lambda ids: 3,
    "repeated index": lambda ids: pd.DataFrame({"id": ids}, index=[7] * len(ids)),
    "index of strings": lambda ids: pd.DataFrame({"id": ids}, index=list(map(str, ids))),
    "named index": lambda ids: pd.DataFrame({"id": ids, "v": ids}).set_index("id"),
    "empty frame": lambda ids: pd.DataFrame(),
    "repeated columns": lambda ids: pd.concat([pd.DataFrame({"id": ids})] * 2, axis=1),
    "columns of levels": lambda ids: pd.DataFrame({("x", "a"): ids, ("x", "b"): ids}),
    "columns of ints": lambda ids: pd.DataFrame({0: ids, 1: ids}),
    "columns of both": lambda ids: pd.DataFrame({0: ids, "1": ids}),
    "subclass of frame": lambda ids: SubFrame({"id": ids}),
    "series": lambda ids: pd.Series(ids, name="id"),
    "categories": lambda ids: pd.DataFrame({"id": ids, "c": pd.Categorical(list(map(str, ids)))}),
    "objects": lambda ids: pd.DataFrame({"o": [1 if i % 2 else "a" for i in ids]}),
    "lists in a frame": lambda ids: pd.DataFrame({"o": [[int(i)] * int(i) for i in ids]}),
    "arrays in a frame": lambda ids: pd.DataFrame({"o": [np.zeros(2) + i for i in ids]}),
    "zoned": lambda ids: pd.DataFrame({"t": pd.to_datetime(ids, utc=True)}),
    "nullable": lambda ids: pd.DataFrame({"t": pd.array([None, *ids[1:]], dtype="Int64")}),
    "record batch": lambda ids: pa.RecordBatch.from_pydict({"id": ids}),
    "table": lambda ids: pa.table({"id": ids}),
    "table without columns": lambda ids: pa.table({}),
    "metadata": lambda ids: pa.table({"id": ids}).replace_schema_metadata({"a": "b"}),
    "subclass of dict": lambda ids: SubDict(id=ids),
    "ordered": lambda ids: collections.OrderedDict(id=ids),
    "typed dict": lambda ids: Typed(id=ids),
    "mapping": lambda ids: View({"id": ids}),
    "proxy": lambda ids: types.MappingProxyType({"id": ids}),
    "dataclass": lambda ids: Data(),
    "named tuple": lambda ids: Named(1),
    "chain map": lambda ids: collections.ChainMap({"id": ids}),
    "keys of ints": lambda ids: {0: ids},
    "no key": lambda ids: {None: ids},
    "tuple for a column": lambda ids: {"id": tuple(ids)},
    "set for a column": lambda ids: {"id": set(ids)},
    "generator for a column": lambda ids: {"id": (i for i in ids)},
    "series for a column": lambda ids: {"id": pd.Series(ids, index=ids[::-1])},
    "arrow for a column": lambda ids: {"id": pa.array(ids)},
    "array-like": lambda ids: {"id": ArrayLike(ids)},
    "None for a column": lambda ids: {"id": None},
    "nothing but None": lambda ids: {"id": [None] * len(ids)},
    "mixed list": lambda ids: {"id": [1 if i % 2 else "a" for i in ids]},
    "list of dicts": lambda ids: {"id": [{"a": int(i)} for i in ids]},
    "ragged": lambda ids: {"id": [np.zeros(i) for i in ids]},
    "matrix": lambda ids: {"id": np.asfortranarray(np.ones((len(ids), 3)) * ids[:, None])},
    "reversed": lambda ids: {"id": ids[::-1]},
    "broadcast": lambda ids: {"id": np.broadcast_to(7, (len(ids),))},
    "half floats": lambda ids: {"id": ids.astype(np.float16)},
    "numpy strings": lambda ids: {"id": ids.astype(str)},
    "numpy bytes": lambda ids: {"id": ids.astype("S5")},
    "structured": lambda ids: {"id": np.array([(1, 2.0)] * len(ids), dtype="i4,f8")},
    "days": lambda ids: {"id": ids.astype("datetime64[D]")},
    "complex": lambda ids: {"id": ids * 1j},
    "big ints": lambda ids: {"id": [2**70] * len(ids)},
    "no rows": lambda ids: {"id": ids[:0]},
    "iterator": lambda ids: iter([{"id": ids}]),
    "tuple": lambda ids: ({"id": ids},),
    "generator of generators": lambda ids: yields(yields({"id": ids})),
    "generator of all": lambda ids: yields({"id": ids}, pd.DataFrame({"id": ids})),
    "generator of types": lambda ids: yields({"id": ids}, {"id": ids * 1.0, "z": ids}),
    "generator of what does not fit": lambda ids: yields({"id": ids}, {"id": ids.astype(str)}),
    "generator of a list": lambda ids: yields([1]),
    "nothing yielded": lambda ids: yields(),
    "raises": divide,
    "StopIteration": lambda ids: next(iter([])),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches(name: str) -> None:
    def udf(batch: Any) -> Any:
        return BATCHES[name](np.asarray(batch["id"]))

    def generator(batch: Any) -> Iterator[Any]:
        yield udf(batch)

    def thirds(count: int) -> Any:
        return np.arange(count) // 2

    for form in ("numpy", "pandas"):
        for kind in (udf, generator):
            expected = content(lambda: plain("map_batches", kind, [TABLE], form))  # noqa: B023
            assert content(lambda: resumed("map_batches", kind, [TABLE], form)) == expected  # noqa: B023
            # Cut by source, as if plain Ray Data had called it with batches of two rows.
            parts = [TABLE.slice(start, 2) for start in (0, 2, 4)]
            expected = content(lambda: plain("map_batches", kind, parts, form))  # noqa: B023
            got = content(lambda: resumed("map_batches", kind, [TABLE], form, sources=thirds))  # noqa: B023
            assert got == expected


VALUES: dict[str, Any] = {
    "int": 1,
    "big": 2**70,
    "none": None,
    "bytearray": bytearray(b"a"),
    "tuple": (1, 2),
    "set": {1},
    "nested": {"a": {"b": [1, {"c": 2}]}},
    "0-d": np.array(5),
    "array": np.arange(3),
    "2-d": np.ones((2, 2)),
    "int32": np.int32(3),
    "half": np.float16(1),
    "datetime64": np.datetime64("2020-01-01"),
    "date": dt.date(2020, 1, 1),
    "zoned": dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc),
    "timedelta": dt.timedelta(1),
    "decimal": Decimal("1.1"),
    "enum": Colour.RED,
    "uuid": uuid.UUID(int=1),
    "path": Path("/a"),
    "fraction": fractions.Fraction(1, 2),
    "complex": 1j,
    "timestamp": pd.Timestamp("2020"),
    "NaT": pd.NaT,
    "NA": pd.NA,
    "series": pd.Series([1, 2]),
    "scalar": pa.scalar(1),
    "function": len,
    "empty list": [],
    "empty dict": {},
    "mixed": [1, "a"],
    "objects": np.array([1, "a"], object),
}

ROWS: dict[str, Callable[[Any], Any]] = {
    "none": lambda row: None,
    "list": lambda row: [row],
    "generator": lambda row: yields(row),
    "text": lambda row: "ab",
    "number": lambda row: 1,
    "empty": lambda row: {},
    "subclass of dict": lambda row: SubDict(**row),
    "mapping": lambda row: View(dict(row)),
    "dataclass": lambda row: Data(),
    "named tuple": lambda row: Named(1),
    "series": lambda row: pd.Series(dict(row)),
    "frame": lambda row: pd.DataFrame([row]),
    "table": lambda row: pa.table({"id": [row["id"]]}),
    "keys of ints": lambda row: {0: 1, "a": 2},
    "other keys": lambda row: {f"k{row['id'] % 2}": 1},
    "other types": lambda row: {"a": 1 if row["id"] % 2 else "x"},
    "int and float": lambda row: {"a": 1 if row["id"] % 2 else 2.5},
    "some None": lambda row: {"a": None if row["id"] % 2 else [1]},
    "shapes": lambda row: {"a": np.zeros(row["id"])},
    "set": lambda row: {1},
    "deque": lambda row: collections.deque([row]),
    "array": lambda row: np.array([row], object),
    "nested": lambda row: yields(yields(row)),
    "None among rows": lambda row: [None, row],
    "bools": lambda row: np.array([True, False]),
    "NA": lambda row: pd.NA,
    "raises": lambda row: divide(row["id"]),
    "StopIteration": lambda row: next(iter([])),
}


@pytest.mark.parametrize("kind", ["map", "flat_map", "filter"])
@pytest.mark.parametrize("block", [TABLE, TABLE.to_pandas()], ids=["arrow", "pandas"])
def test_rows(kind: str, block: Any) -> None:
    udfs = dict(ROWS)
    if kind == "flat_map":
        # None is no rows for a decorated UDF.
        del udfs["none"]
    if kind != "filter":
        for name, value in VALUES.items():
            every = {"v": value}
            udfs[f"value {name}"] = {
                "map": lambda row, every=every: every | {"id": row["id"]},
                "flat_map": lambda row, every=every: [every, {"v": None}],
            }[kind]
    different = [
        name
        for name, udf in udfs.items()
        if content(lambda: plain(kind, udf, [block]))  # noqa: B023
        != content(lambda: resumed(kind, udf, [block], sources=lambda n: np.arange(n) // 2))  # noqa: B023
    ]
    assert different == []
