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


@resumable
def slow(batch: Any) -> Any:
    """Take a while, so that there is something to see."""
    time.sleep(1.5)
    return batch


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
    keys = list(range(16))
    ds = resumable_read(lambda key: {"id": [key]}, keys=keys, checkpoint=folder / "checkpoint")
    summary = resumable_write(ds.map_batches(slow), str(folder / "out"), commit_interval_s=1)
    over.set()
    thread.join()
    print(json.dumps({"run": summary.run_id, "found": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
