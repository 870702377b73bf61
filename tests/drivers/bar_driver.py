"""Runs a pipeline of some seconds; a test gives it a terminal.

python bar_driver.py FOLDER
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import ray

from ray_resume import resumable, resumable_read, resumable_write


@resumable
def slow(batch: Any) -> Any:
    """Take a while, so that there is something to see."""
    time.sleep(0.5)
    return batch


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    keys = list(range(12))
    ds = resumable_read(lambda key: {"id": [key]}, keys=keys, checkpoint=folder / "checkpoint")
    resumable_write(ds.map_batches(slow), str(folder / "out"), commit_interval_s=1)
