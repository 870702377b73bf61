"""Folders that are read-only, damaged, gone, or something else: nothing starts or gets lost."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import ray
from conftest import ids_in, snapshot
from small_disk import Disk, mounted

from ray_resume import Checkpoint, CheckpointError, resumable, resumable_read, resumable_write
from ray_resume.checkpoint.local.backend import LocalBackend

pytestmark = [pytest.mark.extended, pytest.mark.long]

# Ray types a UDF's argument as the union of all batch formats.
Batch: TypeAlias = Any


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    yield from mounted(tmp_path / "disk")


@pytest.mark.usefixtures("cluster")
def test_a_read_only_checkpoint_can_be_looked_at_and_starts_nothing(
    disk: Disk, source: Path, tmp_path: Path
) -> None:
    checkpoint, out = disk.path / "ckpt", tmp_path / "out"
    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=checkpoint)
    resumable_write(ds, out)
    disk.mount("remount,ro")
    before = snapshot(tmp_path)
    assert Checkpoint(checkpoint).status().completed == 7
    assert Checkpoint(checkpoint).check().ok
    for change in (
        lambda: resumable_write(ds, out),
        lambda: Checkpoint(checkpoint).reset(state="all"),
        Checkpoint(checkpoint).compact,
        lambda: LocalBackend(disk.path / "another").ensure(),
    ):
        with pytest.raises(CheckpointError, match="Read-only file system") as caught:
            change()
        assert str(disk.path) in str(caught.value)
        assert "may write to" in str(caught.value)
    assert snapshot(tmp_path) == before


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("where", ["output", "below", "checkpoint"])
def test_a_file_where_a_directory_is_needed(where: str, source: Path, tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "ckpt", tmp_path / "out"
    {"output": out, "below": out, "checkpoint": checkpoint}[where].write_text("mine")
    before = snapshot(tmp_path)

    def go() -> None:
        ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=checkpoint)
        resumable_write(ds, out / "below" if where == "below" else out)

    with pytest.raises(CheckpointError, match=str(tmp_path)) as caught:
        go()
    assert "Give another" in str(caught.value) or "Give a path" in str(caught.value)
    mine = {name: seen for name, seen in snapshot(tmp_path).items() if name in before}
    assert mine == before


@pytest.mark.usefixtures("cluster")
def test_damaged_and_foreign_stores_start_nothing_and_lose_nothing(
    source: Path, tmp_path: Path
) -> None:
    checkpoint, out = tmp_path / "ckpt", tmp_path / "out"
    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=checkpoint)
    resumable_write(ds, out)
    (store,) = checkpoint.glob("*.mdb")
    sound, written = store.read_bytes(), snapshot(out)
    foreign = checkpoint / "dddddddddddd.mdb"
    for broken, content in (
        (store, sound[: len(sound) // 2]),
        (store, b""),
        (store, bytes(len(sound))),
        (store, sound[:8192] + bytes(len(sound) - 8192)),
        (foreign, b"not a store"),
    ):
        broken.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"damaged") as caught:
            resumable_write(ds, out)
        assert str(broken) in str(caught.value)
        assert not Checkpoint(checkpoint).check().ok
        assert snapshot(out) == written
        foreign.unlink(missing_ok=True)
        store.write_bytes(sound)
    assert resumable_write(ds, out).sources_skipped == 7


@pytest.mark.usefixtures("cluster")
def test_a_checkpoint_that_is_removed_under_a_run_ends_it(source: Path, tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "ckpt", tmp_path / "out"

    @resumable
    def remove(batch: Batch) -> Batch:
        shutil.rmtree(checkpoint, ignore_errors=True)
        return batch

    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=checkpoint)
    with pytest.raises(CheckpointError, match=str(checkpoint)):
        resumable_write(ds.map_batches(remove), out)
    # Its successor knows nothing of what was written, and says so instead of writing it again.
    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=checkpoint)
    if ids_in(out):
        with pytest.raises(CheckpointError, match="did not make"):
            resumable_write(ds, out)
