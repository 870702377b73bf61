"""Ray Jobs: a submitted script is stopped in the middle, and goes on when it is submitted again.

It needs the dashboard, which only `ray[default]` installs.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from conftest import write_source
from driver import FILES
from guides import blocks
from job import DRIVER, WITHOUT_TOKENS, Job, kill_with_descendants
from places import ROOT

from ray_resume import Checkpoint, CheckpointError, resumable_read

pytestmark = pytest.mark.long

RAY = Path(sys.executable).with_name("ray")

# Ray sends SIGKILL 3 s after SIGTERM; on a busy machine that may come before we have cleaned up.
PATIENT = ("--runtime-env-json", json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}))

# `ray.init` gives the agent of each cluster the same port: on a machine where another cluster has
# it, this one would never take a job ("No available agent").
_HEAD = """
import socket, time
from ray.cluster_utils import Cluster
with socket.socket() as one, socket.socket() as other:
    one.bind(("127.0.0.1", 0))
    other.bind(("127.0.0.1", 0))
    dashboard, agent = (free.getsockname()[1] for free in (one, other))
cluster = Cluster()
cluster.add_node(
    num_cpus=3, include_dashboard=True, dashboard_port=dashboard, dashboard_agent_listen_port=agent
)
print("http://" + cluster.head_node.webui_url, cluster.address, flush=True)
time.sleep(10**6)
"""


@pytest.fixture
def head() -> Iterator[tuple[str, str]]:
    """A cluster that takes jobs: where it takes them, and its address.

    (Of several clusters on one machine Ray tells a job the address of any.)
    """
    if importlib.util.find_spec("aiohttp_cors") is None:
        pytest.skip("Ray Jobs need the dashboard: pip install 'ray[default]'")
    process = subprocess.Popen(
        [sys.executable, "-c", _HEAD], stdout=subprocess.PIPE, text=True, env=WITHOUT_TOKENS
    )
    assert process.stdout is not None
    dashboard, address = process.stdout.readline().split()
    yield dashboard, address
    kill_with_descendants(process.pid)
    process.communicate()


def ray_job(dashboard: str, command: str, *arguments: str) -> list[str]:
    return [str(RAY), "job", command, "--address", dashboard, *arguments]


def test_a_checkpoint_in_the_copy_of_a_working_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(CheckpointError, match="Give an absolute path"):
        resumable_read(ray.data.read_parquet, str(tmp_path), checkpoint="ckpt")
    assert not list(copy.iterdir())


@pytest.mark.slow
def test_a_relative_checkpoint_of_a_job_with_a_working_directory_is_refused(
    head: tuple[str, str], tmp_path: Path
) -> None:
    dashboard, address = head
    write_source(tmp_path / "in", files=1, rows=10)
    working_dir = tmp_path / "project"
    working_dir.mkdir()
    shutil.copy(DRIVER, working_dir)
    script = [
        sys.executable,
        DRIVER.name,
        str(tmp_path / "in"),
        "ckpt",
        str(tmp_path / "out"),
        address,
    ]
    submitted = subprocess.run(
        ray_job(dashboard, "submit", "--working-dir", str(working_dir), "--", *script),
        capture_output=True,
        text=True,
        timeout=120,
        env=WITHOUT_TOKENS,
    )
    told = submitted.stdout + submitted.stderr
    assert submitted.returncode != 0
    assert "is in the copy of your working directory that Ray has made" in told, told
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_stopped_job_ends_in_order_and_goes_on_when_submitted_again(
    job: Job, head: tuple[str, str]
) -> None:
    dashboard, address = head

    arguments = [job.source, job.checkpoint, job.out, address]
    script = [sys.executable, str(DRIVER), *map(str, arguments)]
    job.process = subprocess.Popen(
        ray_job(dashboard, "submit", "--submission-id", "stopped", *PATIENT, "--", *script),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=WITHOUT_TOKENS,
    )
    job.wait_for(lambda: job.committed() >= 4)
    subprocess.run(
        ray_job(dashboard, "stop", "stopped"), check=True, capture_output=True, env=WITHOUT_TOKENS
    )
    told, _ = job.process.communicate(timeout=60)
    # It ended by itself, before Ray sent SIGKILL.
    done = job.committed()
    assert 4 <= done < FILES
    assert f"was interrupted: {done} of {FILES} sources are completed and safe" in told
    assert Checkpoint(job.checkpoint).status().live == 0
    assert Checkpoint(job.checkpoint).files() == sorted(map(str, job.out.iterdir()))

    again = subprocess.run(
        ray_job(dashboard, "submit", "--", *script),
        capture_output=True,
        text=True,
        timeout=180,
        env=WITHOUT_TOKENS,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{FILES - done} of {FILES} sources completed" in again.stdout
    job.check()


@pytest.mark.extended
def test_the_job_of_the_kubernetes_guide_fails_until_all_is_done(
    head: tuple[str, str], tmp_path: Path
) -> None:
    dashboard, address = head
    page = blocks(ROOT / "examples" / "kubernetes.md")
    [script] = [block.text for block in page if block.text.startswith("# job.py")]
    [job] = [yaml.safe_load(block.text) for block in page if block.language == "yaml"]
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "job.py").write_text(script)
    (tmp_path / "raw").mkdir()
    for number, text in enumerate(["a", None]):
        table = pa.table({"id": [number], "text": pa.array([text], pa.string())})
        pq.write_table(table, tmp_path / "raw" / f"{number}.parquet")
    entrypoint = job["spec"]["entrypoint"].replace("s3://bucket", str(tmp_path))
    words = shlex.split(entrypoint.replace("/app", str(tmp_path / "app")))
    environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])

    def submit() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ray_job(
                dashboard,
                "submit",
                "--runtime-env-json",
                json.dumps(environment),
                "--",
                "env",
                f"RAY_ADDRESS={address}",
                sys.executable,
                *words[1:],
            ),
            capture_output=True,
            text=True,
            timeout=180,
            env=WITHOUT_TOKENS,
        )

    failed = submit()
    for _ in range(30):
        if "No available agent" not in failed.stderr:
            break
        time.sleep(1)  # A head takes its time before it takes jobs.
        failed = submit()
    assert failed.returncode == 1
    assert "IncompleteError" in failed.stdout + failed.stderr
    assert Checkpoint(tmp_path / "ckpt").status().completed == 1
    mended = script.replace("len(text)", "len(text or '')")
    (tmp_path / "app" / "job.py").write_text(mended)
    again = submit()
    assert again.returncode == 0, again.stdout + again.stderr
    assert Checkpoint(tmp_path / "ckpt").status().completed == 2
