"""A full disk, under the store, the checkpoint, the output or the dead letters: nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import ids_in
from small_disk import Disk, fill, mounted

from ray_resume import (
    Checkpoint,
    CheckpointError,
    ResumeError,
    resumable,
    resumable_read,
    resumable_write,
)
from ray_resume.checkpoint.dead_letters import DeadLetterStore
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.checkpoint.local.objects import LocalObjects
from ray_resume.core.messages import DeadLetter
from ray_resume.core.records import Record, State

pytestmark = [pytest.mark.extended, pytest.mark.long]

# Ray types a UDF's argument as the union of all batch formats.
Batch: TypeAlias = Any


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    yield from mounted(tmp_path / "disk")


def sources(count: int, run_id: str, *, width: int = 0) -> list[Record]:
    return [
        Record(f"{number}{'x' * width}", State.COMPLETED, 1 + number, run_id)
        for number in range(count)
    ]


# --- Full: the store ---


WRITE = """
import os, sys
from pathlib import Path
from ray_resume.errors import CheckpointError
from ray_resume.core.records import Record, State
from ray_resume.checkpoint.local.lmdb_file import WriterFile

done = 0
try:
    writer = WriterFile.create(Path(sys.argv[1]), "aaaaaaaaaaaa", {})
    for number in range(60):
        name = f"{number}{os.urandom(2500).hex()}"
        writer.commit([Record(name, State.COMPLETED, 1 + number, "aaaaaaaaaaaa")])
        done += 1
except CheckpointError as error:
    print(error)
print(done)
"""


@pytest.mark.parametrize("free", [0, 4, 8, 12, 16, 24, 32, 40, 60, 100])
def test_the_store_says_that_the_disk_is_full_and_keeps_what_was_committed(
    disk: Disk, free: int
) -> None:
    """Whatever room is left; a process of its own, since a map without room is a SIGBUS."""
    directory = LocalBackend(disk.path / "ckpt")
    directory.ensure()
    disk.fill(but=free << 10)
    child = subprocess.run(
        [sys.executable, "-c", WRITE, str(directory.path)],
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child
    *told, done = child.stdout.splitlines()
    assert len(told) == 1, child
    assert f"{directory.path}/aaaaaaaaaaaa.mdb" in told[0]
    assert "the disk is full" in told[0]
    assert "run again" in told[0]
    made = {path.suffix for path in directory.path.iterdir()}
    assert made <= {".json", "", ".mdb", ".mdb-lock"}
    disk.free()
    assert Checkpoint(directory.path).status().completed == int(done)
    assert Checkpoint(directory.path).check().ok


def test_reset_and_compact_on_a_full_disk_change_nothing(disk: Disk) -> None:
    directory = LocalBackend(disk.path / "ckpt")
    directory.ensure()
    for run_id in ("aaaaaaaaaaaa", "bbbbbbbbbbbb"):
        writer = WriterFile.create(directory.path, run_id, {})
        writer.commit(sources(20, run_id, width=2500))
        writer.close()
    checkpoint = Checkpoint(directory.path)
    changes: list[Callable[[], object]] = [
        checkpoint.compact,
        lambda: checkpoint.reset(state="all"),
    ]
    before = {source.source_id for source in checkpoint.sources("completed")}
    # The lock exists, and the lease needs one page.
    disk.fill(but=8 << 10)
    for change in changes:
        with pytest.raises(CheckpointError, match="No space left"):
            change()
        assert {source.source_id for source in checkpoint.sources("completed")} == before
        assert checkpoint.check().ok
    disk.free()
    assert checkpoint.compact() == 2
    assert checkpoint.reset(state="all") == len(before)
    assert checkpoint.check().ok


# --- Full: a pipeline's checkpoint, output and dead letters ---


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """16 files of 25 rows, about 25 KiB each, that no format can make smaller."""
    folder = tmp_path / ("in-" + "x" * 200) / ("y" * 200)
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(16):
        ids = np.arange(number * 25, (number + 1) * 25)
        noise = pa.array([random.bytes(1000) for _ in ids], pa.binary())
        pq.write_table(pa.table({"id": ids, "noise": noise}), folder / f"{number:02d}.parquet")
    return folder


def run(wide: Path, checkpoint: Path, out: Path, udf: Any) -> Any:
    """Write the files one after another, more or less."""
    ds = resumable_read(
        ray.data.read_parquet,
        str(wide),
        checkpoint=checkpoint,
        on_pipeline_change="continue",
        override_num_blocks=16,
    )
    ds = ds.map_batches(udf, batch_size=25, num_cpus=0.5, concurrency=1)
    return resumable_write(ds, out, concurrency=1)


def wait_for(checkpoint: Path, completed: int) -> None:
    deadline = time.monotonic() + 60
    while Checkpoint(checkpoint).status().completed < completed:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.usefixtures("cluster")
def test_a_full_disk_under_the_checkpoint_ends_the_run_and_loses_nothing(
    disk: Disk, wide: Path, tmp_path: Path
) -> None:
    checkpoint, out, ballast = disk.path / "ckpt", tmp_path / "out", disk.path / "ballast"

    calls = tmp_path / "calls"

    @resumable
    def fill_up(batch: Batch) -> Batch:
        with calls.open("a") as file:
            file.write("x")
        if calls.stat().st_size == 6:
            wait_for(checkpoint, 3)
            fill(ballast)
        return batch

    with pytest.raises(CheckpointError, match=r"No space left|the disk is full") as caught:
        run(wide, checkpoint, out, fill_up)
    assert f"{checkpoint}/" in str(caught.value)
    assert "Free space" in str(caught.value)
    disk.free()
    done = Checkpoint(checkpoint).status().completed
    assert 0 < done < 16
    assert Checkpoint(checkpoint).check().ok
    assert len(ids_in(out)) == done * 25
    assert sorted(map(str, out.iterdir())) == Checkpoint(checkpoint).files(), "no left-overs"

    summary = run(wide, checkpoint, out, resumable(lambda batch: batch))
    assert (summary.sources_skipped, summary.sources_completed) == (done, 16 - done)
    assert ids_in(out) == list(range(400))
    assert Checkpoint(checkpoint).check().ok


@pytest.mark.usefixtures("cluster")
def test_a_full_disk_under_the_output_ends_the_run_and_loses_nothing(
    disk: Disk, wide: Path, tmp_path: Path
) -> None:
    checkpoint, out = tmp_path / "ckpt", disk.path / "out"
    disk.mount("remount,size=200k")
    same = resumable(lambda batch: batch)
    with pytest.raises(ResumeError, match="No space left") as caught:
        run(wide, checkpoint, out, same)
    assert f"The output file {out}/" in str(caught.value)
    assert "Free space" in str(caught.value)
    disk.mount("remount,size=2m")
    done = Checkpoint(checkpoint).status().completed
    assert 0 < done < 16
    assert sorted(map(str, out.iterdir())) == Checkpoint(checkpoint).files(), "nothing half-made"

    summary = run(wide, checkpoint, out, same)
    assert (summary.sources_skipped, summary.sources_completed) == (done, 16 - done)
    assert ids_in(out) == list(range(400))
    assert Checkpoint(checkpoint).check().ok


def test_a_letter_that_finds_no_room_is_told_and_leaves_nothing(disk: Disk) -> None:
    disk.mount("remount,size=100k")
    table = pa.table({"noise": pa.array([os.urandom(1000) for _ in range(200)], pa.binary())})
    letter = DeadLetter.of(0, 1, "map(f)", table, ["bad"] * 200)
    with pytest.raises(CheckpointError, match=r"dead-letters/.* No space left.*Free space"):
        DeadLetterStore(LocalObjects(str(disk.path))).write("a" * 12, "source", letter)
    assert not list((disk.path / "dead-letters").iterdir())


@pytest.mark.usefixtures("cluster")
def test_a_full_disk_under_the_dead_letters_ends_the_run_and_loses_nothing(
    disk: Disk, wide: Path, tmp_path: Path
) -> None:
    checkpoint, out = disk.path / "ckpt", tmp_path / "out"
    disk.mount("remount,size=300k")

    calls = tmp_path / "calls"

    @resumable(on_error="dead_letter")
    def poison(batch: Batch) -> Batch:
        with calls.open("a") as file:
            file.write("x")
        if calls.stat().st_size == 4:
            wait_for(checkpoint, 1)
        raise ValueError("poison")

    # A letter, or the commit of those that found room: whichever comes first on a full disk.
    told = rf"The (dead letter|checkpoint file) {checkpoint}/.* No space left.*Free space"
    with pytest.raises(CheckpointError, match=f"(?s){told}"):
        run(wide, checkpoint, out, poison)
    disk.mount("remount,size=2m")
    done = Checkpoint(checkpoint).status().completed
    assert 0 < done < 16

    summary = run(wide, checkpoint, out, poison)
    assert (summary.sources_skipped, summary.sources_completed) == (done, 16 - done)
    letters = checkpoint / "dead-letters"
    assert ids_in(letters) == list(range(400))
    assert Checkpoint(checkpoint).dead_letters() == sorted(map(str, letters.iterdir()))
    report = Checkpoint(checkpoint).check()
    assert report.ok
    assert report.notes == ()

    next(letters.iterdir()).unlink()
    (note,) = Checkpoint(checkpoint).check().notes
    assert note.startswith("1 of ")
    assert "dead letters are gone" in note
