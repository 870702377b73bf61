"""Marks in Iceberg tables: a property of the snapshot that a publication makes.

A publication's commit requires that the branch's newest snapshot is still that of before the check
of the lease. So `settle` can keep out a publication whose run was declared dead: it puts up a
*fence*, an empty snapshot.

Internals of Ray's that are used:

* ``IcebergDatasink._snapshot_properties`` become those of every snapshot that it commits.
* ``IcebergDatasink._reload_table``: loads ``_table`` again from the catalog. A copy of a datasink
  has none.

And of PyIceberg's: ``Transaction._rebuild_snapshot_updates``, by which version 0.12 repeats a
commit upon whatever snapshot is the newest then. It must not; here, the check comes before.
"""

from __future__ import annotations

import contextlib
import copy
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

from ray.data.datasource import WriteResult

from ray_resume.core.publications import Mark
from ray_resume.raydata.interception import intercepted

__all__ = ["IcebergMarks"]

_PROPERTY = "ray_resume.publication"
_FENCE = "ray_resume.fence"

# Other writers of the table may commit first, and then PyIceberg may refuse a commit.
_ATTEMPTS = 20
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
        return self._holds(self._fresh()._table.metadata, mark, position)

    def _holds(self, metadata: Any, mark: Mark, position: str | None) -> bool:
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

    def settle(self, mark: Mark, position: str | None) -> bool:
        """Return whether the table has the mark; if not, put up a fence that keeps it out."""
        from pyiceberg.exceptions import CommitFailedException

        for attempt in range(_ATTEMPTS):
            table = self._fresh()._table
            if self._holds(table.metadata, mark, position):
                return True
            try:
                with _unrepeated(), table.transaction() as transaction:
                    properties = {_FENCE: str(mark)}
                    with transaction.update_snapshot(properties, self._branch).fast_append():
                        pass
            except CommitFailedException:
                _wait(attempt)
                continue
            return False
        raise LookupError("it changes too often to put up a fence")

    def publish(self, result: WriteResult[Any], mark: Mark, check: Callable[[], None]) -> None:
        """Commit a snapshot with the mark, again if another writer commits at the same time."""
        from pyiceberg.exceptions import CommitFailedException

        for attempt in range(1, _ATTEMPTS + 1):
            fresh = self._fresh()
            position = self._newest(fresh._table.metadata)
            fresh._snapshot_properties = {**fresh._snapshot_properties, _PROPERTY: str(mark)}
            check()
            try:
                with _unrepeated():
                    fresh.on_write_complete(result)
            except CommitFailedException:
                # Ray repeats a commit whose answer got lost, and then it conflicts with itself.
                if self.holds(mark, None if position is None else str(position)):
                    return
                if attempt == _ATTEMPTS:
                    raise
                _wait(attempt)
            else:
                return

    def _fresh(self) -> Any:
        fresh = copy.copy(self._datasink)
        fresh._reload_table()
        return fresh

    def _newest(self, metadata: Any) -> int | None:
        ref = metadata.refs.get(self._branch)
        return None if ref is None else int(ref.snapshot_id)


@contextlib.contextmanager
def _unrepeated() -> Iterator[None]:
    """Let a commit fail if the table has changed since it was read."""
    from pyiceberg.exceptions import CommitFailedException
    from pyiceberg.table import Transaction

    def refuse(*_: Any) -> None:
        raise CommitFailedException("The table has changed since it was read.")

    if not hasattr(Transaction, "_rebuild_snapshot_updates"):
        yield
        return
    with intercepted(Transaction, "_rebuild_snapshot_updates", refuse):
        yield


def _wait(attempt: int) -> None:
    time.sleep(random.uniform(0, min(_LONGEST_WAIT_S, 0.1 * 2**attempt)))
