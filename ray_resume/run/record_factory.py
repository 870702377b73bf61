"""`RecordFactory`: makes the records of one run; each has the next sequence number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ray_resume.core.messages import Completion
from ray_resume.core.records import Record, State, dropped_record, pipeline_hash
from ray_resume.core.run_sources import RunSources
from ray_resume.run.run_spec import RunSpec

__all__ = ["Failed", "RecordFactory"]


@dataclass(frozen=True)
class Failed:
    """Why a source failed, and whether this run brings it nearer to quarantine.

    A failure counts towards quarantine only if the source itself is known to have caused it. One
    bad source would otherwise quarantine all that went through the same tasks.
    """

    error: str
    counts_toward_quarantine: bool


class RecordFactory:
    """Makes records of ``sources``. Only one thread may call it at a time."""

    def __init__(self, spec: RunSpec, sources: RunSources) -> None:
        self._run_id = spec.run_id
        self._sources = sources
        self._earlier: Mapping[int, Record] = spec.records
        self._max_failed_runs = spec.max_failed_runs
        self._pipeline = pipeline_hash(spec.signature, spec.code)
        self._sequence = spec.first_sequence

    def completed(self, done: Completion, now: float) -> Record:
        """Make the record of a completed source."""
        return Record(
            self._sources.id(done.source),
            State.COMPLETED,
            self._next_sequence(),
            self._run_id,
            rows=done.rows_written,
            parts=done.parts,
            completed_at=now,
            fingerprint=self._sources.fingerprint(done.source),
            pipeline=self._pipeline,
            dead_rows=done.dead_rows,
            dead_letters=done.dead_letters,
            end=done.end,
        )

    def failed(self, source: int, how: Failed, now: float) -> Record:
        """Make the record of a source that failed in this run, or is quarantined by now."""
        earlier = self._earlier.get(source)
        failed_runs = (earlier.failed_runs if earlier else 0) + how.counts_toward_quarantine
        is_over = failed_runs >= self._max_failed_runs
        return Record(
            self._sources.id(source),
            State.QUARANTINED if is_over else State.FAILED,
            self._next_sequence(),
            self._run_id,
            # Until a completed record replaces them, its earlier output stays.
            parts=earlier.parts if earlier else (),
            error=how.error,
            failed_runs=failed_runs,
            fingerprint=self._sources.fingerprint(source),
            pipeline=self._pipeline,
            failed_at=now,
            dead_letters=earlier.dead_letters if earlier else (),
        )

    def dropped(self, source_id: str) -> Record:
        """Make the record of a source that no longer has output."""
        return dropped_record(source_id, self._next_sequence(), self._run_id)

    def _next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence
