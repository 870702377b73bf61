"""Values of a column and the sources of rows: beside a simple model, and type by type."""

from __future__ import annotations

import datetime as dt
import math
import re
from collections import defaultdict
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_resume.core.value_index import ValueIndex

NAN = float("nan")
UTC = dt.timezone.utc
DAY = dt.datetime(2026, 1, 2, 3, 4, 5)

# Few values of each type, so that sources share them; what is equal here is equal there.
TYPES: list[tuple[pa.DataType, list[Any]]] = [
    (pa.string(), ["", "a", "A", "a\0", "ä", None]),
    (pa.dictionary(pa.int8(), pa.large_string()), ["a", "b", "c", None]),
    (pa.binary(), [b"", b"a", b"a\0", b"\xff", None]),
    (pa.int64(), [0, 1, -1, 2**53, 2**53 + 1, None]),
    (pa.uint64(), [0, 1, 2**64 - 1, None]),
    (pa.float64(), [0.0, -0.0, 1.5, NAN, math.inf, -math.inf, None]),
    (pa.float32(), [0.0, -0.0, 1.5, NAN, None]),
    (pa.bool_(), [True, False, None]),
    (pa.decimal128(5, 2), [Decimal("1.10"), Decimal("1.11"), Decimal("0.00"), None]),
    (pa.timestamp("ns"), [DAY, DAY + dt.timedelta(microseconds=1), None]),
    (pa.timestamp("us", "Asia/Tokyo"), [DAY.replace(tzinfo=UTC), None]),
    (pa.date32(), [DAY.date(), None]),
    (pa.duration("ms"), [dt.timedelta(0), dt.timedelta(days=1), None]),
    (pa.null(), [None]),
]


def key(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def array(values: list[Any], kind: pa.DataType) -> pa.Array:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.array(values, plain).cast(kind)


@pytest.mark.long
@given(st.data())
def test_beside_a_simple_model(data: st.DataObject) -> None:
    """Rows that a UDF drops, multiplies and shuffles go to their sources, or raise an error."""
    kind, values = data.draw(st.sampled_from(TYPES))
    size = data.draw(st.integers(1, 12))
    rows = data.draw(st.lists(st.sampled_from(values), min_size=size, max_size=size))
    sources = data.draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))
    cut = data.draw(st.integers(0, size))
    column = pa.chunked_array([array(rows[:cut], kind), array(rows[cut:], kind)])
    whole = ValueIndex("c", column, np.array(sources, dtype=np.int32))

    owners: dict[Any, set[int]] = defaultdict(set)
    for value, source in zip(rows, sources, strict=True):
        owners[key(value)].add(source)
    sharing = {source for shared in owners.values() if len(shared) > 1 for source in shared}
    calls = whole.cuts()
    for row, source in enumerate(sources):
        together = {sources[other] for other in np.flatnonzero(calls == calls[row])}
        assert together == ({source} if source in sharing else set(sources) - sharing)

    call = data.draw(st.sampled_from(sorted(set(calls.tolist()))))
    positions = np.flatnonzero(calls == call)
    part = whole.at(positions)
    given_values = {key(rows[row]) for row in positions}
    returned = data.draw(st.lists(st.sampled_from(values), max_size=12))
    output = array(returned, kind)
    if not {key(value) for value in returned} <= given_values:
        with pytest.raises(ValueError, match="in no row of the call"):
            part.find(output)
        return
    found = part.sources[part.find(output)].tolist()
    of_call = {sources[row] for row in positions}
    assert [{source} for source in found] == [owners[key(v)] & of_call for v in returned]

    mask = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))[positions]
    failed = part.with_all_rows_in(mask)
    for row, number in zip(positions.tolist(), part.numbers, strict=True):
        alike = [key(rows[other]) == key(rows[row]) for other in positions]
        assert failed[number] == mask[alike].all()


@pytest.mark.parametrize(
    ("went_in", "came_back"),
    [
        (pa.array(["a", None]), pa.array([None, "a"], pa.large_string())),
        (pa.array(["a", None]), pa.array(["a", None]).dictionary_encode()),
        (pa.array(["a"]).dictionary_encode(), pa.array(["a"])),
        (pa.array([b"ab"], pa.binary(2)), pa.array([b"ab"], pa.large_binary())),
        (pa.array([7, 2**31]), pa.array([7.0, 2.0**31])),
        (pa.array([7.0, None]), pa.array([7], pa.int8())),
        (pa.array([7]), pa.array([7], pa.int16())),
        (pa.array([7], pa.int32()), pa.array([7], pa.uint64())),
        (pa.array([0.1], pa.float32()), pa.array([np.float32(0.1)], pa.float64())),
        (pa.array([np.float16(1.5)], pa.float16()), pa.array([1.5], pa.float64())),
        (pa.array([Decimal("1.10"), Decimal("2.5")]), pa.array([Decimal("2.5")])),
        (pa.array([Decimal("2.5")]), pa.array([Decimal("2.500")])),
        (pa.array([DAY], pa.timestamp("s")), pa.array([DAY], pa.timestamp("ns"))),
        (pa.array([DAY], pa.timestamp("ns")), pa.array([DAY], pa.timestamp("s"))),
        (pa.array([DAY], pa.timestamp("s", "UTC")), pa.array([DAY], pa.timestamp("us", "-01:00"))),
        (pa.array([DAY.date()]), pa.array([DAY.date()], pa.date64())),
        (pa.array([DAY.date()]), pa.array([DAY.date()]).cast(pa.timestamp("ns"))),
        (pa.array([DAY.time()], pa.time64("us")), pa.array([DAY.time()], pa.time32("s"))),
        (pa.array(["a", None]), pa.nulls(3)),
        (pa.nulls(2), pa.array([None], pa.string())),
    ],
    ids=lambda column: str(column.type),
)
def test_types_that_hold_each_value(went_in: pa.Array, came_back: pa.Array) -> None:
    index = ValueIndex("c", went_in, np.arange(len(went_in), dtype=np.int32))
    expected = {str(value): source for source, value in enumerate(went_in.to_pylist())}
    found = index.sources[index.find(came_back)].tolist()
    if str(came_back.type) in map(str, (went_in.type, pa.large_string())):
        assert found == [expected[str(value)] for value in came_back.to_pylist()]
    assert len(found) == len(came_back)


@pytest.mark.parametrize(
    ("went_in", "came_back"),
    [
        (pa.array([2**53 + 1]), pa.array([2.0**53])),
        (pa.array([1.5, 1.0]), pa.array([1])),
        (pa.array([256]), pa.array([0], pa.int8())),
        (pa.array([0.1]), pa.array([0.1], pa.float32())),
        (pa.array(["a"]), pa.array([b"a"])),
        (pa.array([1]), pa.array(["1"])),
        (pa.array([1]), pa.array([True])),
        (pa.array([Decimal("1.5")]), pa.array([1.5])),
        (pa.array([DAY], pa.timestamp("us")), pa.array([DAY], pa.timestamp("us", "UTC"))),
        (pa.array([DAY.replace(microsecond=1)]), pa.array([DAY], pa.timestamp("s"))),
    ],
    ids=lambda column: str(column.type),
)
def test_types_that_could_make_two_values_one_are_refused(
    went_in: pa.Array, came_back: pa.Array
) -> None:
    index = ValueIndex("c", went_in, np.arange(len(went_in), dtype=np.int32))
    with pytest.raises(ValueError, match=re.escape(f"'c' came back as {came_back.type}")):
        index.find(came_back)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([[1], [2]]),
        pa.array([{"a": 1}, {"a": 2}]),
        pa.array([[1, 2]], pa.list_(pa.int64(), 2)),
        pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
    ],
    ids=lambda values: str(values.type),
)
def test_nested_values_are_refused(values: pa.Array) -> None:
    sources = np.zeros(len(values), dtype=np.int32)
    with pytest.raises(ValueError, match=r"'c' is of type .* cannot be compared"):
        ValueIndex("c", values, sources)
    with pytest.raises(ValueError, match=r"as it came back, is of type .* cannot be compared"):
        ValueIndex("c", pa.array(["a"]), sources[:1]).find(values)


def test_a_value_that_is_only_in_another_call_is_an_error() -> None:
    index = ValueIndex("c", pa.array(["a", "b"]), np.array([0, 1], dtype=np.int32))
    with pytest.raises(ValueError, match=r"1 of 2 rows .* 'b', for one"):
        index.at(np.array([0])).find(pa.array(["a", "b"]))


def test_values_that_end_with_a_nul_are_known() -> None:
    sources = np.zeros(2, dtype=np.int32)
    assert ValueIndex("c", pa.array(["a", "a\0"]), sources).has_trailing_nul()
    assert ValueIndex("c", pa.array([b"a\0", None]), sources).has_trailing_nul()
    assert not ValueIndex("c", pa.array(["a\0b", None]), sources).has_trailing_nul()
    assert not ValueIndex("c", pa.array([0, 0]), sources).has_trailing_nul()
