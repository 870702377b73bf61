"""A driver whose data does not fit into the object store, so that blocks wait on disk.

    python spill_driver.py [--lose-node] FOLDER

Each row of the input gets a payload, far more in sum than the store holds, which one slow actor
weighs. With the option, payloads are made on a node of their own, which is lost with all of the
blocks that wait there, in memory and on disk. It prints the run's summary.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

# Ray types a UDF's argument as the union of all batch formats.
Batch: TypeAlias = Any

FILES, ROWS, PAYLOAD_BYTES = 24, 250, 50_000
PIECES = 10
STORE_BYTES = 80 << 20
# Far less than all of it, so that there is a middle to lose a node in.
ENOUGH_SPILLED_BYTES = 20 << 20
MOMENT_S = 0.1


def payload(row: int) -> bytes:
    return bytes([row % 251]) * PAYLOAD_BYTES


def make_payloads(batch: Batch) -> Iterator[Batch]:
    # A block for each piece, so that some can be lost whose neighbours were used.
    for rows in np.array_split(batch["id"], PIECES):
        yield {"id": rows, "payload": np.array([payload(i) for i in rows], dtype=object)}


class Weigh:
    def __call__(self, batch: Batch) -> Batch:
        time.sleep(MOMENT_S)
        weights = [int(np.frombuffer(data, np.uint8).sum()) for data in batch["payload"]]
        return {"id": batch["id"], "weight": np.array(weights)}


def expected() -> Iterator[dict[str, int]]:
    for row in range(FILES * ROWS):
        yield {"id": row, "weight": row % 251 * PAYLOAD_BYTES}


def spilled_bytes(folder: Path) -> int:
    """Return how much lies in ``folder``, in which files come and go."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def main() -> None:
    import logging

    import ray
    from ray.cluster_utils import Cluster
    from ray.data import ActorPoolStrategy

    from ray_resume import resumable, resumable_read, resumable_write

    *options, name = sys.argv[1:]
    folder = Path(name)
    spilled = folder / "spilled"
    makers: dict[str, Any] = {
        "num_cpus": 2,
        "resources": {"makes": 2},
        "object_store_memory": STORE_BYTES,
        "object_spilling_directory": str(spilled),
    }
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "resources": {"weighs": 2},
            "object_store_memory": STORE_BYTES,
        },
    )
    lost = cluster.add_node(**makers)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    cluster.wait_for_nodes()

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1 << 20
    # Otherwise Ray Data makes no more blocks than fit.
    context.set_config("backpressure_policies.enabled", [])
    ds = resumable_read(
        ray.data.read_parquet,
        str(folder / "in"),
        checkpoint=folder / "ckpt",
        override_num_blocks=FILES,
    )
    ds = ds.map_batches(
        resumable(make_payloads), batch_size=None, num_cpus=0.5, resources={"makes": 0.5}
    )
    ds = ds.map_batches(
        resumable(Weigh),
        batch_size=None,
        compute=ActorPoolStrategy(size=1),
        num_cpus=0.5,
        resources={"weighs": 0.5},
    )
    with ThreadPoolExecutor(1) as pool:
        # Ray starts a node in the main thread only.
        run = pool.submit(resumable_write, ds, folder / "out")
        while not run.done() and spilled_bytes(spilled) < ENOUGH_SPILLED_BYTES:
            time.sleep(0.05)
        if not run.done():
            print("blocks are on disk", flush=True)
            if "--lose-node" in options:
                print(f"a node is lost, and {spilled_bytes(spilled)} bytes", flush=True)
                # Its disk goes with it.
                cluster.remove_node(lost, allow_graceful=False)
                cluster.add_node(**makers)
        print(run.result(), flush=True)
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
