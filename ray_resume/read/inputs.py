"""Inputs of reads: the sources of each, and how read tasks for them are made.

An :class:`Input` knows all sources of one `resumable_read`, and makes Ray read tasks for any of
them. It opens no source before it is asked for tasks. Files are here; keys are in `key_input`, a
user's datasource is in `datasource_input`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
from pyarrow.fs import FileSystem
from ray.data.block import BlockMetadata
from typing_extensions import override

from ray_resume.core.sources import Source, SourceTable
from ray_resume.raydata.filereads import (
    DatasourceFiles,
    EachByItself,
    FileReader,
    ReadTaskFactory,
    Selection,
    row_group_of,
)
from ray_resume.raydata.scans import SAMPLED, Scan, planned_scan, reads_with_scans
from ray_resume.read.fixed_schema import explained
from ray_resume.read.footers import readable
from ray_resume.read.listing import has_changed
from ray_resume.read.splits import SplitFiles, split_sizes
from ray_resume.read.workdir import is_local_at

__all__ = [
    "ChangeCheck",
    "FileInput",
    "Input",
    "PlannedFiles",
    "file_reader_of",
    "never_changed",
    "unknown_metadata",
]

ChangeCheck: TypeAlias = Callable[[Source], bool]
"""Returns whether a source has changed since it was listed, as far as metadata shows; picklable."""

# A dataset knows the names of so many files at most: a million would take 100 MB of the driver.
_MAX_NAMED_FILES = 10_000


class Input(ABC):
    """All sources of a read, and how to read them.

    There may be millions, so opening has two steps: the driver finds out what they have in common,
    and the workers open each of them. By default, nothing is known of a source before it is read.

    Attributes:
        name: a name for the plan, such as ``Parquet``.
        sources: all sources, in the order in which they are read.
    """

    name: str
    sources: SourceTable

    @property
    def repeatable(self) -> bool:
        """Whether each read of a source gives the same rows in the same order."""
        return False

    @property
    def selects(self) -> bool:
        """Whether plain Ray Data has this reader itself select rows and columns."""
        return False

    @property
    def filters(self) -> bool:
        """Whether this reader itself may leave out rows, before anything else sees them."""
        return self.selects

    @property
    def reorders(self) -> bool:
        """Whether columns that were selected come in the order of the latest selection."""
        return False

    @property
    def distributed(self) -> bool:
        """Whether any node can read it, and not only the driver's."""
        return True

    def sizes_bytes(self, sources: SourceTable) -> npt.NDArray[np.float64] | None:
        """Estimate the bytes in memory of each of ``sources``, None if they are not known."""
        return None

    def schema(self, columns: Sequence[str] | None) -> pa.Schema | None:
        """Return the schema of ``columns`` (None: of all), None if it is not known.

        Ray's optimizer goes by it. It is the same in every execution.
        """
        return None

    def most_tasks(self, sources: SourceTable) -> int:
        """Return among how many read tasks ``sources`` can be shared out at no extra cost."""
        return len(sources)

    def groups(self, sources: SourceTable, count: int) -> list[range]:
        """Cut the positions of ``sources`` into at most ``count`` groups, for a task each.

        None of them is empty. If there are as many as sources, each is alone.
        """
        n = min(max(count, 1), len(sources))
        return [range(i * len(sources) // n, (i + 1) * len(sources) // n) for i in range(n)]

    def metadata(self, sources: SourceTable) -> BlockMetadata | None:
        """Return the metadata that plain Ray Data has of ``sources`` before it reads them."""
        return None

    def change_check(self) -> ChangeCheck:
        """Return a check of whether a source has changed since it was listed."""
        return never_changed

    @abstractmethod
    def open(
        self, sources: SourceTable, selection: Selection, data_context: Any
    ) -> tuple[Callable[[range], ReadTaskFactory], Selection]:
        """Get ready to read ``sources``, in the driver.

        Returns:
            A function that maps a range of positions to the factory of their read tasks; and the
            rest of the selection, to be made after reading.
        """


def unknown_metadata() -> BlockMetadata:
    """Return the metadata of a read task that knows nothing before it runs."""
    return BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)


@dataclass(frozen=True)
class FileInput(Input):
    """Files, read by one of Ray's ``read_*`` functions.

    ``files`` reads any of them, by paths on ``filesystem``. The driver opens no file, except for
    the footers of the first ones of Parquet, as plain Ray Data does. ``inflation`` is how many
    bytes in memory a byte on disk is taken for.
    """

    name: str
    sources: SourceTable
    files: FileReader
    inflation: float
    filesystem: FileSystem
    repeatable: bool = True
    distributed: bool = True
    selects: bool = False

    @property
    @override
    def reorders(self) -> bool:
        return isinstance(self.files, Scan)

    @override
    def sizes_bytes(self, sources: SourceTable) -> npt.NDArray[np.float64]:
        # A size that is not known counts as zero.
        sizes = sources.fingerprints.sizes
        if isinstance(self.files, SplitFiles):
            sizes = split_sizes(sources)
        return sizes.astype(np.float64) * self.inflation

    @override
    def schema(self, columns: Sequence[str] | None) -> pa.Schema | None:
        return self.files.schema(columns)

    @override
    def metadata(self, sources: SourceTable) -> BlockMetadata | None:
        if len(sources) > _MAX_NAMED_FILES:
            return None
        paths = list(dict.fromkeys(row_group_of(source)[0] for source in sources))
        sizes = {row_group_of(source)[0]: source.fingerprint.size for source in sources}
        metadata = self.files.metadata(paths, [sizes[path] for path in paths])
        if metadata is None:
            size_bytes = round(self.sizes_bytes(sources).sum())
            return BlockMetadata(None, size_bytes, input_files=tuple(paths), exec_stats=None)
        return metadata

    def path_of(self, source: Source) -> str | None:
        """Return the path of a file that has rows of a source, if it has any."""
        return row_group_of(source)[0]

    @override
    def open(
        self, sources: SourceTable, selection: Selection, data_context: Any
    ) -> tuple[Callable[[range], ReadTaskFactory], Selection]:
        tasks, left = self.files.task_factory(selection)
        return lambda _: tasks, left

    @override
    def change_check(self) -> ChangeCheck:
        return partial(_file_has_changed, self.filesystem)


class PlannedFiles(NamedTuple):
    """How files are read.

    Attributes:
        reader: reads any of them.
        columns: those that are selected after that, if any are.
        sampled: the paths of the files that the schema of the read comes from, if it has one.
    """

    reader: FileReader
    columns: list[str] | None = None
    sampled: Sequence[str] = ()


def file_reader_of(
    name: str,
    reader: Callable[..., Any],
    arguments: Mapping[str, Any],
    filesystem: FileSystem,
    sources: SourceTable,
) -> PlannedFiles:
    """Plan how files are read, over the first of ``sources``, which are all that were listed.

    So the plan does not depend on what is pending. Files that cannot be opened are skipped.

    Raises:
        ResumeError: no schema holds those of two files; the message names both.
    """
    scanned = reads_with_scans(getattr(reader, "__name__", ""))

    # This process plans, others read: there, relative paths may mean something else.
    moved = is_local_at(filesystem)

    def planned(paths: Sequence[str], kwargs: Mapping[str, Any]) -> PlannedFiles:
        files: FileReader
        columns = None
        if scanned:
            files, columns = planned_scan(reader, paths, kwargs)
        else:
            files = DatasourceFiles.planned(name, reader, paths, kwargs)
        # A schema that the user gives is not that of any file.
        sampled = paths if scanned and kwargs.get("schema") is None else ()
        return PlannedFiles(files.on(filesystem) if moved else files, columns, sampled)

    if not sources:
        return PlannedFiles(EachByItself(name, reader, arguments))
    if reader is not ray.data.read_parquet:
        return planned([sources[0].item], arguments)
    candidates = _not_empty(sources) if scanned else _paths(sources)
    first = list(islice(candidates, SAMPLED)) or [sources[0].item]
    try:
        return planned(first, arguments)
    except Exception:
        good = readable(filesystem, chain(first, candidates), SAMPLED)
    if good:
        try:
            return planned(good, arguments)
        except pa.ArrowException as error:
            raise explained(error, filesystem, good if scanned else ()) from error
    if scanned:
        # Without a schema, Ray reads no footer now, and each file by its own schema later.
        return planned(first[:1], {**arguments, "schema": pa.schema([])})
    each = EachByItself(name, reader, arguments)
    return PlannedFiles(each.on(filesystem) if moved else each)


def never_changed(_: Source) -> bool:
    """Return False: whatever is read is what was listed."""
    return False


def _paths(sources: SourceTable) -> Iterator[str]:
    return (source.item for source in sources)


def _not_empty(sources: SourceTable) -> Iterator[str]:
    return (source.item for source in sources if source.fingerprint.size != 0)


def _file_has_changed(filesystem: FileSystem, source: Source) -> bool:
    return has_changed(filesystem, row_group_of(source)[0], source.fingerprint)
