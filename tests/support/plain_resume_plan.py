"""The rules of `resume_plan.plan_resume`, source by source: a model for the one with columns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ray_resume.core.records import Record, State, pipeline_hash
from ray_resume.core.sources import Source
from ray_resume.errors import PipelineChangedError, SourceChangedError


@dataclass(frozen=True)
class PlainGone:
    """What a run does about sources that are not listed: `gone.Gone`, by ids.

    ``files`` are the listed files that sources are parts of, as ``file_of`` says; ``is_own`` says
    whether a source is in the run's share.
    """

    remove: bool = False
    files: Collection[str] = ()
    file_of: Callable[[str], str | None] = lambda _: None
    is_own: Callable[[str], bool] = lambda _: True


@dataclass(frozen=True)
class PlainResumePlan:
    """As `resume_plan.ResumePlan`, by ids."""

    pending: list[str]
    records: dict[str, Record]
    skipped: set[str]
    quarantined: int
    removed: set[str] = field(default_factory=set)
    passed_over: int = 0


def plain_todo_of(
    sources: Sequence[Source],
    on_record: Mapping[str, Record],
    *,
    on_source_change: str,
    signature: str,
    on_pipeline_change: str,
    listed: Sequence[Source],
    gone: PlainGone | None = None,
) -> PlainResumePlan:
    gone = gone or PlainGone()
    now = pipeline_hash(signature)
    again: dict[str, Record] = {}
    skipped: set[str] = set()
    quarantined: set[str] = set()
    old_content: set[str] = set()
    changed = otherwise = False
    for source in sources:
        record = on_record.get(source.source_id)
        if record is None:
            continue
        same = record.fingerprint == source.fingerprint
        alike = record.pipeline == now
        done = record.state is State.COMPLETED and (same or on_source_change == "ignore")
        over = record.state is State.QUARANTINED and same
        stays = alike or on_pipeline_change != "restart"
        otherwise |= done and not alike
        if over and stays:
            quarantined.add(source.source_id)
        elif done and stays:
            skipped.add(source.source_id)
            if not same:
                old_content.add(source.source_id)
        else:
            changed |= record.state is State.COMPLETED and not same
            fresh = same and alike
            again[source.source_id] = record if fresh else replace(record, failed_runs=0)
    if otherwise and on_pipeline_change == "error":
        raise PipelineChangedError
    known = {source.source_id for source in listed}
    new = {source.source_id for source in sources} - on_record.keys()
    # What is not listed, and of that what belongs to a listed file.
    outside = {
        source_id
        for source_id, record in on_record.items()
        if source_id not in known and (record.state is State.COMPLETED or record.files)
    }
    # Parts that have failed are forgotten, too: they must not count as failed for ever.
    parts = {
        source_id
        for source_id, record in on_record.items()
        if source_id in outside
        or (source_id not in known and record.state in (State.FAILED, State.QUARANTINED))
        if gone.file_of(source_id) in gone.files
    }
    changed |= any(on_record[part].state is State.COMPLETED for part in parts)
    if changed and on_source_change == "error":
        raise SourceChangedError
    # Where the old content of a file stays, nothing of its new one is read.
    whole = {gone.file_of(source_id) for source_id in old_content} - {None}
    for part in parts:
        record = on_record[part]
        stays = record.pipeline == now or on_pipeline_change != "restart"
        if on_source_change == "ignore" and record.state is State.COMPLETED and stays:
            whole.add(gone.file_of(part))
    going = {part for part in parts if gone.file_of(part) not in whole}
    new |= {s for s, r in again.items() if r.state is State.RESET and not r.files}
    ignored = {source_id for source_id in new if gone.file_of(source_id) in whole}
    again = {source_id: record for source_id, record in again.items() if source_id not in ignored}
    removed = {part for part in going if gone.is_own(part)}
    if gone.remove:
        outside |= {
            source_id
            for source_id, record in on_record.items()
            if source_id not in known and record.state in (State.FAILED, State.QUARANTINED)
        }
        removed |= {source_id for source_id in outside - parts if gone.is_own(source_id)}
    passed_over = skipped | quarantined | ignored
    pending = [s.source_id for s in sources if s.source_id not in passed_over]
    records = {source_id: r for source_id, r in again.items() if source_id in pending}
    return PlainResumePlan(pending, records, skipped, len(quarantined), removed, len(ignored))
