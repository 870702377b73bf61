"""One task of an array, to be killed and requeued: reads its share, takes its time, writes.

    python array_driver.py SOURCE CHECKPOINT OUT ADDRESS

The share is the environment's, as SLURM gives it. Sources complete one after another.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any


def triple(batch: Any) -> Any:
    time.sleep(0.25)
    return {"id": batch["id"], "score": batch["id"] * 3}


def main() -> None:
    import ray

    from ray_resume import resumable, resumable_read, resumable_write

    source, checkpoint, out, address = sys.argv[1:]
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    ds = resumable_read(ray.data.read_parquet, source, checkpoint=checkpoint, shard="slurm")
    ds = ds.select_columns(["id"])
    ds = ds.map_batches(resumable(triple), batch_size=None, num_cpus=0.1)
    print(resumable_write(ds, out, ray_remote_args={"num_cpus": 0.1}), flush=True)


if __name__ == "__main__":
    main()
