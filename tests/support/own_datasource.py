"""A datasource of the user's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask


class Pages(Datasource):
    """As many tasks as asked for, up to five."""

    def __init__(self, named: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.named = named

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        pages = np.array_split(np.arange(50), min(parallelism, 5))
        return [
            ReadTask(
                lambda page=page: [pa.table({"id": page})],  # type: ignore[misc]
                BlockMetadata(
                    num_rows=len(page),
                    size_bytes=None,
                    input_files=(f"page-{page[0]}",) if self.named else None,
                    exec_stats=None,
                ),
            )
            for page in pages
        ]
