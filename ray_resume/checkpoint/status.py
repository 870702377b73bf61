"""`CheckpointStatus`: how many sources of a checkpoint are done, failed and left."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from typing_extensions import override

from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.checkpoint.contents import Contents
from ray_resume.checkpoint.history import RunRecord
from ray_resume.checkpoint.notebook import status_html
from ray_resume.checkpoint.output_listing import files_in
from ray_resume.checkpoint.runs import runs_of
from ray_resume.core.columns import numbers_of, text_of
from ray_resume.core.digests import Digests
from ray_resume.core.record_log import Flag
from ray_resume.core.records import Record, State
from ray_resume.core.row_ranges import lacking_ranges
from ray_resume.core.snapshot import Snapshot
from ray_resume.core.versions import completed_by_version

__all__ = ["STATES", "CheckpointStatus", "dead_lettered", "in_state", "last_line", "status_of"]

STATES = {"completed": State.COMPLETED, "failed": State.FAILED, "quarantined": State.QUARANTINED}
"""The states that a user may ask for, by name."""


# A live run may rewrite output files while they are looked for.
_LOOKS = 3
_WINDOW_S = 300.0


@dataclass(frozen=True, eq=False)
class CheckpointStatus(Mapping[str, Any]):
    """Counts of sources; a mapping as well, so that it prints and serialises as one.

    Attributes:
        total: the sources that the newest run has listed, other shards' sources included, or runs
            beside it; and those on record that are not in the input any more.
        completed, failed, quarantined: sources on record in that state.
        pending: all other sources; the next run reads them, and the failed ones. A source that is
            gone from the input is none of them, once a run has listed what is there.
        writers: runs that have a file in the checkpoint.
        live: how many of these runs are at work right now.
        sink: where the output goes, None before the first run.
        rows: rows in the output of the completed sources.
        files: output files that are listed.
        unclean: those of them that also have rows that do not count. The next run rewrites them.
        last_completed_at: when a source was last committed as completed, in seconds since 1970
            UTC; None if none is.
        errors: why sources failed or were quarantined: how many sources, by the last line of the
            error, the most common first, ten at most.
        runs: the runs that are at work (``alive``), and those that did not end by themselves: they
            were killed, as a rule, and no later run has cleaned up yet. Dicts of ``run_id, host,
            pid, started_at, shard, alive``; ``shard`` is None if the run does everything.
        rows_dead_lettered: rows of the sources that are in dead letters.
        sources_dead_lettered: how many sources have such rows.
        files_missing: listed files of completed sources that are gone from the output folder; None
            if that is not on this host, and was not looked at.
        last_run: the record of the newest run that is over, as a dict (see ``RunRecord``), or None.
        unsettled: publications to a table by runs that did not confirm them before they died. The
            next run asks the table, and commits their sources or processes them again.
        sources_per_s: how many sources the runs at work complete in a second, over the last five
            minutes; None if no run is at work.
        rows_at_risk: rows that they have read or written of sources that are not committed, at
            their last signs of life, some seconds old; None if no run is at work.
        seconds_left: how long the pending and failed sources take at that rate, if it is not 0.
        versions: how many completed sources went through each version of a UDF
            (``@resumable(version=...)``).
    """

    total: int
    completed: int
    failed: int
    quarantined: int
    pending: int
    writers: int
    live: int
    sink: str | None
    rows: int
    files: int
    unclean: int
    last_completed_at: float | None
    errors: dict[str, int]
    runs: list[dict[str, Any]]
    rows_dead_lettered: int = 0
    sources_dead_lettered: int = 0
    files_missing: int | None = None
    last_run: dict[str, Any] | None = None
    unsettled: int = 0
    sources_per_s: float | None = None
    seconds_left: float | None = None
    rows_at_risk: int | None = None
    versions: dict[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether a run has listed sources, and all of them are completed."""
        return 0 < self.total == self.completed

    def _repr_html_(self) -> str:
        return status_html(self)

    @override
    def __getitem__(self, key: str) -> Any:
        if key not in self.__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)

    @override
    def __iter__(self) -> Iterator[str]:
        return (one.name for one in fields(self))

    @override
    def __len__(self) -> int:
        return len(fields(self))


def status_of(storage: CheckpointBackend) -> CheckpointStatus:
    """Count the sources by state; what a live run has committed up to now counts."""
    for _ in range(_LOOKS):
        known = storage.history().read()
        # A run that is alive afterwards confirms its own.
        publications = storage.publications().names()
        contents = storage.snapshot()
        sink = storage.sink()
        missing = _missing(contents.snapshot, sink, storage.root)
        # A live run may have rewritten the files since they were listed.
        if not (missing and contents.live):
            break
    runs = runs_of(storage, known, contents)
    over = [run for run in runs if run.outcome != "running"]
    at_risk = sum(run.rows_at_risk for run in runs if run.outcome == "running")
    counts = _Counts.of(contents.snapshot)
    on_record = sum(counts.states[state] for state in STATES.values())
    pending = _pending(storage.listed(), contents, on_record)
    left = pending + counts.states[State.FAILED]
    rate = _rate(contents)
    return CheckpointStatus(
        total=on_record + pending,
        completed=counts.states[State.COMPLETED],
        failed=counts.states[State.FAILED],
        quarantined=counts.states[State.QUARANTINED],
        pending=pending,
        writers=len(contents.files),
        live=len(contents.live),
        sink=sink,
        rows=counts.rows,
        files=counts.files,
        unclean=counts.unclean,
        last_completed_at=counts.last_completed_at,
        errors=dict(counts.errors.most_common(10)),
        runs=[
            {**asdict(owner), "alive": run_id in contents.live}
            for run_id, owner in {**contents.killed, **contents.live}.items()
        ],
        rows_dead_lettered=counts.rows_dead_lettered,
        sources_dead_lettered=counts.sources_dead_lettered,
        files_missing=missing,
        last_run=asdict(max(over, key=_when_over)) if over else None,
        unsettled=sum(run_id not in contents.live for run_id in publications.values()),
        sources_per_s=rate,
        seconds_left=left / rate if rate else None,
        rows_at_risk=at_risk if contents.live else None,
        versions=completed_by_version(contents.snapshot, contents.headers),
    )


def _pending(listed: Digests | None, contents: Contents, on_record: int) -> int:
    """Count the sources that are ``listed``, and not on record."""
    if listed is None:
        # Earlier versions have recorded only how many sources each run has listed.
        totals = (header.get("sources_total") for header in contents.headers.values())
        return max(0, max((total for total in totals if type(total) is int), default=0) - on_record)
    snapshot = contents.snapshot
    rows = snapshot.find(listed)
    done = snapshot.in_state(*STATES.values())[rows[rows >= 0]]
    return len(listed) - int(np.count_nonzero(done)) + lacking_ranges(snapshot)


def _when_over(run: RunRecord) -> float:
    return run.started_at if run.ended_at is None else run.ended_at


def _missing(snapshot: Snapshot, sink: str | None, root: str) -> int | None:
    """Count the files of completed sources that are gone from a folder of this host."""
    from ray_resume.core.output_files import OutputFileSet, missing_files

    if sink is None or not os.path.isabs(sink):
        return None
    completed = np.flatnonzero(snapshot.in_state(State.COMPLETED))
    try:
        there = OutputFileSet.of(name for name, _ in files_in(sink, apart_from=root))
    except OSError:
        return None  # This process may not look at it.
    return len(dict(missing_files(snapshot.records(completed), there)))


def _rate(contents: Contents) -> float | None:
    """Return how many sources the live runs have completed in a second of late."""
    if not contents.live:
        return None
    now = time.time()
    since = max(now - _WINDOW_S, min(owner.started_at for owner in contents.live.values()))
    count = 0
    for reading in contents.readings:
        if reading.run_id in contents.live:
            log = reading.records
            completed = log.column("state") == State.COMPLETED.value
            completed &= log.column("flags") & Flag.END == 0
            count += int(np.count_nonzero(log.column("completed_at")[completed] > since))
    return count / max(now - since, 1.0)


@dataclass
class _Counts:
    """Counts over all records, which are columns here: there may be millions."""

    states: Counter[State]
    errors: Counter[str]
    files: int
    unclean: int
    rows: int
    last_completed_at: float | None
    rows_dead_lettered: int
    sources_dead_lettered: int

    @classmethod
    def of(cls, snapshot: Snapshot) -> _Counts:
        from ray_resume.core.file_uses import file_uses
        from ray_resume.core.output_files import listed_files

        is_end = snapshot.column("flags") & Flag.END != 0
        completed = snapshot.in_state(State.COMPLETED) & ~is_end
        times = snapshot.column("completed_at")[completed]
        times = times[~np.isnan(times)]
        errors: Counter[str] = Counter()
        for _, batch in snapshot.batches(np.flatnonzero(~completed & ~is_end)):
            for error in batch.column("error").drop_null().to_pylist():
                errors[last_line(text_of(error))] += 1
        dead_rows = [rows for _, rows in dead_lettered(snapshot)]
        return cls(
            Counter({state: int((snapshot.in_state(state) & ~is_end).sum()) for state in State}),
            errors,
            len(listed_files(snapshot)),
            sum(not use.is_clean for use in file_uses(snapshot).values()),
            # Python's numbers do not overflow.
            sum(snapshot.column("rows")[completed].tolist()),
            float(times.max()) if len(times) else None,
            sum(dead_rows),
            len(dead_rows),
        )


def dead_lettered(snapshot: Snapshot) -> Iterator[tuple[int, int]]:
    """Yield the rows of the snapshot with dead letters, and how many rows these have.

    A source that was reset, or has failed since, has none that count.
    """
    flagged = snapshot.flagged(Flag.DEAD_LETTERS)
    for rows, batch in snapshot.batches(flagged):
        counts = numbers_of(batch.column("dead_rows"), "i8").tolist()
        yield from ((row, count) for row, count in zip(rows.tolist(), counts, strict=True) if count)


def last_line(error: str) -> str:
    """Return the last line of an error; the last line of a traceback has the message."""
    return (error.strip().splitlines() or [""])[-1]


def in_state(
    snapshot: Snapshot, state: str, *, dead_letters: bool = False, ends: bool = False
) -> Iterator[Record]:
    """Yield the records in one of `STATES`, or in any of them if ``state`` is ``"all"``.

    Args:
        dead_letters: only those with rows in dead letters.
        ends: also the ends of files of row ranges, which are on record for runs alone.
    """
    wanted = set(STATES.values()) if state == "all" else {STATES[state]}
    mask = snapshot.in_state(*wanted)
    if not ends:
        mask &= snapshot.column("flags") & Flag.END == 0
    if dead_letters:
        chosen = np.zeros(len(snapshot), bool)
        chosen[[row for row, _ in dead_lettered(snapshot)]] = True
        mask &= chosen
    return iter(snapshot.records(np.flatnonzero(mask)))
