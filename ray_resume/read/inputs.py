"""The readings: files of any format, row groups of Parquet files, keys, a user's own datasource."""

from __future__ import annotations

import datetime as dt
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import ray.data
from pyarrow.fs import FileSystem
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from ray_resume.core.sources import (
    ChangeCheck,
    ReadTaskFactory,
    Selection,
    Source,
    SourceTable,
    refuse_repeated,
)
from ray_resume.errors import NonResumableError, ResumeError, SourceChangedError
from ray_resume.raydata import user_batches
from ray_resume.raydata.filereads import DatasourceFiles, EachByItself, FileReader, row_group_of
from ray_resume.raydata.scans import SAMPLED, Scan, planned_scan, reads_with_scans
from ray_resume.read.footers import readable
from ray_resume.read.listing import has_changed
from ray_resume.read.workdir import is_local_at

__all__ = [
    "DatasourceInput",
    "FileInput",
    "KeyInput",
    "files_of",
    "key_sources",
]

# Of so many files at most, a dataset knows the names: a million would take 100 MB of the driver.
_DESCRIBED = 10_000


@dataclass(frozen=True)
class FileInput:
    """Files, read by one of Ray's ``read_*`` functions.

    ``files`` reads any of them, by paths on ``filesystem``. The driver opens no file, except for
    the footers of the first ones of Parquet, as plain Ray Data does. ``inflation`` is how many
    bytes in memory a byte on disk is taken for, ``roots`` the files and folders that were listed.
    """

    name: str
    sources: SourceTable
    files: FileReader
    inflation: float
    filesystem: FileSystem
    roots: tuple[str, ...] = ()
    repeatable: bool = True
    distributed: bool = True
    selects: bool = False

    @property
    def reorders(self) -> bool:
        return isinstance(self.files, Scan)

    def sizes_bytes(self, sources: SourceTable) -> npt.NDArray[np.float64] | None:
        # What is not known counts as nothing.
        return sources.fingerprints.sizes.astype(np.float64) * self.inflation

    def schema(self, columns: Sequence[str] | None) -> pa.Schema | None:
        return self.files.schema(columns)

    def metadata(self, sources: SourceTable) -> BlockMetadata | None:
        if len(sources) > _DESCRIBED:
            return None
        paths = list(dict.fromkeys(row_group_of(source)[0] for source in sources))
        sizes = {row_group_of(source)[0]: source.fingerprint.size for source in sources}
        return self.files.metadata(paths, [sizes[path] for path in paths])

    def open(
        self, sources: SourceTable, selection: Selection, data_context: Any
    ) -> tuple[Callable[[range], ReadTaskFactory], Selection]:
        tasks, left = self.files.task_factory(selection)
        return lambda _: tasks, left

    def change_check(self) -> ChangeCheck:
        return partial(_file_has_changed, self.filesystem)


def files_of(
    name: str,
    reader: Callable[..., Any],
    arguments: Mapping[str, Any],
    filesystem: FileSystem,
    sources: SourceTable,
) -> tuple[FileReader, list[str] | None]:
    """Plan how files are read, by the first ones of ``sources``, which are all that were listed.

    So it is the same in every run, whatever is pending. Files that cannot be opened do not count.

    Returns:
        What reads the files, and the columns that are selected after that, if any.
    """
    scanned = reads_with_scans(getattr(reader, "__name__", ""))

    # Planned in this process, and read in others, where relative paths may mean something else.
    moved = is_local_at(filesystem)

    def planned(
        paths: Sequence[str], kwargs: Mapping[str, Any]
    ) -> tuple[FileReader, list[str] | None]:
        files: FileReader
        columns = None
        if scanned:
            files, columns = planned_scan(reader, paths, kwargs)
        else:
            files = DatasourceFiles.planned(name, reader, paths, kwargs)
        return files.on(filesystem) if moved else files, columns

    if not sources:
        return EachByItself(name, reader, arguments), None
    if reader is not ray.data.read_parquet:
        return planned([sources[0].item], arguments)
    candidates = _not_empty(sources) if scanned else _paths(sources)
    first = list(islice(candidates, SAMPLED)) or [sources[0].item]
    try:
        return planned(first, arguments)
    except Exception:
        good = readable(filesystem, chain(first, candidates), SAMPLED)
    if good:
        return planned(good, arguments)
    if scanned:
        # Then no footer is read, and what a file is found to have later is its schema.
        return planned(first[:1], {**arguments, "schema": pa.schema([])})
    each = EachByItself(name, reader, arguments)
    return each.on(filesystem) if moved else each, None


def _paths(sources: SourceTable) -> Iterator[str]:
    return (source.item for source in sources)


def _not_empty(sources: SourceTable) -> Iterator[str]:
    return (source.item for source in sources if source.fingerprint.size != 0)


def _file_has_changed(filesystem: FileSystem, source: Source) -> bool:
    return has_changed(filesystem, row_group_of(source)[0], source.fingerprint)


def _unchanged(_: Source) -> bool:
    return False


@dataclass(frozen=True)
class KeyInput:
    """Keys, read by a function of the user's: ``load(key)`` returns or yields tables.

    Not repeatable: a database may give its rows in another order each time.
    """

    name: str
    sources: SourceTable
    load: Callable[[Any], Any]
    repeatable: bool = False
    selects: bool = False
    reorders: bool = False
    distributed: bool = True

    def sizes_bytes(self, sources: SourceTable) -> npt.NDArray[np.float64] | None:
        return None

    def schema(self, columns: Sequence[str] | None) -> pa.Schema | None:
        return None

    def metadata(self, sources: SourceTable) -> BlockMetadata | None:
        return None

    def change_check(self) -> ChangeCheck:
        return _unchanged

    def open(
        self, sources: SourceTable, selection: Selection, data_context: Any
    ) -> tuple[Callable[[range], ReadTaskFactory], Selection]:
        return lambda _: _KeyTasks(self.load), selection


@dataclass(frozen=True)
class _KeyTasks:
    load: Callable[[Any], Any]

    def __call__(self, sources: SourceTable) -> Sequence[ReadTask]:
        return [
            ReadTask(_KeyRead(self.load, source.item), _unknown_metadata()) for source in sources
        ]


@dataclass(frozen=True)
class _KeyRead:
    load: Callable[[Any], Any]
    key: Any

    def __call__(self) -> Iterator[Any]:
        result = self.load(self.key)
        parts = result if inspect.isgenerator(result) else [result]
        for part in parts:
            if part is None:
                continue
            if not isinstance(part, (pa.Table, pd.DataFrame, Mapping)):
                raise TypeError(
                    f"{self.load!r} returned a {type(part).__name__} for {self.key!r}; it must "
                    "return or yield a pyarrow.Table, a pandas.DataFrame or a dict of arrays."
                )
            # The loader may fill it again for the next part, or the next key.
            yield BlockAccessor.batch_to_block(user_batches.materialized(part))


def key_sources(keys: Iterable[Any]) -> SourceTable:
    """Make a source of each key: strings as they are, other plain values as they are written.

    Raises:
        ResumeError: two keys are the same, or one has no stable spelling.
    """
    sources = SourceTable.of(Source(_key_id(key), key) for key in keys)
    refuse_repeated(sources)
    return sources


def _key_id(key: Any) -> str:
    if isinstance(key, str):
        return key
    try:
        return json.dumps(key, sort_keys=True, default=_spelt)
    except TypeError as error:
        raise ResumeError(
            f"The key {key!r} has no spelling that is the same in every run ({error}). Use "
            "strings, numbers, dates, and lists, tuples or dicts of these."
        ) from None


def _spelt(value: Any) -> str:
    if isinstance(value, (dt.date, dt.datetime, dt.time)):
        return value.isoformat()
    raise TypeError(f"it has a {type(value).__name__} in it")


@dataclass(frozen=True)
class DatasourceInput:
    """The read tasks of a datasource of the user's own.

    A source's item is what its task named as its files. A datasource may list when it is asked for
    tasks, so each execution asks again, and finds each source's task by its id, wherever it is.

    Whether two executions give the same rows is the datasource's secret, so it counts as not
    repeatable.
    """

    name: str
    sources: SourceTable
    datasource: Datasource
    task_count: int
    source_id: Callable[[ReadTask, int], str] | None = None
    repeatable: bool = False
    selects: bool = False
    reorders: bool = False

    @property
    def distributed(self) -> bool:
        return bool(self.datasource.supports_distributed_reads)

    @classmethod
    def of(
        cls,
        datasource: Datasource,
        source_id: Callable[[ReadTask, int], str] | None,
        task_count: int,
    ) -> DatasourceInput:
        """Identify the read tasks of ``datasource``.

        Args:
            source_id: gives each task its identity; without it, a task is the one file it reads.
            task_count: how many tasks to ask the datasource for, in every run.

        Raises:
            NonResumableError: the tasks have no stable identity.
        """
        tasks = datasource.get_read_tasks(task_count)
        if source_id is None:
            # One task for each file, where the datasource can be asked for that many.
            task_count = max(task_count, sum(len(_files_of(task)) for task in tasks))
            tasks = datasource.get_read_tasks(task_count)
            if not all(len(_files_of(task)) == 1 for task in tasks):
                raise NonResumableError(
                    f"The read tasks of {datasource.get_name()} have no identity that is the same "
                    "in every run: they do not name one file each. Pass source_id=, a function of "
                    "a read task and its position that returns one (what it reads, not where it "
                    "stands), or read by keys=."
                )
        sources = SourceTable.of(
            Source(str(_task_id(task, index, source_id)), _files_of(task))
            for index, task in enumerate(tasks)
        )
        refuse_repeated(sources)
        return cls(datasource.get_name(), sources, datasource, task_count, source_id)

    def sizes_bytes(self, sources: SourceTable) -> npt.NDArray[np.float64] | None:
        return None

    def schema(self, columns: Sequence[str] | None) -> pa.Schema | None:
        return None

    def metadata(self, sources: SourceTable) -> BlockMetadata | None:
        return None

    def change_check(self) -> ChangeCheck:
        return _unchanged

    def open(
        self, sources: SourceTable, selection: Selection, data_context: Any
    ) -> tuple[Callable[[range], ReadTaskFactory], Selection]:
        tasks = self.datasource.get_read_tasks(self.task_count, None, data_context)
        found = self._bind(sources, tasks)
        # Selected after reading: a datasource that selects may cut its tasks otherwise.
        return lambda positions: _Made(found[positions.start : positions.stop]), selection

    def _bind(self, sources: SourceTable, tasks: Sequence[ReadTask]) -> list[ReadTask]:
        """Return the task of each of ``sources``; one that raises for a source without a task.

        Raises:
            NonResumableError: two tasks have the same id.
        """
        named: dict[str | None, ReadTask] = {}
        for index, task in enumerate(tasks):
            name = _task_id(task, index, self.source_id)
            if name is not None and name in named:
                raise NonResumableError(
                    f"{self.name} gave two read tasks for {name}, so they cannot be told apart."
                )
            named[name] = task
        found = []
        for source in sources:
            mine = named.get(source.source_id)
            if mine is None or _files_of(mine) != source.item:
                then = None if mine is None else _files_of(mine)
                read = _MissingRead(self.name, source.source_id, source.item, then)
                mine = ReadTask(read, _unknown_metadata())
            found.append(mine)
        return found


def _files_of(task: ReadTask) -> tuple[str, ...]:
    return tuple(map(str, task.metadata.input_files or ()))


def _task_id(
    task: ReadTask, index: int, source_id: Callable[[ReadTask, int], str] | None
) -> str | None:
    """Return the id of a read task; None if it has none: then it is of no source."""
    if source_id is not None:
        return str(source_id(task, index))
    files = _files_of(task)
    return files[0] if len(files) == 1 else None


@dataclass(frozen=True)
class _MissingRead:
    """Takes the place of a read task that the datasource does not give any more."""

    name: str
    source_id: str
    listed: tuple[str, ...]
    then: tuple[str, ...] | None

    def __call__(self) -> Iterator[Any]:
        what = "gives no read task for it any more"
        if self.then is not None:
            what = f"gives it another read task now: it reads {self.then}, not {self.listed}"
        raise SourceChangedError(
            f"{self.source_id} was listed, and {self.name} {what}. Read again to list what there "
            "is now."
        )


@dataclass(frozen=True)
class _Made:
    """Read tasks that only the driver could make."""

    tasks: Sequence[ReadTask]

    def __call__(self, sources: SourceTable) -> Sequence[ReadTask]:
        return self.tasks


def _unknown_metadata() -> BlockMetadata:
    return BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
