"""The rows of a write task, sorted by source: against a model that looks at one row at a time."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_resume.core.messages import Drain
from ray_resume.core.tokens import MODULUS
from ray_resume.raydata import blocks as batches
from ray_resume.write import source_rows
from ray_resume.write.source_rows import SourceRows, group_by_source

SOURCES = st.lists(st.integers(0, 5), max_size=12)
KINDS = st.sampled_from(["plain", "pandas", "more", "null"])


def block_of(kind: str, ids: list[int], sources: list[int]) -> Any:
    """Make a block whose rows have ``ids``; kinds differ in their schema."""
    columns: dict[str, Any] = {"id": pa.array(ids, pa.int64())}
    if kind == "more":
        columns["more"] = pa.array([f"of {i}" for i in ids])
    if kind == "null":
        columns["more"] = pa.nulls(len(ids))
    rows: Any = pa.table(columns)
    if kind == "pandas":
        rows = pd.DataFrame({"id": np.array(ids, np.int64)})
    tokens = np.array([token_of(i) for i in ids], np.uint64)
    return batches.with_tracking_columns(rows, np.array(sources, np.int32), tokens)


def token_of(row: int) -> int:
    return (row + 1) * 0x9E3779B97F4A7C15 % MODULUS


@given(st.lists(st.tuples(KINDS, SOURCES), max_size=6), st.booleans())
def test_each_source_has_its_rows_in_order_and_their_sum(
    given_blocks: list[tuple[str, list[int]]], small: bool
) -> None:
    expected: defaultdict[int, list[int]] = defaultdict(list)
    kinds: defaultdict[int, set[str]] = defaultdict(set)
    blocks, count = [], 0
    for kind, sources in given_blocks:
        ids = list(range(count, count + len(sources)))
        count += len(sources)
        blocks.append(block_of(kind, ids, sources))
        for i, source in zip(ids, sources, strict=True):
            expected[source].append(i)
            kinds[source].add({"pandas": "plain"}.get(kind, kind))
    with pytest.MonkeyPatch.context() as patch:
        # Either way to sort, whatever the size of the rows.
        patch.setattr(source_rows, "_SMALL_PIECE_BYTES", 1 << 30 if small else 0)
        found = group_by_source(blocks)
    alone = [one for some in found for one in some.alone()]
    assert sorted(int(one.sources[0]) for one in alone) == sorted(expected)
    for one in alone:
        source = int(one.sources[0])
        assert one.table.column("id").to_pylist() == expected[source]
        # A source's file has the columns of its own rows, not those of its neighbours.
        wanted = {"id"} if kinds[source] == {"plain"} else {"id", "more"}
        assert set(one.table.column_names) == wanted
        if "more" in kinds[source]:
            assert one.table.schema.field("more").type == pa.string()
        elif "null" in kinds[source] or "null" in kinds[source]:
            assert one.table.schema.field("more").type == pa.null()
        total = sum(map(token_of, expected[source])) % MODULUS
        assert one.drains() == [Drain(source, -total % MODULUS, len(expected[source]))]
    assert sorted(
        (drain for some in found for drain in some.drains()), key=lambda drain: drain.source
    ) == sorted((one.drains()[0] for one in alone), key=lambda drain: drain.source)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.data())
def test_a_part_has_the_rows_of_its_sources(sources: list[int], data: st.DataObject) -> None:
    table = pa.table({"id": range(len(sources))})
    tokens = np.array([token_of(i) for i in range(len(sources))], np.uint64)
    rows = SourceRows.of(table, np.array(sources, np.int32), tokens)
    first = data.draw(st.integers(0, len(rows) - 1))
    last = data.draw(st.integers(first + 1, len(rows)))
    part = rows.part(first, last)
    assert part.drains() == rows.drains()[first:last]
    numbers = sorted(set(sources))[first:last]
    ids = part.table.column("id").to_pylist()
    assert ids == [i for n in numbers for i, source in enumerate(sources) if source == n]


def test_a_type_that_pyarrow_cannot_take_from() -> None:
    sources = [2, 1, 2, 1]
    for name, column in (
        ("views", pa.array(["a", "b", "c", "d"], pa.string_view())),
        ("runs", pa.RunEndEncodedArray.from_arrays([1, 3, 4], ["a", "b", "c"])),
    ):
        tokens = np.ones(4, np.uint64)
        rows = SourceRows.of(pa.table({name: column}), np.array(sources, np.int32), tokens)
        expected = [column[i].as_py() for i in (1, 3, 0, 2)]
        assert rows.table.column(name).to_pylist() == expected


def test_rows_without_columns_are_refused() -> None:
    block = batches.with_tracking_columns(
        pa.table({"id": [1]}), np.zeros(1, np.int32), np.ones(1, np.uint64)
    )
    with pytest.raises(ValueError, match="Keep at least one column"):
        group_by_source([block.drop_columns(["id"])])
    assert group_by_source([]) == group_by_source([block.slice(0, 0)]) == []
