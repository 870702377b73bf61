"""Runs pipelines with actor pools, plain and resumable, on a cluster of its own.

    python pool_driver.py FOLDER CPUS

The folder has Parquet files in ``in``. Each pipeline writes to ``plain-<name>``, if that is not
there from another cluster, and to ``ours-<name>-<CPUS>``. Actor pools take all of the cluster's
CPUs but what one read needs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy, Dataset
from small_cluster import start_cluster

from ray_resume import resumable, resumable_read, resumable_write

RESOURCE = "GPU_LIKE"


class Double:
    """Doubles each row, so that the batch has twice as many."""

    def __call__(self, batch: Any) -> Any:
        return {
            name: [value for value in column for _ in range(2)] for name, column in batch.items()
        }


class Score:
    """Adds a column."""

    def __call__(self, batch: Any) -> Any:
        return {**batch, "score": batch["id"] * 3}


class Shift:
    """Changes a column."""

    def __call__(self, batch: Any) -> Any:
        return {**batch, "id": batch["id"] + 1}


def odd(batch: Any) -> Any:
    """Keep every second row."""
    mask = batch["id"] % 2 == 1
    return {name: column[mask] for name, column in batch.items()}


def pipelines(cpus: int) -> dict[str, Callable[[Dataset, Callable[[Any], Any]], Dataset]]:
    """Return the pipelines for a cluster of so many CPUs, by name."""
    free = cpus - 1
    pool: dict[str, Any] = {"batch_size": 7, "num_cpus": 1}
    half: dict[str, Any] = {"batch_size": 7, "num_cpus": 0.5}
    custom: dict[str, Any] = {"batch_size": 7, "num_cpus": 0, "resources": {RESOURCE: 1}}

    def actors(size: int) -> dict[str, Any]:
        return {"compute": ActorPoolStrategy(size=size)}

    return {
        "pool": lambda ds, of: ds.map_batches(of(Score), **actors(free), **pool),
        "two_pools": lambda ds, of: (
            ds.map_batches(of(Score), **actors(free), **half)
            .map_batches(of(Double), **actors(free), **half)
            .map_batches(of(odd), batch_size=5)
        ),
        "resource": lambda ds, of: (
            ds.map_batches(of(odd), **custom)
            .map_batches(of(Shift), **actors(1), **custom)
            .map_batches(of(Score), **actors(1), batch_size=3, num_cpus=0.5)
        ),
    }


def main(folder: Path, cpus: int) -> None:
    """Run each pipeline."""
    start_cluster(num_cpus=cpus, resources={RESOURCE: 2})
    ray.data.DataContext.get_current().enable_progress_bars = False
    source = str(folder / "in")
    for name, transform in pipelines(cpus).items():
        plain = transform(ray.data.read_parquet(source), lambda udf: udf)
        plain.write_parquet(str(folder / f"plain-{name}"))
        print(f"plain {name}", flush=True)
        checkpoint = folder / f"checkpoint-{name}"
        ours = resumable_read(ray.data.read_parquet, source, checkpoint=checkpoint)
        out = folder / f"ours-{name}"
        summary = resumable_write(transform(ours, resumable), str(out))
        assert summary.complete, summary
        print(f"ours {name}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
