"""`CheckpointView`: the half of `Checkpoint` that looks at a checkpoint, and changes nothing.

It works without Ray, in any process, also while a run is going on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from typing_extensions import override

from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.checkpoint.check_report import CheckReport
from ray_resume.checkpoint.dead_letters import FOLDER
from ray_resume.checkpoint.history import RunRecord
from ray_resume.checkpoint.location import Location
from ray_resume.checkpoint.notebook import status_html
from ray_resume.checkpoint.runs import runs_on_record
from ray_resume.checkpoint.status import STATES, CheckpointStatus, in_state, status_of
from ray_resume.core.markup import panel, table
from ray_resume.core.records import Record
from ray_resume.core.snapshot import Snapshot
from ray_resume.errors import CheckpointError, ResumeError
from ray_resume.files import public_uri

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

__all__ = ["CheckpointView", "Part", "SourceRecord"]


@dataclass(frozen=True)
class SourceRecord:
    """One source on record.

    Attributes:
        source_id: its stable identity.
        state: ``"completed"``, ``"failed"`` or ``"quarantined"``.
        rows: rows of its output.
        files: paths of its output files. They may hold rows of other sources, too.
        error: why it failed, else None.
        failed_runs: in how many runs it failed.
        run_id: the run that made the record.
        completed_at: when it was committed as completed, in seconds since 1970 UTC, else None.
        failed_at: when it was committed as failed, likewise.
        dead_letters: paths of the Parquet files with those of its rows that a stage refused.
        rows_dead_lettered: how many rows are in these files.
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
    rows_dead_lettered: int = 0


class Part(NamedTuple):
    """Rows of one source that stand together in one output file.

    Attributes:
        file: the file's path.
        first_row: the index of the first of them in the file.
        rows: how many they are.
    """

    source_id: str
    file: str
    first_row: int
    rows: int


class CheckpointView:
    """A checkpoint, to look at. Nothing is read before a method is called."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self._opened: CheckpointBackend | None = None

    @property
    def location(self) -> Location:
        """The place of the checkpoint, as the user gave it."""
        return self._location

    @property
    def _storage(self) -> CheckpointBackend:
        if self._opened is None:
            self._opened = self._location.open()
        return self._opened

    def _snapshot(self) -> Snapshot:
        return self._storage.snapshot().snapshot

    @property
    def path(self) -> str:
        """The checkpoint's absolute path, or its URI without secrets."""
        local = self._location.local_path
        return public_uri(self._location.path) if local is None else str(local)

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    def _repr_html_(self) -> str:
        try:
            return status_html(self.status(), self.path)
        except (CheckpointError, OSError) as error:
            # A notebook shows a traceback in its place otherwise, also where none was asked for.
            return panel(repr(self), table([("", str(error))]))

    def __fspath__(self) -> str:
        return self.path

    def status(self) -> CheckpointStatus:
        """Count the sources by state, including what live runs have committed up to now."""
        return status_of(self._storage)

    def sources(self, state: str | None = None) -> Iterator[SourceRecord]:
        """Yield the sources on record, or those in ``state``, in no particular order.

        Raises:
            ValueError: ``state`` is not ``"completed"``, ``"failed"`` or ``"quarantined"``.
        """
        if state is not None and state not in STATES:
            raise ValueError(f"state must be one of {', '.join(STATES)}, not {state!r}")
        return self._sources(state)

    def _sources(self, state: str | None) -> Iterator[SourceRecord]:
        names = {value: name for name, value in STATES.items()}
        sink, letters = self._storage.sink(), f"{self.path}/{FOLDER}"
        for record in in_state(self._snapshot(), state or "all"):
            yield _public(record, names[record.state], sink, letters)

    def to_arrow(self) -> pa.Table:
        """Return the sources on record as a ``pyarrow.Table``: a million in a second or two.

        The columns are the fields of :class:`SourceRecord`; times are timestamps in UTC, ``state``
        and ``run_id`` are dictionaries. An id that is no valid Unicode has escapes.
        """
        sink, letters = self._storage.sink(), f"{self.path}/{FOLDER}"
        # The command must start quickly, and seldom needs what this loads.
        from ray_resume.checkpoint.source_table import source_table

        return source_table(self._snapshot(), sink=sink, letters=letters)

    def to_pandas(self) -> pd.DataFrame:
        """Return :meth:`to_arrow` as a DataFrame; texts and lists stay in Arrow's memory."""
        import pandas as pd
        import pyarrow as pa

        def kind(of: pa.DataType) -> Any:
            if pa.types.is_string(of):
                return pd.StringDtype("pyarrow")
            return pd.ArrowDtype(of) if pa.types.is_list(of) else None

        frame: pd.DataFrame = self.to_arrow().to_pandas(types_mapper=kind)
        return frame

    def files(self) -> list[str]:
        """Return the paths of the clean output files, sorted: each of their rows counts, once.

        When no run is at work and none was killed, these are all files of this checkpoint in the
        folder. After a kill, some files may have rows of sources that are not completed, beside
        others. They are not in the list until the next run, or :meth:`tidy`, has rewritten them;
        :meth:`parts` knows which of their rows count. The earlier output of a source that was
        reset, or has failed since, counts until new output takes its place.
        """
        sink, snapshot = self._storage.sink(), self._snapshot()
        from ray_resume.core.file_uses import clean_files

        return sorted(f"{sink}/{file}" for file in clean_files(snapshot))

    def parts(self) -> Iterator[Part]:
        """Yield where each source's rows are in the output files, in no particular order.

        All rows that count are in these parts, each once, at any moment.
        """
        sink = self._storage.sink()
        for record in self._snapshot():
            for part in record.parts:
                yield Part(record.source_id, f"{sink}/{part.file}", part.first_row, part.rows)

    def dead_letters(self) -> list[str]:
        """Return the paths of the dead letters, sorted: Parquet files.

        They hold rows as they came into the stage that failed, with three more columns of type
        string: ``ray_resume_source``, ``ray_resume_stage`` and ``ray_resume_error``.
        """
        snapshot = self._snapshot()
        return sorted(f"{self.path}/{FOLDER}/{name}" for name in snapshot.dead_letters())

    def runs(self) -> Iterator[RunRecord]:
        """Yield the runs of this checkpoint, the oldest first, also those that were killed.

        A run that was refused, because another was at work on its sources, leaves no record.
        :meth:`compact`, and a run that finds many records, keeps the newest 10,000 of them.
        """
        return iter(runs_on_record(self._storage))

    def report(self, path: str | os.PathLike[str]) -> str:
        """Write a report as one HTML page that opens offline: progress, runs, failures, sizes.

        It has a bounded size, however many sources there are: about 1 MB. It may be made while a
        run is at work.

        Args:
            path: a file of this host. One that is there is replaced.

        Returns:
            The absolute path of the file.

        Raises:
            ResumeError: what charts need is not installed (``pip install 'ray-resume[report]'``),
                or the file cannot be written.
            CheckpointError: there is no checkpoint, or it cannot be read.
        """
        try:
            from ray_resume.checkpoint.report.page import write_report
        except ImportError as error:
            raise ResumeError(
                f"A report needs Vega-Altair, which this Python cannot import ({error}). Install "
                "it: pip install 'ray-resume[report]'"
            ) from error
        # The command must start quickly, and seldom needs what this loads.
        from ray_resume.write.folder import folder_at

        whole = os.path.abspath(path)
        write_report(self._storage, whole, self.path, lambda sink: folder_at(sink).sizes())
        return whole

    def check(self) -> CheckReport:
        """Check the checkpoint and report all damage; change nothing.

        The check reads every record of every file, in a process of its own, which a damaged file
        may take down. If the output folder is local, it looks for the listed files. It may be
        called after a crash, and while runs are at work.

        Raises:
            CheckpointError: there is no checkpoint. Damage is in the report, and raises nothing.
        """
        # The command must start quickly, and seldom needs what this loads.
        from ray_resume.checkpoint.check import check

        return check(self._storage)


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
        rows_dead_lettered=record.dead_rows,
    )
