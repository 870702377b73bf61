"""Lost nodes, lost pool workers, and blocks that do not fit into the object store.

The run ends, every row is there once, and what was torn is executed again within the call.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import spill_driver
from conftest import write_source
from driver import FILES
from job import WITHOUT_TOKENS, Job
from places import SCRIPTS
from ray.data import ActorPoolStrategy

from ray_resume import resumable, resumable_read, resumable_write
from ray_resume.testing import check_exactly_once

pytestmark = [pytest.mark.extended, pytest.mark.long]


@pytest.mark.slow
@pytest.mark.parametrize("pool", [False, True])
def test_a_lost_node_costs_work_and_no_rows(job: Job, pool: bool) -> None:
    options = ["--pool"] if pool else []
    job.start([sys.executable, str(SCRIPTS / "node_driver.py"), *options])
    output = job.finish()
    assert re.search(rf"a node is lost after ([5-9]|1\d) of {FILES} sources", output), output
    assert f"{FILES} of {FILES} sources completed" in output
    job.check()


@pytest.mark.slow
@pytest.mark.parametrize("lose_node", [False, True])
def test_blocks_that_wait_on_disk(tmp_path: Path, lose_node: bool) -> None:
    """With a node they are lost, and Ray makes them anew: with other tokens than their neighbours.

    A source of which both were used is torn (most often one or two are, but it depends on the
    moment); all are complete when the call ends.
    """
    write_source(tmp_path / "in", files=spill_driver.FILES, rows=spill_driver.ROWS)
    driver = subprocess.run(
        [sys.executable, SCRIPTS / "spill_driver.py", *["--lose-node"] * lose_node, tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
        env=WITHOUT_TOKENS,
    )
    assert driver.returncode == 0, driver.stderr[-4000:]
    told = driver.stdout
    assert "blocks are on disk" in told
    if lose_node:
        lost = re.search(r"a node is lost, and (\d+) bytes", told)
        assert lost is not None, told
        assert int(lost[1]) > 0
        assert "lost objects" in driver.stderr
    assert f"{spill_driver.FILES} of {spill_driver.FILES} sources completed" in told, told
    check_exactly_once(tmp_path / "ckpt", spill_driver.expected())


@pytest.mark.usefixtures("cluster")
def test_a_worker_of_a_pool_is_killed_in_the_middle(tmp_path: Path) -> None:
    write_source(tmp_path / "in", files=6, rows=100)
    pids, killed = tmp_path / "pids", tmp_path / "killed"
    pids.mkdir()

    @resumable
    class Triple:
        def __init__(self) -> None:
            self.calls = 0
            (pids / str(os.getpid())).touch()

        def __call__(self, batch: Any) -> Any:
            self.calls += 1
            if self.calls == 4 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.1)
            return {"id": batch["id"], "score": batch["id"] * 3}

    ds = resumable_read(
        ray.data.read_parquet,
        str(tmp_path / "in"),
        checkpoint=tmp_path / "ckpt",
        override_num_blocks=6,
    )
    ds = ds.map_batches(Triple, batch_size=25, compute=ActorPoolStrategy(size=2), num_cpus=0.5)
    summary = resumable_write(ds, tmp_path / "out")

    assert killed.exists()
    # Ray has started another one in its place.
    assert len(list(pids.iterdir())) >= 3
    assert summary.sources_completed == 6
    check_exactly_once(tmp_path / "ckpt", ({"id": i, "score": i * 3} for i in range(600)))
