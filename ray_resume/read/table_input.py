"""A snapshot of a table as an input: each of its files or fragments is a source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from typing_extensions import override

from ray_resume.core.sources import SourceTable
from ray_resume.raydata.filereads import ReadTaskFactory, Selection
from ray_resume.raydata.table_reads import TableRead
from ray_resume.read.datasource_input import MadeTasks
from ray_resume.read.inputs import Input

__all__ = ["TableInput"]


@dataclass(frozen=True)
class TableInput(Input):
    """The pieces of a table, all of one snapshot: they stay as they are until the run ends."""

    name: str
    sources: SourceTable
    table: TableRead

    @property
    @override
    def repeatable(self) -> bool:
        return self.table.repeatable

    @property
    @override
    def distributed(self) -> bool:
        return bool(self.table.datasource.supports_distributed_reads)

    @override
    def schema(self, columns: Sequence[str] | None) -> pa.Schema | None:
        schema = self.table.schema
        if schema is None or columns is None:
            return schema
        return pa.schema([schema.field(name) for name in columns], schema.metadata)

    @override
    def open(
        self, sources: SourceTable, selection: Selection, data_context: Any
    ) -> tuple[Callable[[range], ReadTaskFactory], Selection]:
        tasks = self.table.tasks(data_context)
        found = [tasks[source.item] for source in sources]
        return lambda positions: MadeTasks(found[positions.start : positions.stop]), selection
