"""Parts as columns are the tuples that they stand for, whatever is taken of them."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from snapshots import snapshot_of

from ray_resume.core.part_lists import PartLists, Parts
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Record, State
from ray_resume.core.sources import SourceTable
from ray_resume.core.upstream import moved_parts, sources_with_output

RUN = "0123456789ab"


@st.composite
def parts(draw: Any) -> FilePart:
    first, rows, more = (draw(st.integers(low, 9)) for low in (0, 1, 0))
    return FilePart(draw(st.sampled_from(["b", "a", "é/c", "d"])), first, rows, first + rows + more)


@given(st.lists(st.lists(parts(), max_size=3).map(tuple), max_size=12), st.data())
def test_they_are_what_they_stand_for(every: list[Parts], data: Any) -> None:
    records = [Record(str(n), State.COMPLETED, n, RUN, parts=one) for n, one in enumerate(every)]
    table = sources_with_output(snapshot_of({RUN: records}))
    # In the order of files, then rows, of their first parts; those without any come first.
    keys = [[(part.file, part.first_row) for part in one[:1]] for one in (s.item for s in table)]
    assert keys == sorted(keys)
    assert {source.source_id: source.item for source in table} == dict(
        zip(map(str, range(len(every))), every, strict=True)
    )
    chosen = data.draw(st.lists(st.sampled_from(range(len(every))))) if every else []
    some = table.take(np.array(chosen, np.int64))
    check(some, [table[position].item for position in chosen])
    start, stop = (data.draw(st.integers(0, len(every))) for _ in range(2))
    check(table[start:stop].packed(), [table[n].item for n in range(start, max(start, stop))])


@given(st.lists(st.tuples(*2 * [st.lists(parts(), max_size=3).map(tuple)]), max_size=9))
def test_differences_are_those_of_the_tuples(pairs: list[tuple[Parts, Parts]]) -> None:
    tables = []
    for side in range(2):
        records = [
            Record(f"{n}", State.COMPLETED, n, RUN, parts=pair[side])
            for n, pair in enumerate([*pairs, *((a, a) for a, _ in pairs)])
        ]
        tables.append(sources_with_output(snapshot_of({RUN: records})))
    ids = {name: n for n, name in enumerate(tables[1].ids())}
    other = tables[1].take(np.array([ids[name] for name in tables[0].ids()], np.int64))
    one, two = (table.part_lists for table in (tables[0], other))
    assert one is not None
    assert two is not None
    expected = [a != b for a, b in zip(one, two, strict=True)]
    assert one.differs(two).tolist() == expected
    moved = moved_parts(*tables)
    assert set(moved) == {name for name, d in zip(tables[0].ids(), expected, strict=True) if d}


def lists_of(*files: tuple[str, int], rows: int = 10) -> PartLists:
    """Return sources of so many rows, so many in each file."""
    records = [
        Record(f"{file}{n:03}", State.COMPLETED, 1, RUN, parts=(part,))
        for file, count in files
        for n in range(count)
        for part in [FilePart(file, n * rows, rows, count * rows)]
    ]
    lists = sources_with_output(snapshot_of({RUN: records})).part_lists
    assert lists is not None
    return lists


def test_sources_are_cut_between_files_and_within_large_or_few_ones() -> None:
    lists = lists_of(("a", 4), ("b", 8), ("c", 1))
    sizes = {"a": 40, "b": 800, "c": 10}
    assert lists.cuts(sizes, 1, 1e9, 1).tolist() == [0, 4, 12]
    assert lists.cuts(sizes, 1, 200, 1).tolist() == [0, 4, 6, 8, 10, 12]
    # Six pieces are wanted, two of each file; no piece is so small.
    assert lists.cuts(sizes, 1, 1e9, 6).tolist() == [0, 2, 4, 8, 12]
    assert lists.cuts(sizes, 30, 1e9, 6).tolist() == [0, 3, 4, 8, 12]
    assert lists.cuts({}, 1, 10, 100).tolist() == [0, 4, 12]
    assert lists_of().cuts({}, 1, 10, 1).tolist() == []


def check(table: SourceTable, expected: list[Parts]) -> None:
    sizes = {"a": 10, "b": 100, "é/c": 7}
    bytes_of = [sum(sizes.get(p.file, 0) * p.rows / p.file_rows for p in one) for one in expected]
    for lists in (table.part_lists, pickle.loads(pickle.dumps(table)).part_lists):
        assert isinstance(lists, PartLists)
        assert list(lists) == expected
        assert [lists[n] for n in range(len(lists))] == expected
        assert lists.files() == {part.file for one in expected for part in one}
        assert np.allclose(lists.sizes(sizes), bytes_of)


def test_a_few_travel_without_the_names_of_other_files() -> None:
    records = [
        Record(f"{n:05}", State.COMPLETED, n, RUN, parts=(FilePart(f"file-{n}", 0, 1, 1),))
        for n in range(10_000)
    ]
    table = sources_with_output(snapshot_of({RUN: records}))
    assert len(pickle.dumps(table[:5].packed())) < 3_000
