"""Real tables of Lance, Iceberg and Delta, which publish as they go: run twice, and killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import write_file
from job import WITHOUT_TOKENS
from places import SCRIPTS
from ray.data._internal.datasource.sql_datasink import SQLDatasink
from table_driver import KINDS, datasink, ids_in_table

from ray_resume import (
    Checkpoint,
    CheckpointError,
    resumable,
    resumable_read,
    resumable_write,
)

pytestmark = pytest.mark.long

DRIVER = SCRIPTS / "table_driver.py"
ONCE = list(range(600))
EVERY_DAY = {("lance", "between"), ("iceberg", "before")}


def skip_if_not_installed(kind: str) -> None:
    pytest.importorskip(KINDS[kind])
    if kind == "delta":
        pytest.importorskip("ray.data._internal.datasource.delta_datasink", reason="Ray 2.58")


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_in_the_table_once(kind: str, source: Path, tmp_path: Path) -> None:
    skip_if_not_installed(kind)
    broken = tmp_path / "broken"
    broken.touch()

    @resumable
    def failing(batch: Any) -> Any:
        if broken.exists() and 300 in batch["id"]:
            raise RuntimeError("a bad row")
        return batch

    def job() -> Any:
        ds = resumable_read(
            ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt", override_num_blocks=7
        )
        return resumable_write(ds.map_batches(failing), datasink(kind, tmp_path))

    with pytest.raises(Exception, match="a bad row"):
        job()
    done = [record.rows for record in Checkpoint(tmp_path / "ckpt").sources("completed")]
    published = ids_in_table(kind, tmp_path)
    assert len(published) == len(set(published)) == sum(done), "what is committed is published"
    assert 300 not in published
    broken.unlink()
    summary = job()
    assert (summary.sources_skipped, summary.sources_completed) == (len(done), 7 - len(done))
    assert ids_in_table(kind, tmp_path) == ONCE
    assert job().sources_skipped == 7
    write_file(source / "new.parquet", 600, 650)
    summary = job()
    assert (summary.sources_skipped, summary.sources_completed) == (7, 1)
    assert ids_in_table(kind, tmp_path) == list(range(650))
    with pytest.raises(CheckpointError, match="belongs to the output datasink"):
        resumable_write(
            resumable_read(
                ray.data.read_parquet,
                str(source),
                checkpoint=tmp_path / "ckpt",
                on_pipeline_change="continue",
            ),
            SQLDatasink("insert into others values (?)", lambda: None),
        )


@pytest.mark.extended
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        # Two are enough for every day.
        pytest.param(kind, moment, marks=[] if (kind, moment) in EVERY_DAY else pytest.mark.slow)
        for kind in KINDS
        for moment in ("writing", "before", "between", "after")
    ],
)
def test_a_driver_killed_around_publishing(
    kind: str, moment: str, source: Path, tmp_path: Path, another_cluster: str
) -> None:
    skip_if_not_installed(kind)
    checkpoint, folder = tmp_path / "ckpt", tmp_path / "tables"
    arguments = [kind, source, checkpoint, folder, another_cluster, moment]
    killed = subprocess.run(
        [sys.executable, str(DRIVER), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=WITHOUT_TOKENS,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert ids_in_table(kind, folder) == (ONCE if moment in ("between", "after") else [])
    assert Checkpoint(checkpoint).status().completed in ((7,) if moment == "after" else (0, 1))

    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=checkpoint)
    summary = resumable_write(ds, datasink(kind, folder))
    # The empty source has nothing to publish, and may be committed at any time.
    done = {"between": (6, 7), "after": (7,)}.get(moment, (0, 1))
    assert summary.sources_skipped in done
    assert summary.sources_completed == 7 - summary.sources_skipped
    assert ids_in_table(kind, folder) == ONCE
    assert not list((checkpoint / "publications").iterdir())
    assert resumable_write(ds, datasink(kind, folder)).sources_skipped == 7
