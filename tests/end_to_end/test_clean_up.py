"""What whole pipelines leave behind: no file of others is removed, and none of theirs piles up."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow.parquet as pq
import pytest
from conftest import ids_in, snapshot
from parquet_job import keep, keep_even, read

from ray_resume import Checkpoint, CheckpointError, resumable, resumable_write
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.run.run import MOST_WRITER_FILES

pytestmark = pytest.mark.usefixtures("cluster")

# Ray types a UDF's argument as the union of all batch formats.
Batch: TypeAlias = Any


@pytest.mark.extended
@pytest.mark.long
def test_clean_up_touches_nobody_elses_files(source: Path, tmp_path: Path) -> None:
    """Beside other people's files, another checkpoint's, and a live run's."""
    from ray_resume.checkpoint.claims import Claim, Owner
    from ray_resume.checkpoint.local.backend import LocalBackend
    from ray_resume.checkpoint.local.lease import Lease

    out = tmp_path / "out"
    resumable_write(read(source, tmp_path / "other").map_batches(keep_even), out)
    (out / "report.parquet").write_bytes(b"mine")
    (out / "sub").mkdir()
    copied = next(out.glob("*.parquet"))
    (out / "sub" / copied.name).write_bytes(b"a copy")
    (out / f"{copied.name}.bak").write_bytes(b"a copy")
    (out / "sub" / "notes.csv").write_bytes(b"a,b")
    ours = LocalBackend(tmp_path / "ckpt").ensure()
    live = Lease.acquire(
        tmp_path / "ckpt", Owner.here("aaaaaaaaaaaa"), Claim(frozenset({b"x" * 16})), wait_s=0
    )
    (out / f"{ours}-aaaaaaaaaaaa-{16 * '0'}-{16 * '1'}.parquet").write_bytes(b"a live run's")
    (out / f".{ours}-aaaaaaaaaaaa-{16 * '0'}-{16 * '2'}.parquet").write_bytes(
        b"a live run's, half-written"
    )
    kept = {name: (out / name).read_bytes() for name in snapshot(out) if (out / name).is_file()}

    with pytest.raises(CheckpointError, match="append=True"):
        resumable_write(read(source, tmp_path / "ckpt").map_batches(keep), out)

    @resumable
    def fails_late(batch: Batch) -> Batch:
        if 450 in batch["id"]:
            time.sleep(1)
            raise RuntimeError("no")
        return batch

    with pytest.raises(Exception, match="no"):
        resumable_write(
            read(source, tmp_path / "ckpt", override_num_blocks=7).map_batches(fails_late),
            out,
            append=True,
        )
    dead = next(path.stem for path in (tmp_path / "ckpt").glob("*.mdb"))
    (out / f"{ours}-{dead}-{16 * '2'}-{16 * '3'}.parquet").write_bytes(b"a left-over")
    (out / f".{ours}-{dead}-{16 * '2'}-{16 * '4'}.parquet").write_bytes(b"a half-written left-over")
    resumable_write(read(source, tmp_path / "ckpt").map_batches(keep), out, append=True)

    listed = {Path(file).name for file in Checkpoint(tmp_path / "ckpt").files()}
    now = {name: (out / name).read_bytes() for name in snapshot(out) if (out / name).is_file()}
    assert {name: content for name, content in now.items() if name not in listed} == kept
    written = [pq.ParquetFile(out / name).read(["id"])["id"].to_pylist() for name in listed]
    assert sorted(i for ids in written for i in ids) == list(range(600))
    live.end(wait_s=0)


@pytest.mark.long
def test_files_of_runs_that_the_checkpoint_has_forgotten_are_told(
    source: Path, tmp_path: Path
) -> None:
    resumable_write(read(source, tmp_path / "ckpt").map_batches(keep), tmp_path / "out")
    (store,) = (tmp_path / "ckpt").glob("*.mdb")
    kept = store.read_bytes()
    store.unlink()
    before = snapshot(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"second time\. Put it back"):
        resumable_write(read(source, tmp_path / "ckpt").map_batches(keep), tmp_path / "out")
    assert snapshot(tmp_path / "out") == before
    store.write_bytes(kept)
    summary = resumable_write(read(source, tmp_path / "ckpt").map_batches(keep), tmp_path / "out")
    assert summary.sources_skipped == 7


@pytest.mark.extended
@pytest.mark.long
def test_writers_files_do_not_pile_up(source: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "ckpt")
    resumable_write(read(source, tmp_path / "ckpt").map_batches(keep), tmp_path / "out")
    for number in range(MOST_WRITER_FILES):
        WriterFile.create(tmp_path / "ckpt", f"{number:012x}", {"purpose": "reset"}).close()
    before = checkpoint.status()
    summary = resumable_write(read(source, tmp_path / "ckpt").map_batches(keep), tmp_path / "out")
    assert summary.sources_skipped == before.completed
    assert len(list((tmp_path / "ckpt").glob("*.mdb"))) == 1
    assert checkpoint.check().ok
    assert ids_in(tmp_path / "out") == list(range(600))


@pytest.mark.extended
@pytest.mark.long
def test_lost_output_is_an_error_that_names_it(source: Path, tmp_path: Path) -> None:
    resumable_write(read(source, tmp_path / "ckpt").map_batches(keep), tmp_path / "out")
    lost = next((tmp_path / "out").iterdir())
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name) as caught:
        resumable_write(read(source, tmp_path / "ckpt").map_batches(keep), tmp_path / "out")
    assert "reset" in str(caught.value)
    with pytest.raises(CheckpointError, match="belongs to the output"):
        resumable_write(read(source, tmp_path / "ckpt").map_batches(keep), tmp_path / "out2")
