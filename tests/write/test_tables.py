"""Real tables of Lance, Iceberg and Delta, which publish as they go: run twice, and killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import snapshot, write_file
from fault_jobs import unanswered
from job import WITHOUT_TOKENS
from places import SCRIPTS
from table_driver import KINDS, datasink, ids_in_table, skip_if_not_installed

from ray_resume import (
    Checkpoint,
    CheckpointError,
    resumable_read,
    resumable_write,
)
from ray_resume.core.shards import Shard

pytestmark = pytest.mark.long

DRIVER = SCRIPTS / "table_driver.py"
ONCE = list(range(600))
EVERY_DAY = {("lance", "between"), ("iceberg", "before")}


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


def start_driver(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(DRIVER), *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env=WITHOUT_TOKENS,
    )


@pytest.mark.extended
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    "kind", ["iceberg", *(pytest.param(k, marks=pytest.mark.slow) for k in ("lance_ray", "delta"))]
)
def test_two_shards_publish_often_and_one_is_killed_on_the_way(
    kind: str, source: Path, tmp_path: Path, another_cluster: str
) -> None:
    """Its second publication is in the table, and is not committed."""
    skip_if_not_installed(kind)
    checkpoint, folder = tmp_path / "ckpt", tmp_path / "tables"
    # Three for each shard, whatever the others are in.
    names = [source / f"more-{number}.parquet" for number in range(40)]
    shards = [[name for name in names if Shard(one, 2).holds(str(name))] for one in (0, 1)]
    for number, name in enumerate([*shards[0][:3], *shards[1][:3]]):
        write_file(name, 600 + 50 * number, 650 + 50 * number)
    datasink(kind, folder)
    drivers = [
        start_driver(kind, source, checkpoint, folder, another_cluster, moment, shard)
        for shard, moment in enumerate(("later", "never"))
    ]
    told = [driver.communicate(timeout=150)[1] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [-signal.SIGKILL, 0], told
    committed = {record.source_id for record in Checkpoint(checkpoint).sources("completed")}
    published = ids_in_table(kind, folder)
    assert len(published) == len(set(published))
    assert len(published) > sum(record.rows for record in Checkpoint(checkpoint).sources())

    def job() -> Any:
        ds = resumable_read(
            ray.data.read_parquet, str(source), checkpoint=checkpoint, on_pipeline_change="continue"
        )
        return resumable_write(ds, datasink(kind, folder))

    summary = job()
    assert summary.sources_skipped > len(committed), "the mark was found"
    assert summary.complete
    assert ids_in_table(kind, folder) == list(range(900))
    assert job().sources_skipped == 13


@pytest.mark.extended
@pytest.mark.usefixtures("cluster")
def test_a_table_that_cannot_tell_stops_the_run(source: Path, tmp_path: Path) -> None:
    skip_if_not_installed("delta")

    def job(sink: Any) -> Any:
        ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
        return resumable_write(ds, sink)

    # The table is there before that: if it were not, none would be the answer.
    job(datasink("delta", tmp_path))
    write_file(source / "new.parquet", 600, 650)
    with pytest.raises(ConnectionError):
        job(unanswered(datasink("delta", tmp_path)))
    assert ids_in_table("delta", tmp_path) == list(range(650))
    before = snapshot(tmp_path / "ckpt" / "publications")
    (tmp_path / "table").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="there is no table any more"):
        job(datasink("delta", tmp_path))
    with pytest.raises(CheckpointError, match="Run once with the sink of that run"):
        job(tmp_path / "out")
    assert snapshot(tmp_path / "ckpt" / "publications") == before
    (tmp_path / "moved").rename(tmp_path / "table")
    assert job(datasink("delta", tmp_path)).sources_skipped == 8
    assert ids_in_table("delta", tmp_path) == list(range(650))


@pytest.mark.extended
@pytest.mark.usefixtures("cluster")
def test_a_reset_comes_after_what_was_published_and_not_committed(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    skip_if_not_installed("delta")
    checkpoint = Checkpoint(tmp_path / "ckpt")

    def job(sink: Any) -> Any:
        ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=checkpoint)
        return resumable_write(ds, sink)

    write_file(source / "new.parquet", 600, 601)
    job(datasink("delta", tmp_path))
    first = source / "00000.parquet"
    for changed in (first, source / "00001.parquet"):
        os.utime(changed)
    with pytest.raises(ConnectionError):
        job(unanswered(datasink("delta", tmp_path)))
    checkpoint.reset([str(first)])
    assert job(datasink("delta", tmp_path)).sources_completed == 1
    assert "1 source of this run, " in caplog.text
    assert "each such source is there with its old and its new rows" in caplog.text
    thrice, twice = list(range(100)), list(range(200))
    assert ids_in_table("delta", tmp_path) == sorted([*range(601), *twice, *thrice])
    checkpoint.reset(state="all")
    with pytest.raises(ConnectionError):
        job(unanswered(datasink("delta", tmp_path)))
    checkpoint.reset(state="all")
    shutil.rmtree(tmp_path / "table")
    assert job(datasink("delta", tmp_path)).sources_completed == 8
    assert ids_in_table("delta", tmp_path) == list(range(601))
