"""Checks of the arguments of `resumable_read` that need no file and no checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.data.datasource import Datasource

from ray_resume.raydata.table_reads import TABLE_READERS
from ray_resume.read.granularity import GRANULARITIES, Cutting

__all__ = ["check_options"]


def check_options(
    reader: Any,
    keys: Sequence[Any] | None,
    cutting: Cutting,
    source_root: Any,
    source_id: Any,
) -> None:
    """Make sure that the options of a read go together.

    Raises:
        TypeError, ValueError: they do not.
    """
    granularity, split_bytes, split_rows = cutting
    if granularity not in GRANULARITIES:
        known = ", ".join(map(repr, GRANULARITIES))
        raise ValueError(f"granularity must be one of {known}, not {granularity!r}")
    if split_bytes is not None and granularity not in ("split", "auto"):
        raise TypeError('split_bytes is for granularity="split" or "auto" alone.')
    if split_bytes is not None and split_bytes < 1:
        raise ValueError(f"split_bytes must be at least 1, not {split_bytes}")
    if split_rows is not None and granularity != "rows":
        raise TypeError('split_rows is for granularity="rows" alone.')
    if split_rows is not None and split_rows < 1:
        raise ValueError(f"split_rows must be at least 1, not {split_rows}")
    reads_files = (
        keys is None and not isinstance(reader, Datasource) and reader.__name__ not in TABLE_READERS
    )
    if not reads_files and (granularity != "file" or source_root is not None):
        raise TypeError("granularity and source_root are for ray.data's readers for files alone.")
    if source_id is not None and (keys is not None or not isinstance(reader, Datasource)):
        raise TypeError(
            "source_id is for a Datasource alone; files and keys have ids of their own."
        )
