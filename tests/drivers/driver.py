"""A driver to be killed: reads, filters, fans out, scores in an actor pool, writes.

    python driver.py SOURCE CHECKPOINT OUT [ADDRESS]

Each batch takes the last stage a moment, so that sources complete one after another, and there
is a middle to be killed in. `rows_of` computes what the
output must be, without Ray.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

# Ray types a UDF's argument as the union of all batch formats.
Batch: TypeAlias = Any

FILES, ROWS = 24, 200
MOMENT_S = 0.08
RUNTIME_ENV_MARK = "RAY_RESUME_TEST_MARK"


def drop_sevenths(batch: Batch) -> Batch:
    mask = batch["id"] % 7 != 0
    return {name: values[mask] for name, values in batch.items()}


def fan_out(batch: Batch) -> Iterator[Batch]:
    copies = np.repeat(np.arange(len(batch["id"])), batch["id"] % 3)
    for part in np.array_split(copies, 2):
        yield {name: values[part] for name, values in batch.items()}


class Score:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, batch: Batch) -> Batch:
        time.sleep(MOMENT_S)
        return {"id": batch["id"], "score": batch["id"] * self.factor}


class ScoreWithEnvironment(Score):
    """Fails where the runtime_env of the user's job did not reach."""

    def __init__(self, factor: int) -> None:
        assert os.environ[RUNTIME_ENV_MARK] == "kept"
        super().__init__(factor)


def rows_of(rows: int) -> list[tuple[int, int]]:
    """Return the sorted ``(id, score)`` rows of the output for the ids ``0 .. rows - 1``."""
    return sorted((i, i * 3) for i in range(rows) if i % 7 for _ in range(i % 3))


def scored(ds: Any, score: type = Score) -> Any:
    """Filter, fan out and score a dataset of ids."""
    from ray.data import ActorPoolStrategy

    from ray_resume import resumable

    ds = ds.map_batches(resumable(drop_sevenths), batch_size=40, num_cpus=0.5)
    ds = ds.map_batches(resumable(fan_out), batch_size=100, num_cpus=0.4)
    return ds.map_batches(
        resumable(score),
        fn_constructor_args=(3,),
        batch_size=64,
        compute=ActorPoolStrategy(size=1),
        num_cpus=0.5,
    )


def main() -> None:
    import logging

    import ray
    from small_cluster import start_cluster

    from ray_resume import resumable_read, resumable_write

    source, checkpoint, out, *address = sys.argv[1:]
    if address:
        ray.init(address=address[0], log_to_driver=False, logging_level=logging.ERROR)
    else:
        start_cluster(num_cpus=3, runtime_env={"env_vars": {RUNTIME_ENV_MARK: "kept"}})
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # Each driver starts workers of its own: few are enough.
    context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=2)
    ds = resumable_read(ray.data.read_parquet, source, checkpoint=checkpoint)
    ds = scored(ds.select_columns(["id"]), Score if address else ScoreWithEnvironment)
    print(resumable_write(ds, out), flush=True)


if __name__ == "__main__":
    main()
