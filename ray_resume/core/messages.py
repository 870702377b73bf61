"""What workers send to the ledger's process, beside the ledger's own events. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["DeadLetter"]


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Rows of one source that failed in one call.

    Args:
        total: the sum of the tokens that the call did not pass on.
        stage: the stage, as messages name it.
        table: an Arrow IPC stream of the rows as they came into the stage.
        errors: the error of each row.
    """

    source: int
    total: int
    stage: str
    table: bytes
    errors: tuple[str, ...]

    @classmethod
    def of(
        cls, source: int, total: int, stage: str, table: pa.Table, errors: Sequence[str]
    ) -> DeadLetter:
        """Make a dead letter of a table."""
        # The command line imports this module, and does not wait for pyarrow.
        import pyarrow as pa

        buffer = pa.BufferOutputStream()
        with pa.ipc.new_stream(buffer, table.schema) as stream:
            stream.write_table(table)
        return cls(source, total, stage, buffer.getvalue().to_pybytes(), tuple(errors))
