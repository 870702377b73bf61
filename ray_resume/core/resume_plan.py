"""What a run has to do: which of its sources to read, by what dead runs left. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from ray_resume.core.digests import DigestIndex, Positions
from ray_resume.core.gone import NOTHING_GONE, Gone
from ray_resume.core.record_log import Flag, RecordLog
from ray_resume.core.records import Record, State, pipeline_before, pipeline_of
from ray_resume.core.sharing import joined, sharing_files
from ray_resume.core.snapshot import Records, Snapshot
from ray_resume.core.sources import Fingerprints, Source, SourceTable
from ray_resume.errors import CheckpointError, PipelineChangedError, SourceChangedError

__all__ = ["Todo", "todo_of"]


_MANY_STEPS = 5


class Earlier(Mapping[int, Record]):
    """What is on record of sources, by a number that each has; decoded when it is asked for.

    ``anew`` says of which of them earlier failures do not count any more.
    """

    def __init__(
        self,
        numbers: npt.NDArray[np.int64],
        log: RecordLog,
        positions: Positions,
        anew: npt.NDArray[np.bool_],
    ) -> None:
        """Take the records at ``positions`` in ``log``; ``numbers`` are ascending."""
        self._numbers, self._log, self._positions, self._anew = numbers, log, positions, anew

    @override
    def __len__(self) -> int:
        return len(self._numbers)

    @override
    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers.tolist())

    @override
    def __getitem__(self, number: int) -> Record:
        row = int(np.searchsorted(self._numbers, number))
        if row == len(self._numbers) or self._numbers[row] != number:
            raise KeyError(number)
        record = self._log.record(int(self._positions[row]))
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

    The output of sources that are gone is taken out: of ``removed`` at once, and in the step in
    which a position of ``pending`` is complete that of the ids that ``replaced`` has for it.
    That of ``kept`` ones stays for now, for the same reasons as ``held`` and ``apart``.
    ``passed_over`` counts new parts of changed files of which the old content is to stay.
    """

    pending: SourceTable
    records: Mapping[int, Record]
    skipped: Records
    quarantined: int
    removed: Records
    held: Sequence[str] = ()
    apart: Sequence[str] = ()
    together: Sequence[Sequence[int]] = ()
    recoded: Sequence[Record] = ()
    replaced: Mapping[int, Sequence[str]] = field(default_factory=dict)
    kept: Sequence[str] = ()
    passed_over: int = 0


def todo_of(
    sources: Sequence[Source],
    union: Snapshot,
    *,
    on_source_change: str,
    signature: str,
    on_pipeline_change: str,
    code: str = "",
    on_code_change: str = "warn",
    listed: Sequence[Source] = (),
    signatures: Iterable[str] = (),
    gone: Gone = NOTHING_GONE,
    file_of: Callable[[str], str | None] = lambda _: None,
) -> Todo:
    """Sort ``sources`` by what is on record of them.

    Args:
        sources: no two of them have the same id.
        signature: of the pipeline that they are to go through now.
        code: stands for the code that the pipeline runs; empty if it is not known.
        on_code_change: whether to "reprocess" what went through other code.
        listed: all that were listed, if ``sources`` are a share of them.
        signatures: of the pipelines that earlier runs have had, for messages.
        gone: what is on record and not in the input any more, if its output is to be taken out.
        file_of: returns the id of the file that a source is a part of, by the source's id.

    Raises:
        SourceChangedError: completed sources have changed, and ``on_source_change`` is "error".
        PipelineChangedError: they went through another pipeline, and ``on_pipeline_change`` is
            "error".
        CheckpointError: earlier output can not be replaced without that of sources that are not
            among ``sources``, nor listed.
    """
    sorting = _Sorting(SourceTable.of(sources), union, gone, file_of)
    pipelines = pipeline_of(signature, code), pipeline_before(signature)
    otherwise = sorting.judge(
        pipelines,
        ignore_changes=on_source_change == "ignore",
        restart=on_pipeline_change == "restart",
        recode=on_code_change == "reprocess",
    )
    if on_pipeline_change == "error" and len(otherwise):
        raise PipelineChangedError(_pipelines(union.records(otherwise), signature, signatures))
    if on_source_change == "error" and len(sorting.changed):
        raise SourceChangedError(_changes(union.records(sorting.changed)))
    sorting.group(listed)
    return sorting.todo()


class _Sorting:
    """The sources of a run while they are being sorted; :meth:`judge`, then :meth:`group`.

    The masks ``quarantined``, ``skipped`` and ``again`` are of the sources that are on record:
    each is in one of them. ``passed_over`` is of all sources; by default they are to be read.
    """

    def __init__(
        self,
        table: SourceTable,
        union: Snapshot,
        gone: Gone,
        file_of: Callable[[str], str | None],
    ) -> None:
        self.table, self.union, self.gone, self.file_of = table, union, gone, file_of
        rows = union.find(table.digests)
        self.on_record = np.flatnonzero(rows >= 0)
        self.known = rows[self.on_record]
        self.place_of = _Places(self.known)
        self.passed_over = np.zeros(len(table), bool)
        self.ignored = 0
        self.held: list[str] = []
        self.apart: list[str] = []
        self.groups: list[list[int]] = []
        self.replaced: dict[int, list[str]] = {}
        self.kept: list[str] = []

    def judge(
        self, pipelines: tuple[bytes, bytes], *, ignore_changes: bool, restart: bool, recode: bool
    ) -> Positions:
        """Say of each source that is on record whether it is to be read again.

        Args:
            pipelines: what stands for this run's, see `records.pipeline_of`, and what stood for it
                in earlier versions.
            ignore_changes: whether what has changed stays as it is.
            restart: whether what went through another pipeline is read again.
            recode: whether what went through other code is.

        Returns:
            The rows of what is done, and went through another pipeline.
        """
        union, known = self.union, self.known
        same = _same(union, known, self.table.fingerprints.take(self.on_record))
        state = union.column("state", known)
        completed = state == State.COMPLETED.value
        then = union.column("pipeline", known)
        now, before = (np.frombuffer(pipeline, np.uint32) for pipeline in pipelines)
        like_before = (then == before).all(axis=1)
        otherwise = (then[:, 0] != now[0]) & ~like_before
        # What is not known is 0, and differs from nothing.
        told = ~like_before & (then[:, 1] != 0) & (now[1] != 0)
        recoded = ~otherwise & told & (then[:, 1] != now[1])
        done = completed & (same | ignore_changes)
        over = (state == State.QUARANTINED.value) & same
        renewed = recoded & recode
        stays = (~otherwise | (not restart)) & ~renewed
        self.quarantined = over & stays
        self.skipped = done & stays
        self.recoded = recoded
        self.again = ~(self.quarantined | self.skipped)
        # What failed was another content of the source, or in another pipeline.
        self.anew = self.again & (~same | otherwise | renewed)
        parts = np.array(sorted(self.gone.parts), np.int64)
        lost = parts[union.column("state", parts) == State.COMPLETED.value]
        self.changed = np.concatenate([known[self.again & completed & ~same], lost])
        self.passed_over[self.on_record[self.quarantined | self.skipped]] = True
        self.parts = dict(self.gone.parts)
        if ignore_changes:
            self._keep_files_whole(self.on_record[self.skipped & ~same])
        through_another: Positions = known[done & otherwise]
        return through_another

    def _keep_files_whole(self, changed: Positions) -> None:
        """Of files with parts that stay although they ``changed``, leave all the rest as it is.

        Their new parts would bring rows that are in the output already.
        """
        kept = {self.file_of(self.table.id(position)) for position in changed.tolist()} - {None}
        if not kept:
            return
        self.parts = {row: file for row, file in self.parts.items() if file not in kept}
        new = np.ones(len(self.table), bool)
        # What was dropped, since the file once had less, is as good as new.
        dropped = self.union.column("state", self.known) == State.RESET.value
        dropped &= self.union.column("flags", self.known) & Flag.FILES == 0
        new[self.on_record[~dropped]] = False
        ignored = [
            p for p in np.flatnonzero(new).tolist() if self.file_of(self.table.id(p)) in kept
        ]
        self.passed_over[ignored] = True
        self.ignored = len(ignored)
        self.again &= ~self.passed_over[self.on_record]

    def group(self, listed: Sequence[Source]) -> None:
        """Find what can only be replaced in one step, and what cannot be replaced now."""
        union = self.union
        parts = np.array(sorted(self.parts), np.int64)
        parts = parts[self.gone.is_own(union, parts)]
        dropped = np.union1d(self.gone.removed(union), parts).astype(np.int64)
        at_once = np.ones(len(dropped), bool)
        seeds = np.concatenate([self.known[self.again], dropped])
        groups = [*sharing_files(seeds, union), *self._files_with_gone_parts(parts)]
        for group in joined(groups):
            new = [-1 - node for node in group if node < 0]
            rows = [node for node in group if node >= 0]
            is_dropped = np.isin(rows, dropped)
            places = self.place_of.of(rows)
            to_read = [p for p, again in zip(places, _at(self.again, places), strict=True) if again]
            outside = [
                row
                for row, place, drop in zip(rows, places, is_dropped.tolist(), strict=True)
                if place < 0 and not drop
            ]
            if outside:
                blamed = [*(int(self.known[p]) for p in to_read), *np.array(rows)[is_dropped]]
                self._refuse_unlisted(outside, blamed, listed)
            elif not _at(self.quarantined, places).any():
                if self._replace(new, [p for p in places if p >= 0], np.array(rows)[is_dropped]):
                    at_once[np.isin(dropped, rows)] = False
                continue
            at_once[np.isin(dropped, rows)] = False
            self.kept += self._ids(np.array(rows)[is_dropped])
            members = [*self.on_record[to_read].tolist(), *new]
            self.passed_over[members] = True
            self.again[to_read] = False
            (self.apart if outside else self.held).extend(map(self.table.id, members))
        self.removed = dropped[at_once]

    def _replace(self, new: list[int], places: list[int], dropped: Positions) -> bool:
        """Have sources replaced in one step, in which others are dropped; False if none is read."""
        members = sorted([*self.on_record[places].tolist(), *new])
        if not members:
            return False
        self.passed_over[members] = False
        self.skipped[places] = False
        self.again[places] = True
        if len(members) > 1:
            self.groups.append(members)
        self.replaced[members[0]] = self._ids(dropped)
        return True

    def _ids(self, rows: Iterable[int]) -> list[str]:
        every = np.fromiter(rows, np.int64)
        return [record.source_id for record in self.union.records(every)]

    def _files_with_gone_parts(self, parts: Positions) -> Iterator[list[int]]:
        """Put parts that are gone together with those of their file that are to be read."""
        if not len(parts):
            return
        nodes: dict[str, list[int]] = {}
        for row in parts.tolist():
            nodes.setdefault(self.parts[row], []).append(row)
        row_of = dict(zip(self.on_record.tolist(), self.known.tolist(), strict=True))
        for position in np.flatnonzero(~self.passed_over).tolist():
            members = nodes.get(self.file_of(self.table.id(position)) or "")
            if members is not None:
                members.append(row_of.get(position, -1 - position))
        yield from nodes.values()

    def _refuse_unlisted(
        self, outside: Sequence[int], to_blame: Sequence[int], listed: Sequence[Source]
    ) -> None:
        """Make sure that the sources in the rows ``outside`` are at least listed, or dropped by
        the run of another shard.

        Raises:
            CheckpointError: one is not.
        """
        rows = np.array(outside)
        digests = self.union.digests.take(rows)
        found = DigestIndex(SourceTable.of(listed).digests).holds(digests)
        found |= np.isin(rows, list(self.parts))
        if self.gone.remove:
            found |= np.isin(rows, self.gone.sources)
        if not found.all():
            unlisted = sorted(self._ids(rows[~found]))
            raise CheckpointError(_out_of_reach(min(self._ids(to_blame)), unlisted))

    def todo(self) -> Todo:
        """Return how the sources were sorted."""
        table, union, known, again = self.table, self.union, self.known, self.again
        pending = np.flatnonzero(~self.passed_over)
        numbers = np.searchsorted(pending, self.on_record[again])
        earlier = RecordLog(union.blocks(known[again]))
        # They are in the log by their rows, and are asked for by their numbers.
        positions = np.argsort(np.argsort(known[again]))
        return Todo(
            table if len(pending) == len(table) else table.take(pending),
            Earlier(numbers, earlier, positions, self.anew[again]),
            union.records(known[self.skipped]),
            int(np.count_nonzero(self.quarantined)),
            union.records(self.removed),
            sorted(self.held),
            sorted(self.apart),
            [np.searchsorted(pending, group).tolist() for group in self.groups],
            union.records(known[self.skipped & self.recoded]),
            {
                int(np.searchsorted(pending, position)): ids
                for position, ids in self.replaced.items()
                if ids
            },
            sorted(self.kept),
            self.ignored,
        )


def _same(union: Snapshot, rows: Positions, now: Fingerprints) -> npt.NDArray[np.bool_]:
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


def _pipelines(otherwise: Sequence[Record], now: str, signatures: Iterable[str]) -> str:
    then = otherwise[0].pipeline
    alike = sum(record.pipeline == then for record in otherwise)
    known = {
        start: text
        for text in signatures
        for start in (pipeline_of(text)[:4], pipeline_before(text)[:4])
    }
    earlier = known.get(then[:4])
    return (
        f"The pipeline is not the one that {alike} of the sources in the checkpoint were completed "
        f"with, {otherwise[0].source_id} for one.\n"
        f"  then: {earlier or 'not on record'}\n  now:  {now}\n{_first_difference(earlier, now)}"
        "To keep their output as it is and go on with the others, pass "
        'on_pipeline_change="continue" to resumable_read; to process them anew, their new output '
        'replacing the old, "restart".'
    )


def _first_difference(then: str | None, now: str) -> str:
    """Name the first step that differs, if there are too many to find it by eye."""
    steps, others = (then or "").split(" -> "), now.split(" -> ")
    if then is None or min(len(steps), len(others)) < _MANY_STEPS:
        return ""
    pairs = itertools.zip_longest(steps, others, fillvalue="nothing")
    number, (step, other) = next((n, p) for n, p in enumerate(pairs, 1) if p[0] != p[1])
    return f"  The first difference is step {number}: {step} then, {other} now.\n"


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
        "lose their rows. Put them back into the input; or pass to resumable_read "
        'on_source_gone="remove", to give their output up, or, if the source has only changed, '
        'on_source_change="ignore", to keep what is there.'
    )
