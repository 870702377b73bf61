"""A driver on a cluster of several nodes, of which one is lost while the job is running.

    python node_driver.py [--pool] SOURCE CHECKPOINT OUT

The rows are those of `driver.py`. It prints the run's summary.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

from driver import FILES, Score, drop_sevenths, fan_out


def main() -> None:
    import logging

    import ray
    from ray.cluster_utils import Cluster
    from ray.data import ActorPoolStrategy

    from ray_resume import Checkpoint, CheckpointError, resumable, resumable_read, resumable_write

    *options, source, checkpoint, out = sys.argv[1:]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    lost = cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    cluster.wait_for_nodes()
    ray.data.DataContext.get_current().enable_progress_bars = False

    def committed() -> int:
        try:
            return Checkpoint(checkpoint).status().completed
        except CheckpointError:
            return 0

    ds = resumable_read(ray.data.read_parquet, source, checkpoint=checkpoint)
    ds = ds.select_columns(["id"])
    ds = ds.map_batches(resumable(drop_sevenths), batch_size=40, num_cpus=0.5)
    ds = ds.map_batches(resumable(fan_out), batch_size=100, num_cpus=0.4)
    if "--pool" in options:
        pool = ActorPoolStrategy(size=2)
        score = resumable(Score)
        ds = ds.map_batches(
            score, fn_constructor_args=(3,), batch_size=64, compute=pool, num_cpus=0.5
        )
    else:
        ds = ds.map_batches(resumable(Score(3).__call__), batch_size=64, num_cpus=0.5)
    with ThreadPoolExecutor(1) as executor:
        # Ray starts a node in the main thread only.
        run = executor.submit(resumable_write, ds, out)
        while not run.done() and committed() < 5:
            time.sleep(0.05)
        cluster.remove_node(lost, allow_graceful=False)
        print(f"a node is lost after {committed()} of {FILES} sources", flush=True)
        cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
        print(run.result(), flush=True)
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
