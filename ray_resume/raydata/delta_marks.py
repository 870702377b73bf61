"""Marks in Delta tables: an application transaction in the commit of a publication.

The application is the run, and the version is the number of the publication. A table keeps the
highest version of each application only. So a run may publish nothing after a publication that is
not known to be there or not.

Internals of Ray's that are used:

* ``DeltaDatasink.on_write_complete`` commits with ``DeltaTable.create_write_transaction``, or with
  ``deltalake.transaction.create_table_with_add_actions`` if there is no table. It has no option for
  the properties of a commit.
* ``DeltaDatasink._path`` and ``_storage_options``.
"""

from __future__ import annotations

import copy
import time
from typing import Any

from ray.data.datasource import WriteResult

from ray_resume.core.publications import Mark
from ray_resume.raydata.interception import intercepted

__all__ = ["DeltaMarks"]

# With this property, a table forgets application transactions.
_RETENTION = "delta.setTransactionRetentionDuration"


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
        table = self._table()
        if table is None:
            if position is not None:
                raise LookupError("there is no table any more")
            return False
        if table.transaction_version(_application(mark)) == mark.number:
            return True
        if str(table.version()) != position and _RETENTION in table.metadata().configuration:
            raise LookupError(f"it forgets transactions ({_RETENTION})")
        return False

    def publish(self, result: WriteResult[Any], mark: Mark) -> None:
        """Commit with the mark."""
        import deltalake
        from deltalake import CommitProperties, DeltaTable, Transaction

        def properties() -> CommitProperties:
            now_ms = int(time.time() * 1000)
            transaction = Transaction(_application(mark), mark.number, now_ms)
            return CommitProperties(app_transactions=[transaction])

        def create(original: Any, *args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs, commit_properties=properties())

        def commit(original: Any, table: Any, *args: Any, **kwargs: Any) -> None:
            # Ray repeats a commit whose answer got lost.
            if table.transaction_version(_application(mark)) != mark.number:
                original(table, *args, **kwargs, commit_properties=properties())

        with (
            intercepted(deltalake.transaction, "create_table_with_add_actions", create),
            intercepted(DeltaTable, "create_write_transaction", commit),
        ):
            copy.copy(self._datasink).on_write_complete(result)

    def _table(self) -> Any:
        from deltalake import DeltaTable

        path, options = self._datasink._path, self._datasink._storage_options
        if not DeltaTable.is_deltatable(path, storage_options=options):
            return None
        return DeltaTable(path, storage_options=options)


def _application(mark: Mark) -> str:
    return f"ray_resume-{mark.checkpoint_id}-{mark.run_id}"
