"""A job over one file that is cut into many sources.

python one_file_driver.py READER FILE CHECKPOINT OUT
"""

from __future__ import annotations

import sys
import time
from typing import Any

import ray
from small_cluster import start_cluster

from ray_resume import resumable, resumable_read, resumable_write

GRANULARITY: dict[str, dict[str, Any]] = {
    "read_parquet": {"granularity": "row_group"},
    "read_json": {"granularity": "split", "split_bytes": 1000},
    "read_text": {"granularity": "split", "split_bytes": 1000},
    "read_csv": {"granularity": "split", "split_bytes": 1000},
}


@resumable
def slow(batch: Any) -> Any:
    """Take a while for each row, so that there is a middle to be killed in."""
    time.sleep(0.01 * len(batch))
    return batch


def main(reader: str, file: str, checkpoint: str, out: str) -> None:
    """Run the job, and say so when all is done."""
    start_cluster(num_cpus=2)
    print("started", flush=True)
    read: Any = getattr(ray.data, reader)
    ds = resumable_read(read, file, checkpoint=checkpoint, **GRANULARITY[reader])
    ds = ds.map_batches(slow, batch_format="pandas")
    resumable_write(ds, out, commit_interval_s=0.5, require_complete=True)
    print("complete", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
