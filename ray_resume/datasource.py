"""The two datasources: what `resumable_read` gives to Ray Data, and what replaces it when armed.

Importable on workers: knows neither checkpoints nor lmdb. A read task's work is
:class:`SourceReader`: read one source after another, add the two columns, seal each.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.data import DataContext
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from ray_resume import batches, plan
from ray_resume.client import LedgerClient
from ray_resume.errors import NonResumableError
from ray_resume.ledger import Seal
from ray_resume.lineage import MODULUS, SOURCE_COLUMN, TOKEN_COLUMN, read_nonce, token_sum, tokens
from ray_resume.listing import FileSource

__all__ = ["ArmedDatasource", "FileRead", "ResumableDatasource", "SourceReader"]

_OURS = (SOURCE_COLUMN, TOKEN_COLUMN)

# As many tasks as Ray Data makes at least of an input that is large enough.
_SPREAD_OVER_TASKS = 200

# Seals of small sources travel together, but none waits longer than this.
_SEAL_INTERVAL_S = 0.1


@dataclass(frozen=True)
class FileRead:
    """How to read files: ``open(paths)`` gives the plain datasource of exactly these paths."""

    name: str
    open: Callable[[Sequence[str]], Datasource]
    # In-memory bytes per byte on disk, to choose a parallelism before anything is opened.
    inflation: float


class _FileDatasource(Datasource):
    """What both have in common: files that are known, and a datasource that is made when needed."""

    def __init__(self, read: FileRead, files: Sequence[FileSource]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read = read
        self.files = files
        self._projection_map: dict[str, str] | None = None
        self._predicates: tuple[Any, ...] = ()

    def get_name(self) -> str:
        return self.read.name

    def estimate_inmemory_data_size(self) -> int:
        return round(sum(file.fingerprint.size or 0 for file in self.files) * self.read.inflation)

    def supports_projection_pushdown(self) -> bool:
        return True

    def _placeholders(self, parallelism: int) -> list[ReadTask]:
        # Ray asks for tasks several times to count them, before the call whose tasks run.
        # Opening files only to be counted would cost as much as reading their footers.
        groups = _grouped(self.files, parallelism)
        return [ReadTask(_never_run, self._metadata(group)) for group in groups]

    def _metadata(self, files: Sequence[FileSource]) -> BlockMetadata:
        size = sum(file.fingerprint.size or 0 for file in files)
        return BlockMetadata(
            num_rows=None,
            size_bytes=round(size * self.read.inflation),
            input_files=None,
            exec_stats=None,
        )

    def _open(self) -> tuple[Datasource, _Selection]:
        """Open the files, and say what the reader of them leaves to be selected after reading."""
        datasource = self.read.open([file.path for file in self.files])
        left = []
        for predicate in self._predicates:
            narrowed = datasource
            if datasource.supports_predicate_pushdown():
                narrowed = datasource.apply_predicate(predicate)
            # A datasource that cannot apply a predicate as a whole returns itself.
            if narrowed is datasource:
                left.append(predicate)
            datasource = narrowed
        if self._projection_map is None:
            return datasource, _Selection(tuple(left), None)
        columns = [name for name in self._projection_map if name not in _OURS]
        if not datasource.supports_projection_pushdown():
            return datasource, _Selection(tuple(left), tuple(columns))
        needed = dict.fromkeys([*columns, *(name for p in left for name in plan.columns_of(p))])
        datasource = datasource.apply_projection({name: name for name in needed})
        extra = len(needed) > len(columns)
        return datasource, _Selection(tuple(left), tuple(columns) if extra else None)


class ResumableDatasource(_FileDatasource):
    """All files of a resumable read. Not armed, it reads what plain Ray Data would.

    ``checkpoint`` and ``options`` are what `resumable_write` needs to know of the read.
    """

    def __init__(
        self, read: FileRead, files: Sequence[FileSource], checkpoint: str, options: Any
    ) -> None:
        super().__init__(read, files)
        self.checkpoint = checkpoint
        self.options = options

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        if data_context is None or not self.files:
            return self._placeholders(parallelism)
        datasource, selection = self._open()
        tasks: list[ReadTask] = datasource.get_read_tasks(
            parallelism, per_task_row_limit, data_context
        )
        return [_selecting(task, selection, per_task_row_limit) for task in tasks]


class ArmedDatasource(_FileDatasource):
    """The pending files of one pass, numbered as in the run's table."""

    def __init__(
        self,
        base: ResumableDatasource,
        files: Sequence[FileSource],
        numbers: Sequence[int],
        client: LedgerClient,
    ) -> None:
        super().__init__(base.read, files)
        self._projection_map = base._projection_map
        self._predicates = base._predicates
        self._numbers = {file.path: number for file, number in zip(files, numbers, strict=True)}
        self._client = client

    def preferred_read_tasks(self, target_bytes: int) -> int:
        """Say how many read tasks suit these files: enough to spread them, few tiny ones.

        Args:
            target_bytes: in-memory size that a task's output should not exceed by much.
        """
        by_size = -(-self.estimate_inmemory_data_size() // target_bytes)
        return min(len(self.files), max(_SPREAD_OVER_TASKS, by_size))

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        if per_task_row_limit is not None:
            raise NonResumableError("A limit cannot stand in a resumable pipeline.")
        if data_context is None:
            return self._placeholders(parallelism)
        datasource, selection = self._open()
        reads: dict[str, ReadTask] = {}
        for task in datasource.get_read_tasks(len(self.files), None, data_context):
            reads[self._path_of(task)] = task
        missing = [file.path for file in self.files if file.path not in reads]
        if missing and not self._predicates:
            raise NonResumableError(
                f"{self.read.name} gave no read task for {missing[0]}, so it cannot be said when "
                "that source is complete."
            )
        return [
            ReadTask(
                SourceReader(
                    tuple(
                        (self._numbers[file.path], file.source_id, reads.get(file.path))
                        for file in group
                    ),
                    selection,
                    self._client,
                ),
                self._metadata(group),
            )
            for group in _grouped(self.files, parallelism)
        ]

    def filtered(self, predicate: Any) -> ArmedDatasource:
        """Return this datasource without the rows that do not satisfy ``predicate``."""
        narrowed = copy.copy(self)
        narrowed._predicates = (*self._predicates, predicate)
        return narrowed

    def _path_of(self, task: ReadTask) -> str:
        paths = [str(path) for path in task.metadata.input_files or ()]
        if len(paths) != 1 or paths[0] not in self._numbers:
            raise NonResumableError(
                f"{self.read.name} gave a read task for {paths}, where one task for each file was "
                "expected, so its rows cannot be bound to their sources."
            )
        return paths[0]


@dataclass(frozen=True)
class SourceReader:
    """Reads ``(number, source id, read task)`` one after another: what a read task runs.

    Rows that ``selection`` leaves out are no rows of their source: they get no token.

    Guarantees: a source is sealed only after its reader is exhausted and each of its rows was
    taken by whoever iterates. A reader that raises, or an iteration that ends early, seals
    nothing, and the source stays pending.
    """

    sources: tuple[tuple[int, str, ReadTask | None], ...]
    selection: _Selection
    client: LedgerClient

    def __call__(self) -> Iterator[Any]:
        seals: list[Seal] = []
        sent_at = time.monotonic()
        for number, source_id, read in self.sources:
            nonce = read_nonce(self.client.run_id, self.client.pass_number, source_id)
            total = start = 0
            # Without a task, a predicate has ruled out the whole file: it has no rows.
            for block in self.selection.apply(read()) if read is not None else ():
                count = batches.num_rows(block)
                values = tokens(nonce, start, count)
                total = (total + token_sum(values)) % MODULUS
                start += count
                yield batches.attach(block, np.full(count, number, dtype=np.int32), values)
            seals.append(Seal(number, total, start))
            if time.monotonic() - sent_at >= _SEAL_INTERVAL_S:
                self.client.send(*seals)
                seals, sent_at = [], time.monotonic()
        if seals:
            self.client.send(*seals)


@dataclass(frozen=True)
class _Selection:
    """What is left to select after reading: rows by predicates, then columns, None for all."""

    predicates: tuple[Any, ...]
    columns: tuple[str, ...] | None

    def apply(self, blocks: Iterable[Any]) -> Iterator[Any]:
        """Select from each block."""
        for block in blocks:
            selected = block
            for predicate in self.predicates:
                selected = batches.pick(selected, plan.mask_of(predicate, selected))
            if self.columns is not None:
                selected = BlockAccessor.for_block(selected).select(list(self.columns))
            yield selected


def _selecting(task: ReadTask, selection: _Selection, row_limit: int | None) -> ReadTask:
    if selection == _Selection((), None):
        return task
    return ReadTask(
        lambda: selection.apply(task()), task.metadata, task.schema, per_task_row_limit=row_limit
    )


def _never_run() -> list[Any]:
    raise AssertionError("a placeholder was run: Ray asked for these tasks only to count them")


def _grouped(items: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """Cut ``items`` into at most ``count`` runs of nearly equal length, none of them empty."""
    n = min(max(count, 1), len(items))
    return [items[i * len(items) // n : (i + 1) * len(items) // n] for i in range(n)]
