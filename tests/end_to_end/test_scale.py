"""What is done to a million sources at once: the same as to each of them, in little time."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from collections import Counter as Counts
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from cluster import Cluster, Costs, needs, simulate
from hypothesis import example, given, settings
from hypothesis import strategies as st
from places import ROOT
from plain_todo import PlainGone, plain_todo_of

from ray_resume.core.digests import DigestIndex, Digests, source_digest
from ray_resume.core.filenames import OutputName, packed, stem_of, unpacked
from ray_resume.core.gone import gone_from
from ray_resume.core.identity import ids_of, part_file
from ray_resume.core.output_files import OutputFileSet, listed_files
from ray_resume.core.records import HEAD, Fingerprint, Record, State, encode, pipeline_of, stored_in
from ray_resume.core.resume_plan import todo_of
from ray_resume.core.shards import Shard
from ray_resume.core.snapshot import Union
from ray_resume.core.sources import Source, SourceTable, refuse_repeated
from ray_resume.core.table import Table
from ray_resume.errors import CheckpointError, PipelineChangedError, SourceChangedError

pytestmark = [pytest.mark.extended, pytest.mark.long]

BENCHMARK = ROOT / "tests" / "benchmarks" / "scale.py"

# Digests ------------------------------------------------------------------------------------------

# Few, and with the same first half often, so that the second one has to decide.
halves = st.sampled_from([bytes(8), b"\0" * 7 + b"\1", b"\xff" * 8])
digests = st.builds(lambda high, low: high + low, halves, halves)


@given(st.lists(digests), st.lists(digests))
def test_digests_are_found_as_in_a_dictionary(known: list[bytes], wanted: list[bytes]) -> None:
    index = DigestIndex(Digests.of(b"".join(known)))
    assert [index.digests[rank] for rank in range(len(index))] == sorted(known)
    ranks = index.positions(Digests.of(b"".join(wanted))).tolist()
    for value, rank in zip(wanted, ranks, strict=True):
        assert (rank >= 0) == (value in known)
        assert rank < 0 or index.digests[rank] == value
    repeated = Digests.of(b"".join(known)).duplicates().tolist()
    assert repeated == [i for i, value in enumerate(known) if known.count(value) > 1]


@given(st.lists(st.binary(min_size=16, max_size=16)), st.integers(1, 1 << 40))
def test_a_share_is_the_same_for_all_at_once(values: list[bytes], count: int) -> None:
    rest = Digests.of(b"".join(values)).modulo(count).tolist()
    assert rest == [int.from_bytes(value, "big") % count for value in values]


def test_shards_hold_the_same_sources_as_columns() -> None:
    sources = SourceTable.of(Source(f"s{i}", None) for i in range(100))
    for count in (1, 2, 7):
        for index in range(count):
            shard = Shard(index, count)
            held = shard.of(sources.digests).tolist()
            assert held == [shard.holds(source.source_id) for source in sources]


# Tables of sources --------------------------------------------------------------------------------

anything = st.text(st.characters(exclude_categories=()), max_size=20)
sizes = st.none() | st.integers(0, 2**62)
sources = st.builds(
    Source, anything, st.none() | st.integers(), st.builds(Fingerprint, sizes, sizes)
)


@given(st.lists(sources), st.data())
@example([Source("\ud800", 1), Source("\udc00", 2)], None)
def test_a_table_gives_its_sources_back(given_: list[Source], data: st.DataObject | None) -> None:
    table = SourceTable.of(given_)
    assert list(table) == given_
    assert table == given_
    assert pickle.loads(pickle.dumps(table)) == given_
    assert table.digests.to_bytes() == b"".join(source_digest(s.source_id) for s in given_)
    assert [s.source_id for s in table.trimmed()] == [s.source_id for s in given_]
    if data is not None and given_:
        some = data.draw(st.lists(st.integers(0, len(given_) - 1)))
        part = table.take(np.array(some, np.int64))
        assert list(part) == [given_[i] for i in some]
        assert [s.source_id for s in part.trimmed()] == [given_[i].source_id for i in some]
        assert part.digests.to_bytes() == b"".join(source_digest(given_[i].source_id) for i in some)


def test_files_are_found_by_their_path_and_may_be_called_otherwise() -> None:
    files = SourceTable.of_files(["/data/a", "/data/b/ü"], [1, None], [2, 3])
    assert list(files) == [
        Source("/data/a", "/data/a", Fingerprint(1, 2)),
        Source("/data/b/ü", "/data/b/ü", Fingerprint(None, 3)),
    ]
    inside = files.relative_to("/data/")
    assert [(s.source_id, s.item) for s in inside] == [("a", "/data/a"), ("b/ü", "/data/b/ü")]
    deeper = inside[1:].relative_to("b/")
    assert [(s.source_id, s.item) for s in deeper] == [("ü", "/data/b/ü")]
    assert [s.source_id for s in deeper.trimmed()] == ["ü"]
    assert deeper.digests.to_bytes() == source_digest("ü")


def test_repeated_sources_are_named() -> None:
    with pytest.raises(Exception, match=r"2 sources are named more than once.*: a, c"):
        refuse_repeated(SourceTable.of(Source(name, None) for name in "abcacc"))
    refuse_repeated(SourceTable.of(Source(name, None) for name in "abc"))


# Tables of records --------------------------------------------------------------------------------

RUNS = ["0123456789ab", "0123456789ac", "run"]
NAMES = ["a", "b", "c", "\udcff", "d" * 600]


def usual_file(source_id: str, run_id: str, number: int) -> str:
    return f"aaaaaaaa-{run_id}-{source_digest(source_id)[:8].hex()}-{number:016x}.parquet"


def shared_file(number: int) -> str:
    return f"aaaaaaaa-{RUNS[0]}-{'0' * 16}-{number:016x}.parquet"


@st.composite
def records(draw: st.DrawFn, source_id: str) -> Record:
    run_id = draw(st.sampled_from(RUNS))
    own = usual_file(source_id, RUNS[0], draw(st.integers(0, 2)))
    files = st.lists(
        st.sampled_from([own, shared_file(1), shared_file(2), "k=1/" + own, "odd"]),
        max_size=2,
        unique=True,
    )
    return Record(
        source_id,
        draw(st.sampled_from(State)),
        draw(st.integers(1, 3)),
        run_id,
        rows=draw(st.integers(0, 3)),
        files=tuple(draw(files)),
        error=draw(st.sampled_from([None, "boom"])),
        failed_runs=draw(st.integers(0, 2)),
        fingerprint=draw(fingerprints),
        pipeline=pipeline_of(draw(st.sampled_from(["now", "then", ""]))),
    )


fingerprints = st.builds(Fingerprint, st.sampled_from([None, 0, 1]), st.sampled_from([None, 0, 1]))
on_record = st.lists(st.sampled_from(NAMES), unique=True).flatmap(
    lambda names: st.tuples(*(records(name) for name in names))
)


def pairs(some: tuple[Record, ...] | list[Record]) -> list[tuple[bytes, bytes]]:
    return [(source_digest(r.source_id), encode(r)) for r in some]


@given(on_record)
def test_a_table_of_records_gives_its_pairs_back(some: tuple[Record, ...]) -> None:
    table = Table.of(pairs(some))
    assert list(table) == pairs(some)
    assert [table.record(row) for row in range(len(table))] == list(some)
    assert table.damaged() is None
    back = pickle.loads(pickle.dumps(table.take(np.arange(len(table))[::-1])))
    assert list(back) == pairs(some)[::-1]


USUAL = Record("a", State.COMPLETED, 1, RUNS[0], files=(usual_file("a", RUNS[0], 1),))


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: value[:-1],
        lambda value: value + b"x",
        lambda value: b"",
        lambda value: value[:40],
        lambda value: b"\0" + value[1:],
        lambda value: b"\5" + value[1:],
        lambda value: value[:1] + b"\x88" + value[2:],
        lambda value: value[:2] + b"\x09" + value[3:],
        lambda value: bytes(len(value)),
    ],
)
def test_damage_is_seen_among_many_and_names_the_file(damage: object) -> None:
    assert callable(damage)
    good = pairs([replace(USUAL, source_id=f"s{i}", files=()) for i in range(100)])
    bad = [(source_digest("a"), damage(encode(USUAL)))]
    Union({"x": good, "y": pairs([USUAL])})
    with pytest.raises(CheckpointError, match=r"file of y .*restore it"):
        Union({"x": good, "y": [*bad, *good]}, owner="the file of {} ".format)


@given(on_record, st.sets(st.sampled_from(NAMES)))
def test_what_a_union_counts_at_once_is_what_its_records_say(
    some: tuple[Record, ...], here: set[str]
) -> None:
    union = Union({"x": pairs(some[::2]), "y": pairs(some[1::2])})
    by_id = {record.source_id: record for record in some}
    assert {r.source_id: r for r in union} == by_id
    assert set(listed_files(union)) == {file for record in some for file in record.files}
    assert len(listed_files(union)) == len({file for record in some for file in record.files})
    outside = [r for r in some if r.state is State.COMPLETED and r.source_id not in here]
    count, one = union.completed_outside(Digests.of(b"".join(map(source_digest, here))))
    assert count == len(outside)
    assert one is None or one in outside
    assert (one is None) == (not outside)
    assert dict(union.pairs()) == dict(pairs(some))
    union.verify()
    stored = [value for block in union.blocks() for value in stored_in(block)]
    assert stored == sorted(key + value for key, value in pairs(some))


@given(on_record, st.integers(1, 3))
def test_blocks_of_a_table_hold_its_pairs(some: tuple[Record, ...], count: int) -> None:
    blocks = list(Table.of(pairs(some)).blocks(count))
    assert [v for block in blocks for v in stored_in(block)] == [k + v for k, v in pairs(some)]
    assert all(sum(1 for _ in stored_in(block)) <= count for block in blocks)


@given(on_record, st.data())
def test_the_rows_of_which_two_tables_differ(some: tuple[Record, ...], data: st.DataObject) -> None:
    changed = {r for r in some if data.draw(st.booleans())}
    other = [replace(r, source_id=r.source_id + "x") if r in changed else r for r in some]
    unlike = Table.of(pairs(some)).unlike(Table.of(pairs(other)))
    assert unlike.tolist() == [row for row, r in enumerate(some) if r in changed]


def cut_short(value: bytes) -> bytes:
    return value[:-1]


def no_text(value: bytes) -> bytes:
    """Damage an id of ASCII such that it is no UTF-8 any more."""
    return value[: HEAD.size] + b"\xff" + value[HEAD.size + 1 :]


BAD = st.sampled_from([cut_short, no_text, None, None])


@given(st.lists(st.tuples(st.sampled_from(NAMES).flatmap(records), BAD, st.booleans()), max_size=5))
def test_what_may_be_at_fault_is_in_doubt(some: list[tuple[Record, Any, bool]]) -> None:
    """Of what is not in doubt, each record is sound by all rules, read one by one."""
    runs = RUNS[:1]
    table = Table.of(
        (source_digest("x" if astray else r.source_id), bad(encode(r)) if bad else encode(r))
        for r, bad, astray in some
    )
    doubtful = set(table.doubtful(runs).tolist())
    numbers = Counts((r.run_id, r.sequence) for r, _, _ in some)
    for row, (record, bad, astray) in enumerate(some):
        if row not in doubtful:
            assert not bad
            assert not astray
            assert table.record(row) == record
            assert record.run_id in runs
            assert numbers[record.run_id, record.sequence] == 1
            assert not any("/" in file for file in record.files)


def test_what_is_as_usual_is_not_in_doubt() -> None:
    """Else a million records would be looked at one by one."""
    usual = [
        replace(USUAL, source_id=f"s{i}", sequence=i, files=(usual_file(f"s{i}", RUNS[0], i),))
        for i in range(1, 50)
    ]
    bare = replace(USUAL, run_id=RUNS[1], files=())
    usual += [replace(bare, source_id=f"t{i}", sequence=i) for i in range(1, 50)]
    table = Table.of(pairs(usual))
    assert len(table.doubtful(RUNS)) == 0
    assert table.doubtful(RUNS[:1]).tolist() == list(range(49, 98))
    for change in ({"sequence": 2}, {"sequence": 0}, {"rows": -1}, {"error": "e"}, {"run_id": "x"}):
        odd: list[Any] = [*usual[:9], replace(usual[9], **change)]
        expected = [1, 9] if change == {"sequence": 2} else [9]
        assert Table.of(pairs(odd)).doubtful(RUNS).tolist() == expected


# What there is to do ------------------------------------------------------------------------------


@settings(max_examples=600, deadline=None)
@given(
    on_record,
    st.lists(st.tuples(st.sampled_from(NAMES), fingerprints), unique_by=lambda pair: pair[0]),
    st.lists(st.sampled_from(NAMES), unique=True),
    st.sampled_from(["reprocess", "ignore", "error"]),
    st.sampled_from(["error", "continue", "restart"]),
)
def test_todo_is_what_its_model_says(
    some: tuple[Record, ...],
    own: list[tuple[str, Fingerprint]],
    listed: list[str],
    on_source_change: str,
    on_pipeline_change: str,
) -> None:
    mine = [Source(source_id, source_id, known) for source_id, known in own]
    options: dict[str, Any] = {
        "on_source_change": on_source_change,
        "on_pipeline_change": on_pipeline_change,
        "signature": "now",
    }
    everyone = [*mine, *(Source(name, name) for name in listed)]
    everyone = list({source.source_id: source for source in everyone}.values())
    compare_todo(mine, everyone, some, {}, {}, **options)


def compare_todo(
    mine: list[Source],
    everyone: list[Source],
    some: tuple[Record, ...],
    ours: dict[str, Any],
    plain: dict[str, Any],
    **options: Any,
) -> None:
    """Hold `todo_of` against its model; ``ours`` and ``plain`` say the same of what is gone."""
    by_id = {record.source_id: record for record in some}
    union = Union({"x": pairs(some)})
    try:
        model = plain_todo_of(mine, by_id, listed=everyone, **plain, **options)
    except (CheckpointError, PipelineChangedError, SourceChangedError) as error:
        with pytest.raises(type(error)):
            todo_of(mine, union, listed=everyone, **ours, **options)
        return
    todo = todo_of(mine, union, listed=everyone, **ours, **options)
    names = [source.source_id for source in todo.pending]
    assert names == model.pending
    assert [s for s in mine if s.source_id in names] == list(todo.pending)
    assert {names[n]: record for n, record in todo.records.items()} == model.records
    assert len(todo.records) == len(model.records)
    assert {record.source_id for record in todo.skipped} == model.skipped
    assert len(todo.skipped) == len(model.skipped)
    assert todo.quarantined == model.quarantined
    assert (todo.held, todo.apart) == (model.held, model.apart)
    assert {frozenset(names[n] for n in group) for group in todo.together} == model.together
    assert {record.source_id for record in todo.removed} == model.removed
    assert {frozenset(ids) for ids in todo.replaced.values()} == model.replaced
    assert (set(todo.kept), todo.passed_over) == (model.kept, model.passed_over)
    # Each is dropped in a step of its own, or of a source that is read in that step.
    steps = {n: group for group in todo.together for n in group}
    assert all(n == min(steps.get(n, [n])) for n in todo.replaced)


PARTS = ["f#rg0", "f#rg1", "f#rg2", "g#rg0", "g#rg1", "h#rg0"]
parts_on_record = st.lists(st.sampled_from(PARTS), unique=True).flatmap(
    lambda names: st.tuples(*(records(name) for name in names))
)


@settings(max_examples=800, deadline=None)
@given(
    parts_on_record,
    st.dictionaries(st.sampled_from(PARTS), fingerprints),
    st.sets(st.sampled_from("fgh")),
    st.sampled_from([None, Shard(0, 2), Shard(1, 2)]),
    st.booleans(),
    st.sampled_from(["reprocess", "ignore", "error"]),
    st.sampled_from(["continue", "restart"]),
)
def test_what_is_gone_is_what_the_model_says(
    some: tuple[Record, ...],
    listed: dict[str, Fingerprint],
    without_parts: set[str],
    shard: Shard | None,
    remove: bool,
    on_source_change: str,
    on_pipeline_change: str,
) -> None:
    """``without_parts`` are files that were listed, and perhaps have no row groups any more."""
    everyone = [Source(name, name, known) for name, known in listed.items()]
    mine = [source for source in everyone if shard is None or shard.holds(source.source_id)]
    files = without_parts | {name[0] for name in listed}
    file_of = partial(part_file, ids_of("row_group"))
    union = Union({"x": pairs(some)})
    gone = gone_from(
        union,
        SourceTable.of(everyone),
        files=files,
        file_of=file_of,
        share=shard,
        remove=remove,
    )
    is_own = shard.holds if shard is not None else lambda _: True
    compare_todo(
        mine,
        everyone,
        some,
        {"gone": gone, "file_of": file_of},
        {"gone": PlainGone(remove, files, file_of, is_own)},
        on_source_change=on_source_change,
        on_pipeline_change=on_pipeline_change,
        signature="now",
    )


# File names ---------------------------------------------------------------------------------------

NAME = usual_file("a", RUNS[0], 1)
TAGGED = f"{stem_of(NAME[:21], None, 'k=1/')}.parquet"
FILES = [
    NAME,
    usual_file("a", RUNS[0], 2),
    usual_file("b", RUNS[0], 1),
    usual_file("b", RUNS[1], 1),
    NAME.replace(".parquet", ".csv"),
    NAME.replace(".parquet", ".json"),
    NAME.replace(".parquet", ".txt"),
    NAME.replace("aaaaaaaa", "bbbbbbbb"),
    NAME.upper(),
    NAME[:-1] + "ü",
    "." + NAME,
    "k=1/" + NAME,
    "k/" + NAME,
    f"k=1/{TAGGED}",
    f"k=2/{TAGGED}",
    f"k=1/k=1/{TAGGED}",
    TAGGED,
    NAME.replace("-", "_"),
    "x" * len(NAME[:-8]) + ".parquet",
    "",
    "other.parquet",
    "\udcff",
]


def test_two_names_are_not_taken_for_two_others() -> None:
    """Put one after the other they are spelt as two names that are not there."""
    for names in ([NAME[:-1], "t" + NAME], [NAME + NAME, ""]):
        assert sorted(OutputFileSet.of(names)) == sorted(names)


@given(st.sets(st.sampled_from(FILES)), st.sets(st.sampled_from(FILES)))
def test_a_list_of_files_is_like_a_set(one: set[str], other: set[str]) -> None:
    mine, theirs = OutputFileSet.of(sorted(one)), OutputFileSet.of(other)
    assert set(mine) == one
    assert len(mine) == len(one)
    assert [name in mine for name in FILES] == [name in one for name in FILES]
    assert set(mine.without(theirs)) == one - other
    for runs in (set[str](), {RUNS[0]}, set(RUNS)):
        for known in (True, False):
            assert set(mine.made_by("a" * 8, runs, known=known)) == {
                name
                for name in one
                if (parsed := OutputName.parse(name)) is not None
                and parsed.checkpoint == "a" * 8
                and (parsed.run_id in runs) == known
                and (parsed.in_place or not known)
            }
    assert set(mine.not_of("a" * 8)) == {
        name
        for name in one
        if (parsed := OutputName.parse(name)) is None
        or parsed.checkpoint != "a" * 8
        or not parsed.in_place
    }
    counts = Counts(
        parsed.checkpoint
        for name in one
        if (parsed := OutputName.parse(name)) is not None and parsed.in_place
    )
    assert mine.checkpoints() == counts


def test_a_packed_name_comes_back() -> None:
    for name in FILES:
        short = packed(name)
        assert short is None or unpacked(short) == name
    assert sum(packed(name) is not None for name in FILES) == 7
    for value in (b"", bytes(26), bytes(26) + b"\x05"):
        with pytest.raises(ValueError, match="no packed name"):
            unpacked(value)


# How much it takes --------------------------------------------------------------------------------


def benchmark(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARK), *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=3600)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_the_ledgers_process_keeps_little_of_a_source() -> None:
    weights = benchmark("memory", "--sources", "20000")["bytes_per_source"]
    assert weights["pending"] < 120
    assert weights["pending, with rows in a file"] < 600
    assert weights["half of them complete"] < 350
    assert weights["complete"] < 180


def test_the_ledger_and_the_store_without_ray() -> None:
    found = benchmark("ledger", "--sources", "20000")
    # Generous, for busy machines: a tenth of what an idle one does.
    assert found["durable_completions_per_s"] > 10_000


def test_planning_takes_the_same_for_few() -> None:
    """What the slow test measures works at all."""
    found = benchmark("plan", "--sources", "2000")
    assert found["plan"]["total_cpu_s"] < 5
    assert found["bytes_per_source"] < 200


@pytest.mark.slow
def test_a_million_finished_sources_are_planned_in_seconds() -> None:
    found = benchmark("plan")
    # Processor time, since tests share the machine with others; 3 s where nobody else is at work.
    assert found["plan"]["total_cpu_s"] < 6
    assert found["plan"]["peak_mb"] < 500
    assert found["status"]["cpu_seconds"]["status"] < 5
    assert found["status"]["status_mb"] < 500


@pytest.mark.slow
def test_ten_million_sources_in_ledger_and_store() -> None:
    found = benchmark("ledger", "--sources", "10000000")
    assert found["durable_completions_per_s"] > 20_000
    assert found["longest_answer_s"] < 10


def test_a_job_over_tiny_files() -> None:
    """What the slow test measures works at all."""
    found = benchmark("run", "--sources", "300")
    assert found["again"]["seconds"]["run"] < 10


@pytest.mark.slow
def test_a_job_over_a_million_tiny_files() -> None:
    found = benchmark("run", "--sources", "1000000")
    assert found["again"]["cpu_seconds"]["run"] < 6
    assert found["job"]["driver_mb"] < 1000
    assert found["job"]["ledger_mb"] < 500


# A cluster ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "source_s", "per_task"), [(10_000, 5.0, 100), (500, 1.0, 1), (10_000, 2.0, 10)]
)
def test_the_model_of_a_cluster_agrees_with_its_arithmetic(
    workers: int, source_s: float, per_task: int
) -> None:
    job = Cluster(workers=workers, source_s=source_s, sources_per_task=per_task)
    core = next(need for need in needs(job, Costs()) if need.what == "ledger: a core")
    traffic = simulate(job, Costs())
    assert core.load < 0.9
    assert traffic.busy == pytest.approx(core.load, rel=0.15)
    assert traffic.slowdown < 1.2


def test_a_ledger_that_is_asked_too_much_slows_the_cluster_down_as_much() -> None:
    job = Cluster(source_s=1.0, sources_per_task=1)
    core = next(need for need in needs(job, Costs()) if need.what == "ledger: a core")
    assert core.load > 2
    traffic = simulate(job, Costs())
    assert traffic.busy > 0.95
    assert traffic.slowdown == pytest.approx(core.load, rel=0.15)
    # As many ledgers as it takes.
    several = replace(job, shards=2 * math.ceil(core.load))
    assert simulate(several, Costs()).slowdown < 1.2
