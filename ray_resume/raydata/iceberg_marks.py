"""Marks in Iceberg tables: a property of the snapshot that a publication makes.

Internals of Ray's that are used:

* ``IcebergDatasink._snapshot_properties`` become those of every snapshot that it commits.
* ``IcebergDatasink._reload_table``: loads ``_table`` again from the catalog. A copy of a datasink
  has none.
"""

from __future__ import annotations

import copy
import random
import time
from typing import Any

from ray.data.datasource import WriteResult

from ray_resume.core.publications import Mark

__all__ = ["IcebergMarks"]

_PROPERTY = "ray_resume.publication"

# Other writers of the table may commit first, and then PyIceberg may refuse a commit.
_ATTEMPTS = 10
_LONGEST_WAIT_S = 2.0


class IcebergMarks:
    """The marks in the table of an ``IcebergDatasink``; see `table_marks.TableMarks`."""

    def __init__(self, datasink: Any) -> None:
        self._datasink = datasink
        # Appends go to the main branch whatever the options.
        self._branch = str(datasink._upsert_kwargs.get("branch", "main"))

    def position(self) -> str | None:
        """Return the id of the branch's newest snapshot."""
        newest = self._newest(self._fresh()._table.metadata)
        return None if newest is None else str(newest)

    def holds(self, mark: Mark, position: str | None) -> bool:
        """Return whether a snapshot between the newest and that of ``position`` has the mark.

        Snapshots that were rolled back do not count: their rows are not in the table.
        """
        metadata = self._fresh()._table.metadata
        snapshot_id = self._newest(metadata)
        while snapshot_id is not None and str(snapshot_id) != position:
            snapshot = metadata.snapshot_by_id(snapshot_id)
            if snapshot is None:
                raise LookupError(f"its snapshot {snapshot_id} was expired")
            summary = snapshot.summary
            if summary and summary.additional_properties.get(_PROPERTY) == str(mark):
                return True
            snapshot_id = snapshot.parent_snapshot_id
            # PyIceberg makes the oldest snapshot that it keeps one without a parent.
            if snapshot_id is None and snapshot.sequence_number != 1:
                raise LookupError(f"snapshots before {snapshot.snapshot_id} were expired")
        return False

    def publish(self, result: WriteResult[Any], mark: Mark) -> None:
        """Commit a snapshot with the mark, again if another writer commits at the same time."""
        from pyiceberg.exceptions import CommitFailedException

        for attempt in range(1, _ATTEMPTS + 1):
            fresh = self._fresh()
            position = self._newest(fresh._table.metadata)
            fresh._snapshot_properties = {**fresh._snapshot_properties, _PROPERTY: str(mark)}
            try:
                fresh.on_write_complete(result)
            except CommitFailedException:
                # Ray repeats a commit whose answer got lost, and then it conflicts with itself.
                if self.holds(mark, None if position is None else str(position)):
                    return
                if attempt == _ATTEMPTS:
                    raise
                time.sleep(random.uniform(0, min(_LONGEST_WAIT_S, 0.1 * 2**attempt)))
            else:
                return

    def _fresh(self) -> Any:
        fresh = copy.copy(self._datasink)
        fresh._reload_table()
        return fresh

    def _newest(self, metadata: Any) -> int | None:
        ref = metadata.refs.get(self._branch)
        return None if ref is None else int(ref.snapshot_id)
