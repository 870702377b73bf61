"""The sources of a checkpoint as an Arrow table, a column at a time: there may be millions.

The columns have the names of the fields of `SourceRecord`. Loads no pandas.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_resume.core.columns import (
    TIME,
    bytes_of,
    lengths_of,
    numbers,
    numbers_of,
    parents_of,
    text_of,
    texts,
    times,
)
from ray_resume.core.digests import Positions
from ray_resume.core.record_log import Flag
from ray_resume.core.records import State
from ray_resume.core.snapshot import Snapshot

__all__ = ["SCHEMA", "source_table"]

_STATES = (State.COMPLETED, State.FAILED, State.QUARANTINED)
_PATHS = pa.list_(pa.string())
_LABEL = pa.dictionary(pa.int32(), pa.string())

SCHEMA = pa.schema(
    {
        "source_id": pa.string(),
        "state": _LABEL,
        "rows": pa.int64(),
        "files": _PATHS,
        "error": pa.string(),
        "failed_runs": pa.int64(),
        "run_id": _LABEL,
        "completed_at": TIME,
        "failed_at": TIME,
        "dead_letters": _PATHS,
        "rows_dead_lettered": pa.int64(),
    }
)
"""The columns of the table."""


def source_table(snapshot: Snapshot, *, sink: str | None, letters: str) -> pa.Table:
    """Return the sources on record as a table of :data:`SCHEMA`.

    Args:
        sink: the output folder, which the paths of output files begin with.
        letters: likewise of dead letters.
    """
    # Users are told nothing of ends of files.
    chosen = snapshot.in_state(*_STATES) & (snapshot.column("flags") & Flag.END == 0)
    rows = None if chosen.all() else np.flatnonzero(chosen)
    batches = [_batch(batch, sink, letters) for _, batch in snapshot.batches(rows)]
    return pa.Table.from_batches(batches, SCHEMA).unify_dictionaries()


def _batch(batch: pa.RecordBatch, sink: str | None, letters: str) -> pa.RecordBatch:
    # All are copies. A column that keeps its batch in memory keeps all columns of it, and the next
    # batch takes fresh memory, which costs more time than all the rest.
    column = batch.column
    columns = {
        "source_id": _texts(column("source_id")),
        "state": _states(column("state")),
        "rows": _numbers(column("rows")),
        "files": _paths(column("files"), f"{sink}/"),
        "error": _texts(column("error")),
        "failed_runs": _numbers(column("failed_runs")),
        "run_id": _texts(column("run_id")).dictionary_encode(),
        "completed_at": _times(column("completed_at")),
        "failed_at": _times(column("failed_at")),
        "dead_letters": _paths(column("dead_letters"), f"{letters}/"),
        "rows_dead_lettered": _numbers(column("dead_rows")),
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _texts(column: pa.Array) -> pa.Array:
    """Return a column of texts as strings, with escapes where one is no valid UTF-8."""
    try:
        return _copied(column).cast(pa.string())
    except pa.ArrowInvalid:
        values = (None if value is None else text_of(value) for value in column.to_pylist())
        # From buffers: `pyarrow.array` would load pandas.
        escaped = [
            None if value is None else value.encode("utf-8", "backslashreplace") for value in values
        ]
        return texts(escaped).cast(pa.string())


def _copied(column: pa.Array) -> pa.Array:
    buffers = [
        None if buffer is None else pa.py_buffer(bytes(buffer)) for buffer in column.buffers()
    ]
    return pa.Array.from_buffers(column.type, len(column), buffers, offset=column.offset)


def _numbers(column: pa.Array) -> pa.Array:
    return numbers(numbers_of(column, "i8"), "i8")


def _paths(column: pa.Array, folder: str) -> pa.Array:
    """Return a column of lists of names in ``folder`` as lists of paths, each path once."""
    lengths: npt.NDArray[Any] = lengths_of(column)
    names = column.flatten()
    if len(lengths) and lengths.max() > 1:
        kept = _first_of_each(column, names)
        lengths = np.bincount(parents_of(column)[kept], minlength=len(column))
        names = names.take(numbers(kept, "i8"))
    offsets = np.zeros(len(column) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    # Sources share files, so most names are there many times.
    encoded = names.dictionary_encode()
    begin, empty = _texts(texts([bytes_of(folder), b""]))
    paths = pc.binary_join_element_wise(begin, _texts(encoded.dictionary), empty)
    paths = paths.take(encoded.indices)
    return pa.ListArray.from_arrays(numbers(offsets, "i4"), paths)


def _first_of_each(column: pa.Array, names: pa.Array) -> Positions:
    """Return where each name of a list first is; a file with several parts is there repeatedly."""
    encoded = names.dictionary_encode()
    codes = numbers_of(encoded.indices, "i4").astype(np.int64)
    pairs = parents_of(column) * len(encoded.dictionary) + codes
    return np.sort(np.unique(pairs, return_index=True)[1])


def _states(column: pa.Array) -> pa.Array:
    names = texts([state.name.lower().encode() for state in _STATES]).cast(pa.string())
    indices = numbers(numbers_of(column, "u1").astype(np.int32) - _STATES[0].value, "i4")
    return pa.DictionaryArray.from_arrays(indices, names)


def _times(column: pa.Array) -> pa.Array:
    return times(numbers_of(column, "f8", unknown=np.nan))
