"""The two datasources: what `resumable_read` gives to Ray Data, and what replaces it when armed.

Importable on workers: knows neither checkpoints nor lmdb. A read task's work is
:class:`SourceReader`: read one source after another, add the two columns, seal each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.data import DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from ray_resume import batches
from ray_resume.client import LedgerClient
from ray_resume.errors import NonResumableError
from ray_resume.ledger import Seal
from ray_resume.lineage import MODULUS, SOURCE_COLUMN, TOKEN_COLUMN, read_nonce, token_sum, tokens
from ray_resume.listing import FileSource

__all__ = ["ArmedDatasource", "FileRead", "ResumableDatasource", "SourceReader"]

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

    def _open(self) -> Datasource:
        datasource = self.read.open([file.path for file in self.files])
        if self._projection_map is not None:
            wanted = {
                name: name
                for name in self._projection_map
                if name not in (SOURCE_COLUMN, TOKEN_COLUMN)
            }
            if not datasource.supports_projection_pushdown():
                raise NonResumableError(
                    f"{self.read.name} cannot read a selection of columns. Select them in a UDF."
                )
            datasource = datasource.apply_projection(wanted)
        return datasource


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
        tasks: list[ReadTask] = self._open().get_read_tasks(
            parallelism, per_task_row_limit, data_context
        )
        return tasks


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
        self._numbers = {file.path: number for file, number in zip(files, numbers, strict=True)}
        self._ids = {file.path: file.source_id for file in files}
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
        return [
            ReadTask(
                SourceReader(tuple(self._source(task) for task in group), self._client),
                self._metadata(files),
            )
            for group, files in zip(
                _grouped(
                    self._open().get_read_tasks(len(self.files), None, data_context), parallelism
                ),
                _grouped(self.files, parallelism),
                strict=True,
            )
        ]

    def _source(self, task: ReadTask) -> tuple[int, str, ReadTask]:
        paths = list(task.metadata.input_files or ())
        if len(paths) != 1 or paths[0] not in self._numbers:
            raise NonResumableError(
                f"{self.read.name} gave a read task for {paths}, where one task for each file was "
                "expected, so its rows cannot be bound to their sources."
            )
        return self._numbers[paths[0]], self._ids[paths[0]], task


@dataclass(frozen=True)
class SourceReader:
    """Reads ``(number, source id, read task)`` one after another: what a read task runs.

    Guarantees: a source is sealed only after its reader is exhausted and each of its rows was
    taken by whoever iterates. A reader that raises, or an iteration that ends early, seals
    nothing, and the source stays pending.
    """

    sources: tuple[tuple[int, str, ReadTask], ...]
    client: LedgerClient

    def __call__(self) -> Iterator[Any]:
        seals: list[Seal] = []
        sent_at = time.monotonic()
        for number, source_id, read in self.sources:
            nonce = read_nonce(self.client.run_id, self.client.pass_number, source_id)
            total = start = 0
            for block in read():
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


def _never_run() -> list[Any]:
    raise AssertionError("a placeholder was run: Ray asked for these tasks only to count them")


def _grouped(items: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """Cut ``items`` into at most ``count`` runs of nearly equal length, none of them empty."""
    n = min(max(count, 1), len(items))
    return [items[i * len(items) // n : (i + 1) * len(items) // n] for i in range(n)]
