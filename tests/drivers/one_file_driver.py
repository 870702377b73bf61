"""A job over one file that is cut into many sources.

python one_file_driver.py READER GRANULARITY FILE CHECKPOINT OUT WORKED ADDRESS

WORKED is a file that has a byte for each row that has been through the UDF. ADDRESS is a cluster's.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import ray

from ray_resume import resumable, resumable_read, resumable_write
from ray_resume.read import granularity as granularities

LENGTH: dict[str, dict[str, int]] = {
    "row_group": {},
    "split": {"split_bytes": 200},
    "rows": {"split_rows": 37},
    "auto": {"split_bytes": 200},
}


@resumable
def only_ids(batch: Any) -> Any:
    """Take the numbers of rows out of samples."""
    batch["id"] = [sample["id"] for sample in batch["json"]]
    return batch[["id"]]


def main(
    reader: str, granularity: str, file: str, checkpoint: str, out: str, worked: str, address: str
) -> None:
    """Run the job."""

    @resumable
    def slow(batch: Any) -> Any:
        """Take a while for each row, so that there is a middle to be killed in; then say so."""
        time.sleep(0.01 * len(batch))
        with open(worked, "a") as log:
            log.write("." * len(batch))
        return batch

    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    # The file is large enough to be cut.
    granularities.AUTO_BYTES = 1000
    read: Any = getattr(ray.data, reader)
    options: dict[str, Any] = {"granularity": granularity, **LENGTH[granularity]}
    ds = resumable_read(read, file, checkpoint=checkpoint, **options)
    if reader == "read_webdataset":
        ds = ds.map_batches(only_ids, batch_format="pandas")
    # A kill costs a call, at least.
    ds = ds.map_batches(slow, batch_format="pandas", batch_size=10)
    resumable_write(ds, out, commit_interval_s=0.5, require_complete=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
