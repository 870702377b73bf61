"""`ResumePlan`: which sources a run reads, given what dead runs committed. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from ray_resume.core.digests import Positions
from ray_resume.core.gone import NOTHING_GONE, Gone
from ray_resume.core.range_items import RangeItems
from ray_resume.core.record_log import Flag, RecordLog
from ray_resume.core.records import Record, State, pipeline_before, pipeline_hash
from ray_resume.core.snapshot import Records, Snapshot
from ray_resume.core.sources import Fingerprints, Source, SourceTable
from ray_resume.core.wording import counted
from ray_resume.errors import PipelineChangedError, SourceChangedError

__all__ = ["ResumePlan", "plan_resume"]


_MANY_STEPS = 5


class Earlier(Mapping[int, Record]):
    """The records of sources, by a number that each has; decoded on access.

    ``anew`` is True for the sources whose earlier failures no longer count.
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
class ResumePlan:
    """The sources of a run, by what the run does with them.

    The run reads ``pending`` ones. ``records`` has their newest records, by position in
    ``pending``. It skips ``recoded`` ones, though they went through the same pipeline with other
    code. ``removed`` ones are gone from the input, and the run drops their output. ``passed_over``
    counts new parts of changed files whose old content stays. ``ends`` counts the skipped ones that
    are ends of files: they have no rows, and users are told nothing of them. ``known`` are all
    sources that were planned, if they are row ranges.
    """

    pending: SourceTable
    records: Mapping[int, Record]
    skipped: Records
    quarantined: int
    removed: Records
    recoded: Sequence[Record] = ()
    passed_over: int = 0
    ends: int = 0
    known: RangeItems | None = None

    @property
    def total(self) -> int:
        """How many sources the run has, but for ends that are on record."""
        return len(self.pending) + self.done + self.quarantined

    @property
    def done(self) -> int:
        """How many sources the run passes over, as they are done."""
        return len(self.skipped) - self.ends + self.passed_over


def plan_resume(
    sources: Sequence[Source],
    snapshot: Snapshot,
    *,
    on_source_change: str,
    signature: str,
    on_pipeline_change: str,
    code: str = "",
    on_code_change: str = "warn",
    signatures: Iterable[str] = (),
    alike: Collection[str] = (),
    gone: Gone = NOTHING_GONE,
    file_of: Callable[[str], str | None] = lambda _: None,
) -> ResumePlan:
    """Sort ``sources`` by what is on record of them.

    Args:
        sources: no two of them have the same id.
        signature: of the pipeline that they are to go through now.
        code: stands for the code that the pipeline runs; empty if it is not known.
        on_code_change: whether to "reprocess" sources that went through other code.
        signatures: of the pipelines that earlier runs have had, for messages.
        alike: signatures that this pipeline has had too, when its input had fewer columns.
        gone: the sources on record that are no longer in the input, if the run removes their
            output.
        file_of: returns the id of the file that a source is a part of, by the source's id.

    Raises:
        SourceChangedError: completed sources have changed, and ``on_source_change`` is "error".
        PipelineChangedError: they went through another pipeline, and ``on_pipeline_change`` is
            "error".
    """
    sorting = _Sorting(SourceTable.of(sources), snapshot, gone, file_of)
    pipelines = pipeline_hash(signature, code), pipeline_before(signature)
    otherwise = sorting.judge(
        pipelines,
        alike=b"".join(pipeline_hash(text)[:4] for text in (signature, *alike)),
        ignore_changes=on_source_change == "ignore",
        restart=on_pipeline_change == "restart",
        recode=on_code_change == "reprocess",
    )
    if on_pipeline_change == "error" and len(otherwise):
        raise PipelineChangedError(_pipelines(snapshot.records(otherwise), signature, signatures))
    if on_source_change == "error" and len(sorting.changed):
        raise SourceChangedError(_changes(snapshot.records(sorting.changed)))
    return sorting.plan()


class _Sorting:
    """The sources of a run while they are being sorted: :meth:`judge`, then :meth:`plan`.

    The masks ``quarantined``, ``skipped`` and ``again`` are of the sources that are on record:
    each is in one of them. ``passed_over`` is of all sources; by default they are to be read.
    """

    def __init__(
        self,
        table: SourceTable,
        snapshot: Snapshot,
        gone: Gone,
        file_of: Callable[[str], str | None],
    ) -> None:
        self.table, self.snapshot, self.gone, self.file_of = table, snapshot, gone, file_of
        rows = snapshot.find(table.digests)
        self.on_record = np.flatnonzero(rows >= 0)
        self.known = rows[self.on_record]
        self.passed_over = np.zeros(len(table), bool)
        self.ignored = 0

    def judge(
        self,
        pipelines: tuple[bytes, bytes],
        *,
        alike: bytes,
        ignore_changes: bool,
        restart: bool,
        recode: bool,
    ) -> Positions:
        """Decide for each source on record whether the run reads it again.

        Args:
            pipelines: the hash of this run's pipeline, see `records.pipeline_hash`, and its hash in
                earlier versions.
            alike: the hashes, of four bytes, of the signatures that this run's pipeline may have.
            ignore_changes: whether changed sources stay as they are.
            restart: whether to read sources again that went through another pipeline.
            recode: whether to read sources again that went through other code.

        Returns:
            The rows of completed sources that went through another pipeline.
        """
        snapshot, known = self.snapshot, self.known
        same = _same(snapshot, known, self.table.fingerprints.take(self.on_record))
        state = snapshot.column("state", known)
        completed = state == State.COMPLETED.value
        otherwise, recoded = _other_pipelines(snapshot, known, pipelines, alike)
        done = completed & (same | ignore_changes)
        over = (state == State.QUARANTINED.value) & same
        stays = ~((otherwise & restart) | (recoded & recode))
        self.quarantined = over & stays
        self.skipped = done & stays
        self.recoded = recoded
        self.again = ~(self.quarantined | self.skipped)
        # These failed with another content of the source, or in another pipeline.
        self.anew = self.again & (~same | otherwise | (recoded & recode))
        parts = np.array(sorted(self.gone.parts), np.int64)
        lost = parts[snapshot.column("state", parts) == State.COMPLETED.value]
        self.changed = np.concatenate([known[self.again & completed & ~same], lost])
        self.passed_over[self.on_record[self.quarantined | self.skipped]] = True
        self.parts = dict(self.gone.parts)
        if ignore_changes:
            otherwise_lost, recoded_lost = _other_pipelines(snapshot, lost, pipelines, alike)
            stay = lost[~((otherwise_lost & restart) | (recoded_lost & recode))]
            self._keep_files_whole(self.on_record[self.skipped & ~same], stay)
        through_another: Positions = known[done & otherwise]
        return through_another

    def _keep_files_whole(self, changed: Positions, gone: Positions) -> None:
        """Pass over new parts of files with parts that stay although they ``changed``.

        Their rows may be in the output already. ``gone`` are rows of parts that files do not have
        any more: a split has its length in its id, so a file may have none that is on record.
        """
        kept = {self.file_of(self.table.id(position)) for position in changed.tolist()} - {None}
        kept |= {self.parts[row] for row in gone.tolist()}
        if not kept:
            return
        self.parts = {row: file for row, file in self.parts.items() if file not in kept}
        new = np.ones(len(self.table), bool)
        # A part that was dropped, because the file once had fewer, counts as new.
        dropped = self.snapshot.column("state", self.known) == State.RESET.value
        dropped &= self.snapshot.column("flags", self.known) & Flag.FILES == 0
        new[self.on_record[~dropped]] = False
        ignored = [
            p for p in np.flatnonzero(new).tolist() if self.file_of(self.table.id(p)) in kept
        ]
        self.passed_over[ignored] = True
        self.ignored = len(ignored)
        self.again &= ~self.passed_over[self.on_record]

    def plan(self) -> ResumePlan:
        """Return how the sources were sorted."""
        parts = np.array(sorted(self.parts), np.int64)
        parts = parts[self.gone.is_own(self.snapshot, parts)]
        # The parts of a file that are gone go at once: their rows may be in its new parts.
        removed = np.union1d(self.gone.removed(self.snapshot), parts).astype(np.int64)
        table, snapshot, known, again = self.table, self.snapshot, self.known, self.again
        pending = np.flatnonzero(~self.passed_over)
        numbers = np.searchsorted(pending, self.on_record[again])
        earlier = RecordLog(snapshot.blocks(known[again]))
        # They are in the log by their rows, and are asked for by their numbers.
        positions = np.argsort(np.argsort(known[again]))
        return ResumePlan(
            table if len(pending) == len(table) else table.take(pending),
            Earlier(numbers, earlier, positions, self.anew[again]),
            snapshot.records(known[self.skipped]),
            int(np.count_nonzero(self.quarantined)),
            snapshot.records(removed),
            snapshot.records(known[self.skipped & self.recoded]),
            self.ignored,
            int(np.count_nonzero(snapshot.column("flags", known[self.skipped]) & Flag.END)),
            table.ranges,
        )


def _other_pipelines(
    snapshot: Snapshot, rows: Positions, pipelines: tuple[bytes, bytes], alike: bytes
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Say of each row whether its source went through another pipeline, or only other code."""
    then = snapshot.column("pipeline", rows)
    now, before = (np.frombuffer(pipeline, np.uint32) for pipeline in pipelines)
    like_before = (then == before).all(axis=1)
    otherwise = ~np.isin(then[:, 0], np.frombuffer(alike, np.uint32)) & ~like_before
    # A hash of 0 is unknown, and differs from no other.
    told = ~like_before & (then[:, 1] != 0) & (now[1] != 0)
    return otherwise, ~otherwise & told & (then[:, 1] != now[1])


def _same(snapshot: Snapshot, rows: Positions, now: Fingerprints) -> npt.NDArray[np.bool_]:
    """Return for each row whether it has the fingerprint that its source has now."""
    # A size or time that is not known is 0 in both.
    same: npt.NDArray[np.bool_] = (
        (snapshot.column("flags", rows) & (Flag.SIZE | Flag.MTIME) == now.known)
        & (snapshot.column("size", rows) == now.sizes)
        & (snapshot.column("mtime_ns", rows) == now.mtimes_ns)
    )
    return same


def _pipelines(otherwise: Sequence[Record], now: str, signatures: Iterable[str]) -> str:
    then = otherwise[0].pipeline
    alike = sum(record.pipeline == then for record in otherwise)
    known = {
        start: text
        for text in signatures
        for start in (pipeline_hash(text)[:4], pipeline_before(text)[:4])
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
        f"{counted(len(changed), 'source')} changed after being completed: {names}"
        f"{', ...' if len(changed) > 10 else ''}. (A file has another size or modification time, a "
        "piece of a table has other deletes, the pipeline before has processed a source again.) "
        "To process such sources again, their new output replacing the old, pass "
        'on_source_change="reprocess"; to keep what is there, "ignore".'
    )
