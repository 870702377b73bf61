"""The sources of a checkpoint that the next pipeline reads: pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from snapshots import snapshot_of

from ray_resume.core.gone import gone_from, judge_gone
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Record, State
from ray_resume.core.resume_plan import ResumePlan, plan_resume
from ray_resume.core.snapshot import Snapshot
from ray_resume.core.sources import Source
from ray_resume.core.upstream import moved_parts, sources_with_output
from ray_resume.errors import SourceChangedError

RUN, LATER, OWN = "0123456789ab", "ba9876543210", "aaaaaaaaaaaa"
F, G = "f.parquet", "g.parquet"


def done(source_id: str, *parts: FilePart, run: str = RUN, sequence: int = 1) -> Record:
    rows = sum(part.rows for part in parts)
    return Record(source_id, State.COMPLETED, sequence, run, rows=rows, parts=parts)


def snapshot_with(*records: Record) -> Snapshot:
    by_run: dict[str, list[Record]] = {}
    for record in records:
        by_run.setdefault(record.run_id, []).append(record)
    return snapshot_of(by_run)


def plan_after(before: Snapshot, now: Snapshot, **options: Any) -> ResumePlan:
    """Plan a run of the second pipeline, which had completed all that it saw ``before``."""
    own = snapshot_with(
        *(
            Record(source.source_id, State.COMPLETED, n, OWN, fingerprint=source.fingerprint)
            for n, source in enumerate(sources_with_output(before), 1)
        )
    )
    listed = sources_with_output(now)
    gone = gone_from(own, listed, remove=True)
    judge_gone(own, gone, listed, None, "/ckpt")
    return plan_resume(
        listed,
        own,
        on_source_change="reprocess",
        signature="",
        on_pipeline_change="continue",
        gone=gone,
    )


A, B = FilePart(F, 0, 4, 10), FilePart(F, 4, 6, 10)


def test_sources_are_found_by_their_parts_in_the_order_of_files() -> None:
    sources = sources_with_output(
        snapshot_with(
            done("z", A),
            done("m", FilePart(G, 0, 2, 2), FilePart(F, 10, 1, 11)),
            done("a", B),
            done("empty"),
            Record("failed", State.FAILED, 1, RUN),
            Record("failed since", State.FAILED, 1, RUN, parts=(FilePart(F, 2, 1, 10),)),
            Record("reset", State.RESET, 1, RUN, parts=(A,)),
        )
    )
    assert [source.source_id for source in sources] == ["empty", "z", "failed since", "a", "m"]
    assert [source.item for source in sources][:3] == [(), (A,), (FilePart(F, 2, 1, 10),)]
    assert len(sources_with_output(snapshot_with())) == 0


def test_a_rewrite_is_no_change_and_another_run_is_one() -> None:
    before = snapshot_with(done("a", A), done("b", B))
    merged = FilePart(G, 0, 4, 10)
    rewritten = snapshot_with(done("a", merged, sequence=5), done("b", B))
    plan = plan_after(before, rewritten)
    assert not plan.pending
    assert len(plan.skipped) == 2
    assert not plan.removed
    # Executed again, with the same rows in the same place as far as numbers tell.
    again = snapshot_with(done("a", A), done("a", A, run=LATER, sequence=7), done("b", B))
    assert list(plan_after(before, again).pending.ids()) == ["a"]


def test_a_run_that_completes_a_source_after_it_got_lost_there_has_changed_it() -> None:
    lost = snapshot_with(done("a", A), Record("a", State.FAILED, 3, LATER, parts=(A,)))
    since = snapshot_with(done("a", A), done("a", B, run=LATER, sequence=4))
    assert list(plan_after(lost, since).pending.ids()) == ["a"]


def test_what_is_reset_or_gone_is_removed_and_what_is_new_or_failed_since_is_read() -> None:
    before = snapshot_with(*(done(name, A) for name in "abcd"))
    now = snapshot_with(
        done("a", A),
        Record("b", State.RESET, 9, LATER, parts=(A,)),
        Record("c", State.FAILED, 9, LATER, parts=(A,)),
        Record("f", State.FAILED, 9, LATER),
        Record("d", State.RESET, 9, LATER),
        done("e", A),
    )
    plan = plan_after(before, now)
    assert sorted(plan.pending.ids()) == ["c", "e"]
    assert sorted(record.source_id for record in plan.removed) == ["b", "d"]
    assert len(plan_after(snapshot_with(), now).pending) == 3
    # An emptied pipeline has nothing here either; another one is refused.
    assert len(plan_after(before, snapshot_with()).removed) == 4
    other = snapshot_with(done("x", A), done("y", B))
    with pytest.raises(SourceChangedError, match="none of the 4 sources"):
        plan_after(before, other)


def test_moved_parts_are_those_of_rewritten_files_and_none_of_replaced_sources() -> None:
    listed = sources_with_output(snapshot_with(*(done(name, A) for name in "abcd"), done("e")))
    to = FilePart(G, 1, 4, 10)
    now = sources_with_output(
        snapshot_with(
            done("d", A),
            done("b", to, sequence=2),
            replace(done("c", A), run_id=LATER),
            done("e"),
        )
    )
    assert moved_parts(listed, now) == {"a": None, "b": (to,), "c": None}
    assert moved_parts(listed, listed) == {}
    assert isinstance(listed[0], Source)
