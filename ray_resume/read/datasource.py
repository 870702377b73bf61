"""The two datasources: that of `resumable_read`, and that which replaces it in an armed pipeline.

Importable on workers: knows neither checkpoints nor lmdb. The work of their read tasks is in
:mod:`ray_resume.read.read_task`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from ray.data import DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from typing_extensions import override

from ray_resume.core.digests import DigestIndex, Digests, source_digest
from ray_resume.core.sources import SourceTable
from ray_resume.core.tokens import SOURCE_COLUMN, SOURCE_TYPE, TOKEN_COLUMN, TOKEN_TYPE
from ray_resume.errors import NonResumableError
from ray_resume.raydata.expressions import is_repeatable
from ray_resume.raydata.filereads import ReadTaskFactory, Selection
from ray_resume.raydata.parallelism import detected_read_tasks
from ray_resume.raydata.scans import Scan
from ray_resume.read.footers import schemas_of
from ray_resume.read.inputs import FileInput, Input
from ray_resume.read.read_task import PlainReadTask, ResumableReadTask
from ray_resume.run.client import LedgerClient

__all__ = ["ArmedDatasource", "ResumableDatasource"]

# To name files in a message, so many are opened at most.
_MAX_FOOTERS = 64


class _SourceDatasource(Datasource):
    """A datasource whose sources are known; it makes read tasks when Ray executes it."""

    def __init__(self, input_: Input, sources: SourceTable) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.input = input_
        self.sources = sources
        self._projection_map: dict[str, str] | None = None
        self._predicates: tuple[Any, ...] = ()

    @override
    def get_name(self) -> str:
        return self.input.name

    @override
    def estimate_inmemory_data_size(self) -> int | None:
        return _total(self.input.sizes_bytes(self.sources))

    @property
    @override
    def supports_distributed_reads(self) -> bool:
        return self.input.distributed

    @override
    def supports_projection_pushdown(self) -> bool:
        return False

    @override
    def supports_predicate_pushdown(self) -> bool:
        return False

    @property
    def selected_columns(self) -> tuple[str, ...] | None:
        """The columns that Ray Data has pushed into the read; None: all."""
        selected = self._projection_map
        return None if selected is None else tuple(selected)

    @property
    def column_names(self) -> Sequence[str] | None:
        """The columns that there are before any are selected, None if they are not known."""
        schema = self.input.schema(None)
        return None if schema is None else list(schema.names)

    @property
    def predicates(self) -> tuple[Any, ...]:
        """The filters that Ray Data has pushed into the read; all must hold."""
        return self._predicates

    def _placeholders(self, parallelism: int) -> list[ReadTask]:
        # Ray asks for tasks several times to count them, before the call whose tasks run.
        # Opening sources only to be counted would cost as much as reading their footers.
        groups = self.input.groups(self.sources, parallelism)
        schema = self._schema() if groups else None
        return [
            ReadTask(_never_run, self._metadata(self.sources[group.start : group.stop]), schema)
            for group in groups
        ]

    def _schema(self) -> pa.Schema | None:
        # Where Ray does not know it, its optimizer takes a path that loses columns.
        return self.input.schema(self.selected_columns)

    def _metadata(self, sources: SourceTable) -> BlockMetadata:
        return BlockMetadata(
            num_rows=None,
            size_bytes=_total(self.input.sizes_bytes(sources)),
            input_files=None,
            exec_stats=None,
        )

    def _reads(
        self, parallelism: int, data_context: DataContext
    ) -> Iterator[tuple[range, SourceTable, ReadTaskFactory, Selection]]:
        """Open the sources, and cut them into at most ``parallelism`` groups, by position."""
        selection = Selection(self._predicates, self.selected_columns)
        tasks_of, left = self.input.open(self.sources, selection, data_context)
        for positions in self.input.groups(self.sources, parallelism):
            group = self.sources[positions.start : positions.stop].packed()
            yield positions, group, tasks_of(positions), left


class ResumableDatasource(_SourceDatasource):
    """The sources of a resumable read. Executed as it is, it reads as plain Ray Data would.

    ``sources`` are those of the read's shard, or all that were listed. ``checkpoint`` and
    ``options`` are what `resumable_write` needs to know of the read.
    """

    def __init__(self, input_: Input, sources: SourceTable, checkpoint: Any, options: Any) -> None:
        super().__init__(input_, sources)
        self.checkpoint = checkpoint
        self.options = options

    def with_schema(self, schema: pa.Schema) -> ResumableDatasource:
        """Return the same read of Parquet files with another schema; see `scans.Scan`."""
        assert isinstance(self.input, FileInput)
        assert isinstance(self.input.files, Scan)
        changed = copy.copy(self)
        changed.input = replace(self.input, files=self.input.files.with_schema(schema))
        return changed

    def having(self, columns: Collection[str], source_ids: Iterable[str]) -> list[str]:
        """Return those of the first few of the sources whose Parquet files have such a column."""
        if not isinstance(self.input, FileInput):
            return []
        some = list(islice(source_ids, _MAX_FOOTERS))
        at = DigestIndex(self.sources.digests)
        found = at.positions(Digests.of(b"".join(map(source_digest, some))))
        ids: dict[str, str] = {}
        for position in at.order[found[found >= 0]].tolist():
            path = self.input.path_of(self.sources[position])
            if path is not None:
                ids.setdefault(path, self.sources.id(position))
        schemas = schemas_of(self.input.filesystem, ids)
        return [ids[path] for path, schema in schemas if not set(columns).isdisjoint(schema.names)]

    # Ray's optimizer pushes into this read what it would push into that of plain Ray Data.
    @override
    def supports_projection_pushdown(self) -> bool:
        return self.input.selects

    @override
    def supports_predicate_pushdown(self) -> bool:
        return self.input.filters

    @override
    def apply_projection(self, projection_map: dict[str, str] | None) -> Any:
        before = self._projection_map
        narrowed: Any = super().apply_projection(projection_map)
        if self.input.reorders and before and projection_map is not None:
            narrowed._projection_map = {name: name for name in projection_map if name in before}
        return narrowed

    @override
    def apply_predicate(self, predicate_expr: Any) -> ResumableDatasource:
        # Tokens are given out by position in what was read, so that must be the same each time.
        if not is_repeatable(predicate_expr):
            return self
        narrowed = copy.copy(self)
        narrowed._predicates = (*self._predicates, predicate_expr)
        return narrowed

    @override
    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        if data_context is None and parallelism == 1 and self.sources:
            # Ray asks for what a user can ask of a dataset: its size, its files, its rows.
            metadata = self.input.metadata(self.sources) or self._metadata(self.sources)
            return [ReadTask(_never_run, metadata, self._schema())]
        parallelism = min(parallelism, max(1, self.input.most_tasks(self.sources)))
        if data_context is None or not self.sources:
            return self._placeholders(parallelism)
        return [
            ReadTask(
                PlainReadTask(group, tasks, left),
                self._metadata(group),
                per_task_row_limit=per_task_row_limit,
            )
            for _, group, tasks, left in self._reads(parallelism, data_context)
        ]


class ArmedDatasource(_SourceDatasource):
    """The pending sources of one pass, numbered as in the run's table.

    Nothing can be pushed into it: Ray's optimizer has pushed it into the ``base`` already.
    """

    def __init__(
        self,
        base: ResumableDatasource,
        sources: SourceTable,
        numbers: Sequence[int],
        client: LedgerClient,
    ) -> None:
        super().__init__(base.input, sources)
        self._projection_map = base._projection_map
        self._predicates = base._predicates
        self._numbers = numbers
        self._client = client

    @override
    def _schema(self) -> pa.Schema | None:
        schema = super()._schema()
        if schema is None:
            return None
        ours = [pa.field(SOURCE_COLUMN, SOURCE_TYPE), pa.field(TOKEN_COLUMN, TOKEN_TYPE)]
        return pa.schema([*schema, *ours], schema.metadata)

    def preferred_read_tasks(self, data_context: DataContext) -> int:
        """Return how many read tasks suit these sources: as many as plain Ray Data would make."""
        size_bytes = self.estimate_inmemory_data_size()
        most = self.input.most_tasks(self.sources)
        return min(most, detected_read_tasks(size_bytes, data_context))

    @override
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
        return self._read_tasks(parallelism, data_context)

    def _read_tasks(self, parallelism: int, data_context: DataContext) -> list[ReadTask]:
        return [
            ReadTask(
                ResumableReadTask(
                    group,
                    self._numbers[positions.start : positions.stop],
                    tasks,
                    left,
                    self.input.repeatable,
                    self.input.change_check(),
                    self._client,
                ),
                self._metadata(group),
            )
            for positions, group, tasks, left in self._reads(parallelism, data_context)
        ]


def _total(sizes_bytes: npt.NDArray[np.float64] | None) -> int | None:
    return None if sizes_bytes is None else round(sizes_bytes.sum())


def _never_run() -> list[Any]:
    raise AssertionError("a placeholder was run: Ray asked for these tasks only to count them")
