"""`Agreement`: one schema for all output files of a run, agreed on in the ledger's process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence

import pyarrow as pa

from ray_resume.checkpoint.output_schemas import SchemaStore
from ray_resume.core.output_schema import OutputSchema, SchemaMismatchError
from ray_resume.core.variants import MAX_NAMED

__all__ = ["Agreement"]


class Agreement:
    """The output's schema, as agreed up to now. Safe to call from several threads.

    Args:
        source_id: returns the id of a source by its number, None if it does not know it any more.
        afresh: no output of earlier runs is to stay, so its types do not bind this run.
        stale: then, whether there may be such output for now.
        gone: the ids of sources whose types do not count: they have no output, or the run
            replaces it. Give none while another run is at work.

    Guarantees: an answer is durable before a sink gets it, so the next run knows the types of every
    file. The schema only widens.
    """

    def __init__(
        self,
        box: SchemaStore,
        run_id: str,
        source_id: Callable[[int], str | None],
        *,
        afresh: bool = False,
        stale: bool = False,
        gone: Collection[str] = (),
    ) -> None:
        self._box = box
        self._run_id = run_id
        self._source_id = source_id
        self._afresh, self._stale, self._gone = afresh, stale, gone
        self._lock = threading.Lock()
        self._agreed: OutputSchema | None = None
        # The names of the schemas on record that the next schema replaces.
        self._replaced: Sequence[str] | None = None
        self._answer = b""
        # By encoded schema, the numbers of the sources that have asked for it; None once there
        # were so many that no further one changes anything. Nearly all ask for the same.
        self._asked: dict[bytes, set[int] | None] = {}

    def widen(self, asked: Sequence[tuple[bytes, int]], given: bool) -> tuple[bytes, str | None]:
        """Include schemas, each with the number of a source that has it.

        Args:
            asked: schemas as Arrow encodes them.
            given: the user has given the only one of them, which replaces the agreed schema.

        Returns:
            The agreed schema; or an explanation, if no schema holds them all.
        """
        with self._lock:
            new = [(schema, source) for schema, source in asked if self._is_new(schema, source)]
            if not new and self._answer:
                return self._answer, None
            try:
                if self._agreed is None:
                    self._agreed = self._first()
                agreed = self._agreed
                for encoded, source in new:
                    schema = pa.ipc.read_schema(pa.py_buffer(encoded))
                    if given:
                        agreed = _given(agreed, schema)
                    else:
                        agreed = agreed.widened(schema, self._source_id(source))
            except SchemaMismatchError as error:
                return b"", str(error)
            if given and agreed is not self._agreed:
                self._replaced = self._replaced or self._box.names()
            self._record(agreed)
            for encoded, source in new:
                self._note(encoded, source)
            self._answer = agreed.schema.serialize().to_pybytes()
            return self._answer, None

    def _first(self) -> OutputSchema:
        """Return what was agreed before this run, as far as it binds this run."""
        names = self._box.names()
        # Files of before stay until their sources are done again.
        empty = OutputSchema(pa.schema([]), stale=self._afresh and self._stale)
        stored = None if self._afresh else self._box.read(self._gone)
        if self._afresh or self._gone:
            self._replaced = names
        return stored or empty

    def _record(self, agreed: OutputSchema) -> None:
        if self._replaced is not None:
            self._box.settle(self._run_id, agreed, self._replaced)
            self._replaced = None
        elif agreed is not self._agreed:
            self._box.write(self._run_id, agreed)
        self._agreed = agreed

    def _is_new(self, schema: bytes, source: int) -> bool:
        before = self._asked.get(schema, set())
        return before is not None and source not in before

    def _note(self, schema: bytes, source: int) -> None:
        before = self._asked.setdefault(schema, set())
        if before is not None:
            before.add(source)
            if len(before) > MAX_NAMED:
                self._asked[schema] = None


def _given(agreed: OutputSchema, schema: pa.Schema) -> OutputSchema:
    if agreed.schema.equals(schema):
        return agreed
    return OutputSchema(schema, stale=agreed.stale or len(agreed.schema) > 0, given=True)
