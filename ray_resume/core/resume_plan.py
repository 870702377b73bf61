"""What a run has to do: which of its sources to read, by what dead runs left. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ray_resume.core.digests import Positions, SortedDigests
from ray_resume.core.filenames import OutputName
from ray_resume.core.records import Flag, Record, State, pipeline_of, starts_of_pipeline
from ray_resume.core.snapshot import Records, Union
from ray_resume.core.sources import Fingerprints, Source, SourceTable
from ray_resume.core.table import Table
from ray_resume.errors import CheckpointError, PipelineChangedError, SourceChangedError

__all__ = ["Todo", "todo_of"]


class Earlier(Mapping[int, Record]):
    """What is on record of sources, by a number that each has; decoded when it is asked for.

    ``anew`` says of which of them earlier failures do not count any more.
    """

    def __init__(
        self, numbers: npt.NDArray[np.int64], table: Table, anew: npt.NDArray[np.bool_]
    ) -> None:
        """Take the records of ``table``; ``numbers`` are ascending."""
        self._numbers, self._table, self._anew = numbers, table, anew

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers.tolist())

    def __getitem__(self, number: int) -> Record:
        row = int(np.searchsorted(self._numbers, number))
        if row == len(self._numbers) or self._numbers[row] != number:
            raise KeyError(number)
        record = self._table.record(row)
        return replace(record, failed_runs=0) if self._anew[row] else record


@dataclass(frozen=True)
class Todo:
    """The sources of a run by what is to be done with them.

    ``pending`` are to be read. ``records`` holds what is on record of them, by position in
    ``pending``. ``together`` are groups of such positions: their earlier output is in the same
    files, so it can only be replaced in one step. ``held`` sources would have to be read too, but
    share files with ``quarantined`` ones; ``apart`` likewise, but they share them with sources
    that were listed and are another shard's. ``recoded`` ones are skipped, though they went
    through the same pipeline with other code.
    """

    pending: SourceTable
    records: Mapping[int, Record]
    skipped: Records
    quarantined: int
    held: Sequence[str] = ()
    apart: Sequence[str] = ()
    together: Sequence[Sequence[int]] = ()
    recoded: Sequence[Record] = ()


def todo_of(
    sources: Sequence[Source],
    union: Union,
    *,
    on_source_change: str,
    signature: str,
    on_pipeline_change: str,
    code: str = "",
    on_code_change: str = "warn",
    listed: Sequence[Source] = (),
    signatures: Iterable[str] = (),
) -> Todo:
    """Sort ``sources`` by what is on record of them.

    Args:
        sources: no two of them have the same id.
        signature: of the pipeline that they are to go through now.
        code: stands for the code that the pipeline runs; empty if it is not known.
        on_code_change: whether to "reprocess" what went through other code.
        listed: all that were listed, if ``sources`` are a share of them.
        signatures: of the pipelines that earlier runs have had, for messages.

    Raises:
        SourceChangedError: completed sources have changed, and ``on_source_change`` is "error".
        PipelineChangedError: they went through another pipeline, and ``on_pipeline_change`` is
            "error".
        CheckpointError: earlier output can not be replaced without that of sources that are not
            among ``sources``, nor listed.
    """
    table = SourceTable.of(sources)
    rows = union.find(table.digests)
    on_record = np.flatnonzero(rows >= 0)
    known = rows[on_record]
    same = _same(union, known, table.fingerprints.take(on_record))
    state = union.column("state", known)
    completed = state == State.COMPLETED.value
    then = union.column("pipeline", known).view(np.uint32).reshape(-1, 2)
    now = np.frombuffer(pipeline_of(signature, code), np.uint32)
    otherwise = then[:, 0] != now[0]
    # What is not known is 0, and differs from nothing.
    recoded = ~otherwise & (then[:, 1] != now[1]) & (then[:, 1] != 0) & (now[1] != 0)
    done = completed & (same | (on_source_change == "ignore"))
    over = (state == State.QUARANTINED.value) & same
    renewed = recoded & (on_code_change == "reprocess")
    stays = (~otherwise | (on_pipeline_change != "restart")) & ~renewed
    quarantined = over & stays
    skipped = done & stays
    again = ~(quarantined | skipped)
    changed = again & completed & ~same
    # What failed was another content of the source, or in another pipeline.
    anew = again & (~same | otherwise | renewed)
    if on_pipeline_change == "error" and (done & otherwise).any():
        raise PipelineChangedError(
            _pipelines(union.records(known[done & otherwise]), signature, signatures)
        )
    if on_source_change == "error" and changed.any():
        raise SourceChangedError(_changes(union.records(known[changed])))
    # The outcome of each source: by default it is to be read.
    passed_over = np.zeros(len(table), bool)
    passed_over[on_record[quarantined | skipped]] = True
    groups: list[list[int]] = []
    held: list[str] = []
    apart: list[str] = []
    place_of = _Places(known)
    for group in _sharing_files(known[again], union):
        places = place_of.of(group)
        to_read = [
            place for place, again_ in zip(places, _at(again, places), strict=True) if again_
        ]
        outside = [row for row, place in zip(group, places, strict=True) if place < 0]
        if outside:
            _refuse_unlisted(outside, [int(known[place]) for place in to_read], union, listed)
        elif not _at(quarantined, places).any():
            members = on_record[places]
            passed_over[members] = False
            groups.append(sorted(members.tolist()))
            skipped[places] = False
            again[places] = True
            continue
        members = on_record[to_read]
        passed_over[members] = True
        again[to_read] = False
        (apart if outside else held).extend(map(table.id, members.tolist()))
    pending = np.flatnonzero(~passed_over)
    numbers = np.searchsorted(pending, on_record[again])
    return Todo(
        table if len(pending) == len(table) else table.take(pending),
        Earlier(numbers, union.table(known[again]), anew[again]),
        union.records(known[skipped]),
        int(np.count_nonzero(quarantined)),
        sorted(held),
        sorted(apart),
        [np.searchsorted(pending, group).tolist() for group in groups],
        union.records(known[skipped & recoded]),
    )


def _same(union: Union, rows: Positions, now: Fingerprints) -> npt.NDArray[np.bool_]:
    """Say of each row whether it has the fingerprint that its source has now."""
    # What is not known is 0 in both.
    same: npt.NDArray[np.bool_] = (
        (union.column("flags", rows) & (Flag.SIZE | Flag.MTIME) == now.known)
        & (union.column("size", rows) == now.sizes)
        & (union.column("mtime_ns", rows) == now.mtimes_ns)
    )
    return same


def _at(mask: npt.NDArray[np.bool_], places: Sequence[int]) -> npt.NDArray[np.bool_]:
    return np.array([place >= 0 and mask[place] for place in places], bool)


class _Places:
    """Where rows of the union stand among the sources that are on record."""

    def __init__(self, known: Positions) -> None:
        self._order: Positions | None = None
        self._known = known

    def of(self, rows: Sequence[int]) -> list[int]:
        """Return the place of each row, -1 if it is not of these sources."""
        if self._order is None:
            self._order = np.argsort(self._known)
            self._sorted = self._known[self._order]
        at = np.searchsorted(self._sorted, rows)
        return [
            int(self._order[i]) if i < len(self._sorted) and self._sorted[i] == row else -1
            for i, row in zip(at.tolist(), rows, strict=True)
        ]


def _refuse_unlisted(
    outside: Sequence[int], to_read: Sequence[int], union: Union, listed: Sequence[Source]
) -> None:
    """Make sure that the sources in the rows ``outside`` are at least listed.

    Raises:
        CheckpointError: one is not.
    """
    rows = np.array(outside)
    found = SortedDigests(SourceTable.of(listed).digests).holds(union.digests.take(rows))
    if not found.all():
        unlisted = sorted(union.record(row).source_id for row in rows[~found].tolist())
        to_blame = min(union.record(row).source_id for row in to_read)
        raise CheckpointError(_out_of_reach(to_blame, unlisted))


def _sharing_files(again: Positions, union: Union) -> Iterator[list[int]]:
    """Group the rows ``again`` with all that share files with them, however indirectly."""
    shared = union.flagged(Flag.SHARED)
    left = set(np.intersect1d(again, shared).tolist())
    if not left:
        return
    files: dict[int, set[str]] = {}
    sources: defaultdict[str, set[int]] = defaultdict(set)
    for row in shared.tolist():
        files[row] = {file for file in union.record(row).files if _is_shared(file)}
        for file in files[row]:
            sources[file].add(row)
    while left:
        group: set[int] = set()
        reached = {left.pop()}
        while reached:
            group |= reached
            near = {file for row in reached for file in files[row]}
            reached = {mate for file in near for mate in sources[file]} - group
        left -= group
        if len(group) > 1:
            yield sorted(group)


def _is_shared(file: str) -> bool:
    name = OutputName.parse(file)
    return name is not None and name.is_shared


def _pipelines(otherwise: Sequence[Record], now: str, signatures: Iterable[str]) -> str:
    then = otherwise[0].pipeline
    alike = sum(record.pipeline == then for record in otherwise)
    known = {start: text for text in signatures for start in starts_of_pipeline(text)}
    return (
        f"The pipeline is not the one that {alike} of the sources in the checkpoint were completed "
        f"with, {otherwise[0].source_id} for one.\n"
        f"  then: {known.get(then[:4], 'not on record')}\n  now:  {now}\n"
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
