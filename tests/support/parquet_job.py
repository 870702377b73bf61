"""A job over Parquet files: the read, and UDFs that keep all rows or some."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import ray
from ray.data import Dataset

from ray_resume import resumable, resumable_read

# Ray types a UDF's argument as the union of all batch formats.
Batch: TypeAlias = Any


@resumable
def keep_even(batch: Batch) -> Batch:
    mask = batch["id"] % 2 == 0
    return {name: values[mask] for name, values in batch.items()}


@resumable
def keep(batch: Batch) -> Batch:
    return batch


def read(source: Path, checkpoint: Path, **options: Any) -> Dataset:
    options = {"on_pipeline_change": "continue", **options}
    return resumable_read(ray.data.read_parquet, str(source), checkpoint=checkpoint, **options)
