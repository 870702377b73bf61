"""The rows of a write task made to conform to the schema that all files of the output have.

Importable on workers. Formats without types (CSV, JSON lines) are only cast where the user gave a
schema.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import pyarrow as pa

from ray_resume.core.common_types import Limits, limits_of
from ray_resume.core.messages import Failure
from ray_resume.core.output_schema import (
    SchemaMismatchError,
    asked,
    conform,
    is_agreeable,
    unifiable,
)
from ray_resume.core.tokens import MODULUS
from ray_resume.core.variants import MAX_NAMED
from ray_resume.errors import ResumeError
from ray_resume.run.client import LedgerClient
from ray_resume.write.formats import TYPED
from ray_resume.write.layout import Layout
from ray_resume.write.source_rows import SourceRows

__all__ = ["Conformity"]


@dataclass(frozen=True)
class Conformity:
    """Makes rows conform, and says which sources have rows that cannot."""

    layout: Layout
    client: LedgerClient

    def of(self, rows: list[SourceRows]) -> tuple[list[SourceRows], list[Failure]]:
        """Return the rows that conform, and the failures of those that do not.

        Raises:
            ResumeError: the types of two sources cannot be unified, or values would change. Where
                the user gave a schema, that is the failure of a source instead.
        """
        given, typed = self.layout.schema, self.layout.format.name in TYPED
        if given is None and not (typed and all(is_agreeable(some.table.schema) for some in rows)):
            return rows, []
        if given is None:
            schema = self._agreed(rows)
        else:
            schema = given
            if typed:
                self.client.agree([(_encoded(self.layout.agreed_columns(given)), 0)], given=True)
        kept: list[SourceRows] = []
        failures: list[Failure] = []
        for some in rows:
            try:
                kept.append(replace(some, table=self._conform(some.table, schema)))
            except SchemaMismatchError:
                kept.extend(self._one_by_one(some.alone(), schema, failures))
        return kept, failures

    def _agreed(self, rows: Iterable[SourceRows]) -> pa.Schema:
        schemas = [asking for some in rows for asking in self._asked(some)]
        agreed = pa.ipc.read_schema(pa.py_buffer(self.client.agree(schemas)))
        # Other runs may have had other partition columns.
        return self.layout.agreed_columns(agreed)

    def _asked(self, some: SourceRows) -> Iterator[tuple[bytes, int]]:
        """Yield the schema of rows, with the limits of their values, and a source that has it."""
        columns = self.layout.agreed_columns(some.table.schema)
        limits = _limits(some.table, columns)
        parts = [(limits, some)]
        if limits and len(some) <= MAX_NAMED:
            parts = [(_limits(one.table, columns), one) for one in some.alone()]
        for found, part in parts:
            encoded = bytes(asked(columns, found).serialize().to_pybytes())
            # The ledger keeps none of more than that.
            for source in part.sources[: MAX_NAMED + 1].tolist():
                yield encoded, source

    def _conform(self, table: pa.Table, schema: pa.Schema) -> pa.Table:
        if self.layout.schema is not None:
            return conform(table, schema, exactly=True)
        partitions = [name for name in self.layout.partition_columns if name in table.column_names]
        made = conform(table.drop_columns(partitions), schema)
        for name in partitions:
            made = made.append_column(table.schema.field(name), table.column(name))
        return made

    def _one_by_one(
        self, alone: Iterable[SourceRows], schema: pa.Schema, failures: list[Failure]
    ) -> Iterator[SourceRows]:
        for one in alone:
            try:
                yield replace(one, table=self._conform(one.table, schema))
            except SchemaMismatchError as error:
                (drain,) = one.drains()
                source = self.client.name_of(drain.source)
                text = f"The rows of {source} do not conform to the output's schema: {error}"
                if self.layout.schema is None:
                    raise ResumeError(text) from error
                failures.append(Failure(drain.source, -drain.delta % MODULUS, drain.rows, text))


def _limits(table: pa.Table, columns: pa.Schema) -> dict[str, Limits]:
    every = {name: limits_of(table.column(name)) for name in columns.names}
    return {name: limits for name, limits in every.items() if limits}


def _encoded(schema: pa.Schema) -> bytes:
    return bytes(unifiable(schema).serialize().to_pybytes())
