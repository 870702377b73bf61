"""The readings: files of any format, row groups of Parquet files, keys, a user's own datasource."""

from __future__ import annotations

import datetime as dt
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import pyarrow as pa
from pyarrow.fs import FileSystem
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from ray_resume import plan
from ray_resume.errors import NonResumableError, ResumeError
from ray_resume.listing import has_changed
from ray_resume.source import Selection, Source, SourceTable, Watch, refuse_repeated

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

    ``reader(paths, **arguments)`` must plan one read whose tasks can be bound to files.
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

    def size_bytes(self, sources: Sequence[Source]) -> int | None:
        if isinstance(sources, SourceTable):
            return round(int(sources.fingerprints.sizes.sum()) * self.inflation)
        return round(sum(source.fingerprint.size or 0 for source in sources) * self.inflation)

    def open(
        self, sources: Sequence[Source], selection: Selection, data_context: Any
    ) -> tuple[Mapping[str, ReadTask], Selection]:
        by_path = {source.item: source.source_id for source in sources}
        datasource = plan.plain_datasource(self.reader, list(by_path), dict(self.arguments))
        datasource, left = plan.push_selection(datasource, selection)
        return self._bound(datasource, by_path, selection, data_context), left

    def watch(self) -> Watch:
        return partial(_file_has_changed, self.filesystem)

    def _bound(
        self,
        datasource: Datasource,
        by_path: Mapping[str, str],
        selection: Selection,
        data_context: Any,
    ) -> dict[str, ReadTask]:
        """Bind one task to each file, by the path that the task says that it reads."""
        tasks: dict[str, ReadTask] = {}
        for task in datasource.get_read_tasks(len(by_path), None, data_context):
            paths = [str(path) for path in task.metadata.input_files or ()]
            if len(paths) != 1 or paths[0] not in by_path:
                raise NonResumableError(
                    f"{self.name} gave a read task for {paths[:3]}, where one task for each file "
                    "was expected, so its rows cannot be bound to their sources."
                )
            tasks[by_path[paths[0]]] = task
        missing = [path for path, source_id in by_path.items() if source_id not in tasks]
        if missing and not selection.predicates:
            raise NonResumableError(
                f"{self.name} gave no read task for {missing[0]}, so nobody can say when that "
                "source is complete."
            )
        return tasks


def _file_has_changed(filesystem: FileSystem, source: Source) -> bool:
    path = source.item if isinstance(source.item, str) else source.item[0]
    return has_changed(filesystem, path, source.fingerprint)


def _nobody_can_see(_: Source) -> bool:
    return False


@dataclass(frozen=True)
class RowGroupReading(FileReading):
    """Row groups of Parquet files; a source's item is ``(path, row group)``."""

    def open(
        self, sources: Sequence[Source], selection: Selection, data_context: Any
    ) -> tuple[Mapping[str, ReadTask], Selection]:
        by_name = {plan.row_group_name(*source.item): source.source_id for source in sources}
        paths = list(dict.fromkeys(source.item[0] for source in sources))
        datasource = plan.plain_datasource(self.reader, paths, dict(self.arguments))
        datasource = plan.row_group_datasource(datasource, [source.item for source in sources])
        datasource, left = plan.push_selection(datasource, selection)
        return self._bound(datasource, by_name, selection, data_context), left


@dataclass(frozen=True)
class KeyReading:
    """Keys, read by a function of the user's: ``load(key)`` returns or yields tables.

    Not repeatable: a database may give its rows in another order each time.
    """

    name: str
    sources: SourceTable
    load: Callable[[Any], Any]
    repeatable: bool = False

    def size_bytes(self, sources: Sequence[Source]) -> int | None:
        return None

    def watch(self) -> Watch:
        return _nobody_can_see

    def open(
        self, sources: Sequence[Source], selection: Selection, data_context: Any
    ) -> tuple[Mapping[str, ReadTask], Selection]:
        tasks = {
            source.source_id: ReadTask(_KeyRead(self.load, source.item), _unknown_metadata())
            for source in sources
        }
        return tasks, selection


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
            yield BlockAccessor.batch_to_block(part)


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
    """The read tasks of a datasource of the user's own; a source's item is the task's position.

    Whether two executions give the same rows is the datasource's secret, so it counts as not
    repeatable.
    """

    name: str
    sources: SourceTable
    datasource: Datasource
    task_count: int
    repeatable: bool = False

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
            files = [list(map(str, task.metadata.input_files or ())) for task in tasks]
            # One task for each file, where the datasource can be asked for that many.
            task_count = max(task_count, sum(map(len, files)))
            tasks = datasource.get_read_tasks(task_count)
            files = [list(map(str, task.metadata.input_files or ())) for task in tasks]
            if not all(len(paths) == 1 for paths in files):
                raise NonResumableError(
                    f"The read tasks of {datasource.get_name()} have no identity that is the same "
                    "in every run: they do not name one file each. Pass source_id=, a function of "
                    "a read task and its position that returns one (what it reads, not where it "
                    "stands), or read by keys=."
                )
            ids = [paths[0] for paths in files]
        else:
            ids = [str(source_id(task, index)) for index, task in enumerate(tasks)]
        sources = SourceTable.of(Source(name, index) for index, name in enumerate(ids))
        refuse_repeated(sources)
        return cls(datasource.get_name(), sources, datasource, task_count)

    def size_bytes(self, sources: Sequence[Source]) -> int | None:
        return None

    def watch(self) -> Watch:
        return _nobody_can_see

    def open(
        self, sources: Sequence[Source], selection: Selection, data_context: Any
    ) -> tuple[Mapping[str, ReadTask], Selection]:
        tasks = self.datasource.get_read_tasks(self.task_count, None, data_context)
        if len(tasks) != len(self.sources):
            raise NonResumableError(
                f"{self.name} gave {len(self.sources)} read tasks at first and {len(tasks)} later, "
                "so they cannot be told apart."
            )
        # Selected after reading: a datasource that selects may cut its tasks otherwise.
        return {source.source_id: tasks[source.item] for source in sources}, selection


def _unknown_metadata() -> BlockMetadata:
    return BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
