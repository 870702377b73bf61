"""A node is lost in the middle of a run: the run ends, and every row is there once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from job import FILES, Job


@pytest.mark.slow
@pytest.mark.parametrize("pool", [False, True])
def test_a_lost_node_costs_work_and_no_rows(job: Job, pool: bool) -> None:
    options = ["--pool"] if pool else []
    job.start([sys.executable, str(Path(__file__).with_name("node_driver.py")), *options])
    output = job.finish()
    assert "a node is lost" in output
    # What it tore was executed again within the call, or else is now.
    if f"{FILES} of {FILES} sources completed" not in output:
        job.start()
        job.finish()
    job.check()
