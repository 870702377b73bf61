"""Dead letters: rows that failed in a stage with ``on_error="dead_letter"``.

A worker sends them to the ledger's process (`messages.DeadLetter`), because a worker may be on a
node that does not see the checkpoint. The ledger's process writes them as Parquet files into the
checkpoint (a :class:`DeadLetterStore`). The sources' records list the files that count, as with
output files.

"""

from __future__ import annotations

import io
import re
import secrets
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from ray_resume.checkpoint.objects import Objects
from ray_resume.core.digests import source_digest
from ray_resume.core.messages import DeadLetter
from ray_resume.failpoints import failpoint

__all__ = ["COLUMNS", "FOLDER", "DeadLetterStore"]

FOLDER = "dead-letters"
"""Their folder in a checkpoint."""

COLUMNS = ("ray_resume_source", "ray_resume_stage", "ray_resume_error")
"""The columns that are added to a row, all strings: its source's id, the stage, the error."""

# A half-written letter has a dot before its name, and perhaps a random part behind it.
_NAME = re.compile(r"\.?([0-9a-f]{12})-[0-9a-f]{16}-[0-9a-f]{16}\.parquet(\.[0-9a-f]{8})?")


class DeadLetterStore:
    """The dead letters of a checkpoint."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def write(self, run_id: str, source_id: str, letter: DeadLetter) -> str:
        """Write a letter durably under a name of its own; return the name, without the folder.

        Raises:
            CheckpointError: the storage is full or fails. The rows count for no run.
        """
        name = _new_name(run_id, source_id)
        buffer = io.BytesIO()
        _write(letter, source_id, buffer)
        failpoint("letters.writing")
        self._objects.put(f"{FOLDER}/{name}", buffer.getvalue())
        failpoint("letters.written")
        return name

    def names(self) -> Collection[str]:
        """List the letters, without the folder."""
        return _names(self._objects.list(FOLDER))

    def reasons(self, name: str) -> Iterator[tuple[str, str, str]]:
        """Yield the stage, the error and the source's id of each row in a letter.

        A letter that is gone or damaged has none: this is for reports.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        data = self._objects.get(f"{FOLDER}/{name}")
        if data is None:
            return
        try:
            file = pq.ParquetFile(pa.BufferReader(data))
            # They are the last that have this name: the rows may have such columns, too.
            columns = [_last_named(name, file.schema_arrow.names) for name in COLUMNS]
            table = file.read(columns=columns)
        except (pa.ArrowException, OSError, KeyError):
            return
        source, stage, error = (table.column(column).to_pylist() for column in columns)
        yield from zip(map(str, stage), map(str, error), map(str, source), strict=True)

    def remove_leftovers(self, runs: Collection[str], listed: Collection[str]) -> None:
        """Remove the letters of ``runs``, all of them over, that no record lists.

        Letters that a killed process left half-written go, too.
        """
        doomed = [
            name
            for name in _names(self._objects.list(FOLDER, hidden=True))
            if (match := _NAME.fullmatch(name)) and match[1] in runs and name not in listed
        ]
        if doomed:
            failpoint("cleanup.removing_letter")
            self._objects.delete(f"{FOLDER}/{name}" for name in doomed)


def _names(listing: Iterable[str]) -> set[str]:
    return {name.removeprefix(f"{FOLDER}/") for name in listing}


def _new_name(run_id: str, source_id: str) -> str:
    return f"{run_id}-{source_digest(source_id)[:8].hex()}-{secrets.token_hex(8)}.parquet"


def _last_named(name: str, names: Collection[str]) -> str:
    """Return the name that `_write` gave to a column.

    Raises:
        KeyError: there is none.
    """
    while f"_{name}" in names:
        name = f"_{name}"
    if name not in names:
        raise KeyError(name)
    return name


def _write(letter: DeadLetter, source_id: str, file: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pa.ipc.open_stream(letter.table) as stream:
        table = stream.read_all()
    count = len(letter.errors)
    printable = source_id.encode("utf-8", "backslashreplace").decode("utf-8")
    for name, values in zip(
        COLUMNS, ([printable] * count, [letter.stage] * count, letter.errors), strict=True
    ):
        while name in table.column_names:
            name = f"_{name}"
        table = table.append_column(name, pa.array(values, pa.string()))
    try:
        pq.write_table(table, file)
    except pa.ArrowException:
        # Parquet cannot hold every Arrow type. Text is better than nothing.
        file.seek(0)
        file.truncate()
        pq.write_table(_as_text(table), file)


def _as_text(table: Any) -> Any:
    import pyarrow as pa

    def text(column: Any) -> Any:
        if pa.types.is_primitive(column.type) or pa.types.is_string(column.type):
            return column
        return pa.array([None if v is None else repr(v) for v in column.to_pylist()], pa.string())

    return pa.table({name: text(table.column(name)) for name in table.column_names})
