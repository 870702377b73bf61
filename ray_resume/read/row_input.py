"""`RowInput`: files whose sources are row ranges, and the armed datasource that reads them.

Importable on workers: knows neither checkpoints nor lmdb.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from ray.data import DataContext
from ray.data.datasource import ReadTask
from typing_extensions import override

from ray_resume.core.digests import Positions
from ray_resume.core.range_items import END, WHOLE, RangeItems
from ray_resume.core.row_ranges import range_id
from ray_resume.core.row_reading import RowFile
from ray_resume.core.shards import Shard
from ray_resume.core.sources import Source, SourceTable
from ray_resume.raydata import blocks
from ray_resume.raydata.filereads import ReadTaskFactory, Selection
from ray_resume.read.datasource import ArmedDatasource, ResumableDatasource
from ray_resume.read.granularity import SPLIT_ROWS
from ray_resume.read.inputs import FileInput
from ray_resume.read.read_task import ResumableReadTask
from ray_resume.read.row_read_task import RowReadTask
from ray_resume.run.client import LedgerClient

__all__ = ["ArmedRows", "RowInput"]


@dataclass(frozen=True)
class RowInput(FileInput):
    """Files of which each range of ``split_rows`` rows is a source; ``sources`` are their ends.

    ``share`` is the run's: ranges that are not in it are dropped after they were numbered.
    """

    split_rows: int = SPLIT_ROWS
    share: Shard | None = None

    @property
    def ends(self) -> npt.NDArray[np.bool_]:
        """Which sources are ends of files, and not files or parts of them that are known."""
        found: npt.NDArray[np.bool_] = _items(self.sources).ranges == END
        return found

    @property
    @override
    def filters(self) -> bool:
        # Rows are numbered before any is left out.
        return False

    @override
    def sizes_bytes(self, sources: SourceTable) -> npt.NDArray[np.float64]:
        items = _items(sources)
        bytes_ = sources.fingerprints.sizes.astype(np.float64)
        for position in np.flatnonzero(items.ranges == WHOLE).tolist():
            if not isinstance(items[position], str):
                bytes_[position] = items[position][1].end - items[position][1].first
        # The sources of a file share its bytes.
        shares = np.bincount(items.files, minlength=1)[items.files]
        sizes: npt.NDArray[np.float64] = bytes_ * self.inflation / shares
        return sizes

    @override
    def most_tasks(self, sources: SourceTable) -> int:
        return len(np.unique(_items(sources).files))

    @override
    def groups(self, sources: SourceTable, count: int) -> list[range]:
        """Cut ``sources``, of which those of a file stand together: a file is in one group."""
        files = _items(sources).files
        starts = np.append(np.flatnonzero(np.diff(files, prepend=-1)), len(files)).tolist()
        most = len(starts) - 1
        n = min(max(count, 1), most)
        cuts = [starts[i * most // n] for i in range(n)] + [len(files)] if n else []
        return [range(first, stop) for first, stop in itertools.pairwise(cuts)]

    @override
    def open(
        self, sources: SourceTable, selection: Selection, data_context: Any
    ) -> tuple[Callable[[range], ReadTaskFactory], Selection]:
        tasks, left = self.files.task_factory(selection)
        whole = _WholeFiles(tasks, self.split_rows, self.share)
        return lambda _: whole, left


def _items(sources: SourceTable) -> RangeItems:
    items = sources.ranges
    assert items is not None
    return items


@dataclass(frozen=True)
class _WholeFiles:
    """A factory: reads files from start to end; given ends of files, those rows of a share."""

    tasks: ReadTaskFactory
    split_rows: int
    share: Shard | None

    def __call__(self, sources: SourceTable) -> Sequence[Any]:
        if sources.ranges is None:
            return self.tasks(sources)
        is_whole = sources.ranges.ranges == WHOLE
        files = [
            source if whole else _file_of(source)
            for source, whole in zip(sources, is_whole.tolist(), strict=True)
        ]
        tasks = self.tasks(SourceTable.of(files))
        if self.share is None:
            return tasks
        return [
            task if task is None or whole else partial(self._share, file.source_id, task)
            for file, task, whole in zip(files, tasks, is_whole.tolist(), strict=True)
        ]

    def _share(self, file: str, task: Any) -> Iterator[Any]:
        assert self.share is not None
        first = 0
        for block in task():
            rows = np.arange(first, first + blocks.num_rows(block))
            first += len(rows)
            ranges, of = np.unique(rows // self.split_rows, return_inverse=True)
            held = [self.share.holds(range_id(file, n, self.split_rows)) for n in ranges.tolist()]
            yield blocks.take(block, np.array(held, bool)[of])


def _file_of(source: Source) -> Source:
    """Return the file that an end or a range is of."""
    name, _, _ = source.source_id.rpartition("#rows=")
    return Source(name, source.item[0], source.fingerprint)


class ArmedRows(ArmedDatasource):
    """The pending ranges of one pass, and the ends of files that it is to find.

    Args:
        known: all ranges and ends that the run knows; what is not among ``sources`` is dropped.
    """

    def __init__(
        self,
        base: ResumableDatasource,
        sources: SourceTable,
        numbers: Sequence[int],
        client: LedgerClient,
        known: RangeItems,
    ) -> None:
        items = _items(sources)
        # The reads of a file are one.
        order = np.lexsort((items.ranges, items.files))
        self._ordered = np.asarray(numbers, np.int64)[order]
        super().__init__(base, sources.take(order), self._ordered.tolist(), client)
        order = np.lexsort((known.ranges, known.files))
        self._known = known.take(order)

    @override
    def _read_tasks(self, parallelism: int, data_context: DataContext) -> list[ReadTask]:
        selection = Selection(self._predicates, self.selected_columns)
        tasks_of, left = self.input.open(self.sources, selection, data_context)
        is_whole = _items(self.sources).ranges == WHOLE
        tasks: list[ReadTask] = []
        for group in self.input.groups(self.sources, parallelism):
            positions = np.arange(group.start, group.stop)
            wholes, others = positions[is_whole[positions]], positions[~is_whole[positions]]
            for some in (wholes, others):
                if len(some):
                    run = self._task(some, is_whole.item(some[0]), tasks_of(group), left)
                    tasks.append(ReadTask(run, self._metadata(self.sources.take(some))))
        return tasks

    def _task(
        self, positions: Positions, whole: bool, tasks: ReadTaskFactory, left: Selection
    ) -> ResumableReadTask | RowReadTask:
        check = self.input.change_check()
        if not whole:
            return RowReadTask(list(self._files(positions)), tasks, left, check, self._client)
        sources = SourceTable.of(list(self.sources.take(positions)))
        numbers = self._ordered[positions].tolist()
        return ResumableReadTask(sources, numbers, tasks, left, True, check, self._client)

    def _files(self, positions: Positions) -> Iterator[RowFile]:
        """Yield what is to be read of each file that has sources at ``positions``."""
        assert isinstance(self.input, RowInput)
        items = _items(self.sources)
        files = items.files[positions]
        cuts = np.append(np.flatnonzero(np.diff(files, prepend=-1)), len(files))
        for start, end_ in itertools.pairwise(cuts.tolist()):
            # Those of a file stand together.
            first, stop = int(positions[start]), int(positions[end_ - 1]) + 1
            known = np.searchsorted(self._known.files, [items.files[first], items.files[first] + 1])
            ranges = self._known.ranges[known[0] : known[1]]
            wanted, numbers = items.ranges[first:stop], self._ordered[first:stop]
            end = None
            if wanted[0] == END:
                end = int(numbers[0])
                wanted, numbers = wanted[1:], numbers[1:]
            yield RowFile(
                _file_of(self.sources[first]),
                self.input.split_rows,
                ranges[ranges >= 0].copy(),
                wanted.copy(),
                numbers.copy(),
                end,
                self.input.share,
            )
