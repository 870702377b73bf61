"""A job over one file that is cut into many sources.

python one_file_driver.py READER GRANULARITY FILE CHECKPOINT OUT
"""

from __future__ import annotations

import sys
import time
from typing import Any

import ray
from small_cluster import start_cluster

from ray_resume import resumable, resumable_read, resumable_write

LENGTH: dict[str, dict[str, int]] = {
    "row_group": {},
    "split": {"split_bytes": 1000},
    "rows": {"split_rows": 37},
}


@resumable
def slow(batch: Any) -> Any:
    """Take a while for each row, so that there is a middle to be killed in."""
    time.sleep(0.01 * len(batch))
    return batch


@resumable
def only_ids(batch: Any) -> Any:
    """Take the numbers of rows out of samples."""
    batch["id"] = [sample["id"] for sample in batch["json"]]
    return batch[["id"]]


def main(reader: str, granularity: str, file: str, checkpoint: str, out: str) -> None:
    """Run the job, and say so when all is done."""
    start_cluster(num_cpus=2)
    print("started", flush=True)
    read: Any = getattr(ray.data, reader)
    options: dict[str, Any] = {"granularity": granularity, **LENGTH[granularity]}
    ds = resumable_read(read, file, checkpoint=checkpoint, **options)
    if reader == "read_webdataset":
        ds = ds.map_batches(only_ids, batch_format="pandas")
    ds = ds.map_batches(slow, batch_format="pandas")
    resumable_write(ds, out, commit_interval_s=0.5, require_complete=True)
    print("complete", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
