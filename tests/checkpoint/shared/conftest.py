"""A shared checkpoint in a folder and on a real S3 server, and processes that use it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from buckets import S3
from shared_checkpoint import TTL_S

from ray_resume.checkpoint.location import Location


@pytest.fixture(params=["folder", "s3"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Location:
    # What this host keeps for itself: of an S3 server that is gone it would still be there.
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    if request.param == "folder":
        return Location(str(tmp_path / "ckpt"), shared=True, lease_ttl_s=TTL_S)
    s3: S3 = request.getfixturevalue("s3")
    return Location(s3.uri(f"{tmp_path.name}/ckpt"), lease_ttl_s=TTL_S)


@pytest.fixture
def started() -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []

    def start(command: list[str]) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        processes.append(subprocess.Popen(command, text=True, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()
