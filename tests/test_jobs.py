"""Ray Jobs: a submitted script is stopped in the middle, and goes on when it is submitted again.

It needs the dashboard, which only `ray[default]` installs.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from job import DRIVER, FILES, WITHOUT_TOKENS, Job, kill_with_descendants

from ray_resume import Checkpoint

RAY = Path(sys.executable).with_name("ray")

_HEAD = """
import socket, time
import ray
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
context = ray.init("local", num_cpus=3, include_dashboard=True, dashboard_port=port)
print("http://" + context.dashboard_url, flush=True)
time.sleep(10**6)
"""


@pytest.fixture
def dashboard() -> Iterator[str]:
    """The address of a cluster that takes jobs."""
    if importlib.util.find_spec("aiohttp_cors") is None:
        pytest.skip("Ray Jobs need the dashboard: pip install 'ray[default]'")
    process = subprocess.Popen(
        [sys.executable, "-c", _HEAD], stdout=subprocess.PIPE, text=True, env=WITHOUT_TOKENS
    )
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    kill_with_descendants(process.pid)
    process.communicate()


@pytest.mark.slow
def test_a_stopped_job_ends_in_order_and_goes_on_when_submitted_again(
    job: Job, dashboard: str
) -> None:
    def ray_job(command: str, *arguments: str) -> list[str]:
        return [str(RAY), "job", command, "--address", dashboard, *arguments]

    script = [sys.executable, str(DRIVER), *map(str, (job.source, job.checkpoint, job.out)), "auto"]
    job.process = subprocess.Popen(
        ray_job("submit", "--submission-id", "stopped", "--", *script),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=WITHOUT_TOKENS,
    )
    job.wait_for(lambda: job.committed() >= 4)
    subprocess.run(ray_job("stop", "stopped"), check=True, capture_output=True, env=WITHOUT_TOKENS)
    told, _ = job.process.communicate(timeout=60)
    # It ended by itself, in the time that Ray gives it before it sends SIGKILL.
    done = job.committed()
    assert 4 <= done < FILES
    assert f"was interrupted: {done} of {FILES} sources are completed and safe" in told
    assert Checkpoint(job.checkpoint).status().live == 0
    assert Checkpoint(job.checkpoint).files() == sorted(map(str, job.out.iterdir()))

    again = subprocess.run(
        ray_job("submit", "--", *script),
        capture_output=True,
        text=True,
        timeout=180,
        env=WITHOUT_TOKENS,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{FILES - done} of {FILES} sources completed" in again.stdout
    job.check()
