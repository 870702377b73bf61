"""One task of an array job: clean the text of its share of a folder of Parquet files.

    sbatch examples/slurm_array.sbatch python examples/slurm_array.py IN CKPT OUT

Without SLURM, a share is given by hand: ``--shard 0 8`` to ``--shard 7 8``. The column ``text`` of
the input is cleaned, rows that are empty then are dropped.
"""

from __future__ import annotations

import argparse
import os

import pandas as pd
import ray

from ray_resume import resumable, resumable_read, resumable_write


@resumable
def clean(batch: pd.DataFrame) -> pd.DataFrame:
    text = batch["text"].str.replace(r"\s+", " ", regex=True).str.strip()
    kept: pd.DataFrame = batch.assign(text=text)[text.str.len() > 0]
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input")
    parser.add_argument("checkpoint")
    parser.add_argument("output")
    parser.add_argument("--shard", type=int, nargs=2, metavar=("INDEX", "COUNT"))
    options = parser.parse_args()
    index_and_count = options.shard and (options.shard[0], options.shard[1])

    # A cluster for each task, as large as its allocation, unless there is one for all.
    address = os.environ.get("RAY_ADDRESS", "local")
    cpus = int(os.environ.get("SLURM_CPUS_PER_TASK", 2)) if address == "local" else None
    ray.init(address=address, num_cpus=cpus)
    ds = resumable_read(
        ray.data.read_parquet,
        options.input,
        checkpoint=options.checkpoint,
        shard=index_and_count or "slurm",
    )
    ds = ds.map_batches(clean, batch_format="pandas")  # type: ignore[arg-type]
    # SLURM must not take the task for done while sources are left.
    resumable_write(ds, options.output, require_complete=True)


if __name__ == "__main__":
    main()
