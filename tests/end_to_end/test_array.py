"""Array tasks: processes with one checkpoint and one output, killed, requeued, submitted again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import ids_in, snapshot, write_source
from job import WITHOUT_TOKENS, kill_with_descendants
from places import ROOT, SCRIPTS
from pyarrow.fs import LocalFileSystem

from ray_resume import Checkpoint, CheckpointError, resumable_read, resumable_write
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.contents import Contents
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lease import Lease
from ray_resume.checkpoint.local.lmdb_file import WriterContents, WriterFile
from ray_resume.checkpoint.location import Location
from ray_resume.core.digests import source_digest
from ray_resume.core.identity import ids_of
from ray_resume.core.planning import Listing, Policies
from ray_resume.core.records import Record, State
from ray_resume.core.shards import Shard
from ray_resume.core.sources import Source, SourceTable
from ray_resume.run.run import Run
from ray_resume.run.run_plan import RunPlan
from ray_resume.write.folder import Folder
from ray_resume.write.output import FolderOutput

pytestmark = pytest.mark.extended

DRIVER = SCRIPTS / "array_driver.py"
ROWS = 20


class Array:
    """An array job on a cluster of its own, its tasks by their indexes."""

    def __init__(self, folder: Path, address: str, indexes: Sequence[int], files: int) -> None:
        self.source, self.checkpoint, self.out = folder / "in", folder / "ckpt", folder / "out"
        self.address, self.indexes, self.files = address, indexes, files
        self.job = 4711
        self.hold = folder / "in.hold"
        self.hold.touch()
        self.running: dict[int, subprocess.Popen[str]] = {}
        write_source(self.source, files=files, rows=ROWS)
        held_back = [path.name for path in sorted(self.source.iterdir())[files // 3 :]]
        for shard in (Shard(rank, len(indexes)) for rank in range(len(indexes))):
            assert any(map(shard.holds, held_back)), f"{shard} would not be at work in the middle"

    def submit(self, indexes: Sequence[int]) -> None:
        """Submit another array for the same input."""
        self.job, self.indexes = self.job + 100, indexes
        self.start(indexes)

    def start(self, indexes: Sequence[int]) -> None:
        for index in indexes:
            variables = {
                "JOB_ID": self.job,
                "TASK_ID": index,
                "TASK_COUNT": len(self.indexes),
                "TASK_MIN": min(self.indexes),
                "TASK_MAX": max(self.indexes),
                "TASK_STEP": 1,
            }
            slurm = {f"SLURM_ARRAY_{name}": str(value) for name, value in variables.items()}
            paths = map(str, (self.source, self.checkpoint, self.out))
            self.running[index] = subprocess.Popen(
                [sys.executable, str(DRIVER), *paths, self.address, str(self.files * ROWS // 3)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**WITHOUT_TOKENS, **slurm},
            )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 180
        while not condition():
            for process in self.running.values():
                assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def wait_for_the_middle(self) -> None:
        """Wait until every task is at work, and all is committed that is not held back."""
        self.wait_for(lambda: self.middle() == (self.files // 3, len(self.indexes)))

    def middle(self) -> tuple[int, int]:
        if not (self.checkpoint / "checkpoint.json").exists():
            return 0, 0
        status = Checkpoint(self.checkpoint).status()
        return status.completed, status.live

    def kill(self, indexes: Sequence[int]) -> None:
        """Kill drivers that are at work, and let the others go on."""
        for index in indexes:
            assert self.running[index].poll() is None, "it has ended: too late to prove anything"
            self.running[index].kill()
        for index in indexes:
            self.running.pop(index).communicate()
        self.hold.unlink()

    def finish(self) -> str:
        """Wait for all tasks; return what they said."""
        said = ""
        for index in list(self.running):
            output, _ = self.running[index].communicate(timeout=240)
            assert self.running.pop(index).returncode == 0, output
            said += output
        return said

    def end(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                kill_with_descendants(process.pid)
            process.communicate()

    def check(self) -> None:
        """Every row is there once, and the folder holds what the checkpoint lists, no more."""
        rows: list[tuple[int, int]] = []
        for path in self.out.iterdir():
            table = pq.ParquetFile(path).read()
            rows += zip(*(table.column(name).to_pylist() for name in ("id", "score")), strict=True)
        assert sorted(rows) == [(i, i * 3) for i in range(self.files * ROWS)]
        checkpoint = Checkpoint(self.checkpoint)
        assert checkpoint.files() == sorted(map(str, self.out.iterdir()))
        status = checkpoint.status()
        assert (status.total, status.completed, status.pending) == (self.files, self.files, 0)
        assert status.live == 0
        report = checkpoint.check()
        assert report.ok, report


@pytest.fixture
def array(request: pytest.FixtureRequest, tmp_path: Path, another_cluster: str) -> Iterator[Array]:
    indexes, files, *shared = request.param
    array = Array(tmp_path, another_cluster, indexes, files)
    if shared:
        # Known again by what is in it, as on a network file system by its kind.
        Location(str(array.checkpoint), shared=True).open().ensure()
    yield array
    array.end()


@pytest.mark.long
@pytest.mark.parametrize("array", [([2, 3, 7], 12)], indirect=True)
def test_three_tasks_with_gaps_one_killed_and_requeued(array: Array) -> None:
    array.start(array.indexes)
    array.wait_for_the_middle()
    status = Checkpoint(array.checkpoint).status()
    assert (status.total, status.completed, status.pending) == (12, 4, 8)
    assert {run["shard"] for run in status.runs} == {f"shard {i} of 3" for i in range(3)}
    array.kill([3])
    array.start([3])
    array.finish()
    array.check()
    # Only those that failed, as an array of their own: there is nothing left, of any share.
    before = snapshot(array.out)
    array.submit([3, 7])
    # The log has these sentences, too, behind the time.
    said = [line for line in array.finish().splitlines() if line.startswith("Run ")]
    assert [": 0 of " in line for line in said] == [True, True]
    assert snapshot(array.out) == before
    array.check()


@pytest.mark.slow
@pytest.mark.parametrize(
    "array",
    [
        (range(4, 12), 96),
        ([1, 2, 4, 8, 9, 11, 30, 31], 96),
        ([1, 2, 4, 8, 9, 11, 30, 31], 96, "shared"),
    ],
    indirect=True,
)
def test_eight_tasks_half_of_them_killed_and_requeued(array: Array) -> None:
    array.start(array.indexes)
    array.wait_for_the_middle()
    killed = array.indexes[::2]
    array.kill(killed)
    array.start(killed)
    array.finish()
    array.check()


@pytest.mark.slow
@pytest.mark.parametrize("array", [(range(4), 48)], indirect=True)
def test_another_count_goes_on_from_there(array: Array) -> None:
    array.start(array.indexes)
    array.wait_for_the_middle()
    array.kill(array.indexes)
    array.submit([5, 7, 9])
    said = array.finish()
    completed = re.findall(r"Run \w+: (\d+) of", said)
    assert sum(map(int, completed)) == array.files * 2 // 3
    array.check()


@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_shards_of_one_process_after_another(tmp_path: Path) -> None:
    write_source(tmp_path / "in", files=6, rows=10)
    reader, paths = ray.data.read_parquet, str(tmp_path / "in")

    options: Any = {"checkpoint": tmp_path / "ckpt", "source_root": paths}

    def run(shard: tuple[int, int] | None) -> tuple[int, int, int]:
        ds = resumable_read(reader, paths, shard=shard, **options)
        summary = resumable_write(ds, tmp_path / "out")
        return summary.sources_total, summary.sources_completed, summary.sources_skipped

    shares = [
        sum(Shard(i, 3).holds(path.name) for path in (tmp_path / "in").iterdir()) for i in range(3)
    ]
    assert sum(shares) == 6
    ds = resumable_read(reader, paths, shard=(1, 3), **options)
    assert ds.count() == shares[1] * 10
    for index in (2, 1):
        assert run((index, 3)) == (shares[index], shares[index], 0)
    status = Checkpoint(tmp_path / "ckpt").status()
    assert (status.total, status.pending) == (6, shares[0])
    # Of many shares some are empty: that is nothing to do, not an error.
    held = [
        sum(Shard(i, 12).holds(path.name) for path in (tmp_path / "in").iterdir())
        for i in range(12)
    ]
    outcomes = [run((index, 12)) for index in range(12) if held[index] or index == held.index(0)]
    assert sum(total for total, _, _ in outcomes) == 6
    assert min(outcomes) == (0, 0, 0)
    assert sum(completed for _, completed, _ in outcomes) == shares[0]
    assert run(None) == (6, 0, 6)
    assert ids_in(tmp_path / "out") == list(range(60))


@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_sources_that_share_files_with_those_of_other_shards_are_done_by_their_own(
    tmp_path: Path,
) -> None:
    write_source(tmp_path / "in", files=6, rows=10)

    def run(shard: tuple[int, int] | None) -> tuple[int, int]:
        paths, checkpoint = str(tmp_path / "in"), tmp_path / "ckpt"
        ds = resumable_read(
            ray.data.read_parquet, paths, checkpoint=checkpoint, source_root=paths, shard=shard
        )
        summary = resumable_write(ds, tmp_path / "out", target_file_bytes=1 << 20)
        return summary.sources_completed, summary.sources_pending

    assert run(None) == (6, 0)
    checkpoint = Checkpoint(tmp_path / "ckpt")
    (before,) = checkpoint.files()
    checkpoint.reset(state="completed")
    share = sum(Shard(0, 2).holds(path.name) for path in (tmp_path / "in").iterdir())
    assert 0 < share < 6
    assert run((0, 2)) == (share, 0)
    # The rows of the other share have been copied out of the file.
    assert before not in checkpoint.files()
    assert checkpoint.files() == sorted(map(str, (tmp_path / "out").iterdir()))
    assert ids_in(tmp_path / "out") == list(range(60))
    assert run((1, 2)) == (6 - share, 0)
    assert checkpoint.files() == sorted(map(str, (tmp_path / "out").iterdir()))
    assert ids_in(tmp_path / "out") == list(range(60))


# The example.

EXAMPLES = ROOT / "examples"
SCONTROL = """#!/bin/sh
echo "$@" >>"$REQUEUED"
"""


class Batch:
    """The batch script as SLURM's shell runs it; what it asks of SLURM is written down."""

    def __init__(self, folder: Path) -> None:
        (folder / "bin").mkdir()
        (folder / "bin" / "scontrol").write_text(SCONTROL)
        (folder / "bin" / "scontrol").chmod(0o755)
        self.requeued, self.ready = folder / "requeued", folder / "ready"
        self.environment = {
            **WITHOUT_TOKENS,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "REQUEUED": str(self.requeued),
            "SLURM_JOB_ID": "4713",
        }

    def start(self, *command: object, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(EXAMPLES / "slurm_array.sbatch"), *map(str, command)],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def time_is_up(self, **environment: str) -> str:
        """Start a command that would take for ever, tell that time is up, return what was said."""
        endless = f"import pathlib, time; pathlib.Path({str(self.ready)!r}).touch(); time.sleep(99)"
        process = self.start(sys.executable, "-c", endless, **environment)
        while not self.ready.exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
        said, _ = process.communicate(timeout=30)
        assert process.returncode == 128 + signal.SIGTERM
        return said


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return Batch(tmp_path)


@pytest.mark.long
def test_the_batch_script_has_itself_requeued_when_time_is_up(batch: Batch) -> None:
    assert "Time is up: requeued." in batch.time_is_up()
    assert batch.requeued.read_text() == "requeue 4713\n"


@pytest.mark.long
def test_the_batch_script_gives_up_in_the_end(batch: Batch) -> None:
    assert "after 50 requeues" in batch.time_is_up(SLURM_RESTART_COUNT="50")
    assert not batch.requeued.exists()


@pytest.mark.long
@pytest.mark.parametrize("code", [0, 3])
def test_the_batch_script_ends_as_its_command_does(batch: Batch, code: int) -> None:
    process = batch.start(sys.executable, "-c", f"raise SystemExit({code})")
    process.communicate(timeout=30)
    assert process.returncode == code
    assert not batch.requeued.exists()


@pytest.mark.long
def test_the_example(batch: Batch, tmp_path: Path, another_cluster: str) -> None:
    (tmp_path / "in").mkdir()
    for number in range(6):
        text = [f" text \n {number} ", " \t", "", None]
        pq.write_table(pa.table({"text": text}), tmp_path / "in" / f"{number}.parquet")
    paths = [tmp_path / name for name in ("in", "ckpt", "out")]
    variables = {"JOB_ID": "7", "TASK_COUNT": "2", "TASK_MIN": "3", "TASK_MAX": "9"}
    slurm = {f"SLURM_ARRAY_{name}": value for name, value in variables.items()}
    tasks = [
        batch.start(
            sys.executable,
            EXAMPLES / "slurm_array.py",
            *paths,
            **slurm,
            SLURM_ARRAY_TASK_ID=index,
            RAY_ADDRESS=another_cluster,
        )
        for index in ("3", "9")
    ]
    for task in tasks:
        said, _ = task.communicate(timeout=240)
        assert task.returncode == 0, said
    assert ids_in(tmp_path / "out", "text") == [f"text {number}" for number in range(6)]


# Neighbours.


def plan_of(directory: LocalBackend, out: Path, shard: Shard | None = None) -> RunPlan:
    sources = SourceTable.of([Source("a", "a")])
    return RunPlan(
        storage=directory,
        listing=Listing(sources, sources, ids_of("file"), shard=shard),
        policies=Policies(),
        output=FolderOutput(Folder(LocalFileSystem(), str(out), str(out)), append=False),
        table=None,
        signature="",
    )


class BusyDirectory(LocalBackend):
    """While it is being read, a neighbour begins, writes a file, and is at work from then on."""

    def begin_neighbour(self, out: Path) -> None:
        self.out = out

    def committed_by_dead_runs(
        self, own: str, own_contents: WriterContents | None = None
    ) -> Contents:
        contents = super().committed_by_dead_runs(own, own_contents)
        self.neighbour = Lease.acquire(
            self.path, Owner.here("b" * 12), Claim(frozenset([source_digest("b")])), wait_s=0
        )
        WriterFile.create(self.path, "b" * 12, {}).close()
        self.out.mkdir()
        name = f"{self.identity()}-{'b' * 12}-{'0' * 15}1-{'0' * 16}.parquet"
        (self.out / name).write_bytes(b"rows")
        return contents


def test_a_neighbour_that_begins_meanwhile_is_no_stranger(tmp_path: Path) -> None:
    """Its file must neither be taken for one of an unknown run, nor for a left-over."""
    directory = BusyDirectory(tmp_path / "ckpt")
    directory.ensure()
    directory.begin_neighbour(tmp_path / "out")
    writer = WriterFile.create(directory.path, "a" * 12, {})
    writer.commit([Record("a", State.COMPLETED, 1, "a" * 12)])
    writer.close()
    summary = Run(plan_of(directory, tmp_path / "out")).execute(lambda _: None, lease_wait_s=0)
    assert summary.sources_skipped == 1
    assert len(list((tmp_path / "out").iterdir())) == 1
    directory.neighbour.end(wait_s=0)


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        (
            Shard(0, 2),
            r"shard 0 of 2, host .*This run is to do shard 1 of 3, and that one does "
            r"shard 0 of 2: only different shards of one count",
        ),
        (Shard(1, 3), r"Both are to do shard 1 of 3: was the array submitted twice"),
        (None, r"This run is to do shard 1 of 3, and that one does everything"),
    ],
)
def test_shards_that_overlap_are_refused(tmp_path: Path, theirs: Shard | None, told: str) -> None:
    directory = LocalBackend(tmp_path / "ckpt")
    directory.ensure()
    claim = Claim(frozenset([source_digest("a"), source_digest("b")]))
    shard = None if theirs is None else str(theirs)
    lease = Lease.acquire(directory.path, Owner.here("b" * 12, shard), claim, wait_s=0)
    run = Run(plan_of(directory, tmp_path / "out", Shard(1, 3)))
    with pytest.raises(CheckpointError, match=told):
        run.execute(lambda _: None, lease_wait_s=0)
    lease.end(wait_s=0)
