"""Whole jobs with checkpoint and output in a storage that hosts share, killed and resumed."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from buckets import S3
from conftest import write_file, write_source
from divided_outputs import DIVIDED
from driver import FILES, ROWS, rows_of
from job import Job
from PIL import Image
from places import SCRIPTS

from ray_resume import Checkpoint, mark_failed, resumable, resumable_read, resumable_write
from ray_resume.checkpoint.location import Location
from ray_resume.testing import kill_at
from ray_resume.write.folder import Folder

pytestmark = [pytest.mark.extended, pytest.mark.long]

DRIVER = SCRIPTS / "shared_driver.py"


class StoredJob(Job):
    """A job that sees nothing of its checkpoint and its output but what the storage gives it."""

    def __init__(self, folder: Path, s3: S3 | None, address: str | None) -> None:
        super().__init__(folder, address)
        self.hosts = 0
        self.place, self.sink = str(self.checkpoint), str(self.out)
        self.s3 = s3
        if s3 is not None:
            self.place = s3.uri(f"{folder.name}/ckpt")
            self.sink = s3.uri(f"{folder.name}/out")

    def start_on_another_host(self) -> None:
        self.hosts += 1
        driver = [sys.executable, str(DRIVER), str(self.source), self.place, self.sink]
        self._run([*driver, f"host {self.hosts}"])

    @property
    def looked_at(self) -> Checkpoint:
        return Checkpoint(self.place)

    def committed(self) -> int:
        location = Location(self.place)
        if self.s3 is None and not (self.checkpoint / "checkpoint.json").exists():
            return 0
        if self.s3 is not None and "checkpoint.json" not in self.s3.names(self._key("ckpt")):
            return 0
        return len(location.open().snapshot().snapshot)

    def _key(self, what: str) -> str:
        return f"{self.source.parent.name}/{what}"

    def check(self) -> None:
        rows: list[tuple[int, int]] = []
        if self.s3 is None:
            names = sorted(str(path) for path in self.out.iterdir())
            tables = [pq.read_table(name) for name in names]
        else:
            out = self._key("out")
            keys = [self.s3.key(f"{out}/{name}") for name in self.s3.names(out)]
            tables = [pq.read_table(key, filesystem=self.s3.filesystem) for key in keys]
            names = [f"s3://{key}" for key in keys]
        for table in tables:
            rows += zip(*(table.column(name).to_pylist() for name in ("id", "score")), strict=True)
        assert sorted(rows) == rows_of(FILES * ROWS)
        assert self.looked_at.files() == names
        status = self.looked_at.status()
        assert (status.completed, status.pending, status.live) == (FILES, 0, 0)
        report = self.looked_at.check()
        assert report.ok, report


@pytest.fixture
def stored_job(
    request: pytest.FixtureRequest, tmp_path: Path, another_cluster: str
) -> Iterator[StoredJob]:
    write_source(tmp_path / "in", files=FILES, rows=ROWS)
    s3 = request.getfixturevalue("s3") if request.param == "s3" else None
    job = StoredJob(tmp_path, s3, another_cluster)
    yield job
    job.kill(with_descendants=True)


@pytest.mark.parametrize(
    "stored_job", ["s3", pytest.param("folder", marks=pytest.mark.slow)], indirect=True
)
def test_a_job_that_is_killed_on_one_host_resumes_on_another(stored_job: StoredJob) -> None:
    job = stored_job
    job.start_on_another_host()
    job.wait_for(lambda: job.committed() >= 6)
    job.kill(with_descendants=False)
    assert job.committed() < FILES, "killed too late to prove anything"
    job.start_on_another_host()
    output = job.finish()
    assert f"of {FILES} sources completed" in output
    job.check()


@pytest.mark.usefixtures("cluster")
def test_dead_letters_and_partitions_in_a_bucket(s3: S3, source: Path, tmp_path: Path) -> None:
    base = tmp_path.name
    checkpoint = Checkpoint(s3.uri(f"{base}/ckpt"), lease_ttl_s=5, publish_interval_s=0.2)

    @resumable(on_error="dead_letter")
    def refuse(batch: Any) -> Any:
        bad = batch["id"] % 10 == 3
        if bad.any():
            mark_failed("a three", bad)
        return {"id": batch["id"][~bad], "half": batch["id"][~bad] % 2}

    def run() -> Any:
        ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=checkpoint)
        return resumable_write(
            ds.map_batches(refuse), s3.uri(f"{base}/out"), partition_cols=["half"]
        )

    summary = run()
    assert (summary.sources_completed, summary.rows_dead_lettered) == (7, 60)
    names = s3.names(f"{base}/out")
    assert checkpoint.files() == [f"s3://{s3.key(base)}/out/{name}" for name in names]
    assert {name.partition("/")[0] for name in names} == {"half=0", "half=1"}
    tables = [pq.read_table(s3.key(f"{base}/out/{n}"), filesystem=s3.filesystem) for n in names]
    ids = sorted(i for table in tables for i in table.column("id").to_pylist())
    assert ids == [i for i in range(600) if i % 10 != 3]
    letters = [path.rpartition("/")[2] for path in checkpoint.dead_letters()]
    assert letters == s3.names(f"{base}/ckpt/dead-letters")
    assert "secret" not in str(checkpoint.files() + checkpoint.dead_letters() + [str(checkpoint)])
    assert checkpoint.check(), checkpoint.check()
    assert run().sources_skipped == 7


@pytest.mark.usefixtures("cluster")
def test_images_in_a_bucket(s3: S3, tmp_path: Path) -> None:
    base = tmp_path.name
    checkpoint = Checkpoint(s3.uri(f"{base}/ckpt"), lease_ttl_s=5, publish_interval_s=0.2)
    drawn, options = DIVIDED["images"]
    write_source(tmp_path / "in", files=3, rows=4)

    def run() -> Any:
        ds = resumable_read(ray.data.read_parquet, str(tmp_path / "in"), checkpoint=checkpoint)
        out = s3.uri(f"{base}/out")
        return resumable_write(
            ds.map_batches(drawn), out, format="images", name_column="id", **options
        )

    def images() -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for name in s3.names(f"{base}/out"):
            with s3.filesystem.open_input_file(s3.key(f"{base}/out/{name}")) as file:
                pixels = np.asarray(Image.open(io.BytesIO(file.read())))
            # Its label ends its name.
            found[int(name.removesuffix(".png").rpartition("~")[2])] = pixels.ravel().tolist()
        return found

    # The images of the worker that dies are in the bucket, and in no record.
    with kill_at("sink.before_drain"):
        assert run().files == 12
    assert images() == {i: [i] * 6 for i in range(12)}
    write_file(tmp_path / "in" / "00001.parquet", 100, 103)
    assert (run().sources_completed, checkpoint.status().completed) == (1, 3)
    ids = [*range(4), *range(8, 12), *range(100, 103)]
    assert images() == {i: [i] * 6 for i in ids}
    names = s3.names(f"{base}/out")
    assert checkpoint.files() == [f"s3://{s3.key(base)}/out/{name}" for name in names]
    assert checkpoint.check(), checkpoint.check()


def test_a_file_that_could_not_be_written_is_not_in_the_bucket(s3: S3, tmp_path: Path) -> None:
    folder = Folder(s3.filesystem, s3.key(tmp_path.name), "s3://")

    def fail(file: Any) -> None:
        file.write(b"half of")
        raise RuntimeError("a format that cannot hold it")

    with pytest.raises(RuntimeError):
        folder.write_file("a/b.parquet", fail)
    assert list(folder.list_files()) == []

    def succeed(file: Any) -> None:
        file.write(b"whole")

    folder.write_file("a/b.parquet", succeed)
    assert list(folder.list_files()) == ["a/b.parquet"]
