"""`Checkpoint`: a checkpoint as its user sees it. It shows what is done and where the output is.

It works without Ray, in any process, also while a run is going on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from typing_extensions import override

from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.checkpoint.check_report import CheckReport
from ray_resume.checkpoint.compaction import compact
from ray_resume.checkpoint.dead_letters import FOLDER
from ray_resume.checkpoint.history import RunRecord
from ray_resume.checkpoint.location import Location
from ray_resume.checkpoint.notebook import status_html
from ray_resume.checkpoint.resets import reset
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

__all__ = ["Checkpoint", "Part", "SourceRecord"]


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


class Checkpoint:
    """A checkpoint, to look at and to pass to ``resumable_read``.

    Nothing is created or read before a method is called.

    Args:
        path: a directory (``str``, ``Path``, or a ``file://`` URI), or a URI of a storage that
            pyarrow knows: ``s3://bucket/path``, ``gs://``, ``abfs://``, ``hdfs://``.
        filesystem: the pyarrow or fsspec filesystem that ``path`` is on; by default, that of the
            URI.
        publish_interval_s: in a storage that hosts share, a run publishes the *records* of complete
            sources after so many seconds at the latest. A crash costs these sources, beside those
            that were not complete. (On a local disk, a run commits them within 0.2 s.) How often
            *rows* are published to a table is an option of ``resumable_write``, of the same name.
        lease_ttl_s: in such a storage, a run without a heartbeat for so long is dead: 30 s by
            default on object stores, 120 s on network file systems. A run that cannot send one for
            three quarters of that commits nothing more. 2 s to a day; hosts may give different
            ones.
        shared: hosts share the directory, although it looks like a local disk. Network file
            systems are recognized without this.

    Raises:
        CheckpointError: every method, where the checkpoint is missing, unreadable or of another
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
        return f"Checkpoint({self.path!r})"

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

    def tidy(self, *, filesystem: Any = None) -> int:
        """Rewrite the output files that are not clean, and remove leftovers, as the next run would.

        Nothing is lost if it is killed at any moment: the old files are removed when the new ones
        are durable and on record, 16 GiB of files at a time. The disk needs room for so much. Files
        with sources of a run at work stay as they are; if all have such sources, this raises.

        Args:
            filesystem: the pyarrow filesystem that the output folder is on; by default, that of
                its URI.

        Returns:
            How many files were rewritten.

        Raises:
            CheckpointError: the output is no folder, a run is at work on sources of all these
                files, or a file cannot be read or written. No row is lost.
        """
        # The command must start quickly, and seldom needs what this loads.
        from ray_resume.checkpoint.rebinding import output_folder
        from ray_resume.write.folder import folder_at
        from ray_resume.write.tidying import copy_here, tidy_output

        folder = folder_at(output_folder(self._storage), filesystem)
        wait_s = self._storage.max_death_detection_s
        try:
            tidied = tidy_output(self._storage, folder, copy_here(folder), wait_s=wait_s)
        except OSError as error:
            raise CheckpointError(
                f"The output folder {folder.uri} cannot be tidied: {error}. No row is lost."
            ) from error
        return len(tidied.moved)

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

    def reset(
        self,
        source_ids: Iterable[str] | None = None,
        *,
        state: str | None = None,
        dead_letters: bool = False,
        version: str | None = None,
    ) -> int:
        """Reset sources, so that the next run processes them again; return how many.

        Their output files stay until that run has committed new ones in their place. A reset
        deletes nothing: it adds a record for each source, all in one durable transaction.

        Args:
            source_ids: the sources to reset, or a single id; or
            state: ``"completed"``, ``"failed"``, ``"quarantined"`` or ``"all"``: all sources in it;
                or
            dead_letters: all sources with rows in dead letters, once the UDF is mended. The letters
                stay until the next run has completed their source; or
            version: all sources that went through a UDF of this version
                (``@resumable(version=...)``).

        Raises:
            ValueError: none of them or several are given, or there is no such state.
            CheckpointError: an id or the version is not on record, or a run is at work. Nothing
                was reset.
        """
        ways = [source_ids is None, state is None, not dead_letters, version is None]
        if ways.count(False) != 1:
            raise ValueError(
                'reset needs the ids of sources, or a state ("all" for everything), or '
                "dead_letters=True, or a version"
            )
        if state is not None and state != "all" and state not in STATES:
            raise ValueError(f"state must be one of {', '.join(STATES)} or all, not {state!r}")
        if source_ids is not None:
            source_ids = [source_ids] if isinstance(source_ids, str) else list(source_ids)
        return reset(
            self._storage, source_ids, state or "all", dead_letters=dead_letters, version=version
        )

    def compact(self) -> int:
        """Merge the writers' files into one, so that reading the checkpoint stays quick.

        A kill at any moment loses nothing: the old files are removed once the new one is whole,
        durable and read back. Runs wait for it to end.

        Returns:
            How many files were merged; 0 if there is only one.

        Raises:
            CheckpointError: a run is at work, or a file cannot be read. Nothing was changed.
        """
        return compact(self._storage, lease_wait_s=self._storage.max_death_detection_s)

    def rebind(self, folder: str | os.PathLike[str], *, filesystem: Any = None) -> int:
        """Bind the checkpoint to ``folder``, where the output was moved to: later runs write there.

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
