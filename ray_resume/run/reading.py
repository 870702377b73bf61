"""The schema that a run reads with, recorded before it reads. In the driver, under the lease."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence

import pyarrow as pa

from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.core.read_schema import ReadSchema, holds
from ray_resume.core.records import Record
from ray_resume.errors import ResumeError

__all__ = ["record_read_schema"]

_MAX_NAMED = 3

logger = logging.getLogger("ray_resume")


def record_read_schema(
    storage: CheckpointBackend,
    schema: ReadSchema,
    run_id: str,
    *,
    completed: Sequence[Record],
    having: Callable[[Collection[str], Iterable[str]], list[str]] | None,
    afresh: bool,
) -> pa.Schema:
    """Record the schema that this run reads with, and return it.

    Args:
        completed: the sources that earlier runs have completed.
        having: returns some of the sources of these ids whose files have one of these columns.
        afresh: no source is left that was read with the schema on record, so it does not count.

    Raises:
        ResumeError: no schema holds that of earlier runs and that of the files that were listed;
            or another run has widened it since they were listed.
    """
    store = storage.read_schemas()
    if afresh:
        if [schema.listed] != store.read():
            store.settle(run_id, schema.listed)
        return schema.listed
    if schema.conflict:
        raise ResumeError(
            f"The input does not fit the schema that this checkpoint is read with: "
            f"{schema.conflict} Or, if the new types are right, process all of it again: "
            f"Checkpoint({storage.uri!r}).reset(state='all')."
        )
    # One that was on record when the files were listed is widened: `used` holds its columns with
    # other types.
    others = (other for other in store.read() if other not in schema.recorded)
    if not all(holds(schema.used, other) for other in others):
        raise ResumeError(
            "Another run has read with more columns or other types since the files were listed. "
            "Run again: resumable_read then uses them, too."
        )
    if not schema.is_recorded:
        if schema.recorded and completed:
            logger.warning(
                "Files that were added or changed have widened the schema of the read: column %s. "
                "%d sources were completed before, and stay as they are: where their files have "
                "values that the earlier schema had no place for, the output has null%s. To read "
                "them again: Checkpoint(%r).reset(state='completed').",
                ", ".join(schema.news()),
                len(completed),
                _example(schema, completed, having),
                storage.uri,
            )
        store.write(run_id, schema.used)
    return schema.used


def _example(
    schema: ReadSchema,
    completed: Sequence[Record],
    having: Callable[[Collection[str], Iterable[str]], list[str]] | None,
) -> str:
    """Name some of the completed sources whose files have columns that no run has read."""
    unread = schema.names_unread()
    if having is None or not unread:
        return ""
    found = having(unread, (record.source_id for record in completed))
    names = ", ".join(found[:_MAX_NAMED])
    return f" ({names}{' and others' if len(found) > _MAX_NAMED else ''})" if found else ""
