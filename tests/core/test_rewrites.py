"""Rewrites of output files: what is planned, and any history of runs, crashes and tidies."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import pytest
from output_simulator import SHIPPED, Rules, simulate_output
from snapshots import snapshot_of, whole_files

from ray_resume.core.file_uses import FileUse, clean_files, file_uses, overlapping_files
from ray_resume.core.filenames import OutputName, stem_of
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Record, State
from ray_resume.core.rewrites import (
    Rewrite,
    Supersession,
    merge_groups,
    moves_of,
    plan_rewrites,
    still_due,
)
from ray_resume.core.shards import Shard
from ray_resume.errors import CheckpointError

RUN = "0123456789ab"

pytestmark = pytest.mark.long


def done(source: str, *parts: FilePart, sequence: int = 1) -> Record:
    return Record(source, State.COMPLETED, sequence, RUN, parts=parts)


# In "f", rows 1 and 2 are dead. "g" is clean, and so is "h", which is one part as a whole.
A = done("a", FilePart("f", 0, 1, 4), FilePart("g", 0, 2, 3))
B = done("b", FilePart("f", 3, 1, 4), FilePart("g", 2, 1, 3), sequence=2)
C = done("c", *whole_files("h", rows=7), sequence=3)


def test_a_file_is_clean_if_all_of_its_rows_are_live() -> None:
    snapshot = snapshot_of({RUN: [A, B, C]})
    assert file_uses(snapshot) == {"f": FileUse(2, 4), "g": FileUse(3, 3)}
    assert set(clean_files(snapshot)) == {"g", "h"}
    assert overlapping_files(snapshot) == []
    nothing = snapshot_of({})
    assert (file_uses(nothing), list(clean_files(nothing)), overlapping_files(nothing)) == (
        {},
        [],
        [],
    )


@pytest.mark.parametrize(
    "wrong",
    [
        FilePart("g", 1, 2, 3),
        FilePart("g", 2, 1, 3),
        FilePart("h", 0, 7, 7),
        FilePart("f", 1, 2, 5),
    ],
)
def test_records_that_contradict_each_other_about_a_file_are_found(wrong: FilePart) -> None:
    snapshot = snapshot_of({RUN: [A, B, C, done("d", wrong, sequence=4)]})
    assert overlapping_files(snapshot) == [wrong.file]


def test_live_rows_move_to_a_new_file_and_records_keep_their_completion() -> None:
    snapshot = snapshot_of({RUN: [A, B, C]})
    (rewrite,) = plan_rewrites(snapshot)
    assert rewrite == Rewrite(("f",), (A.parts[0], B.parts[0]))
    moves = moves_of(rewrite, "new")
    assert moves == {A.parts[0]: FilePart("new", 0, 1, 2), B.parts[0]: FilePart("new", 1, 1, 2)}
    last = snapshot.highest_sequence()
    assert list(Supersession(snapshot, [[rewrite]]).records(["f"], moves)) == [
        replace(A, sequence=last + 1, parts=(FilePart("new", 0, 1, 2), A.parts[1])),
        replace(B, sequence=last + 2, parts=(FilePart("new", 1, 1, 2), B.parts[1])),
    ]


def test_a_later_step_knows_what_an_earlier_one_has_moved() -> None:
    record, other = done("a", FilePart("f", 0, 2, 3), FilePart("g", 0, 1, 2)), done("b", sequence=2)
    snapshot = snapshot_of({RUN: [record, other]})
    steps = [[Rewrite((part.file,), (part,))] for part in record.parts]
    supersession = Supersession(snapshot, steps)
    first, second = (
        list(supersession.records(step[0].files, moves_of(step[0], f"new-{step[0].files[0]}")))
        for step in steps
    )
    assert [one.parts for one in first] == [(FilePart("new-f", 0, 2, 2), record.parts[1])]
    assert [one.parts for one in second] == [
        (FilePart("new-f", 0, 2, 2), FilePart("new-g", 0, 1, 1))
    ]
    assert second[0].sequence > first[0].sequence > other.sequence


def test_a_source_keeps_the_order_of_its_rows() -> None:
    late, early = FilePart("f", 0, 2, 3), FilePart("g", 0, 1, 2)
    record, other = done("a", early, late), done("b", FilePart("g", 1, 1, 2), sequence=2)
    snapshot = snapshot_of({RUN: [record, other]})
    (rewrite,) = plan_rewrites(snapshot, sizes={"f": 1.0, "g": 1.0}, target_bytes=10)
    assert rewrite == Rewrite(("f", "g"), (early, late, *other.parts), filled_bytes=0)
    assert rewrite.is_needed
    assert rewrite.halves() == [
        Rewrite(("f",), (late,)),
        Rewrite(("g",), (early, *other.parts)),
    ]
    assert [half.is_needed for half in rewrite.halves()] == [True, False]
    moves = moves_of(rewrite, "new")
    supersession = Supersession(snapshot, [[rewrite]])
    new = {one.source_id: one for one in supersession.records(["f", "g"], moves)}
    assert new["a"].parts == (FilePart("new", 0, 3, 4),)


def test_parts_of_a_source_that_come_to_stand_together_are_one() -> None:
    record = done("a", FilePart("f", 0, 2, 3), FilePart("g", 0, 1, 2))
    snapshot = snapshot_of({RUN: [record]})
    rewrite = Rewrite(("f", "g"), record.parts)
    supersession = Supersession(snapshot, [[rewrite]])
    (new,) = supersession.records(rewrite.files, moves_of(rewrite, "new"))
    assert new.parts == (FilePart("new", 0, 3, 3),)


def test_a_rewrite_of_what_has_changed_is_refused() -> None:
    before, after = snapshot_of({RUN: [A, C]}), snapshot_of({RUN: [A, B, C]})
    (rewrite,) = [one for one in plan_rewrites(before) if one.files == ("f",)]
    assert still_due([rewrite], before) == [rewrite]
    assert still_due([rewrite], after) == []
    with pytest.raises(CheckpointError, match=r"f was rewritten.* of b\."):
        list(Supersession(after, [[rewrite]]).records(["f"], moves_of(rewrite, "new")))


def test_a_share_leaves_files_alone_that_others_have_rows_in() -> None:
    snapshot = snapshot_of({RUN: [A, B, C]})
    plans = [plan_rewrites(snapshot, share=Shard(index, 2)) for index in range(2)]
    assert plans in ([[], []], [[*plan_rewrites(snapshot)], []], [[], [*plan_rewrites(snapshot)]])
    assert plan_rewrites(snapshot, share=Shard(0, 1)) == plan_rewrites(snapshot)


def test_small_files_of_a_folder_are_merged_and_large_ones_stay() -> None:
    sizes = {f"d=1/{n}.json": 3.0 for n in range(5)} | {"d=2/x.json": 1.0, "y.json": 1.0}
    sizes |= {"d=1/large.json": 6.0, "d=1/z.json.gz": 1.0, "d=1/w.json.gz": 2.0}
    uses = {file: FileUse(5, 5) for file in sizes}
    gzipped = ["d=1/w.json.gz", "d=1/z.json.gz"]
    whole = ["d=1/0.json", "d=1/1.json", "d=1/2.json", "d=1/3.json"]
    assert merge_groups(uses, sizes, 10) == [whole, gzipped]
    assert merge_groups(uses, sizes, 10, max_rows=10) == [whole[:2], whole[2:], gzipped]
    # Another pipeline may have written lines of another kind.
    uses["d=1/1.json"] = FileUse(5, 5, pipeline=7)
    uses["d=1/w.json.gz"] = FileUse(5, 5, pipeline=-1)
    assert merge_groups(uses, sizes, 10) == [["d=1/0.json", *whole[2:], "d=1/4.json"]]
    snapshot = snapshot_of({RUN: [A, B, C]})
    plan = plan_rewrites(snapshot, sizes={"f": 8.0, "g": 3.0, "stranger": 1.0}, target_bytes=10)
    assert [rewrite.files for rewrite in plan] == [("f", "g")]


def merged_file(bytes_: int | None, folder: str = "") -> str:
    stem = stem_of(f"c0ffee00-{RUN}", None, folder, filled_bytes=bytes_)
    return f"{folder}{stem}.parquet"


def test_a_file_that_was_merged_is_not_merged_again_for_little() -> None:
    """A merged file is often smaller than its files were: each of these has a footer."""
    full, shrunk = merged_file(100), merged_file(100)
    tail, small_tail = merged_file(0), merged_file(0)
    sizes = {full: 60.0, shrunk: 5.0, tail: 20.0, small_tail: 3.0}

    def merges(target: int = 100, **new: float) -> set[frozenset[str]]:
        every = sizes | {f"{name}.parquet": size for name, size in new.items()}
        uses = {file: FileUse(5, 5) for file in every}
        return {frozenset(group) for group in merge_groups(uses, every, target)}

    assert merges() == set(), "nothing is new"
    fresh = ["a.parquet", "b.parquet"]
    assert merges(a=1.0, b=1.0) == {frozenset(fresh)}
    assert merges(a=2.0, b=1.0) == {frozenset([*fresh, small_tail])}
    assert merges(a=2.0, b=15.0) == {frozenset([*fresh, small_tail, tail])}
    # A larger target makes them small again.
    assert merges(200) == {frozenset([full, shrunk, tail, small_tail])}


def test_a_merge_takes_no_longer_for_a_source_if_there_are_many() -> None:
    count = 20_000
    parts = tuple(FilePart("f", row, 1, count) for row in range(count))
    began = time.process_time()
    moves = moves_of(Rewrite(("f",), parts), "new")
    # It took 15 s once.
    assert time.process_time() - began < 1
    assert moves[parts[7]] == FilePart("new", 7, 1, count)


def test_a_merge_of_enough_says_so_in_the_files_name() -> None:
    records = [done(name, *whole_files(f"d=1/{name}"), sequence=n) for n, name in enumerate("abc")]
    sizes = {f"d=1/{name}": 4.0 for name in "abc"}
    snapshot = snapshot_of({RUN: records})
    for target, filled in ((12, 12), (13, 0)):
        (rewrite,) = plan_rewrites(snapshot, sizes=sizes, target_bytes=target)
        assert rewrite.filled_bytes == filled
        name = OutputName.parse(merged_file(rewrite.filled_bytes, "d=1/"))
        assert name is not None
        assert (name.filled_bytes, name.is_shared, name.in_place) == (filled, True, True)
    for digest in (None, b"\xff" * 8, b"\xff\xfe" + bytes(6)):
        name = OutputName.parse(f"{stem_of(f'c0ffee00-{RUN}', digest)}.parquet")
        assert name is not None
        assert name.filled_bytes is None


def run_histories(seeds: range) -> Counter[str]:
    total: Counter[str] = Counter()
    for seed in seeds:
        wrong, seen = simulate_output(seed)
        assert not wrong, f"simulate_output({seed}): {wrong}"
        total += seen
    return total


@pytest.mark.extended
def test_live_parts_are_right_at_any_moment_and_files_after_a_tidy() -> None:
    seen = run_histories(range(250))
    assert min(seen[what] for what in ("COMPLETED", "FAILED", "killed", "files rewritten")) > 50


@pytest.mark.slow
def test_many_histories_of_the_output() -> None:
    run_histories(range(100_000))


# A broken rule, and a seed shortly before the first history that shows it.
BROKEN = [
    (Rules(compares=False), 100),
    (Rules(takes_lease=False), 0),
    (Rules(commits_first=False), 0),
    (Rules(counts_rows=False), 0),
    (Rules(remembers=False), 0),
]


@pytest.mark.parametrize(("rules", "seed"), BROKEN, ids=str)
def test_the_simulator_finds_a_broken_rule(rules: Rules, seed: int) -> None:
    assert rules != SHIPPED
    assert any(simulate_output(seed + number, rules)[0] for number in range(600))
