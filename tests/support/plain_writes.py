"""What plain Ray Data writes, written in this process."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

from local_execution import execute
from ray.data import Dataset
from ray.data._internal.execution.interfaces.task_context import TaskContext
from ray.data.datasource.datasink import Datasink, WriteResult

__all__ = ["plainly"]


def write_here(ds: Dataset, sink: Datasink[Any], **_: Any) -> None:
    """Stands in for ``Dataset.write_datasink``: writes in this process, a block at a time."""
    tables = execute(ds)
    sink.on_write_start(tables[0].schema)
    results = [
        sink.write([table], TaskContext(number, "Write", kwargs={"write_uuid": f"plain{number}"}))
        for number, table in enumerate(tables)
    ]
    rows = sum(table.num_rows for table in tables)
    sink.on_write_complete(WriteResult(rows, 0, results))


# While it is entered, `Dataset.write_*` do.
plainly = partial(mock.patch.object, Dataset, "write_datasink", write_here)
