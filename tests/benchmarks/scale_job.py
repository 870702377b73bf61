"""`scale.py run`: a whole job over tiny files."""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from measures import Clock, Watcher, peak_mb
from scale_parts import in_child


def run_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make tiny files, then process them and run again, in processes of their own."""
    work = Path(tempfile.mkdtemp(prefix="ray-resume-scale-"))
    clock = Clock()
    try:
        with clock.step("make"):
            for number in range(arguments.sources):
                folder = work / "in" / f"{number // 1000:04d}"
                if number % 1000 == 0:
                    folder.mkdir(parents=True)
                (folder / f"{number:09d}.txt").write_text(f"{number}\n")
        kinds = ["plain"] * arguments.plain + ["job", "again"]
        done = {kind: in_child(kind, work, arguments.sources) for kind in kinds}
        return {"sources": arguments.sources, "make_s": clock.seconds["make"], **done}
    finally:
        shutil.rmtree(work)


def job(kind: str, work: Path, count: int) -> dict[str, Any]:
    """Run the job, by Ray Data alone if it is "plain"; watch what its processes take."""
    import pyarrow.dataset as pads
    import ray

    from ray_resume import resumable, resumable_read, resumable_write

    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=1 << 30,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    out, clock, before_mb = work / ("plain" if kind == "plain" else "out"), Clock(), peak_mb()
    with Watcher() as watcher:
        if kind == "plain":
            with clock.step("list"):
                ds = ray.data.read_text(str(work / "in"))
            with clock.step("run"):
                ds.map_batches(lambda batch: batch).write_parquet(str(out))
            found: dict[str, Any] = {}
        else:
            with clock.step("list"):
                ds = resumable_read(ray.data.read_text, str(work / "in"), checkpoint=work / "ckpt")
            same = resumable(lambda batch: batch, one_to_one=True)
            with clock.step("run"):
                summary = resumable_write(ds.map_batches(same), out)
            assert (summary.sources_completed, summary.sources_skipped) == (
                (count, 0) if kind == "job" else (0, count)
            )
            found = {"files": sum(1 for _ in out.iterdir())}
    rows = pads.dataset(out, format="parquet").to_table().column("text").to_pylist()
    assert sorted(map(int, rows)) == list(range(count))
    ray.shutdown()
    return {
        **clock.told(),
        **found,
        "driver_mb": round(peak_mb()),
        "before_mb": round(before_mb),
        "ledger_mb": watcher.peak_mb.get("ray::_LedgerActor"),
    }
