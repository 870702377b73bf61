"""What there is to do and what is gone, against a model that goes source by source."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from any_records import NAMES, fingerprints, on_record, records
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_resume_plan import PlainGone, plain_todo_of
from snapshots import snapshot_of

from ray_resume.core.gone import gone_from
from ray_resume.core.identity import ids_of, part_file
from ray_resume.core.records import Fingerprint, Record
from ray_resume.core.resume_plan import plan_resume
from ray_resume.core.shards import Shard
from ray_resume.core.sources import Source, SourceTable
from ray_resume.errors import PipelineChangedError, SourceChangedError

pytestmark = [pytest.mark.extended, pytest.mark.long]


@settings(max_examples=600, deadline=None)
@given(
    on_record,
    st.lists(st.tuples(st.sampled_from(NAMES), fingerprints), unique_by=lambda pair: pair[0]),
    st.sampled_from(["reprocess", "ignore", "error"]),
    st.sampled_from(["error", "continue", "restart"]),
)
def test_todo_is_what_its_model_says(
    some: tuple[Record, ...],
    own: list[tuple[str, Fingerprint]],
    on_source_change: str,
    on_pipeline_change: str,
) -> None:
    mine = [Source(source_id, source_id, known) for source_id, known in own]
    options: dict[str, Any] = {
        "on_source_change": on_source_change,
        "on_pipeline_change": on_pipeline_change,
        "signature": "now",
    }
    compare_todo(mine, mine, some, {}, {}, **options)


def compare_todo(
    mine: list[Source],
    everyone: list[Source],
    some: tuple[Record, ...],
    ours: dict[str, Any],
    plain: dict[str, Any],
    **options: Any,
) -> None:
    """Hold `plan_resume` against its model; ``ours`` and ``plain`` say the same of what is gone."""
    by_id = {record.source_id: record for record in some}
    snapshot = snapshot_of({"x": some})
    try:
        model = plain_todo_of(mine, by_id, listed=everyone, **plain, **options)
    except (PipelineChangedError, SourceChangedError) as error:
        with pytest.raises(type(error)):
            plan_resume(mine, snapshot, **ours, **options)
        return
    resume_plan = plan_resume(mine, snapshot, **ours, **options)
    names = [source.source_id for source in resume_plan.pending]
    assert names == model.pending
    assert [s for s in mine if s.source_id in names] == list(resume_plan.pending)
    assert {names[n]: record for n, record in resume_plan.records.items()} == model.records
    assert len(resume_plan.records) == len(model.records)
    assert {record.source_id for record in resume_plan.skipped} == model.skipped
    assert len(resume_plan.skipped) == len(model.skipped)
    assert resume_plan.quarantined == model.quarantined
    assert {record.source_id for record in resume_plan.removed} == model.removed
    assert resume_plan.passed_over == model.passed_over


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
    snapshot = snapshot_of({"x": some})
    gone = gone_from(
        snapshot,
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
