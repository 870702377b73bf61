"""Ray Client: refused before anything is done, and told what to do; the way out works.

It needs gRPC, which only `ray[client]` installs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import write_source
from job import WITHOUT_TOKENS, kill_with_descendants
from places import SCRIPTS

from ray_resume.testing import check_exactly_once

pytestmark = pytest.mark.long

DRIVER = SCRIPTS / "client_driver.py"

# Started like this it does not become the cluster that `ray.init()` finds on this machine.
_HEAD = """
import socket, time
import ray
from ray.util.client.server.server import serve
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ray.init("local", num_cpus=2, include_dashboard=False, logging_level="error")
server = serve("127.0.0.1", port)
print(f"ray://127.0.0.1:{port}", flush=True)
time.sleep(10**6)
"""


@pytest.fixture
def client_address() -> Iterator[str]:
    """The address of a cluster for Ray Client."""
    pytest.importorskip("grpc", reason="Ray Client needs gRPC: pip install 'ray[client]'")
    process = subprocess.Popen(
        [sys.executable, "-c", _HEAD], stdout=subprocess.PIPE, text=True, env=WITHOUT_TOKENS
    )
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    kill_with_descendants(process.pid)
    process.communicate()


@pytest.mark.slow
def test_a_client_is_refused_and_a_task_of_the_cluster_is_not(
    client_address: str, tmp_path: Path
) -> None:
    write_source(tmp_path / "in", files=4, rows=50)
    driver = subprocess.run(
        [sys.executable, DRIVER, tmp_path, client_address],
        capture_output=True,
        text=True,
        env=WITHOUT_TOKENS,
        timeout=180,
    )
    assert driver.returncode == 0, driver.stderr
    assert driver.stdout.splitlines() == ["read refused", "write refused", "4 of 4 completed"]
    check_exactly_once(tmp_path / "ckpt", ({"id": i, "half": i / 2} for i in range(200)))


def test_an_address_that_would_make_a_client_is_refused_before_anybody_connects(
    tmp_path: Path,
) -> None:
    # In a process without Ray, since what Ray does on its own depends on whether it is started.
    script = (
        "import ray\n"
        "from ray_resume import ResumeError, resumable_read\n"
        "try:\n"
        f"    resumable_read(ray.data.read_parquet, 'in', checkpoint={str(tmp_path / 'ckpt')!r})\n"
        "except ResumeError as error:\n"
        "    print(error)\n"
        "assert not ray.is_initialized()\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "RAY_ADDRESS": "ray://127.0.0.1:1"},
    ).stdout
    assert told.startswith("RAY_ADDRESS would connect this process to its cluster through Ray Cl")
    assert "ray job submit" in told
    assert not (tmp_path / "ckpt").exists()
