"""What a run has to do: which of its sources to read, by what dead runs left. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ray_resume.errors import CheckpointError, PipelineChangedError, SourceChangedError
from ray_resume.naming import OutputName
from ray_resume.record import Record, State
from ray_resume.source import Source
from ray_resume.store import Union

__all__ = ["Todo", "todo_of"]


@dataclass(frozen=True)
class Todo:
    """The sources of a run by what is to be done with them.

    ``pending`` are to be read. ``records`` holds what is on record of them, by position in
    ``pending``. ``together`` are groups of such positions: their earlier output is in the same
    files, so it can only be replaced in one step. ``held`` sources would have to be read too, but
    share files with ``quarantined`` ones; ``apart`` likewise, but they share them with sources
    that were listed and are another shard's.
    """

    pending: Sequence[Source]
    records: Mapping[int, Record]
    skipped: Sequence[Record]
    quarantined: int
    held: Sequence[str] = ()
    apart: Sequence[str] = ()
    together: Sequence[Sequence[int]] = ()


def todo_of(
    sources: Sequence[Source],
    union: Union,
    *,
    on_source_change: str,
    signature: str,
    on_pipeline_change: str,
    listed: Sequence[Source] = (),
) -> Todo:
    """Sort ``sources`` by what is on record of them.

    Args:
        signature: of the pipeline that they are to go through now.
        listed: all that were listed, if ``sources`` are a share of them.

    Raises:
        SourceChangedError: completed sources have changed, and ``on_source_change`` is "error".
        PipelineChangedError: they went through another pipeline, and ``on_pipeline_change`` is
            "error".
        CheckpointError: earlier output can not be replaced without that of sources that are not
            among ``sources``, nor listed.
    """
    records: dict[str, Record] = {}
    skipped: dict[str, Record] = {}
    quarantined: set[str] = set()
    changed: list[Record] = []
    otherwise: list[Record] = []
    restart = on_pipeline_change == "restart"
    for source in sources:
        record = union.get(source.source_id)
        if record is None:
            continue
        same = record.fingerprint == source.fingerprint
        done = record.state is State.COMPLETED and (same or on_source_change == "ignore")
        over = record.state is State.QUARANTINED and same
        if done and record.signature != signature:
            otherwise.append(record)
        if over and not (restart and record.signature != signature):
            quarantined.add(source.source_id)
        elif done and not (restart and record.signature != signature):
            skipped[source.source_id] = record
        else:
            if record.state is State.COMPLETED and not same:
                changed.append(record)
            # What failed was another content of the source, or in another pipeline.
            fresh = same and record.signature == signature
            records[source.source_id] = record if fresh else replace(record, failed_runs=0)
    if otherwise and on_pipeline_change == "error":
        raise PipelineChangedError(_pipelines(otherwise, signature))
    if changed and on_source_change == "error":
        raise SourceChangedError(_changes(changed))
    known = {source.source_id for source in sources}
    groups = []
    held: set[str] = set()
    apart: set[str] = set()
    for group in _sharing_files(records, union):
        if outside := group - known:
            unlisted = outside.difference(source.source_id for source in listed)
            if unlisted:
                raise CheckpointError(_out_of_reach(min(group & records.keys()), sorted(unlisted)))
            apart |= group & records.keys()
            continue
        if group & quarantined:
            held |= group & records.keys()
            continue
        groups.append(group)
        records |= {mate: skipped.pop(mate) for mate in group & skipped.keys()}
    passed_over = skipped.keys() | quarantined | held | apart
    pending = [source for source in sources if source.source_id not in passed_over]
    positions = {source.source_id: position for position, source in enumerate(pending)}
    return Todo(
        pending,
        {positions[source_id]: r for source_id, r in records.items() if source_id in positions},
        list(skipped.values()),
        len(quarantined),
        sorted(held),
        sorted(apart),
        [sorted(positions[source_id] for source_id in group) for group in groups],
    )


def _sharing_files(records: Mapping[str, Record], union: Union) -> Iterator[set[str]]:
    """Group the sources of ``records`` with all that share files with them, however indirectly."""
    if not any(_shared(record) for record in records.values()):
        return
    files: dict[str, set[str]] = {}
    sources: defaultdict[str, set[str]] = defaultdict(set)
    for record in union:
        if shared := _shared(record):
            files[record.source_id] = shared
            for file in shared:
                sources[file].add(record.source_id)
    left = {source_id for source_id in records if source_id in files}
    while left:
        group: set[str] = set()
        reached = {left.pop()}
        while reached:
            group |= reached
            near = {file for source_id in reached for file in files[source_id]}
            reached = {mate for file in near for mate in sources[file]} - group
        left -= group
        if len(group) > 1:
            yield group


def _shared(record: Record) -> set[str]:
    return {file for file in record.files if _is_shared(file)}


def _is_shared(file: str) -> bool:
    name = OutputName.parse(file)
    return name is not None and name.is_shared


def _pipelines(otherwise: Sequence[Record], signature: str) -> str:
    then = otherwise[0].signature
    alike = sum(record.signature == then for record in otherwise)
    return (
        f"The pipeline is not the one that {alike} of the sources in the checkpoint were completed "
        f"with, {otherwise[0].source_id} for one.\n  then: {then}\n  now:  {signature}\n"
        "To keep their output as it is and go on with the others, pass "
        'on_pipeline_change="continue" to resumable_read; to process them anew, their new output '
        'replacing the old, "restart".'
    )


def _changes(changed: Sequence[Record]) -> str:
    names = ", ".join(record.source_id for record in changed[:10])
    return (
        f"{len(changed)} sources have another size or modification time than when they were "
        f"completed: {names}{', ...' if len(changed) > 10 else ''}. To process them again, their "
        'new output replacing the old, pass on_source_change="reprocess"; to keep what is there, '
        '"ignore".'
    )


def _out_of_reach(source_id: str, outside: Sequence[str]) -> str:
    return (
        f"{source_id} is to be processed again, but shares output files with {len(outside)} "
        f"sources that are not among this run's, {outside[0]} for one: to replace the file would "
        "lose their rows. Put them back into the input; or, if the source has only changed, pass "
        'on_source_change="ignore" to keep what is there.'
    )
