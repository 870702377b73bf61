"""`CheckpointStatus`: how many sources of a checkpoint are done, failed and left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from typing_extensions import override

from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.checkpoint.contents import Contents
from ray_resume.core.columns import text_of
from ray_resume.core.digests import Digests
from ray_resume.core.records import Record, State
from ray_resume.core.snapshot import Snapshot

__all__ = ["STATES", "CheckpointStatus", "in_state", "last_line", "status_of"]

STATES = {"completed": State.COMPLETED, "failed": State.FAILED, "quarantined": State.QUARANTINED}
"""The states that a user may ask for, by name."""


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

    @property
    def complete(self) -> bool:
        """Whether a run has listed sources, and all of them are completed."""
        return 0 < self.total == self.completed

    @override
    def __getitem__(self, key: str) -> Any:
        if key not in self.__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)

    @override
    def __iter__(self) -> Iterator[str]:
        return (field.name for field in fields(self))

    @override
    def __len__(self) -> int:
        return len(fields(self))


def status_of(storage: CheckpointBackend) -> CheckpointStatus:
    """Count the sources by state; what a live run has committed up to now counts."""
    contents = storage.snapshot()
    counts = _Counts.of(contents.snapshot)
    known = sum(counts.states[state] for state in STATES.values())
    pending = _pending(storage.listed(), contents, known)
    return CheckpointStatus(
        total=known + pending,
        completed=counts.states[State.COMPLETED],
        failed=counts.states[State.FAILED],
        quarantined=counts.states[State.QUARANTINED],
        pending=pending,
        writers=len(contents.files),
        live=len(contents.live),
        sink=storage.sink(),
        rows=counts.rows,
        files=counts.files,
        unclean=counts.unclean,
        last_completed_at=counts.last_completed_at,
        errors=dict(counts.errors.most_common(10)),
        runs=[
            {**asdict(owner), "alive": run_id in contents.live}
            for run_id, owner in {**contents.killed, **contents.live}.items()
        ],
    )


def _pending(listed: Digests | None, contents: Contents, known: int) -> int:
    """Count the sources that are ``listed``, and not on record."""
    if listed is None:
        # Earlier versions have recorded only how many sources each run has listed.
        totals = (header.get("sources_total") for header in contents.headers.values())
        return max(0, max((total for total in totals if type(total) is int), default=0) - known)
    snapshot = contents.snapshot
    rows = snapshot.find(listed)
    done = snapshot.in_state(*STATES.values())[rows[rows >= 0]]
    return len(listed) - int(np.count_nonzero(done))


@dataclass
class _Counts:
    """Counts over all records, which are columns here: there may be millions."""

    states: Counter[State]
    errors: Counter[str]
    files: int
    unclean: int
    rows: int
    last_completed_at: float | None

    @classmethod
    def of(cls, snapshot: Snapshot) -> _Counts:
        from ray_resume.core.output_files import listed_files
        from ray_resume.core.rewrites import file_uses

        completed = snapshot.in_state(State.COMPLETED)
        times = snapshot.column("completed_at")[completed]
        times = times[~np.isnan(times)]
        errors: Counter[str] = Counter()
        for _, batch in snapshot.batches(np.flatnonzero(~completed)):
            for error in batch.column("error").drop_null().to_pylist():
                errors[last_line(text_of(error))] += 1
        return cls(
            Counter({state: int(snapshot.in_state(state).sum()) for state in State}),
            errors,
            len(listed_files(snapshot)),
            sum(not use.is_clean for use in file_uses(snapshot).values()),
            # Python's numbers do not overflow.
            sum(snapshot.column("rows")[completed].tolist()),
            float(times.max()) if len(times) else None,
        )


def last_line(error: str) -> str:
    """Return the last line of an error; the last line of a traceback has the message."""
    return (error.strip().splitlines() or [""])[-1]


def in_state(snapshot: Snapshot, state: str) -> Iterator[Record]:
    """Yield the records in one of `STATES`, or in any of them if ``state`` is ``"all"``."""
    wanted = set(STATES.values()) if state == "all" else {STATES[state]}
    return iter(snapshot.records(snapshot.in_state(*wanted).nonzero()[0]))
