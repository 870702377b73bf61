"""A checkpoint as its user sees it: what is done, what failed, where the output is.

Works without Ray, in any process, also while a run is going on.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from typing_extensions import override

from ray_resume.checkpoint.backend import CheckpointBackend, new_run_id
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.compaction import compact
from ray_resume.checkpoint.dead_letters import FOLDER
from ray_resume.checkpoint.location import Location
from ray_resume.checkpoint.report import CheckReport, plain
from ray_resume.core.columns import text_of
from ray_resume.core.records import Record, State, encode
from ray_resume.core.snapshot import Snapshot
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint
from ray_resume.files import public_uri

__all__ = ["CheckReport", "Checkpoint", "CheckpointStatus", "SourceRecord", "last_line", "plain"]

_STATES = {"completed": State.COMPLETED, "failed": State.FAILED, "quarantined": State.QUARANTINED}


@dataclass(frozen=True)
class SourceRecord:
    """What is known of one source.

    Attributes:
        source_id: its stable identity.
        state: ``"completed"``, ``"failed"`` or ``"quarantined"``.
        rows: rows of its output.
        files: paths of its output files.
        error: why it failed, else None.
        failed_runs: in how many runs it failed.
        run_id: the run that said so.
        completed_at: when it was committed, in seconds since 1970 UTC, else None.
        failed_at: when it was noted as failed, likewise.
        dead_letters: paths of the Parquet files with its rows that a stage could not do with.
    """

    source_id: str
    state: str
    rows: int
    files: tuple[str, ...]
    error: str | None
    failed_runs: int
    run_id: str
    completed_at: float | None
    failed_at: float | None = None
    dead_letters: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class CheckpointStatus(Mapping[str, Any]):
    """Counts of sources; a mapping as well, so that it prints and serialises as one.

    Attributes:
        total: sources that the largest run so far listed, those of other shards with them, or
            more if more are on record.
        completed, failed, quarantined: sources on record in that state.
        pending: the others, which the next run will read, failed ones not among them.
        writers: runs that have a file in the checkpoint.
        live: of these, how many are at work right now.
        sink: where the output goes, None before the first run.
        rows: rows in the output of the completed sources.
        files: output files that are listed.
        last_completed_at: when a source was last committed as completed, in seconds since 1970
            UTC; None if none is.
        errors: why sources failed or were quarantined: how many sources, by the last line of the
            error, the most common first, ten at most.
        runs: who is at work (``alive``), and who ended without saying so: was killed, as a rule,
            and no run has tidied up since. Dicts of ``run_id, host, pid, started_at,
            shard, alive``; ``shard`` is None where a run does everything.
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
    last_completed_at: float | None
    errors: dict[str, int]
    runs: list[dict[str, Any]]

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


class Checkpoint:
    """A checkpoint, to look at and to pass to ``resumable_read``.

    Nothing is created or read before a method is called.

    Args:
        path: a directory (``str``, ``Path``, or a ``file://`` URI), or a URI of a storage that
            pyarrow knows: ``s3://bucket/path``, ``gs://``, ``abfs://``, ``hdfs://``.
        filesystem: the pyarrow or fsspec filesystem that ``path`` is on; by default, that of the
            URI.
        publish_interval_s: in a storage that hosts share, what is complete is published at the
            latest after so many seconds: what a crash costs at most beside what was not complete.
            (On a local disk it is committed within 0.2 s.)
        lease_ttl_s: there, a run that gives no sign of life for so long is dead: 30 s by default
            on object stores, 120 s on network file systems. A run that cannot give one for three
            quarters of that commits nothing more. 2 s to a day; hosts may give different ones.
        shared: that hosts share a directory although it looks like a local disk. Network file
            systems are known for what they are.

    Raises:
        CheckpointError: every method, where the checkpoint is missing, unreadable or of a newer
            format; the message names the file and the way out.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        filesystem: Any = None,
        publish_interval_s: float = 5.0,
        lease_ttl_s: float | None = None,
        shared: bool = False,
    ) -> None:
        self._location = (
            path.location
            if isinstance(path, Checkpoint)
            else Location(os.fspath(path), filesystem, publish_interval_s, lease_ttl_s, shared)
        )
        self._opened: CheckpointBackend | None = None

    @property
    def location(self) -> Location:
        """Where it is, as it was given."""
        return self._location

    @property
    def _storage(self) -> CheckpointBackend:
        if self._opened is None:
            self._opened = self._location.open()
        return self._opened

    @property
    def path(self) -> str:
        """The checkpoint's absolute path, or its URI without secrets."""
        local = self._location.local_path
        return public_uri(self._location.path) if local is None else str(local)

    @override
    def __repr__(self) -> str:
        return f"Checkpoint({self.path!r})"

    def __fspath__(self) -> str:
        return self.path

    def status(self) -> CheckpointStatus:
        """Count the sources by state. Sees what a live run has committed up to now."""
        contents = self._storage.snapshot()
        counts = _Counts.of(contents.union)
        known = sum(counts.states[state] for state in _STATES.values())
        totals = (header.get("sources_total") for header in contents.headers.values())
        listed = max((total for total in totals if type(total) is int), default=0)
        total = max(known, listed)
        return CheckpointStatus(
            total=total,
            completed=counts.states[State.COMPLETED],
            failed=counts.states[State.FAILED],
            quarantined=counts.states[State.QUARANTINED],
            pending=total - known,
            writers=len(contents.files),
            live=len(contents.live),
            sink=self._storage.sink(),
            rows=counts.rows,
            files=counts.files,
            last_completed_at=counts.last_completed_at,
            errors=dict(counts.errors.most_common(10)),
            runs=[
                {**asdict(owner), "alive": run_id in contents.live}
                for run_id, owner in {**contents.killed, **contents.live}.items()
            ],
        )

    def sources(self, state: str | None = None) -> Iterator[SourceRecord]:
        """Yield the sources on record, or those in ``state``, in no particular order.

        Raises:
            ValueError: ``state`` is not ``"completed"``, ``"failed"`` or ``"quarantined"``.
        """
        if state is not None and state not in _STATES:
            raise ValueError(f"state must be one of {', '.join(_STATES)}, not {state!r}")
        return self._sources(state)

    def _sources(self, state: str | None) -> Iterator[SourceRecord]:
        names = {value: name for name, value in _STATES.items()}
        sink, letters = self._storage.sink(), f"{self.path}/{FOLDER}"
        for record in _in_state(self._storage.snapshot().union, state or "all"):
            yield _public(record, names[record.state], sink, letters)

    def files(self) -> list[str]:
        """Return the paths of the output files, sorted.

        This list is the truth: whatever else is in the output folder is a left-over, or somebody
        else's. The earlier output of a source that was reset, or has failed since, is in it until
        new output takes its place.
        """
        sink, union = self._storage.sink(), self._storage.snapshot().union
        from ray_resume.core.output_files import listed_files

        return sorted(f"{sink}/{file}" for file in listed_files(union))

    def dead_letters(self) -> list[str]:
        """Return the paths of the dead letters, sorted: Parquet files.

        A row stands there as it came into the stage that failed, with three more columns of type
        string: ``ray_resume_source``, ``ray_resume_stage`` and ``ray_resume_error``.
        """
        union = self._storage.snapshot().union
        return sorted(f"{self.path}/{FOLDER}/{name}" for name in union.dead_letters())

    def reset(self, source_ids: Iterable[str] | None = None, *, state: str | None = None) -> int:
        """Forget sources, so that the next run processes them anew; return how many.

        Their output files stay until that run has committed new ones in their place. Nothing is
        deleted: a record that says so is added for each, all in one durable transaction.

        Args:
            source_ids: the sources to forget (one id alone will do); or
            state: ``"completed"``, ``"failed"``, ``"quarantined"``, or ``"all"``: all in it.

        Raises:
            ValueError: neither or both of them are given, or there is no such state.
            CheckpointError: an id is not on record, or a run is at work. Nothing was forgotten.
        """
        if (source_ids is None) == (state is None):
            raise ValueError('reset needs the ids of sources, or a state ("all" for everything)')
        if state is not None and state != "all" and state not in _STATES:
            raise ValueError(f"state must be one of {', '.join(_STATES)} or all, not {state!r}")
        if source_ids is not None:
            source_ids = [source_ids] if isinstance(source_ids, str) else list(source_ids)
        self._storage.identity()
        run_id = new_run_id()
        lease = self._storage.acquire(
            Owner.here(run_id), Claim(None), wait_s=self._storage.max_death_detection_s
        )
        try:
            contents = self._storage.committed_by_dead_runs(run_id)
            union = contents.union
            records = list(
                _in_state(union, state or "all")
                if source_ids is None
                else self._on_record(union, source_ids)
            )
            if records:
                resets = _resets(records, run_id, union.highest_sequence())
                # Imported here, because the command must start quickly.
                from ray_resume.core.identity import HEADER_KEY, ids_in_headers

                # Their output stays, so how they were called must not be forgotten.
                ids = ids_in_headers(contents.headers, {record.run_id for record in records})
                header = {"purpose": "reset", HEADER_KEY: sorted(ids)}
                self._storage.write_whole(run_id, header, encode(resets))
                failpoint("reset.committed")
                lease.check()
            return len(records)
        finally:
            lease.end(wait_s=0)

    def compact(self) -> int:
        """Merge the writers' files into one, so that looking and starting stay quick.

        Nothing is forgotten, and nothing is lost if it is killed at any moment: the old files are
        removed when the new one is whole, durable and read back. Runs wait until it is over.

        Returns:
            How many files were merged; 0 if there is but one.

        Raises:
            CheckpointError: a run is at work, or a file cannot be read. Nothing was changed.
        """
        return compact(self._storage, lease_wait_s=self._storage.max_death_detection_s)

    def rebind(self, folder: str | os.PathLike[str], *, filesystem: Any = None) -> int:
        """Say that the output was moved to ``folder``: later runs write there.

        Args:
            folder: a path or URI of the folder, with all of the files that were in the old one.
            filesystem: the pyarrow filesystem that it is on; by default, that of the URI.

        Returns:
            How many output files are listed.

        Raises:
            CheckpointError: files of completed sources are not there (the message names them), a
                run is at work, or there is no output folder yet. Nothing was changed.
        """
        # The command must start quickly, and seldom needs what this loads.
        from ray_resume.checkpoint.rebinding import rebind
        from ray_resume.write.folder import folder_at

        return rebind(self._storage, folder_at(folder, filesystem))

    def check(self) -> CheckReport:
        """Prove the checkpoint sound, or say what is wrong with it; change nothing.

        Every record of every file is read (in a process of its own, which a damaged file may take
        down), and the listed output files are looked for where they are in a local folder. Good
        to call after a crash, and while runs are at work.

        Raises:
            CheckpointError: there is no checkpoint. Damage is not raised, but reported.
        """
        # The command must start quickly, and seldom needs what this loads.
        from ray_resume.checkpoint.check import check

        return check(self._storage)

    def _on_record(self, union: Snapshot, source_ids: list[str]) -> Iterator[Record]:
        known = {source_id: union.get(source_id) for source_id in source_ids}
        unknown = [source_id for source_id, record in known.items() if record is None]
        if unknown:
            raise CheckpointError(
                f"The checkpoint {self.path} has no record of {unknown[0]!r}"
                + (f" and {len(unknown) - 1} others" if len(unknown) > 1 else "")
                + ". Nothing was reset. Are the ids spelt as in Checkpoint.sources()?"
            )
        return (r for r in known.values() if r is not None and r.state is not State.RESET)


@dataclass
class _Counts:
    """What is counted over all records, as columns: there may be millions."""

    states: Counter[State]
    errors: Counter[str]
    files: int
    rows: int
    last_completed_at: float | None

    @classmethod
    def of(cls, union: Snapshot) -> _Counts:
        from ray_resume.core.output_files import listed_files

        completed = union.in_state(State.COMPLETED)
        times = union.column("completed_at")[completed]
        times = times[~np.isnan(times)]
        errors: Counter[str] = Counter()
        for _, batch in union.batches(np.flatnonzero(~completed)):
            for error in batch.column("error").drop_null().to_pylist():
                errors[last_line(text_of(error))] += 1
        return cls(
            Counter({state: int(union.in_state(state).sum()) for state in State}),
            errors,
            len(listed_files(union)),
            # Python's numbers do not overflow.
            sum(union.column("rows")[completed].tolist()),
            float(times.max()) if len(times) else None,
        )


def last_line(error: str) -> str:
    """Return the line of an error that says most: of a traceback, the last."""
    return (error.strip().splitlines() or [""])[-1]


def _in_state(union: Snapshot, state: str) -> Iterator[Record]:
    wanted = set(_STATES.values()) if state == "all" else {_STATES[state]}
    return iter(union.records(union.in_state(*wanted).nonzero()[0]))


def _resets(records: Iterable[Record], run_id: str, highest_sequence: int) -> list[Record]:
    return [
        Record(
            source_id=record.source_id,
            state=State.RESET,
            sequence=sequence,
            run_id=run_id,
            # Until a completed record replaces them, they stay.
            files=record.files,
            dead_letters=record.dead_letters,
        )
        for sequence, record in enumerate(records, highest_sequence + 1)
    ]


def _public(record: Record, state: str, sink: str | None, letters: str) -> SourceRecord:
    return SourceRecord(
        source_id=record.source_id,
        state=state,
        rows=record.rows,
        files=tuple(f"{sink}/{file}" for file in record.files),
        error=record.error,
        failed_runs=record.failed_runs,
        run_id=record.run_id,
        completed_at=record.completed_at,
        failed_at=record.failed_at,
        dead_letters=tuple(f"{letters}/{name}" for name in record.dead_letters),
    )
