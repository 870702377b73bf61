"""A driver that is a Ray Client: it is refused, and a task of the cluster does the work instead.

    python client_driver.py FOLDER ADDRESS

It prints what became of each.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import ray

from ray_resume import ResumeError, RunSummary, resumable, resumable_read, resumable_write


@resumable
def halve(batch: Any) -> Any:
    return {"id": batch["id"], "half": batch["id"] / 2}


def pipeline(folder: Path) -> Any:
    ds = resumable_read(ray.data.read_parquet, str(folder / "in"), checkpoint=folder / "ckpt")
    return ds.map_batches(halve)


def main() -> None:
    folder, address = Path(sys.argv[1]), sys.argv[2]
    ray.init("local", num_cpus=1, include_dashboard=False, logging_level=logging.ERROR)
    before = pipeline(folder)
    ray.shutdown()

    ray.init(address)
    for what, call in (
        ("read", lambda: pipeline(folder)),
        ("write", lambda: resumable_write(before, folder / "out")),
    ):
        try:
            call()
        except ResumeError as error:
            told = str(error)
            assert "through Ray Client" in told, told
            assert "ray job submit" in told, told
            print(what, "refused")
    assert not (folder / "out").exists()

    task: Any = ray.remote(lambda: resumable_write(pipeline(folder), folder / "out"))
    summary: RunSummary = ray.get(task.remote())
    print(f"{summary.sources_completed} of {summary.sources_total} completed")


if __name__ == "__main__":
    main()
