"""The readings: files of any format, row groups of Parquet files, keys, a user's own datasource."""

from __future__ import annotations

import datetime as dt
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
    ReadTasks,
    Selection,
    Source,
    SourceTable,
    Watch,
    refuse_repeated,
)
from ray_resume.errors import NonResumableError, ResumeError, SourceChangedError
from ray_resume.raydata import plan, user_batches
from ray_resume.read.listing import has_changed

__all__ = [
    "DatasourceReading",
    "FileReading",
    "KeyReading",
    "RowGroupReading",
    "key_sources",
]


@dataclass(frozen=True)
class FileReading:
    """Files, read by one of Ray's ``read_*`` functions.

    ``reader(paths, **arguments)`` must plan one read whose tasks can be bound to files. Nobody asks
    it about each file in the driver, but for Parquet, as in plain Ray Data.
    ``inflation`` is how many bytes in memory a byte on disk is taken for, ``roots`` the files and
    directories that were listed on ``filesystem``.
    """

    name: str
    sources: SourceTable
    reader: Callable[..., Any]
    arguments: Mapping[str, Any]
    inflation: float
    filesystem: FileSystem
    roots: tuple[str, ...] = ()
    repeatable: bool = True
    distributed: bool = True

    @property
    def selects(self) -> bool:
        return self.reader is ray.data.read_parquet

    def sizes_bytes(self, sources: SourceTable) -> npt.NDArray[np.float64] | None:
        # What is not known counts as nothing.
        return sources.fingerprints.sizes.astype(np.float64) * self.inflation

    def open(
        self, sources: SourceTable, selection: Selection, data_context: Any
    ) -> tuple[Callable[[range], ReadTasks], Selection]:
        datasource = self._datasource(sources[:1])
        if not plan.reads_any_file(datasource):
            datasource = self._datasource(sources)
            plan.ParquetFiles(datasource).refuse_others(map(_path_of, sources))
        datasource, left = plan.push_selection(datasource, selection)
        part_of = self._parts(datasource, sources)

        def tasks_of(positions: range) -> ReadTasks:
            return _FileTasks(self.name, part_of(positions), bool(selection.predicates))

        # What cannot be bound to its sources is found out here, not on some worker.
        tasks_of(range(1))(sources[:1])
        return tasks_of, left

    def watch(self) -> Watch:
        return partial(_file_has_changed, self.filesystem)

    def _datasource(self, sources: SourceTable) -> Datasource:
        paths = [_path_of(source) for source in sources]
        return plan.plain_datasource(self.reader, list(dict.fromkeys(paths)), dict(self.arguments))

    def _parts(self, datasource: Datasource, sources: SourceTable) -> Callable[[range], Datasource]:
        if plan.reads_any_file(datasource):
            return lambda _: datasource
        files = plan.ParquetFiles(datasource)
        return lambda positions: files.reading(
            [source.item for source in sources[positions.start : positions.stop]]
        )


def _file_has_changed(filesystem: FileSystem, source: Source) -> bool:
    return has_changed(filesystem, _path_of(source), source.fingerprint)


def _path_of(source: Source) -> str:
    return str(source.item if isinstance(source.item, str) else source.item[0])


@dataclass(frozen=True)
class _FileTasks:
    """Makes a read task for each file, or row group, and binds it by what it says that it reads.

    ``datasource`` reads these files, if it does not read any that it is given.
    """

    name: str
    datasource: Datasource
    may_leave_out: bool

    def __call__(self, sources: SourceTable) -> Sequence[ReadTask | None]:
        names, sizes = [], []
        for source in sources:
            item = source.item
            names.append(item if isinstance(item, str) else plan.row_group_name(*item))
            sizes.append(source.fingerprint.size)
        datasource = self.datasource
        if plan.reads_any_file(datasource):
            datasource = plan.reading_files(datasource, names, sizes)
        tasks: dict[str, ReadTask | None] = dict.fromkeys(names)
        for task in datasource.get_read_tasks(len(names)):
            paths = [str(path) for path in task.metadata.input_files or ()]
            if len(paths) != 1 or paths[0] not in tasks:
                raise NonResumableError(
                    f"{self.name} gave a read task for {paths[:3]}, where one task for each file "
                    "was expected, so its rows cannot be bound to their sources."
                )
            tasks[paths[0]] = task
        missing = [name for name, task in tasks.items() if task is None]
        if missing and not self.may_leave_out:
            raise NonResumableError(
                f"{self.name} gave no read task for {missing[0]}, so nobody can say when that "
                "source is complete."
            )
        return list(tasks.values())


def _nobody_can_see(_: Source) -> bool:
    return False


@dataclass(frozen=True)
class RowGroupReading(FileReading):
    """Row groups of Parquet files; a source's item is ``(path, row group)``."""

    def _parts(self, datasource: Datasource, sources: SourceTable) -> Callable[[range], Datasource]:
        files = plan.ParquetFiles(datasource)
        return lambda positions: files.reading_row_groups(
            [source.item for source in sources[positions.start : positions.stop]]
        )


@dataclass(frozen=True)
class KeyReading:
    """Keys, read by a function of the user's: ``load(key)`` returns or yields tables.

    Not repeatable: a database may give its rows in another order each time.
    """

    name: str
    sources: SourceTable
    load: Callable[[Any], Any]
    repeatable: bool = False
    selects: bool = False
    distributed: bool = True

    def sizes_bytes(self, sources: SourceTable) -> npt.NDArray[np.float64] | None:
        return None

    def watch(self) -> Watch:
        return _nobody_can_see

    def open(
        self, sources: SourceTable, selection: Selection, data_context: Any
    ) -> tuple[Callable[[range], ReadTasks], Selection]:
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
            yield BlockAccessor.batch_to_block(user_batches.settled(part))


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
class DatasourceReading:
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

    @property
    def distributed(self) -> bool:
        return bool(self.datasource.supports_distributed_reads)

    @classmethod
    def of(
        cls,
        datasource: Datasource,
        source_id: Callable[[ReadTask, int], str] | None,
        task_count: int,
    ) -> DatasourceReading:
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

    def watch(self) -> Watch:
        return _nobody_can_see

    def open(
        self, sources: SourceTable, selection: Selection, data_context: Any
    ) -> tuple[Callable[[range], ReadTasks], Selection]:
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
