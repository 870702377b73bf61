"""The output of another resumable pipeline as an input: its sources are the sources here.

The driver asks that pipeline's checkpoint for the live parts of each source when it lists. It asks
again before an execution if some of the files are gone. Runs of that pipeline may rewrite files at
any moment. So a worker that does not find a file leaves its sources unsealed, and the next pass
reads them from where they are then. A file never changes: as long as it is there, it has the rows
that were listed, whatever has become of their sources since. The next run sees that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem
from ray.data.block import BlockMetadata
from typing_extensions import override

from ray_resume.core.digests import Positions
from ray_resume.core.part_lists import PartLists, Parts
from ray_resume.core.sources import Source, SourceTable
from ray_resume.core.upstream import moved_parts
from ray_resume.errors import CheckpointError, NonResumableError, SourceChangedError
from ray_resume.raydata.filereads import ReadTaskFactory, Selection, left_to_select
from ray_resume.raydata.scans import Scan
from ray_resume.read.file_rows import FileRows, OutputFiles
from ray_resume.read.inputs import ChangeCheck, FileInput, file_reader_of, never_changed
from ray_resume.read.options import is_repeatable
from ray_resume.read.overlap import InputFolders
from ray_resume.read.paths import located, normalized
from ray_resume.read.read_errors import RowsMovedError

__all__ = ["PartsInput", "UpstreamRead", "read_upstream"]

_READERS = {
    "parquet": "read_parquet",
    "json": "read_json",
    "csv": "read_csv",
    "orc": "read_orc",
    "tar": "read_webdataset",
    "npy": "read_numpy",
    **dict.fromkeys(("png", "jpeg", "tiff", "bmp", "gif"), "read_images"),
}
"""Which of Ray's readers reads the files of a format, by their ending."""

# The checkpoint decides which rows are read, and no row knows of other rows of its file.
_REFUSED = (
    *("catalog", "file_extensions", "ignore_missing_paths", "include_row_hash", "meta_provider"),
    *("partition_filter", "shuffle", "skip_paths"),
)
# Bytes in memory for a byte on disk, where the reader does not tell.
_INFLATION = 5.0
# A run may remove a file between the look at its checkpoint and the look at the folder.
_LOOK_AGAIN_S = (0.1, 1.0, 3.0)
# A row group is read by each task that has rows of it. So tasks share a file only where it is
# large, or where there would be fewer tasks than this, too few for the stages after the read.
_FEW_TASKS = 16
_PIECE_BYTES = 1 << 20, 32 << 20
# So few files are looked for one by one; of more, the folder is listed.
_FEW_FILES = 256


@dataclass(frozen=True)
class PartsInput(FileInput):
    """Parts of output files. Each source's item is its parts; it may have none.

    Args:
        folder: the path of the output folder on ``filesystem``.
        sizes: the bytes of the files, by name.
        current: returns the sources and their parts as they are now. In the driver.
        checkpoint: the other pipeline's, for messages.
        reader: the name of Ray's reader.
    """

    folder: str = field(kw_only=True)
    sizes: Mapping[str, int] = field(kw_only=True)
    current: Callable[[], SourceTable] = field(kw_only=True)
    checkpoint: str = field(kw_only=True)
    reader: str = field(kw_only=True)

    @override
    def sizes_bytes(self, sources: SourceTable) -> npt.NDArray[np.float64]:
        return _parts_of(sources).sizes(self.sizes) * self.inflation

    @override
    def most_tasks(self, sources: SourceTable) -> int:
        return len(self._cuts(sources))

    @override
    def groups(self, sources: SourceTable, count: int) -> list[range]:
        if count >= len(sources):
            return super().groups(sources, count)
        # Where a cut is best, and the nearest one before it at which files are not read twice.
        cuts = self._cuts(sources)
        wanted = np.arange(count) * len(sources) // max(count, 1)
        starts = cuts[np.searchsorted(cuts, wanted, "right") - 1] if len(cuts) > count else cuts
        edges = [*np.unique(starts).tolist(), len(sources)]
        return [range(start, stop) for start, stop in pairwise(edges)]

    def _cuts(self, sources: SourceTable) -> Positions:
        least, most = _PIECE_BYTES
        if self.reader != "read_parquet":
            # They are read from the start of a file, whichever rows are wanted.
            return _parts_of(sources).cuts(self.sizes, least, math.inf, _FEW_TASKS // 4)
        return _parts_of(sources).cuts(self.sizes, least, most, _FEW_TASKS)

    @override
    def metadata(self, sources: SourceTable) -> BlockMetadata | None:
        if isinstance(self.files, Scan):
            return self.files.metadata([], [])
        paths = [f"{self.folder}/{file}" for file in sorted(_parts_of(sources).files())]
        size_bytes = round(self.sizes_bytes(sources).sum())
        return BlockMetadata(None, size_bytes, input_files=tuple(paths), exec_stats=None)

    @override
    def path_of(self, source: Source) -> str | None:
        return f"{self.folder}/{source.item[0].file}" if source.item else None

    @override
    def change_check(self) -> ChangeCheck:
        # The rows are those that were listed: a source with other rows has parts in other files.
        return never_changed

    @override
    def open(
        self, sources: SourceTable, selection: Selection, data_context: Any
    ) -> tuple[Callable[[range], ReadTaskFactory], Selection]:
        needed, after = selection.columns, Selection(selection.predicates)
        if needed is not None:
            # Predicates come later: rows are found by their places in the file.
            names, after = left_to_select(needed, selection.predicates)
            needed = tuple(names)
        tasks, left = self.files.task_factory(Selection((), needed))
        if left.columns is not None:
            after = Selection(after.predicates, selection.columns)
        files = OutputFiles(
            self.folder, self.filesystem, tasks, self.reader == "read_parquet", self.reader
        )
        factory = _PartTasks(files, self._moved(sources), self.checkpoint)
        return lambda _: factory, after

    def _moved(self, sources: SourceTable) -> Mapping[str, Parts | None]:
        """Return what `moved_parts` does, if a file of ``sources`` is gone."""
        listed = _parts_of(sources).files()
        if len(_sizes(self.filesystem, self.folder, listed)) == len(listed):
            return {}

        def look() -> tuple[Mapping[str, Parts | None], Collection[str]]:
            moved = moved_parts(sources, self.current())
            every = (moved.get(one.source_id, one.item) for one in sources)
            return moved, {part.file for parts in every if parts is not None for part in parts}

        found = _present(look, self.filesystem, self.folder, self.checkpoint)
        moved: Mapping[str, Parts | None] = found.what
        return moved


@dataclass(frozen=True)
class _PartTasks:
    """A factory: reads of sources that share what they read, if they are called in order.

    Args:
        moved: the newest parts of sources whose rows were elsewhere when they were listed. None
            for a source that has other rows now.
    """

    files: OutputFiles
    moved: Mapping[str, Parts | None]
    checkpoint: str

    def __call__(self, sources: SourceTable) -> Sequence[Callable[[], Iterator[Any]]]:
        rows = FileRows(self.files)
        return [
            partial(self._read, rows, one.source_id, self.moved.get(one.source_id, one.item))
            for one in sources
        ]

    def _read(self, rows: FileRows, source_id: str, parts: Parts | None) -> Iterator[Any]:
        if parts is None:
            raise SourceChangedError(
                f"{source_id} was processed again or reset in {self.checkpoint} after it was "
                "listed. Run again: the run then reads it as it is."
            )
        for part in parts:
            try:
                yield from rows.of(part)
            except Exception as error:
                rows.forget(part.file)
                if not self._is_gone(part.file):
                    raise
                raise RowsMovedError(
                    f"The file {self.files.path(part.file)} is gone: a run of the pipeline of "
                    f"{self.checkpoint} has rewritten it since this execution began. Execute it "
                    "again."
                ) from error

    def _is_gone(self, file: str) -> bool:
        try:
            info = self.files.filesystem.get_file_info(self.files.path(file))
        except OSError:
            return False
        return bool(info.type == FileType.NotFound)


class UpstreamRead(NamedTuple):
    """How the output of another pipeline is read: see `resumable_read._Read`."""

    input: PartsInput
    columns: list[str] | None
    folders: InputFolders
    sampled: Sequence[str]


def read_upstream(
    reader: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    folder: str,
    current: Callable[[], SourceTable],
    checkpoint: str,
) -> UpstreamRead:
    """List the sources of another pipeline, and plan how their rows are read.

    Args:
        arguments: the reader's, by name.
        folder: the path or URI of the pipeline's output folder.
        current: returns the pipeline's sources and their parts as they are now.
        checkpoint: the pipeline's, for messages.

    Raises:
        NonResumableError: the reader does not read such files, or not by rows.
        CheckpointError: a file with live rows is gone.
    """
    name = reader.__name__
    _refuse_options(name, arguments)
    given = arguments.get("filesystem")
    del arguments["paths"]
    opened_on, (plain,) = located(folder, given)
    filesystem, (root,) = normalized(opened_on, [plain])
    if not isinstance(filesystem, LocalFileSystem) or given is not None:
        arguments["filesystem"] = opened_on
    plain = plain.rstrip("/")
    sources, sizes = _present(lambda: _listed(current()), opened_on, plain, checkpoint)
    _refuse_other_formats(name, sizes, checkpoint)
    names = sorted(sizes)
    files = SourceTable.of_files(
        [f"{plain}/{file}" for file in names],
        [sizes[file] for file in names],
        [None] * len(names),
    )
    title = name.removeprefix("read_").title()
    planned = file_reader_of(title, reader, arguments, opened_on, files)
    parts_input = PartsInput(
        title,
        sources,
        planned.reader,
        planned.reader.inflation() or _INFLATION,
        opened_on,
        repeatable=is_repeatable(arguments),
        selects=name == "read_parquet",
        folder=plain,
        sizes=sizes,
        current=current,
        checkpoint=checkpoint,
        reader=name,
    )
    folders = InputFolders.of(filesystem, [root], [f"{root}/{file}" for file in names])
    return UpstreamRead(parts_input, planned.columns, folders, planned.sampled)


def _listed(sources: SourceTable) -> tuple[SourceTable, Collection[str]]:
    return sources, _parts_of(sources).files()


def _parts_of(sources: SourceTable) -> PartLists:
    parts = sources.part_lists
    assert parts is not None
    return parts


class _Found(NamedTuple):
    what: Any
    sizes: Mapping[str, int]


def _present(
    look: Callable[[], tuple[Any, Collection[str]]],
    filesystem: FileSystem,
    folder: str,
    checkpoint: str,
) -> _Found:
    """Return what ``look`` does, and the sizes of its files, once all of them are there.

    Raises:
        CheckpointError: some are missing, whenever one looks.
    """
    for wait_s in (*_LOOK_AGAIN_S, None):
        what, files = look()
        sizes = _sizes(filesystem, folder, files)
        missing = sorted(set(files) - sizes.keys())
        if not missing:
            return _Found(what, sizes)
        if wait_s is not None:
            time.sleep(wait_s)
    raise CheckpointError(
        f"{len(missing)} output files with rows of sources of {checkpoint} are gone, "
        f"{folder}/{missing[0]} for one. If the folder was moved, run: ray-resume rebind "
        f"{checkpoint} FOLDER. Else put them back; or reset the sources that have rows in them "
        f"(ray-resume sources {checkpoint} lists both), and run that pipeline again."
    )


def _sizes(filesystem: FileSystem, folder: str, files: Collection[str]) -> dict[str, int]:
    """Return the sizes of those of ``files`` that are there."""
    base = f"{folder}/"
    if len(files) <= _FEW_FILES:
        infos = filesystem.get_file_info([f"{base}{file}" for file in files])
    else:
        infos = filesystem.get_file_info(FileSelector(folder, recursive=True, allow_not_found=True))
    found = {
        info.path.removeprefix(base): info.size or 0 for info in infos if info.type == FileType.File
    }
    return {file: found[file] for file in files if file in found}


def _refuse_options(name: str, arguments: Mapping[str, Any]) -> None:
    refused = [option for option in _REFUSED if arguments.get(option)]
    if refused:
        raise NonResumableError(
            f"ray.data.{name} got {', '.join(refused)}, and the checkpoint of the pipeline before "
            "decides which rows are read. Leave the option out; filter rows by ds.filter(expr=...)."
        )


def _refuse_other_formats(name: str, files: Collection[str], checkpoint: str) -> None:
    """Make sure that ``ray.data.<name>`` reads the format of all files.

    Raises:
        NonResumableError: it does not; the message names the reader that does.
    """
    formats: dict[str, str] = {}
    for file in files:
        formats.setdefault(file.rpartition("/")[2].split(".")[1], file)
    if not formats and name not in _READERS.values():
        formats = {"such": "any file"}
    if len({_READERS.get(ending) for ending in formats}) > 1:
        raise NonResumableError(
            f"The pipeline of {checkpoint} has written files of several formats "
            f"({', '.join(file for _, file in sorted(formats.items()))}), and a reader reads those "
            "of one. Have it process all sources again into one format: "
            'on_pipeline_change="restart".'
        )
    for ending, file in sorted(formats.items()):
        fitting = _READERS.get(ending)
        if fitting is None:
            raise NonResumableError(
                f"The pipeline of {checkpoint} has written {ending} files ({file} for one), which "
                "cannot be read source by source. Have it write Parquet, JSON lines, CSV or ORC "
                "(format= of resumable_write), into a new folder and with a new checkpoint."
            )
        if fitting != name:
            raise NonResumableError(
                f"The pipeline of {checkpoint} has written {ending} files ({file} for one), which "
                f"ray.data.{name} does not read. Pass ray.data.{fitting}."
            )
