"""What resumability costs: the same pipeline plain and resumable, alternating, in one process.

    python tests/benchmarks/overhead.py [--rows-per-file N] [--files N] [--pairs N]

Prints what an armed UDF adds to a call, the seconds of each pair and their ratio, and how long a
finished job takes to find that out.
Timings of a shared machine drift, so only the ratios within pairs are worth quoting.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from ray_resume import resumable, resumable_read, resumable_write
from ray_resume.core import tokens
from ray_resume.raydata import blocks
from ray_resume.udf import stage


def keep_positive(batch: Any) -> Any:
    """Drop about half of the rows."""
    mask = batch["value"] > 0
    return {name: column[mask] for name, column in batch.items()}


def make_input(folder: Path, files: int, rows: int) -> None:
    """Write ``files`` Parquet files of ``rows`` rows: an id, a float, a short string."""
    folder.mkdir()
    for number in range(files):
        random = np.random.default_rng(number)
        ids = np.arange(number * rows, (number + 1) * rows)
        table = pa.table(
            {"id": ids, "value": random.normal(size=rows), "text": (ids % 1000).astype(str)}
        )
        pq.write_table(table, folder / f"{number:05d}.parquet")


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Run both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=24)
    parser.add_argument("--rows-per-file", type=int, default=200_000)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--finished-files", type=int, default=1000)
    arguments = parser.parse_args()

    time_one_call()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    work = Path(tempfile.mkdtemp(prefix="ray-resume-benchmark-"))
    try:
        compare(work, arguments.files, arguments.rows_per_file, arguments.pairs)
        resume_finished(work, arguments.finished_files)
    finally:
        shutil.rmtree(work)
        ray.shutdown()


class NoLedger:
    """Takes what a call reports."""

    def send(self, *events: object) -> None:
        """Do nothing."""


def time_one_call(rows: int = 1000, columns: int = 10, calls: int = 5000) -> None:
    """Time what an armed UDF adds to a call with one batch of one source."""
    batch = {f"c{i}": np.random.default_rng(i).normal(size=rows) for i in range(columns)}
    client: Any = NoLedger()
    udf: Any = stage.instrument(resumable(lambda batch: batch), client)
    given = blocks.with_tracking_columns(batch, np.zeros(rows, np.int32), tokens.tokens(1, 0, rows))
    spent_s = seconds(lambda: [udf(given) for _ in range(calls)])
    print(
        f"a call with {rows} rows and {columns} columns costs {spent_s / calls * 1e6:.0f} us more"
    )


def compare(work: Path, files: int, rows: int, pairs: int) -> None:
    """Alternate between both pipelines, after one uncounted pair."""
    source = work / "in"
    make_input(source, files, rows)
    decorated = resumable(keep_positive)

    def plain(output: Path) -> None:
        ray.data.read_parquet(str(source)).map_batches(keep_positive).write_parquet(str(output))

    def resumable_pipeline(output: Path) -> None:
        ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=f"{output}.ckpt")
        resumable_write(ds.map_batches(decorated), str(output))

    ratios = []
    for pair in range(pairs + 1):
        plain_s = seconds(lambda pair=pair: plain(work / f"plain-{pair}"))  # type: ignore[misc]
        ours_s = seconds(lambda pair=pair: resumable_pipeline(work / f"ours-{pair}"))  # type: ignore[misc]
        if pair:
            ratios.append(ours_s / plain_s)
            print(f"plain {plain_s:6.2f} s   resumable {ours_s:6.2f} s   ratio {ratios[-1]:.3f}")
        for output in work.glob("*-*"):
            shutil.rmtree(output)
    print(
        f"{files} files, {files * rows:,} rows: median ratio {statistics.median(ratios):.3f} "
        f"(from {min(ratios):.3f} to {max(ratios):.3f})"
    )


def resume_finished(work: Path, files: int) -> None:
    """Finish a job of many small files, then time runs that find nothing to do."""
    source = work / "many"
    make_input(source, files, 10)

    def job() -> None:
        ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=work / "many.ckpt")
        resumable_write(ds.map_batches(resumable(keep_positive)), str(work / "many-out"))

    first_s = seconds(job)
    again_s = min(seconds(job) for _ in range(3))
    print(f"{files} files: first run {first_s:.2f} s, finished job {again_s * 1000:.0f} ms")


if __name__ == "__main__":
    main()
