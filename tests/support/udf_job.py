"""A job over six small files with any UDFs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.data import Dataset

from ray_resume import RunSummary, resumable_read, resumable_write

FILES, ROWS = 6, 20


def run(folder: Path, chain: Callable[[Dataset], Dataset], **options: Any) -> RunSummary:
    ds = resumable_read(
        ray.data.read_parquet,
        str(folder / "in"),
        checkpoint=folder / "ckpt",
        on_pipeline_change="continue",
        **options,
    )
    return resumable_write(chain(ds), folder / "out")
