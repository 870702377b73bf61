"""Dead letters: rows that a stage with ``on_error="dead_letter"`` could not do with.

A worker sends them to the ledger's process (`messages.DeadLetter`), because a worker may be on a
node that does not see the checkpoint. That process writes them as Parquet files into the checkpoint
(a :class:`DeadLetterStore`). The sources' records list the files that count, as with output files.
"""

from __future__ import annotations

import contextlib
import io
import re
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

from ray_resume.checkpoint.shared.objects import Objects
from ray_resume.core.digests import source_digest
from ray_resume.core.messages import DeadLetter
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint
from ray_resume.files import fsync_directory, write_atomically

__all__ = ["COLUMNS", "FOLDER", "DeadLetterStore", "LetterFolder", "LetterObjects"]

FOLDER = "dead-letters"
"""Where they are in a checkpoint directory."""

COLUMNS = ("ray_resume_source", "ray_resume_stage", "ray_resume_error")
"""What stands beside the columns of a row: its source's id, the stage, the error; all strings."""

_NAME = re.compile(r"\.?([0-9a-f]{12})-[0-9a-f]{16}-[0-9a-f]{16}\.parquet")


class DeadLetterStore(Protocol):
    """The dead letters of a checkpoint."""

    def write(self, run_id: str, source_id: str, letter: DeadLetter) -> str:
        """Write a letter durably under a name of its own, and return that, without the folder.

        Raises:
            CheckpointError: the storage is full or fails. The rows count for nobody.
        """

    def names(self) -> Collection[str]:
        """List the letters that are there, without the folder."""

    def remove_leftovers(self, runs: Collection[str], listed: Collection[str]) -> None:
        """Remove what ``runs``, all of them over, have left and no record lists."""


class LetterObjects:
    """Dead letters in a storage of objects."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def write(self, run_id: str, source_id: str, letter: DeadLetter) -> str:
        name = _new_name(run_id, source_id)
        buffer = io.BytesIO()
        _write(letter, source_id, buffer)
        self._objects.put(f"{FOLDER}/{name}", buffer.getvalue())
        failpoint("letters.written")
        return name

    def names(self) -> Collection[str]:
        return {name.removeprefix(f"{FOLDER}/") for name in self._objects.list(FOLDER)}

    def remove_leftovers(self, runs: Collection[str], listed: Collection[str]) -> None:
        doomed = _leftovers(self.names(), runs, listed)
        self._objects.delete(f"{FOLDER}/{name}" for name in doomed)


class LetterFolder:
    """Dead letters in a checkpoint directory; the folder is made with the first one."""

    def __init__(self, checkpoint: Path) -> None:
        self._path = checkpoint / FOLDER

    def write(self, run_id: str, source_id: str, letter: DeadLetter) -> str:
        name = _new_name(run_id, source_id)
        try:
            self._path.mkdir(exist_ok=True)
            write_atomically(
                self._path / name,
                lambda file: _write(letter, source_id, file),
                before_rename=lambda: failpoint("letters.writing"),
            )
            fsync_directory(self._path)
            fsync_directory(self._path.parent)
        except OSError as error:
            raise CheckpointError(
                f"The dead letter {self._path / name} cannot be written: {error}. Its rows count "
                "for nobody, and what was committed is safe. Free space or mend the disk, and run "
                "again."
            ) from error
        failpoint("letters.written")
        return name

    def names(self) -> Collection[str]:
        with contextlib.suppress(FileNotFoundError):
            return {path.name for path in self._path.iterdir()}
        return ()

    def remove_leftovers(self, runs: Collection[str], listed: Collection[str]) -> None:
        for name in _leftovers(self.names(), runs, listed):
            failpoint("cleanup.removing_letter")
            (self._path / name).unlink(missing_ok=True)


def _new_name(run_id: str, source_id: str) -> str:
    return f"{run_id}-{source_digest(source_id)[:8].hex()}-{secrets.token_hex(8)}.parquet"


def _leftovers(names: Collection[str], runs: Collection[str], listed: Collection[str]) -> list[str]:
    return [
        name
        for name in names
        if (match := _NAME.fullmatch(name)) is not None and match[1] in runs and name not in listed
    ]


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
        # Parquet cannot hold every Arrow type; better as text than not at all.
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
