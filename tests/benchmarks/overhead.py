"""The cost of resumability: the same pipeline plain and resumable, in turns, in one process.

    python tests/benchmarks/overhead.py [SHAPE ...] [--pairs N] [--profile] [--progress] [--cpu]

For each shape of pipeline, prints the seconds of each pair and their ratio, how many files each of
the two wrote, and the median ratio. ``call`` prints what an armed UDF adds to a call, ``finished``
how long a finished job takes to find that out, ``next`` what the second of two pipelines in a row
takes. ``--profile`` prints what Ray Data says of the time
that each operator took, for one more pair. ``--progress`` compares runs without and with progress
and numbers of stages, in the place of plain and resumable ones. ``--cpu`` compares processor time,
of the driver and all processes of the cluster; others on the machine disturb it less.
Timings of a shared machine drift, so only the ratios within pairs are worth quoting.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data.expressions import col

from ray_resume import Checkpoint, resumable, resumable_read, resumable_write
from ray_resume.core import tokens
from ray_resume.raydata import blocks
from ray_resume.udf import stage
from ray_resume.write import execution

Decorate = Callable[[Any], Any]


def keep_positive(batch: Any) -> Any:
    """Drop about half of the rows."""
    mask = batch["value"] > 0
    return {name: column[mask] for name, column in batch.items()}


def as_it_is(batch: Any) -> Any:
    """Return a batch."""
    return batch


class Pooled:
    """The same, in actors."""

    def __call__(self, batch: Any) -> Any:
        return batch


def mean_color(batch: Any) -> Any:
    """Replace each image by its mean."""
    return {"mean": np.array([image.mean() for image in batch["image"]])}


def make_parquet(folder: Path, *, files: int, rows: int) -> None:
    """Write Parquet files: an id, a float, a short string."""
    for number in range(files):
        random = np.random.default_rng(number)
        ids = np.arange(number * rows, (number + 1) * rows)
        table = pa.table(
            {"id": ids, "value": random.normal(size=rows), "text": (ids % 1000).astype(str)}
        )
        pq.write_table(table, folder / f"{number:05d}.parquet")


def make_images(folder: Path, *, files: int) -> None:
    """Write images of 64 x 64 pixels."""
    from PIL import Image

    for number in range(files):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.png")


def make_json(folder: Path, *, files: int, rows: int) -> None:
    """Write files of JSON lines."""
    for number in range(files):
        random = np.random.default_rng(number).normal(size=rows)
        with open(folder / f"{number:05d}.jsonl", "w") as file:
            for row in range(rows):
                line = {"id": number * rows + row, "value": random[row], "text": str(row % 1000)}
                file.write(json.dumps(line) + "\n")


def make_lines(folder: Path, *, files: int) -> None:
    """Write text files of one line."""
    for number in range(files):
        (folder / f"{number:07d}.txt").write_text(f"row {number}\n")


def filtered(ds: Any, decorate: Decorate) -> Any:
    return ds.map_batches(decorate(keep_positive))


def pooled(ds: Any, decorate: Decorate) -> Any:
    pool, cheap = (
        ray.data.ActorPoolStrategy(size=1),
        {"batch_size": None, "batch_format": "pyarrow"},
    )
    ds = ds.filter(expr=col("value") > 0)
    ds = ds.map_batches(decorate(Pooled), compute=pool, **cheap)
    return ds.map_batches(decorate(as_it_is), **cheap)


def unchanged(ds: Any, decorate: Decorate) -> Any:
    return ds.map_batches(decorate(as_it_is))


@dataclass(frozen=True)
class Shape:
    """A pipeline: how its input is made and read, and what stands between read and write."""

    make: Callable[[Path], None]
    reader: str
    transform: Callable[[Any, Decorate], Any]
    read: dict[str, Any] = field(default_factory=dict)
    write: dict[str, Any] = field(default_factory=dict)


_POOL_INPUT = partial(make_parquet, files=16, rows=200_000)

SHAPES = {
    "filter": Shape(partial(make_parquet, files=24, rows=200_000), "read_parquet", filtered),
    "images": Shape(
        partial(make_images, files=600),
        "read_images",
        lambda ds, of: ds.map_batches(of(mean_color)),
    ),
    "json": Shape(partial(make_json, files=12, rows=20_000), "read_json", filtered),
    "pool": Shape(_POOL_INPUT, "read_parquet", pooled),
    "pool, four read tasks": Shape(
        _POOL_INPUT, "read_parquet", pooled, read={"override_num_blocks": 4}
    ),
    "pool, one read task": Shape(
        _POOL_INPUT, "read_parquet", pooled, read={"override_num_blocks": 1}
    ),
    "tiny files": Shape(partial(make_lines, files=100_000), "read_text", unchanged),
    "tiny files, merged": Shape(
        partial(make_lines, files=100_000),
        "read_text",
        unchanged,
        write={"target_file_bytes": 64 << 20},
    ),
    "small files": Shape(partial(make_parquet, files=1000, rows=10), "read_parquet", filtered),
}


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cpu_seconds(work: Callable[[], object]) -> float:
    """Measure the processor time of one call, of this process and all that it has started."""
    start = _cpu_s()
    work()
    return _cpu_s() - start


def _cpu_s() -> float:
    here = psutil.Process()
    total = 0.0
    for process in (here, *here.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            # The last two are of children that have ended.
            user, system, of_children, in_system = process.cpu_times()[:4]
            total += user + system + of_children + in_system
    return total


def compare(
    work: Path,
    name: str,
    pairs: int,
    *,
    profile: bool,
    progress: bool,
    measure: Callable[[Callable[[], object]], float],
) -> None:
    """Alternate between both pipelines, after one uncounted pair."""
    shape = SHAPES[name]
    source = work / "in"
    source.mkdir()
    shape.make(source)

    def plain(output: Path) -> Any:
        ds = getattr(ray.data, shape.reader)(str(source), **shape.read)
        ds = shape.transform(ds, lambda udf: udf)
        ds.write_parquet(str(output))
        return ds

    def ours(output: Path, *, is_shown: bool | None = None) -> Any:
        reader = getattr(ray.data, shape.reader)
        ds = resumable_read(reader, str(source), checkpoint=f"{output}.ckpt", **shape.read)
        ds = shape.transform(ds, resumable)
        return resumable_write(ds, str(output), progress=is_shown, **shape.write)

    def unobserved(output: Path) -> Any:
        with mock.patch.object(execution, "instrument", uncounted):
            return ours(output, is_shown=False)

    if progress:
        plain, ours = unobserved, partial(ours, is_shown=True)

    ratios = []
    for pair in range(pairs + 1):
        plain_s = measure(lambda pair=pair: plain(work / f"plain-{pair}"))  # type: ignore[misc]
        ours_s = measure(lambda pair=pair: ours(work / f"ours-{pair}"))  # type: ignore[misc]
        files = [
            sum(1 for _ in (work / f"{kind}-{pair}").rglob("*.parquet"))
            for kind in ("plain", "ours")
        ]
        if pair or not pairs:
            ratios.append(ours_s / plain_s)
            print(
                f"{name:22} plain {plain_s:6.2f} s, {files[0]:4} files   resumable {ours_s:6.2f} s,"
                f" {files[1]:4} files   ratio {ratios[-1]:.3f}",
                flush=True,
            )
        for output in work.glob("*-*"):
            shutil.rmtree(output)
    print(
        f"{name:22} median ratio {statistics.median(ratios):.3f} "
        f"(from {min(ratios):.3f} to {max(ratios):.3f})",
        flush=True,
    )
    if profile:
        print_stats(lambda: plain(work / "plain"), lambda: ours(work / "ours"))
    shutil.rmtree(work)
    work.mkdir()


def uncounted(udf: Any, client: Any, kind: str, position: int) -> Any:
    """Take the place of `stage.instrument`, and have nothing counted."""
    return stage.instrument(udf, client, kind)


def print_stats(*jobs: Callable[[], object]) -> None:
    """Print what Ray Data says of the operators of each execution."""
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    executor_class: Any = StreamingExecutor
    shutdown = executor_class.shutdown

    def print_and_shut_down(executor: Any, *args: Any, **kwargs: Any) -> None:
        shutdown(executor, *args, **kwargs)
        print(executor._final_stats.to_summary().to_string(), flush=True)

    executor_class.shutdown = print_and_shut_down
    for job in jobs:
        job()
    executor_class.shutdown = shutdown


class NoLedger:
    """Takes what a call reports."""

    run_id = "run"

    def send(self, *events: object) -> None:
        """Do nothing."""


def time_one_call(rows: int = 1000, columns: int = 10, calls: int = 5000) -> None:
    """Time what an armed UDF adds to a call with one batch of one source."""
    batch = {f"c{i}": np.random.default_rng(i).normal(size=rows) for i in range(columns)}
    client: Any = NoLedger()
    given = blocks.with_tracking_columns(batch, np.zeros(rows, np.int32), tokens.tokens(1, 0, rows))
    for position in (None, 0) * 3:
        udf: Any = stage.instrument(resumable(lambda batch: batch), client, "map_batches", position)
        spent_s = seconds(lambda udf=udf: [udf(given) for _ in range(calls)])  # type: ignore[misc]
        print(
            f"a call with {rows} rows and {columns} columns costs {spent_s / calls * 1e6:.1f} us "
            f"more{'' if position is None else ', counted'}"
        )


def resume_finished(work: Path, files: int = 1000) -> None:
    """Finish a job of many small files, then time runs that find nothing to do."""
    source = work / "in"
    source.mkdir()
    make_parquet(source, files=files, rows=10)

    def job() -> None:
        ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=work / "ckpt")
        resumable_write(ds.map_batches(resumable(keep_positive)), str(work / "out"))

    first_s = seconds(job)
    again_s = min(seconds(job) for _ in range(3))
    print(f"{files} files: first run {first_s:.2f} s, finished job {again_s * 1000:.0f} ms")
    shutil.rmtree(work)
    work.mkdir()


def read_next(work: Path, pairs: int, files: int = 400, rows: int = 2000) -> None:
    """Compare the second of two pipelines in a row with plain Ray Data over the first one's files.

    Then a source of the first changes, and both run again.
    """
    source = work / "in"
    source.mkdir()
    make_parquet(source, files=files, rows=rows)
    first = Checkpoint(work / "first")

    def write_first() -> None:
        ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=first)
        resumable_write(ds, str(work / "mid"))

    def second(name: str) -> None:
        ds = resumable_read(ray.data.read_parquet, first, checkpoint=work / f"{name}.ckpt")
        resumable_write(ds.map_batches(resumable(keep_positive)), str(work / name))

    def plain(name: str) -> None:
        ds = ray.data.read_parquet(first.files())
        ds.map_batches(keep_positive).write_parquet(str(work / name))

    write_first()
    for pair in range(pairs + 1):
        plain_s = seconds(lambda pair=pair: plain(f"plain-{pair}"))  # type: ignore[misc]
        ours_s = seconds(lambda pair=pair: second(f"ours-{pair}"))  # type: ignore[misc]
        make_parquet(source, files=1, rows=rows)
        write_first()
        anew_s = seconds(lambda pair=pair: plain(f"anew-{pair}"))  # type: ignore[misc]
        again_s = seconds(lambda pair=pair: second(f"ours-{pair}"))  # type: ignore[misc]
        if pair or not pairs:
            print(
                f"second of two, {files} sources: plain {plain_s:.2f} s, resumable {ours_s:.2f} s, "
                f"ratio {ours_s / plain_s:.3f}; one changed: plain {anew_s:.2f} s, resumable "
                f"{again_s:.2f} s, ratio {again_s / anew_s:.3f}",
                flush=True,
            )
    shutil.rmtree(work)
    work.mkdir()


def main() -> None:
    """Run the comparisons that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["call", "finished", "next", *SHAPES]
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=", ".join(names))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()
    if unknown := set(given.shapes) - set(names):
        parser.error(f"no such shape: {', '.join(unknown)}. Give some of: {', '.join(names)}.")

    chosen = given.shapes or names
    if "call" in chosen:
        time_one_call()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    work = Path(tempfile.mkdtemp(prefix="ray-resume-benchmark-"))
    try:
        for name in chosen:
            if name == "finished":
                resume_finished(work)
            elif name == "next":
                read_next(work, given.pairs)
            elif name in SHAPES:
                compare(
                    work,
                    name,
                    given.pairs,
                    profile=given.profile,
                    progress=given.progress,
                    measure=cpu_seconds if given.cpu else seconds,
                )
    finally:
        shutil.rmtree(work)
        ray.shutdown()


if __name__ == "__main__":
    main()
