"""The rules of `todo.todo_of`, source by source: a model to hold the one with columns against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ray_resume.core.filenames import OutputName
from ray_resume.core.records import Record, State, pipeline_of
from ray_resume.core.sources import Source
from ray_resume.errors import CheckpointError, PipelineChangedError, SourceChangedError


@dataclass(frozen=True)
class PlainTodo:
    """As `todo.Todo`, by ids."""

    pending: list[str]
    records: dict[str, Record]
    skipped: set[str]
    quarantined: int
    held: list[str]
    apart: list[str]
    together: set[frozenset[str]]


def plain_todo_of(
    sources: Sequence[Source],
    on_record: Mapping[str, Record],
    *,
    on_source_change: str,
    signature: str,
    on_pipeline_change: str,
    listed: Sequence[Source],
) -> PlainTodo:
    now = pipeline_of(signature)
    again: dict[str, Record] = {}
    skipped: set[str] = set()
    quarantined: set[str] = set()
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
        else:
            changed |= record.state is State.COMPLETED and not same
            fresh = same and alike
            again[source.source_id] = record if fresh else replace(record, failed_runs=0)
    if otherwise and on_pipeline_change == "error":
        raise PipelineChangedError
    if changed and on_source_change == "error":
        raise SourceChangedError
    own = {source.source_id for source in sources}
    known = {source.source_id for source in listed}
    held: set[str] = set()
    apart: set[str] = set()
    together = set()
    for group in groups_of(again, on_record):
        to_read = group & again.keys()
        if group - own:
            if group - own - known:
                raise CheckpointError
            apart |= to_read
        elif group & quarantined:
            held |= to_read
        else:
            together.add(frozenset(group))
            again |= {mate: on_record[mate] for mate in group & skipped}
            skipped -= group
    passed_over = skipped | quarantined | held | apart
    pending = [s.source_id for s in sources if s.source_id not in passed_over]
    records = {source_id: r for source_id, r in again.items() if source_id in pending}
    return PlainTodo(
        pending, records, skipped, len(quarantined), sorted(held), sorted(apart), together
    )


def groups_of(again: Mapping[str, Record], on_record: Mapping[str, Record]) -> list[set[str]]:
    """Join whoever shares a file until nothing changes; return what has a source of ``again``."""
    groups = [{source_id} for source_id in on_record]
    shared = {source_id: shared_files(record) for source_id, record in on_record.items()}
    joined = True
    while joined:
        joined = False
        for one in groups:
            for other in groups:
                files = set().union(*(shared[s] for s in one))
                if one is not other and files & set().union(*(shared[s] for s in other)):
                    one |= other
                    groups.remove(other)
                    joined = True
                    break
            if joined:
                break
    return [group for group in groups if len(group) > 1 and group & again.keys()]


def shared_files(record: Record) -> set[str]:
    names = {file: OutputName.parse(file) for file in record.files}
    return {file for file, name in names.items() if name is not None and name.is_shared}
