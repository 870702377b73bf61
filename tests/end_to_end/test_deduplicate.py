"""The example with a shuffle between two resumable pipelines: killed in each step, one command."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from job import WITHOUT_TOKENS
from places import ROOT

from ray_resume import Checkpoint

SIGKILLED = -9


def run(workdir: Path, address: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "examples" / "deduplicate.py", "--workdir", workdir, *options],
        env={**WITHOUT_TOKENS, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=180,
    )


def kill_in(step: str, workdir: Path, address: str) -> None:
    killed = run(workdir, address, "--crash-in", step)
    assert killed.returncode == SIGKILLED, killed.stdout + killed.stderr


def completed(workdir: Path, name: str) -> int:
    folder = workdir / f"{name}-checkpoint"
    return Checkpoint(folder).status().completed if folder.exists() else 0


@pytest.mark.extended
@pytest.mark.long
def test_it_is_killed_in_each_step_and_goes_on(tmp_path: Path, another_cluster: str) -> None:
    workdir = tmp_path / "work"
    hashed = []
    for number, step in enumerate(("hash", "group", "group"), 1):
        kill_in(step, workdir, another_cluster)
        begun = list(Checkpoint(workdir / "hashed-checkpoint").runs())
        assert len(begun) == number, "what an earlier run left is not taken for the step"
        hashed.append(completed(workdir, "hashed"))
    assert 0 < hashed[0] < hashed[1] == hashed[2] == 24
    # On a busy machine a kill may come when all is filtered, which proves nothing: then once more.
    shutil.copytree(workdir, tmp_path / "before")
    for _ in range(3):
        kill_in("filter", workdir, another_cluster)
        filtered = completed(workdir, "unique")
        if filtered < 24:
            break
        shutil.rmtree(workdir)
        shutil.copytree(tmp_path / "before", workdir)
    assert 0 < filtered < 24
    ended = run(workdir, another_cluster)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "OK: " in ended.stdout
    runs = list(Checkpoint(workdir / "unique-checkpoint").runs())
    assert runs[-1].sources_skipped >= filtered

    # Documents change, go and come: only these are hashed, and what they leave out is right.
    documents = workdir / "documents"
    (documents / "03.parquet").unlink()
    pq.write_table(pa.table({"id": [1, 7], "text": ["new", "New"]}), documents / "00.parquet")
    pq.write_table(pa.table({"id": [90_000], "text": ["NEW"]}), documents / "99.parquet")
    again = run(workdir, another_cluster)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "OK: " in again.stdout
    newest = list(Checkpoint(workdir / "hashed-checkpoint").runs())[-1]
    assert (newest.sources_completed, newest.sources_skipped) == (2, 22)
