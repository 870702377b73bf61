"""How Ray Data's datasources read any file that they are given, wherever they are asked.

The driver plans a datasource over the first file, or a few. From there on it is a template: each
worker has it read the files of its own sources. So the driver opens no other file, and a file that
cannot be opened fails where it is read. `scans` does the same for Ray's newer reader.

Internals of Ray's that are used:

* ``DataContext.use_datasource_v2``: which of its two readers Ray plans a read with.
* ``FileBasedDatasource._paths`` and ``_file_sizes``: its list of files is in the object store.
* ``FileBasedDatasource._NUM_THREADS_PER_TASK``: how many files a task reads at once.
* ``ParquetDatasource._pq_fragments``: to read other files, and row groups, with Ray's reader.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeAlias

import pyarrow as pa
from pyarrow.fs import FileSystem
from ray.data import DataContext, Dataset
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource
from typing_extensions import override

from ray_resume.core.sources import Source, SourceTable
from ray_resume.errors import NonResumableError, ResumeError
from ray_resume.raydata.internals import check_used, unknown_ray
from ray_resume.raydata.paths import resolving
from ray_resume.raydata.read_ahead import read_ahead

try:
    from ray.data._internal.datasource.parquet_datasource import (
        ParquetDatasource,
        _ParquetFragment,
    )
    from ray.data._internal.logical.operators import Read
    from ray.data._internal.planner.plan_expression.expression_visitors import (
        get_column_references,
    )
    from ray.data._internal.util import RetryingPyFileSystem
    from ray.data.datasource.file_based_datasource import FileBasedDatasource
except ImportError as error:
    raise unknown_ray(error) from error

__all__ = [
    "DatasourceFiles",
    "EachByItself",
    "FileReader",
    "ReadTaskFactory",
    "Selection",
    "Unreadable",
    "fail",
    "left_to_select",
    "planned",
    "row_group_name",
    "row_group_of",
]

check_used(
    {
        DataContext: "use_datasource_v2",
        FileBasedDatasource: "_paths _file_sizes _filesystem _data_context get_read_tasks "
        "estimate_inmemory_data_size _NUM_THREADS_PER_TASK",
        ParquetDatasource: "_pq_paths _pq_fragments",
        _ParquetFragment: "_fragment _file_size file_size original",
    }
)


@dataclass(frozen=True)
class Selection:
    """Rows by predicates (all must hold), then columns; ``None`` for all columns."""

    predicates: tuple[Any, ...] = ()
    columns: tuple[str, ...] | None = None


ReadTaskFactory: TypeAlias = Callable[[SourceTable], Sequence[Any]]
"""Makes a Ray read task for each of the sources that it is for, on the worker that reads them.

None stands for a source that was found to have no row that satisfies the predicates. Picklable.
"""


class Unreadable(str):
    """Replaces a row group's number: the reason why the footer of its file could not be read."""

    __slots__ = ()


class FileReader(Protocol):
    """Reads files of one `resumable_read`: any, wherever it is asked."""

    def schema(self, columns: Sequence[str] | None) -> pa.Schema | None:
        """Return the schema that Ray Data gives to its optimizer, None where it gives none."""

    def on(self, filesystem: FileSystem) -> FileReader:
        """Return such a reader for paths on another filesystem."""

    def metadata(self, paths: Sequence[str], sizes: Sequence[int | None]) -> BlockMetadata | None:
        """Return the metadata that plain Ray Data has of these files before reading, if any."""

    def inflation(self) -> float | None:
        """Return how many bytes in memory Ray Data takes a byte of a file for, None if unknown."""

    def task_factory(self, selection: Selection) -> tuple[ReadTaskFactory, Selection]:
        """Return a factory of read tasks, and the part of ``selection`` to make after reading.

        The factory runs on workers, and opens no files.
        """


def planned(
    reader: Callable[..., Dataset], paths: Sequence[str], kwargs: Mapping[str, Any], *, v2: bool
) -> Any:
    """Return the operator that ``reader(paths, **kwargs)`` plans, with either of Ray's readers."""
    with resolving():
        context = DataContext.get_current().copy()
        context.use_datasource_v2 = v2
        with DataContext.current(context):
            # A copy for each call: Ray writes into what it is given.
            dataset = reader(list(paths), **{name: _fresh(kwargs[name]) for name in kwargs})
    return dataset._logical_plan.dag


def _fresh(value: Any) -> Any:
    if type(value) is dict:
        return {name: _fresh(inner) for name, inner in value.items()}
    return [_fresh(inner) for inner in value] if type(value) is list else value


@dataclass(frozen=True)
class DatasourceFiles:
    """Files that a datasource of Ray's reads; it was planned over other files of the same read."""

    name: str
    template: Datasource
    filesystem: FileSystem | None = None

    def on(self, filesystem: FileSystem) -> DatasourceFiles:
        """Return the same, for paths on another filesystem."""
        if isinstance(self.template, FileBasedDatasource):
            moved: Any = copy.copy(self.template)
            errors = moved._data_context.retried_io_errors
            moved._filesystem = RetryingPyFileSystem.wrap(filesystem, retryable_errors=errors)
            return replace(self, template=moved)
        return replace(self, filesystem=filesystem)

    @classmethod
    def planned(
        cls,
        name: str,
        reader: Callable[..., Dataset],
        paths: Sequence[str],
        kwargs: Mapping[str, Any],
    ) -> DatasourceFiles:
        """Plan ``reader`` over ``paths``.

        Raises:
            NonResumableError: the reader plans something that cannot be bound to files.
        """
        operator = planned(reader, paths, kwargs, v2=False)
        if not isinstance(operator, Read):
            raise NonResumableError(
                f"{getattr(reader, '__name__', reader)} plans {operator.name}, which ray_resume "
                "cannot bind to files."
            )
        return cls(name, operator.datasource)

    def schema(self, columns: Sequence[str] | None) -> pa.Schema | None:
        """Return the schema that the datasource gives with its read tasks."""
        datasource, _ = _pushed(self.template, Selection((), _tupled(columns)))
        schemas = [getattr(task, "schema", None) for task in datasource.get_read_tasks(1)]
        return schemas[0] if schemas and isinstance(schemas[0], pa.Schema) else None

    def metadata(self, paths: Sequence[str], sizes: Sequence[int | None]) -> BlockMetadata | None:
        """As :meth:`FileReader.metadata`."""
        if not isinstance(self.template, FileBasedDatasource):
            return None
        (task,) = _with_files(self.template, paths, sizes).get_read_tasks(1)
        metadata: BlockMetadata = task.metadata
        return metadata

    def inflation(self) -> float | None:
        """As :meth:`FileReader.inflation`."""
        if not isinstance(self.template, FileBasedDatasource):
            return None
        size = 1 << 20
        estimate = _with_files(self.template, ["any"], [size]).estimate_inmemory_data_size()
        return None if estimate is None else estimate / size

    def task_factory(self, selection: Selection) -> tuple[ReadTaskFactory, Selection]:
        """As :meth:`FileReader.task_factory`."""
        pushed, left = _pushed(self.template, selection)
        if isinstance(self.template, ParquetDatasource):
            # Its predicate rules out files, so it is given to each of them on its own.
            return _ParquetTasks(self.template, selection, self.filesystem), left
        if isinstance(self.template, FileBasedDatasource):
            return _FileTasks(self.name, pushed), left
        raise NonResumableError(
            f"{self.template.get_name()} reads no files, and ray_resume cannot bind what it reads "
            "to files."
        )


def _tupled(columns: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if columns is None else tuple(columns)


def _pushed(datasource: Datasource, selection: Selection) -> tuple[Datasource, Selection]:
    """Have ``datasource`` select rows and columns as far as it can; return the rest."""
    left = []
    for predicate in selection.predicates:
        narrowed = datasource
        if datasource.supports_predicate_pushdown():
            narrowed = datasource.apply_predicate(predicate)
        # A datasource that cannot apply a predicate as a whole returns itself.
        if narrowed is datasource:
            left.append(predicate)
        datasource = narrowed
    if selection.columns is None:
        return datasource, Selection(tuple(left))
    if not datasource.supports_projection_pushdown():
        return datasource, Selection(tuple(left), selection.columns)
    needed, after = left_to_select(selection.columns, left)
    return datasource.apply_projection({name: name for name in needed}), after


def left_to_select(columns: Sequence[str], left: Sequence[Any]) -> tuple[list[str], Selection]:
    """Say which columns to read for ``columns``, if ``left`` is evaluated after reading."""
    referred = (name for predicate in left for name in get_column_references(predicate))
    needed = list(dict.fromkeys([*columns, *referred]))
    more = len(needed) > len(columns)
    return needed, Selection(tuple(left), tuple(columns) if more else None)


def _with_files(
    datasource: Datasource, paths: Sequence[str], sizes: Sequence[int | None]
) -> Datasource:
    # Its own list of files is in the object store.
    narrowed: Any = copy.copy(datasource)
    narrowed._paths, narrowed._file_sizes = lambda: list(paths), lambda: list(sizes)
    bound: Datasource = narrowed
    return bound


@dataclass(frozen=True)
class _FileTasks:
    """A factory: a copy of ``datasource`` makes a read task for each file, bound by its name."""

    name: str
    datasource: Any

    def __call__(self, sources: SourceTable) -> Sequence[Any]:
        paths = [str(source.item) for source in sources]
        sizes = [source.fingerprint.size for source in sources]
        bound: Any = _with_files(self.datasource, paths, sizes)
        # Each task reads one file; `read_ahead` has the threads.
        bound._NUM_THREADS_PER_TASK = 0
        tasks: dict[str, Any] = dict.fromkeys(paths)
        for task in bound.get_read_tasks(len(paths)):
            files = [str(path) for path in task.metadata.input_files or ()]
            if len(files) != 1 or files[0] not in tasks:
                raise NonResumableError(
                    f"{self.name} gave a read task for {files[:3]}, where one task for each file "
                    "was expected, so its rows cannot be bound to their sources."
                )
            tasks[files[0]] = task
        missing = [path for path, task in tasks.items() if task is None]
        if missing:
            raise NonResumableError(
                f"{self.name} gave no read task for {missing[0]}, so ray_resume cannot say when "
                "that source is complete."
            )
        threads = self.datasource._NUM_THREADS_PER_TASK
        return read_ahead(list(tasks.values()), threads) if threads else list(tasks.values())


@dataclass(frozen=True)
class _ParquetTasks:
    """A factory: a copy of ``datasource`` makes the read task of each file or row group."""

    datasource: Any
    selection: Selection
    filesystem: FileSystem | None

    def __call__(self, sources: SourceTable) -> Sequence[Any]:
        whole = self.datasource._pq_fragments[0].original
        return [self._task(whole, source) for source in sources]

    def _task(self, whole: Any, source: Source) -> Any:
        path, row_group = row_group_of(source)
        if isinstance(row_group, Unreadable):
            return partial(fail, path, row_group)
        fragment = whole.format.make_fragment(path, self.filesystem or whole.filesystem)
        narrowed = copy.copy(self.datasource)
        size = source.fingerprint.size or 0
        if row_group is None:
            narrowed._pq_paths = [path]
            narrowed._pq_fragments = [_ParquetFragment(fragment, size)]
        else:
            narrowed._pq_paths = [row_group_name(path, row_group)]
            narrowed._pq_fragments = [_RowGroup(fragment, size, row_group)]
        pushed, _ = _pushed(narrowed, self.selection)
        tasks = pushed.get_read_tasks(1)
        # None if the predicate has ruled it out.
        return tasks[0] if tasks else None


@dataclass(frozen=True)
class EachByItself:
    """Files of which none could be opened to plan with: each is planned where it is read."""

    name: str
    reader: Callable[..., Dataset]
    kwargs: Mapping[str, Any]
    filesystem: FileSystem | None = None

    def on(self, filesystem: FileSystem) -> EachByItself:
        """As :meth:`FileReader.on`."""
        return replace(self, filesystem=filesystem)

    def schema(self, columns: Sequence[str] | None) -> pa.Schema | None:
        """Return None."""
        return None

    def metadata(self, paths: Sequence[str], sizes: Sequence[int | None]) -> BlockMetadata | None:
        """Return None."""
        return None

    def inflation(self) -> float | None:
        """Return None."""
        return None

    def task_factory(self, selection: Selection) -> tuple[ReadTaskFactory, Selection]:
        """As :meth:`FileReader.task_factory`."""
        return self._tasks, selection

    def _tasks(self, sources: SourceTable) -> Sequence[Any]:
        return [partial(self._read, sources[i : i + 1]) for i in range(len(sources))]

    def _read(self, source: SourceTable) -> Iterator[Any]:
        path, row_group = row_group_of(source[0])
        if isinstance(row_group, Unreadable):
            fail(path, row_group)
        files = DatasourceFiles.planned(self.name, self.reader, [path], self.kwargs)
        if self.filesystem is not None:
            files = files.on(self.filesystem)
        tasks, _ = files.task_factory(Selection())
        for task in tasks(source):
            yield from task()


def row_group_of(source: Source) -> tuple[str, Any]:
    """Return a source's path, and its row group's number: None of a whole file, or `Unreadable`."""
    item = source.item
    return (str(item), None) if isinstance(item, str) else (str(item[0]), item[1])


def fail(path: str, reason: str) -> Iterator[Any]:
    """Fail as the read task of a file whose footer could not be read.

    Raises:
        ResumeError: always.
    """
    raise ResumeError(
        f"The footer of {path} could not be read when its row groups were listed: {reason}. "
        "Repair or remove the file; the next run lists it again."
    )


def row_group_name(path: str, row_group: int) -> str:
    """Format a row group as Ray Data's own unit ids."""
    return f"{path}#rg{row_group}"


class _RowGroup(_ParquetFragment):
    """A fragment with one row group. Ray's own forgets its row groups when it is pickled."""

    def __init__(self, fragment: Any, file_size: int, row_group: int) -> None:
        super().__init__(fragment, file_size)
        self._row_group = row_group

    @property
    @override
    def original(self) -> Any:
        whole = self._fragment
        return whole.format.make_fragment(
            whole.path, whole.filesystem, whole.partition_expression, row_groups=[self._row_group]
        )
