"""Marks in Lance tables: a property of the transaction that a publication commits.

Both Ray's own ``LanceDatasink`` and that of the package lance-ray are served.

A Lance table cannot keep out the commit of a driver that was declared dead and wakes. Lance rebases
an append onto whatever was committed since its ``read_version``, also with ``max_retries=0``. Only
two operations make it refuse: a restore and an overwrite. As a fence, either of them would itself
discard what other runs have appended at the same time.

Internals of theirs that are used:

* ``on_write_complete`` commits with ``lance.LanceDataset.commit`` and an operation. It has no
  option for the properties of a transaction.
* ``uri``, ``storage_options``, ``read_version``; and ``storage_options_provider`` (Ray's) or
  ``namespace_kwargs`` (lance-ray's), which renew credentials.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from ray.data.datasource import WriteResult

from ray_resume.core.publications import Mark
from ray_resume.raydata.interception import intercepted

__all__ = ["LanceMarks"]

_PROPERTY = "ray_resume.publication"


class LanceMarks:
    """The marks in the table of a ``LanceDatasink``; see `table_marks.TableMarks`."""

    def __init__(self, datasink: Any) -> None:
        self._datasink = datasink

    def position(self) -> str | None:
        """Return the table's version."""
        return str(self._table().version)

    def holds(self, mark: Mark, position: str | None) -> bool:
        """Return whether a transaction after the version ``position`` has the mark."""
        table = self._table()
        newest, since = table.version, int(position or 0)
        # A table that was made anew begins with version 1 again.
        for version in range(newest, since if since <= newest else 0, -1):
            try:
                transaction = table.read_transaction(version)
            except OSError as error:
                raise LookupError(f"its version {version} was cleaned up: {error}") from error
            if transaction is None:
                continue
            if (transaction.transaction_properties or {}).get(_PROPERTY) == str(mark):
                return True
        return False

    def settle(self, mark: Mark, position: str | None) -> bool:
        """Return as :meth:`holds`."""
        return self.holds(mark, position)

    def publish(self, result: WriteResult[Any], mark: Mark, check: Callable[[], None]) -> None:
        """Commit with the mark."""
        import lance
        from lance.dataset import Transaction

        def commit(
            original: Any, uri: Any, operation: Any, read_version: Any = None, **kwargs: Any
        ) -> Any:
            transaction = Transaction(
                read_version, operation, transaction_properties={_PROPERTY: str(mark)}
            )
            return original(uri, transaction, **kwargs)

        fresh = copy.copy(self._datasink)
        # From a version of long ago on, Lance would have to look for conflicts.
        fresh.read_version = self._table().version
        check()
        with intercepted(lance.LanceDataset, "commit", commit):
            fresh.on_write_complete(result)

    def _table(self) -> Any:
        import lance

        datasink = self._datasink
        kwargs = dict(getattr(datasink, "namespace_kwargs", {}))
        provider = getattr(datasink, "storage_options_provider", None)
        if provider is not None:
            kwargs["storage_options_provider"] = provider
        return lance.LanceDataset(datasink.uri, storage_options=datasink.storage_options, **kwargs)
