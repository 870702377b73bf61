"""`Agreement`: one schema for all output files of a run, agreed on in the ledger's process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pyarrow as pa

from ray_resume.checkpoint.output_schemas import SchemaStore
from ray_resume.core.output_schema import OutputSchema, SchemaMismatchError

__all__ = ["Agreement"]


class Agreement:
    """The output's schema, as agreed up to now. Safe to call from several threads.

    Args:
        afresh: no output of earlier runs is to stay, so its types do not bind this run.
        stale: then, whether there may be such output for now.

    Guarantees: an answer is durable before a sink gets it, so the next run knows the types of every
    file. The schema only widens.
    """

    def __init__(
        self,
        box: SchemaStore,
        run_id: str,
        source_id: Callable[[int], str],
        *,
        afresh: bool = False,
        stale: bool = False,
    ) -> None:
        self._box = box
        self._stale = stale
        self._afresh = afresh
        self._run_id = run_id
        self._source_id = source_id
        self._lock = threading.Lock()
        self._agreed: OutputSchema | None = None
        self._answer = b""
        # Encoded schemas that are in it already: nearly all that sinks ask for.
        self._included: set[bytes] = set()

    def widen(self, asked: Sequence[tuple[bytes, int]], given: bool) -> tuple[bytes, str | None]:
        """Include schemas, each with the number of a source that has it.

        Args:
            asked: schemas as Arrow encodes them.
            given: the user has given the only one of them, which replaces the agreed schema.

        Returns:
            The agreed schema; or an explanation, if no schema holds them all.
        """
        with self._lock:
            if self._agreed is None:
                stored = None if self._afresh else self._box.read()
                # Earlier files stay until their sources are processed again.

                self._agreed = stored or OutputSchema(
                    pa.schema([]), stale=self._afresh and self._stale
                )
            new = [(schema, source) for schema, source in asked if schema not in self._included]
            if not new and self._answer:
                return self._answer, None
            agreed = self._agreed
            try:
                for encoded, source in new:
                    schema = pa.ipc.read_schema(pa.py_buffer(encoded))
                    if given:
                        agreed = _given(agreed, schema)
                    else:
                        agreed = agreed.widened(schema, self._source_id(source))
            except SchemaMismatchError as error:
                return b"", str(error)
            if agreed is not self._agreed:
                if self._afresh or given:
                    self._box.settle(self._run_id, agreed)
                    self._afresh = False
                else:
                    self._box.write(self._run_id, agreed)
                self._agreed = agreed
            self._included.update(schema for schema, _ in new)
            self._answer = agreed.schema.serialize().to_pybytes()
            return self._answer, None


def _given(agreed: OutputSchema, schema: pa.Schema) -> OutputSchema:
    if agreed.schema.equals(schema):
        return agreed
    return OutputSchema(schema, stale=agreed.stale or len(agreed.schema) > 0, given=True)
