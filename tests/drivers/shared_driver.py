"""The job of `driver.py` with checkpoint and output in a storage that hosts share.

    python shared_driver.py SOURCE CHECKPOINT OUT HOST [ADDRESS]

HOST is what it takes its host for: another HOST cannot know by the kernel that this one is dead.
"""

from __future__ import annotations

import logging
import sys

from driver import scored


def main() -> None:
    import ray
    from small_cluster import start_cluster

    from ray_resume import Checkpoint, resumable_read, resumable_write
    from ray_resume.checkpoint.shared import scratch

    source, place, out, host, *address = sys.argv[1:]
    scratch.boot_id = lambda: host
    if address:
        ray.init(address=address[0], log_to_driver=False, logging_level=logging.ERROR)
    else:
        start_cluster(num_cpus=3)
    ray.data.DataContext.get_current().enable_progress_bars = False
    checkpoint = Checkpoint(place, shared=True, lease_ttl_s=4, publish_interval_s=0.3)
    ds = resumable_read(ray.data.read_parquet, source, checkpoint=checkpoint)
    print(resumable_write(scored(ds.select_columns(["id"])), out), flush=True)


if __name__ == "__main__":
    main()
