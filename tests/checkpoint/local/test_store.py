"""The store: one suite for the real one and its model, then how its files grow."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_store import MemoryStore, MemoryUnion, Store
from snapshots import snapshot_of
from store_files import LmdbStore, done, records_in

from ray_resume.checkpoint.local import lmdb_file
from ray_resume.checkpoint.local.lmdb_file import FORMAT_VERSION, WriterFile, read_writer
from ray_resume.core.digests import source_digest
from ray_resume.core.records import encode
from ray_resume.errors import CheckpointError


@pytest.fixture(params=["lmdb", "memory"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return LmdbStore(tmp_path) if request.param == "lmdb" else MemoryStore()


# The contract.


def test_what_was_committed_is_read_while_the_writer_is_open_and_after(both: Store) -> None:
    writer = both.create("run", {"sources_total": 2, "note": "ü"})
    header = {"sources_total": 2, "note": "ü", "run_id": "run", "format": FORMAT_VERSION}
    assert both.read("run") == (header, {})
    writer.commit([done("a"), done("b")])
    expected = {"a": done("a"), "b": done("b")}
    assert both.read("run") == (header, expected)
    writer.close()
    assert both.read("run") == (header, expected)


def test_commits_add_up_and_later_ones_supersede(both: Store) -> None:
    writer = both.create("run", {})
    writer.commit([done("a", 1), done("b", 2)])
    writer.commit([])
    writer.commit([done("b", 3), done("c", 4)])
    writer.close()
    assert both.read("run")[1] == {"a": done("a", 1), "b": done("b", 3), "c": done("c", 4)}


def test_a_commit_that_raises_leaves_nothing(both: Store) -> None:
    writer = both.create("run", {})
    with pytest.raises(Exception, match=r"."):
        writer.commit([done("a"), done("b", sequence=2**64)])
    writer.commit([done("c")])
    assert set(both.read("run")[1]) == {"c"}
    writer.close()


def test_a_closed_writer_refuses(both: Store) -> None:
    writer = both.create("run", {})
    writer.close()
    writer.close()
    with pytest.raises(CheckpointError):
        writer.commit([done("a")])
    assert both.read("run")[1] == {}


def test_writers_are_listed_by_run_id(both: Store) -> None:
    assert both.run_ids() == []
    for run_id in ("b", "c", "a"):
        both.create(run_id, {}).close()
    assert both.run_ids() == ["a", "b", "c"]


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_the_union_has_the_highest_sequence_whoever_wrote_first(
    both: Store, order: tuple[str, ...]
) -> None:
    sequences = {"a": {"x": 3, "tie": 5}, "b": {"x": 9, "tie": 5, "y": 1}, "c": {"x": 4}}
    for run_id in order:
        writer = both.create(run_id, {})
        writer.commit([done(s, n, run_id) for s, n in sequences[run_id].items()])
        writer.close()
    snapshot = both.snapshot()
    newest = [done("tie", 5, "a"), done("x", 9, "b"), done("y", 1, "b")]
    assert sorted(snapshot, key=lambda record: record.source_id) == newest
    assert [snapshot.get(r.source_id) for r in newest] == newest
    assert snapshot.get("z") is None
    assert (len(snapshot), snapshot.highest_sequence()) == (3, 9)


def test_the_union_of_nothing(both: Store) -> None:
    snapshot = both.snapshot()
    assert (len(snapshot), snapshot.highest_sequence(), list(snapshot), snapshot.get("a")) == (
        0,
        0,
        [],
        None,
    )


@given(
    st.dictionaries(
        st.sampled_from("abcd"), st.dictionaries(st.sampled_from("xyz"), st.integers(0, 3))
    ),
    st.randoms(use_true_random=False),
)
def test_the_union_agrees_with_its_model(
    sequences: dict[str, dict[str, int]], shuffle: random.Random
) -> None:
    writers = {
        run_id: {source_digest(s): done(s, n, run_id) for s, n in mine.items()}
        for run_id, mine in sequences.items()
    }
    order = list(writers)
    shuffle.shuffle(order)
    snapshot = snapshot_of({run: writers[run].values() for run in order})
    model = MemoryUnion(writers)
    assert {r.source_id: r for r in snapshot} == {r.source_id: r for r in model}
    assert snapshot.highest_sequence() == model.highest_sequence()
    assert len(snapshot) == len(model)


def test_commits_are_synced(tmp_path: Path) -> None:
    """Nothing short of a power cut shows it otherwise."""
    writer = WriterFile.create(tmp_path, "run", {})
    flags = writer._env.flags()
    writer.close()
    assert flags["sync"]
    assert flags["metasync"]
    assert not flags["writemap"]
    assert not flags["map_async"]


# Growth.


@pytest.mark.extended
@pytest.mark.long
def test_one_commit_larger_than_the_whole_map(tmp_path: Path) -> None:
    writer = WriterFile.create(tmp_path, "run", {})
    batch = [done(f"s{i}", size=10_000) for i in range(2_500)]
    assert sum(map(len, encode(batch))) > lmdb_file._INITIAL_MAP_BYTES
    writer.commit([done("before")])
    writer.commit(batch)
    writer.commit([done("after")])
    writer.close()
    assert records_in(tmp_path / "run.mdb").keys() == {"before", "after"} | {
        f"s{i}" for i in range(2_500)
    }


def test_the_map_grows_over_many_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_file, "_INITIAL_MAP_BYTES", 1 << 16)
    writer = WriterFile.create(tmp_path, "run", {})
    for i in range(60):
        writer.commit([done(f"s{i}", size=10_000)])
    writer.close()
    assert len(records_in(tmp_path / "run.mdb")) == 60


@pytest.mark.extended
@pytest.mark.long
def test_small_commits_share_blocks_and_pages(tmp_path: Path) -> None:
    """A run that commits one source at a time is read as quickly as any other."""
    writer = WriterFile.create(tmp_path, "run", {})
    some = [done(f"source {i}", i, size=40) for i in range(1, 1001)]
    for record in some:
        writer.commit([record])
        if record.sequence == 500:
            assert list(records_in(tmp_path / "run.mdb").values()) == some[:500]
    writer.commit(some[:300])
    writer.commit([done("last")])
    writer.close()
    log = read_writer(tmp_path / "run.mdb", live=False)[1]
    assert list(log) == [*some, *some[:300], done("last")]
    assert len(log.blocks) < 10
    # Some pages are free: each commit writes the last block to others.
    assert (tmp_path / "run.mdb").stat().st_size < 40 * 4096 + sum(map(len, log.blocks))


def test_a_commit_that_fails_leaves_the_small_block_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(point: str) -> None:
        if point == "store.in_commit":
            raise OSError("the disk fails")

    writer = WriterFile.create(tmp_path, "run", {})
    writer.commit([done("a")])
    with monkeypatch.context() as patch:
        patch.setattr(lmdb_file, "failpoint", fail)
        with pytest.raises(CheckpointError, match="the disk fails"):
            writer.commit([done("b")])
    assert set(records_in(tmp_path / "run.mdb")) == {"a"}
    writer.commit([done("c")])
    writer.close()
    assert set(records_in(tmp_path / "run.mdb")) == {"a", "c"}


@pytest.mark.parametrize("number", [0, 1])
def test_what_another_process_wrote_into_the_file_is_never_replaced(
    tmp_path: Path, number: int
) -> None:
    writer = WriterFile.create(tmp_path, "run", {})
    writer.commit([done("a")])
    (block,) = encode([done("foreign")])
    with writer._env.begin(db=writer._records, write=True) as transaction:
        transaction.put(number.to_bytes(8, "big"), block)
    with pytest.raises(CheckpointError, match="did not write"):
        writer.commit([done("b")])
    writer.close()
    assert "foreign" in records_in(tmp_path / "run.mdb")
