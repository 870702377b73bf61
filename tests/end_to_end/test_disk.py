"""The disk and the file system: full, read-only, gone, in use for something else, on a network."""

from __future__ import annotations

import os
import shutil
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
from conftest import ids_in, snapshot
from hypothesis import given
from hypothesis import strategies as st

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
from ray_resume.checkpoint.mounts import filesystem_type_of, is_remote, network_filesystem_type
from ray_resume.core.messages import DeadLetter
from ray_resume.core.records import Record, State

pytestmark = [pytest.mark.extended, pytest.mark.long]

# Ray types a UDF's argument as the union of all batch formats.
Batch: TypeAlias = Any


# --- A small disk of our own ---


class Disk:
    """A file system in memory, of a size that a test can fill."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def mount(self, options: str) -> None:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(self.path)],
            check=True,
            capture_output=True,
        )

    def fill(self, *, but: int = 0) -> None:
        """Take up all space, ``but`` so many bytes."""
        spare = self.path / "spare"
        spare.write_bytes(bytes(but))
        fill(self._ballast)
        spare.unlink()

    def free(self) -> None:
        self._ballast.unlink()


def fill(ballast: Path) -> None:
    with ballast.open("ab", buffering=0) as file:
        size = 1 << 16
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of 1 MiB; skips where nobody may mount one."""
    disk = Disk(tmp_path / "disk")
    disk.path.mkdir()
    try:
        disk.mount("size=1m")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nothing can be mounted here: {error}")
    yield disk
    subprocess.run(["umount", "-l", str(disk.path)], check=True)


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


# --- Read-only, gone, or something else ---


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


# --- Network file systems ---

MOUNTS = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 27 0:30 / /home rw,relatime shared:2 master:1 - nfs4 server:/home rw,vers=4.2
31 30 8:2 / /home/local rw - xfs /dev/sdb1 rw
32 27 0:32 / /my\040data\134\011 rw - lustre 10.0.0.1@tcp:/fs rw
33 27 0:33 / /over rw - ext4 /dev/sdc1 rw
34 33 0:34 / /over rw - fuse.sshfs me@there:/ rw
35 27 0:35 /sub /bind rw - cifs //server/share rw
36 27 0:36 / /broken rw
37
"""


@pytest.mark.parametrize(
    ("path", "fstype"),
    [
        ("/", "ext4"),
        ("/ckpt", "ext4"),
        ("/home", "nfs4"),
        ("/home/me/ckpt", "nfs4"),
        ("/homeless/ckpt", "ext4"),
        ("/home/local/ckpt", "xfs"),
        ("/home/locally", "nfs4"),
        ("/my data\\\t/ckpt", "lustre"),
        ("/over/ckpt", "fuse.sshfs"),
        ("/bind/a", "cifs"),
        ("/broken/a", "ext4"),
    ],
)
def test_the_mount_that_a_path_is_under(path: str, fstype: str) -> None:
    assert filesystem_type_of(MOUNTS, path) == fstype


@given(st.text() | st.text("/ -\\0a\n"), st.text().map("/".__add__))
def test_any_table_has_an_answer(mounts: str, path: str) -> None:
    assert filesystem_type_of("", path) is None
    fstype = filesystem_type_of(mounts, path)
    assert fstype is None or fstype in mounts


REMOTE = """
    nfs nfs4 lustre cifs smb3 ceph gpfs beegfs 9p glusterfs
    fuse fuse.sshfs fuse.s3fs fuse.gcsfuse fuse.juicefs fuse.never-heard-of
"""
LOCAL = "ext4 xfs btrfs zfs tmpfs overlay f2fs fuseblk fuse.fuse-overlayfs virtiofs"


@pytest.mark.parametrize("fstype", REMOTE.split())
def test_what_other_hosts_may_change_is_remote(fstype: str) -> None:
    assert is_remote(fstype)


@pytest.mark.parametrize("fstype", LOCAL.split())
def test_what_this_host_has_for_itself_is_not(fstype: str) -> None:
    assert not is_remote(fstype)


def test_this_machines_own_mounts(disk: Disk) -> None:
    table = Path("/proc/self/mountinfo").read_text()
    assert filesystem_type_of(table, str(disk.path / "ckpt")) == "tmpfs"
    assert network_filesystem_type(disk.path / "not" / "there") is None


LOOK = """
import sys
from ray_resume import Checkpoint, CheckpointError
from ray_resume.checkpoint.local.backend import LocalBackend
for call in (
    LocalBackend(sys.argv[1]).ensure,
    Checkpoint(sys.argv[1]).status,
    Checkpoint(sys.argv[1]).check,
    Checkpoint(sys.argv[1]).compact,
    lambda: Checkpoint(sys.argv[1]).reset(state="all"),
    lambda: LocalBackend(sys.argv[1]).committed_by_dead_runs("x"),
):
    try:
        call()
        print("done")
    except CheckpointError as error:
        print(error)
"""


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_local_checkpoint_that_moved_to_a_network_file_system_is_not_touched(
    tmp_path: Path, through_a_link: bool
) -> None:
    """With the kernel's table replaced by one in which the directory is mounted by NFS."""
    checkpoint = tmp_path / "nfs" / "ckpt"
    LocalBackend(checkpoint).ensure()
    WriterFile.create(checkpoint, "aaaaaaaaaaaa", {}).close()
    (tmp_path / "link").symlink_to(tmp_path / "nfs")
    table = tmp_path / "table"
    table.write_text(f"1 0 8:1 / / rw - ext4 a rw\n2 1 0:9 / {tmp_path}/nfs rw - nfs4 b rw\n")
    before = snapshot(tmp_path)
    given = (tmp_path / "link" if through_a_link else tmp_path / "nfs") / "ckpt"
    script = 'mount --bind "$1" /proc/$$/mountinfo || exit 77; shift; exec "$@"'
    look = [sys.executable, "-c", LOOK, str(given)]
    child = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", str(table), *look],
        capture_output=True,
        text=True,
    )
    if child.returncode in (1, 77) and not child.stdout:
        pytest.skip(f"nothing can be mounted here: {child.stderr}")
    told = child.stdout.splitlines()
    assert len(told) == 6, child
    for line in told[:1] + told[-1:]:
        assert f"{given} is on a network file system (nfs4)" in line
    for line in told[1:-1]:
        assert f"{given} was made in a directory of one host's own" in line
    assert all("local disk" in line for line in told)
    assert snapshot(tmp_path) == before
