"""Files that several sources share: how they are made, and what happens to all who share one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import ids_in, write_source
from hypothesis import given
from hypothesis import strategies as st
from ray.data import Dataset
from snapshots import snapshot_of

from ray_resume import (
    Checkpoint,
    CheckpointError,
    RunSummary,
    resumable,
    resumable_read,
    resumable_write,
)
from ray_resume.core.records import Fingerprint, Record, State
from ray_resume.core.resume_plan import Todo, todo_of
from ray_resume.core.sources import Source
from ray_resume.errors import SourceChangedError
from ray_resume.write.packing import Packing, groups_of
from ray_resume.write.source_rows import SourceRows

pytestmark = pytest.mark.extended

# Which parts make a file --------------------------------------------------------------------------


def rows_of(source: int, count: int, *, name: str = "x") -> SourceRows:
    numbers = np.full(count, source, np.int32)
    return SourceRows.of(pa.table({name: np.arange(count)}), numbers, np.ones(count, np.uint64))


def together(rows: list[SourceRows]) -> list[SourceRows]:
    """Put neighbours with the same columns together, as they may come in one block."""
    made: list[SourceRows] = []
    for one in rows:
        if made and made[-1].table.schema == one.table.schema:
            last = made.pop()
            counts = np.diff(last.starts)
            sources = np.append(last.sources.repeat(counts), one.sources.repeat(len(one.table)))
            table = pa.concat_tables([last.table, one.table])
            one = SourceRows.of(table, sources, np.ones(len(table), np.uint64))
        made.append(one)
    return made


@given(
    st.lists(st.integers(1, 40), max_size=20),
    st.lists(st.booleans(), min_size=20, max_size=20),
    st.integers(1, 400),
    st.integers(1, 400),
    st.booleans(),
)
def test_packs(
    rows: list[int], other: list[bool], target: int, group_target: int, mixed: bool
) -> None:
    groups = groups_of(np.array([8.0 * n for n in rows]), group_target)
    packing = Packing(target, groups)
    # Blocks come in any order.
    parts = [
        rows_of(i, n, name="y" if other[i] else "x") for i, n in reversed(list(enumerate(rows)))
    ]
    packs = list(packing.packs(together(parts) if mixed else parts))
    found = {
        source: (stop - start)
        for pack in packs
        for piece in pack
        for source, start, stop in zip(
            piece.sources.tolist(), piece.starts[:-1], piece.starts[1:], strict=True
        )
    }
    assert found == dict(enumerate(rows))
    assert sum(len(piece) for pack in packs for piece in pack) == len(rows)
    open_ends: list[Any] = []
    for pack in packs:
        kinds = {(int(groups[s]), piece.table.schema) for piece in pack for s in piece.sources}
        assert len(kinds) == 1
        sizes = [piece.table.nbytes for piece in pack]
        if len(pack) > 1 or len(pack[0]) > 1:
            assert all(8 * rows[s] < target for piece in pack for s in piece.sources)
        assert sum(sizes[:-1]) < target
        if sum(sizes) < target:
            open_ends += kinds
    assert len(set(open_ends)) == len(open_ends)


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 100))
def test_groups(sizes: list[int], target: int) -> None:
    groups = groups_of(np.array(sizes, float), target).tolist()
    assert groups == sorted(groups)
    assert groups[:1] in ([], [0])
    for group in set(groups):
        members = [size for size, its in zip(sizes, groups, strict=True) if its == group]
        assert sum(members[:-1]) < target
        assert sum(members) >= target or group == groups[-1]


# What there is to do again ------------------------------------------------------------------------

PACKED = "aaaaaaaa-bbbbbbbbbbbb-0000000000000000-{:016x}.parquet"


def record(source_id: str, state: State, *files: int) -> Record:
    return Record(source_id, state, 1, "run", files=tuple(PACKED.format(file) for file in files))


def sorted_out(
    ids: str, *records: Record, changed: str = "", policy: str = "reprocess", listed: str = ""
) -> Todo:
    union = snapshot_of({"run": records})
    sources = [Source(i, i, Fingerprint(1, 1) if i in changed else Fingerprint()) for i in ids]
    others = [Source(i, i) for i in listed]
    return todo_of(
        sources,
        union,
        on_source_change=policy,
        signature="",
        on_pipeline_change="error",
        listed=others,
    )


def pending(todo: Todo) -> str:
    return "".join(source.source_id for source in todo.pending)


DONE = [record("a", State.COMPLETED, 1), record("b", State.COMPLETED, 1, 2)]
DONE += [record("c", State.COMPLETED, 2), record("d", State.COMPLETED, 3)]


def test_who_shares_a_file_with_a_changed_source_is_done_again_with_it() -> None:
    todo = sorted_out("abcde", *DONE, changed="c")
    assert pending(todo) == "abce"
    assert todo.together == [[0, 1, 2]]
    assert [r.source_id for r in todo.skipped] == ["d"]
    assert {n: r.source_id for n, r in todo.records.items()} == {0: "a", 1: "b", 2: "c"}


def test_one_that_has_its_files_for_itself_is_done_alone() -> None:
    todo = sorted_out("abcd", *DONE, changed="d")
    assert (pending(todo), todo.together) == ("d", [])


def test_nothing_is_done_again_without_need() -> None:
    for policy, changed in (("reprocess", ""), ("ignore", "abcd")):
        todo = sorted_out("abcd", *DONE, changed=changed, policy=policy)
        assert (pending(todo), todo.together, len(todo.skipped)) == ("", [], 4)
    with pytest.raises(SourceChangedError):
        sorted_out("abcd", *DONE, changed="c", policy="error")


def test_a_neighbour_that_is_not_in_the_input_is_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"c is to be processed again.*2 sources.*a for one"):
        sorted_out("cd", *DONE, changed="c")
    assert pending(sorted_out("cd", *DONE, changed="d")) == "d"


def test_neighbours_in_other_shards_hold_nobody_but_those_who_share_files_with_them() -> None:
    """Shard "cde" of a listing of all five, after a run without shards: the others go on."""
    todo = sorted_out("cde", *DONE, changed="cd", listed="abcde")
    assert (pending(todo), todo.apart, todo.held) == ("de", ["c"], [])
    assert list(todo.skipped) == []
    with pytest.raises(CheckpointError, match="1 sources that are not among this run's, b for one"):
        sorted_out("cde", *DONE, changed="cd", listed="acde")
    # Once all of them are this run's, they are done.
    assert pending(sorted_out("abcde", *DONE, changed="cd", listed="abcde")) == "abcde"


def test_a_quarantined_neighbour_holds_the_others() -> None:
    records = [record("a", State.QUARANTINED, 1), *DONE[1:]]
    todo = sorted_out("abcd", *records, changed="c")
    assert (pending(todo), todo.held, todo.quarantined) == ("", ["c"], 1)
    assert [r.source_id for r in todo.skipped] == ["b", "d"]


# On a cluster -------------------------------------------------------------------------------------

FILES, ROWS = 40, 5
ALL = list(range(FILES * ROWS))


@pytest.fixture
def tiny(tmp_path: Path) -> None:
    write_source(tmp_path / "in", files=FILES, rows=ROWS)


def run(folder: Path, *udfs: Any, **options: Any) -> RunSummary:
    ds: Dataset = resumable_read(
        ray.data.read_parquet,
        str(folder / "in"),
        checkpoint=folder / "ckpt",
        on_pipeline_change="continue",
    )
    for udf in udfs:
        ds = ds.map_batches(resumable(udf))
    options = {"target_file_bytes": 1 << 20, **options}
    return resumable_write(ds, folder / "out", **options)


def check(folder: Path, expected: list[int] = ALL) -> None:
    assert ids_in(folder / "out") == expected
    assert Checkpoint(folder / "ckpt").files() == sorted(map(str, (folder / "out").iterdir()))


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "out").iterdir()}


@pytest.mark.usefixtures("cluster", "tiny")
def test_tiny_sources_share_files(tmp_path: Path) -> None:
    summary = run(tmp_path)
    assert (summary.sources_completed, summary.rows_written) == (FILES, len(ALL))
    assert summary.files == len(files(tmp_path)) == 1
    check(tmp_path)
    assert run(tmp_path).sources_skipped == FILES

    # A new source and a changed one: all who shared a file with the latter are done with it.
    write_source(tmp_path / "new", files=1, rows=ROWS)
    changed = sorted((tmp_path / "in").iterdir())[3]
    table = pq.ParquetFile(changed).read()
    time.sleep(0.01)
    pq.write_table(table.slice(1), changed)
    os.rename(next((tmp_path / "new").iterdir()), tmp_path / "in" / "new.parquet")
    before = files(tmp_path)
    summary = run(tmp_path)
    assert (summary.sources_completed, summary.sources_skipped) == (FILES + 1, 0)
    assert files(tmp_path).isdisjoint(before)
    check(tmp_path, sorted([*(set(ALL) - {table["id"][0].as_py()}), *range(ROWS)]))

    # Small files again, and nothing else: what is there already does not matter.
    Checkpoint(tmp_path / "ckpt").reset(state="completed")
    assert run(tmp_path, target_file_bytes=None).files == FILES + 1


@pytest.mark.usefixtures("cluster", "tiny")
@pytest.mark.parametrize("partitioned", [False, True])
def test_a_source_that_gets_lost_holds_its_neighbours_only_for_a_pass(
    tmp_path: Path, partitioned: bool
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()

    def falls_over(batch: Any) -> Any:
        batch["part"] = batch["id"] % 2
        if 17 in batch["id"]:
            (marks / str(time.monotonic_ns())).touch()
            raise ValueError("row 17 is bad")
        return batch

    def patient(folder: Path) -> RunSummary:
        ds = resumable_read(ray.data.read_parquet, str(folder / "in"), checkpoint=folder / "ckpt")
        ds.context.max_errored_blocks = -1
        ds = ds.map_batches(resumable(falls_over))
        columns = ["part"] if partitioned else None
        return resumable_write(
            ds, folder / "out", target_file_bytes=1 << 20, partition_cols=columns
        )

    summary = patient(tmp_path)
    assert (summary.sources_completed, summary.sources_failed) == (FILES - 1, 1)
    assert len(list(marks.iterdir())) >= 2
    if not partitioned:
        check(tmp_path, [i for i in ALL if i not in range(15, 20)])


@pytest.mark.usefixtures("cluster", "tiny")
def test_earlier_output_stays_until_all_who_share_it_are_done(tmp_path: Path) -> None:
    def falls_over(batch: Any) -> Any:
        if 17 in batch["id"]:
            raise ValueError("row 17 is bad")
        return batch

    run(tmp_path)
    before = files(tmp_path)
    Checkpoint(tmp_path / "ckpt").reset(
        next(source.source_id for source in Checkpoint(tmp_path / "ckpt").sources())
    )
    # Without packing, so that the neighbours come through one by one.
    with pytest.raises(Exception, match="row 17 is bad"):
        run(tmp_path, falls_over, target_file_bytes=None)
    assert files(tmp_path) == before
    check(tmp_path)
    assert run(tmp_path, target_file_bytes=None).sources_completed == FILES
    assert files(tmp_path).isdisjoint(before)
    check(tmp_path)
