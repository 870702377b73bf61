"""Runs a pipeline on a cluster of its own, and prints the metrics that Ray gives out meanwhile.

    python metrics_driver.py FOLDER

Ray collects every second here.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import ray

from ray_resume import resumable, resumable_read, resumable_write


@resumable(on_error="dead_letter")
def slow(batch: Any) -> Any:
    """Take a while, so that there is something to see, and fail for one source."""
    time.sleep(1.5)
    if batch["id"][0] == 1:
        raise ValueError("one row fails")
    return batch


def sink(folder: Path) -> Any:
    """Return a table, which a run publishes as it goes on, or a folder without the library."""
    try:
        from ray.data._internal.datasource.delta_datasink import DeltaDatasink
    except ImportError:
        return str(folder)
    return DeltaDatasink(str(folder))


def scrape(over: threading.Event, found: dict[str, str]) -> None:
    """Keep the newest line of each metric of ray_resume."""
    nodes: Any = ray.nodes
    node = nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    while not over.wait(0.5):
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:
            continue
        found.update({line.partition("{")[0]: line for line in lines if line[:10] == "ray_resume"})


def main(folder: Path) -> None:
    """Run the pipeline."""
    ray.init(
        "local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 1000},
    )
    over, found = threading.Event(), dict[str, str]()
    thread = threading.Thread(target=scrape, args=(over, found))
    thread.start()
    keys = list(range(10))
    ds = resumable_read(lambda key: {"id": [key]}, keys=keys, checkpoint=folder / "checkpoint")
    ds = ds.map_batches(slow)
    out = sink(folder / "out")
    summary = resumable_write(ds, out, commit_interval_s=1, publish_interval_s=2)
    over.set()
    thread.join()
    published = not isinstance(out, str)
    told = {"run": summary.run_id, "sources": len(keys), "published": published, "found": found}
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
