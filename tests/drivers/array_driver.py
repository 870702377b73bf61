"""One task of an array, to be killed and requeued: reads its share, triples, writes.

    python array_driver.py SOURCE CHECKPOINT OUT ADDRESS HELD_BACK

The share is the environment's, as SLURM gives it. While SOURCE.hold is there, rows from id
HELD_BACK on stay in their UDF: so there is a middle that all tasks are in at once. Ids of sources
are relative to SOURCE: which share a file is in does not depend on where the test runs.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any


class Triple:
    def __init__(self, hold: str, held_back: int) -> None:
        self.hold, self.held_back = hold, held_back

    def __call__(self, batch: Any) -> Any:
        while batch["id"][-1] >= self.held_back and os.path.exists(self.hold):
            time.sleep(0.02)
        return {"id": batch["id"], "score": batch["id"] * 3}


def main() -> None:
    import ray

    from ray_resume import resumable, resumable_read, resumable_write

    source, checkpoint, out, address, held_back = sys.argv[1:]
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    # One worker for each task of the array, and one task at a time: eight of them fit in.
    little = 0.4
    ds = resumable_read(
        ray.data.read_parquet,
        source,
        checkpoint=checkpoint,
        shard="slurm",
        source_root=source,
        num_cpus=little,
        concurrency=1,
    )
    triple = resumable(Triple(f"{source}.hold", int(held_back)).__call__)
    one = ray.data.TaskPoolStrategy(size=1)
    ds = ds.map_batches(triple, batch_size=None, num_cpus=little, compute=one)
    print(resumable_write(ds, out, ray_remote_args={"num_cpus": little}, concurrency=1), flush=True)


if __name__ == "__main__":
    main()
