"""The example with a shuffle between two resumable pipelines: killed in each step, one command."""

from __future__ import annotations

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


@pytest.mark.extended
@pytest.mark.long
def test_it_is_killed_in_each_step_and_goes_on(tmp_path: Path, another_cluster: str) -> None:
    done: dict[str, int] = {}
    for number, step in enumerate(("hash", "group", "group", "filter"), 1):
        killed = run(tmp_path, another_cluster, "--crash-in", step)
        assert killed.returncode == SIGKILLED, killed.stdout + killed.stderr
        begun = list(Checkpoint(tmp_path / "hashed-checkpoint").runs())
        assert len(begun) == number, "what an earlier run left is not taken for the step"
        for name in ("hashed", "unique"):
            folder = tmp_path / f"{name}-checkpoint"
            done[f"{name} after {step}"] = (
                Checkpoint(folder).status().completed if folder.exists() else 0
            )
    assert 0 < done["hashed after hash"] < done["hashed after group"] == 24
    assert 0 < done["unique after filter"] < 24, "killed too late to prove anything"
    ended = run(tmp_path, another_cluster)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "OK: " in ended.stdout
    runs = list(Checkpoint(tmp_path / "unique-checkpoint").runs())
    assert runs[-1].sources_skipped >= done["unique after filter"]

    # Documents change, go and come: only these are hashed, and what they leave out is right.
    documents = tmp_path / "documents"
    (documents / "03.parquet").unlink()
    pq.write_table(pa.table({"id": [1, 7], "text": ["new", "New"]}), documents / "00.parquet")
    pq.write_table(pa.table({"id": [90_000], "text": ["NEW"]}), documents / "99.parquet")
    again = run(tmp_path, another_cluster)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "OK: " in again.stdout
    newest = list(Checkpoint(tmp_path / "hashed-checkpoint").runs())[-1]
    assert (newest.sources_completed, newest.sources_skipped) == (2, 22)
