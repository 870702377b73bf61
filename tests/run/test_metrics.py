"""Metrics: what Ray's own endpoint gives out, and what the dashboard shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ray_resume
from ray_resume.run.metrics import NAMES

ROOT = Path(ray_resume.__file__).parent.parent
DRIVER = ROOT / "tests" / "drivers" / "metrics_driver.py"


def test_the_dashboard_shows_metrics_that_exist_and_no_other() -> None:
    dashboard = json.loads((ROOT / "examples" / "grafana_dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["targets"]
    shown = set(re.findall(r"ray_resume_\w+", json.dumps(dashboard)))
    assert shown <= NAMES
    # A histogram is shown by its buckets.
    assert {name for name in NAMES if not name.endswith(("_count", "_sum"))} <= shown


@pytest.mark.extended
def test_the_endpoint_of_ray_has_every_metric_with_its_tags(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client", reason="pip install 'ray[default]'")
    result = subprocess.run(
        [sys.executable, DRIVER, tmp_path],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "RAY_enable_metrics_collection": "1"},
    )
    told = json.loads(result.stdout.splitlines()[-1])
    found = told["found"]
    # The driver writes into a folder if no library of tables is installed.
    absent = {name for name in NAMES if "publish" in name and not told["published"]}
    assert NAMES - absent <= found.keys()
    for line in found.values():
        assert f'checkpoint="{tmp_path / "checkpoint"}"' in line
        assert f'run="{told["run"]}"' in line
    value = {name: float(line.rpartition(" ")[2]) for name, line in found.items()}
    known = value["ray_resume_sources_completed"] + value["ray_resume_sources_pending"]
    assert known == told["sources"]
    assert 1 <= value["ray_resume_sources_committed"] <= value["ray_resume_sources_completed"]
    # Each source has one row, and that of one is a dead letter.
    dead_lettered = value["ray_resume_rows_dead_lettered_total"]
    assert dead_lettered == 1
    rows = value["ray_resume_rows_written_total"] + dead_lettered
    assert rows >= value["ray_resume_sources_committed"]
    assert value["ray_resume_commit_seconds_count"] >= 1
