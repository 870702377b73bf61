"""The rules of `resume_plan.todo_of`, source by source: a model for the one with columns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ray_resume.core.filenames import OutputName
from ray_resume.core.records import Record, State, pipeline_of
from ray_resume.core.sources import Source
from ray_resume.errors import CheckpointError, PipelineChangedError, SourceChangedError


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
class PlainTodo:
    """As `resume_plan.Todo`, by ids."""

    pending: list[str]
    records: dict[str, Record]
    skipped: set[str]
    quarantined: int
    held: list[str]
    apart: list[str]
    together: set[frozenset[str]]
    removed: set[str] = field(default_factory=set)
    replaced: set[frozenset[str]] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)
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
) -> PlainTodo:
    gone = gone or PlainGone()
    now = pipeline_of(signature)
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
    own = {source.source_id for source in sources}
    known = {source.source_id for source in listed}
    new = own - on_record.keys()
    # What is not listed, and of that what belongs to a listed file.
    outside = {
        source_id
        for source_id, record in on_record.items()
        if source_id not in known and (record.state is State.COMPLETED or record.files)
    }
    parts = {source_id for source_id in outside if gone.file_of(source_id) in gone.files}
    changed |= any(on_record[part].state is State.COMPLETED for part in parts)
    if changed and on_source_change == "error":
        raise SourceChangedError
    # Where the old content of a file stays, nothing of its new one is read.
    whole = {gone.file_of(source_id) for source_id in old_content} - {None}
    going = {part for part in parts if gone.file_of(part) not in whole}
    new |= {s for s, r in again.items() if r.state is State.RESET and not r.files}
    ignored = {source_id for source_id in new if gone.file_of(source_id) in whole}
    again = {source_id: record for source_id, record in again.items() if source_id not in ignored}
    elsewhere = {part for part in going if not gone.is_own(part)}
    dropped = going - elsewhere
    if gone.remove:
        dropped |= {source_id for source_id in outside - parts if gone.is_own(source_id)}
        elsewhere |= outside - parts - dropped
    # Parts that go, and those of their file that are to be read, are of one step.
    to_be_read = again.keys() | (new - ignored)
    steps = [
        {part for part in going & dropped if gone.file_of(part) == file}
        | {source_id for source_id in to_be_read if gone.file_of(source_id) == file}
        for file in {gone.file_of(part) for part in going & dropped}
    ]
    held: set[str] = set()
    apart: set[str] = set()
    kept: set[str] = set()
    together = set()
    replaced = set()
    removed = set(dropped)
    for group in groups_of(on_record, steps):
        if not group & (again.keys() | dropped):
            continue
        to_read = group & to_be_read
        beyond = group - own - dropped
        if beyond:
            if beyond - known - elsewhere:
                raise CheckpointError
            apart |= to_read
            kept |= group & dropped
        elif group & quarantined:
            held |= to_read
            kept |= group & dropped
        else:
            members = group & own
            if len(members) > 1:
                together.add(frozenset(members))
            again |= {mate: on_record[mate] for mate in group & skipped}
            skipped -= group
            if not members:
                continue
            if group & dropped:
                replaced.add(frozenset(group & dropped))
        removed -= group
    passed_over = skipped | quarantined | held | apart | ignored
    pending = [s.source_id for s in sources if s.source_id not in passed_over]
    records = {source_id: r for source_id, r in again.items() if source_id in pending}
    return PlainTodo(
        pending,
        records,
        skipped,
        len(quarantined),
        sorted(held),
        sorted(apart),
        together,
        removed,
        replaced,
        kept,
        len(ignored),
    )


def groups_of(on_record: Mapping[str, Record], steps: Iterable[set[str]]) -> list[set[str]]:
    """Join whoever shares a file, or is of one of ``steps``, until nothing changes.

    Returns what has more than one member, or is one of ``steps``.
    """
    steps = [set(step) for step in steps]
    groups = [{source_id} for source_id in on_record]
    groups += [{source_id} for step in steps for source_id in step if source_id not in on_record]
    shared = {source_id: shared_files(record) for source_id, record in on_record.items()}

    def meet(one: set[str], other: set[str]) -> bool:
        files = set().union(*(shared.get(s, set()) for s in one))
        return bool(files & set().union(*(shared.get(s, set()) for s in other))) or any(
            one & step and other & step for step in steps
        )

    joined = True
    while joined:
        joined = False
        for one in groups:
            for other in groups:
                if one is not other and meet(one, other):
                    one |= other
                    groups.remove(other)
                    joined = True
                    break
            if joined:
                break
    return [group for group in groups if len(group) > 1 or group in steps]


def shared_files(record: Record) -> set[str]:
    names = {file: OutputName.parse(file) for file in record.files}
    return {file for file, name in names.items() if name is not None and name.is_shared}
