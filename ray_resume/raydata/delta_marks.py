"""Marks in Delta tables: an application transaction in the commit of a publication.

The application is the run, and the version is the number of the publication. A table keeps the
highest version of each application only. So a run may publish nothing after a publication that is
not known to be there or not. It also keeps out a publication whose run was declared dead and goes
on all the same: `settle` puts a *fence* in the run's place, its highest version. Delta lets no two
concurrent commits of one application through, and a later one sees the fence.

Internals of Ray's that are used:

* ``DeltaDatasink.on_write_complete`` commits with ``DeltaTable.create_write_transaction``, or with
  ``deltalake.transaction.create_table_with_add_actions`` if there is no table. It has no option for
  the properties of a commit.
* ``DeltaDatasink._path`` and ``_storage_options``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

from ray.data.datasource import WriteResult

from ray_resume.core.publications import Mark
from ray_resume.errors import CheckpointError
from ray_resume.raydata.interception import intercepted

__all__ = ["DeltaMarks"]

# With this property, a table forgets application transactions.
_RETENTION = "delta.setTransactionRetentionDuration"

# The version of a fence; no run has so many publications.
_FENCE = 1 << 62

_ATTEMPTS = 10


class DeltaMarks:
    """The marks in the table of a ``DeltaDatasink``; see `table_marks.TableMarks`."""

    def __init__(self, datasink: Any) -> None:
        self._datasink = datasink

    def position(self) -> str | None:
        """Return the table's version."""
        table = self._table()
        return None if table is None else str(table.version())

    def holds(self, mark: Mark, position: str | None) -> bool:
        """Return whether the newest transaction of the mark's run is the mark's."""
        return self._holds(self._table(), mark, position)

    def settle(self, mark: Mark, position: str | None) -> bool:
        """Return whether the table has the mark; if not, put up a fence that keeps it out.

        A table that does not exist needs none: `publish` makes an empty one, before its check.
        """
        from deltalake.exceptions import CommitFailedError

        for _ in range(_ATTEMPTS):
            table = self._table()
            if table is not None and _is_fenced(table, mark):
                return False
            if self._holds(table, mark, position) or table is None:
                return table is not None
            try:
                # The commit fails if the run has published after `table` was read.
                table.create_write_transaction(
                    [],
                    "append",
                    table.schema(),
                    partition_by=table.metadata().partition_columns,
                    commit_properties=_properties(mark, _FENCE),
                )
            except CommitFailedError:
                continue
            return False
        raise LookupError("it changes too often to put up a fence")

    def _holds(self, table: Any, mark: Mark, position: str | None) -> bool:
        if table is None:
            if position is not None:
                raise LookupError("there is no table any more")
            return False
        if table.transaction_version(_application(mark)) == mark.number:
            return True
        if str(table.version()) != position and _RETENTION in table.metadata().configuration:
            raise LookupError(f"it forgets transactions ({_RETENTION})")
        return False

    def publish(self, result: WriteResult[Any], mark: Mark, check: Callable[[], None]) -> None:
        """Commit with the mark. If there is no table, make an empty one first."""
        import deltalake
        from deltalake import DeltaTable
        from deltalake.exceptions import CommitFailedError

        def create(original: Any, *args: Any, **kwargs: Any) -> None:
            original(*args, **{**kwargs, "add_actions": []})

        def commit(original: Any, table: Any, *args: Any, **kwargs: Any) -> None:
            if _is_fenced(table, mark):
                raise _declared_dead(mark)
            # Ray repeats a commit whose answer got lost.
            if table.transaction_version(_application(mark)) == mark.number:
                return
            properties = _properties(mark, mark.number)
            try:
                original(table, *args, **kwargs, commit_properties=properties)
            except CommitFailedError as error:
                if _is_fenced(self._table(), mark):
                    raise _declared_dead(mark) from error
                raise

        if self._table() is None:
            with intercepted(deltalake.transaction, "create_table_with_add_actions", create):
                copy.copy(self._datasink).on_write_complete(result)
        check()
        with intercepted(DeltaTable, "create_write_transaction", commit):
            copy.copy(self._datasink).on_write_complete(result)

    def _table(self) -> Any:
        from deltalake import DeltaTable

        path, options = self._datasink._path, self._datasink._storage_options
        if not DeltaTable.is_deltatable(path, storage_options=options):
            return None
        return DeltaTable(path, storage_options=options)


def _is_fenced(table: Any, mark: Mark) -> bool:
    return bool(table.transaction_version(_application(mark)) == _FENCE)


def _declared_dead(mark: Mark) -> CheckpointError:
    return CheckpointError(
        f"Run {mark.run_id} was declared dead: its driver stood still for too long. Another "
        "run processes again what this one would have published now. Nothing of it is in the "
        "table, and earlier publications are safe. Run again."
    )


def _properties(mark: Mark, version: int) -> Any:
    from deltalake import CommitProperties, Transaction

    transaction = Transaction(_application(mark), version, int(time.time() * 1000))
    return CommitProperties(app_transactions=[transaction])


def _application(mark: Mark) -> str:
    return f"ray_resume-{mark.checkpoint_id}-{mark.run_id}"
