"""An output folder that was moved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import ray
from conftest import ids_in, write_file, write_source
from snapshots import whole_files

from ray_resume import Checkpoint, CheckpointError, RunSummary, resumable_read, resumable_write
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lease import Lease
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.cli import main
from ray_resume.core.digests import source_digest
from ray_resume.core.filenames import stem_of
from ray_resume.core.records import Record, State

RUN = "0123456789ab"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Two completed sources, one of them in a partition; one that failed has an old file."""
    directory, out = LocalBackend(tmp_path / "ckpt"), tmp_path / "out"
    prefix = f"{directory.ensure()}-{RUN}"
    directory.bind(str(out), RUN)
    records = []
    for number, (name, folder) in enumerate({"a": "", "b": "k=1/", "c": ""}.items(), 1):
        file = f"{folder}{stem_of(prefix, source_digest(name)[:8], folder)}.parquet"
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_bytes(b"rows")
        state = State.FAILED if name == "c" else State.COMPLETED
        records.append(Record(name, state, number, RUN, rows=1, parts=whole_files(file)))
    writer = WriterFile.create(directory.path, RUN, {"sources_total": 3})
    writer.commit(records)
    writer.close()
    return Checkpoint(tmp_path / "ckpt")


@pytest.mark.long
def test_a_folder_that_was_moved_whole(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [Path(file).relative_to(tmp_path / "out") for file in checkpoint.files()]
    shutil.move(tmp_path / "out", tmp_path / "new place")
    assert main(["rebind", str(checkpoint.path), str(tmp_path / "new place")]) == 0
    assert capsys.readouterr().out == f"The output is in {tmp_path}/new place now, 3 files.\n"
    assert checkpoint.files() == [str(tmp_path / "new place" / file) for file in before]
    assert checkpoint.status().sink == str(tmp_path / "new place")
    assert checkpoint.check(), checkpoint.check()
    # What failed needs no earlier output.
    Path(checkpoint.sources("failed").__next__().files[0]).unlink()
    shutil.move(tmp_path / "new place", tmp_path / "out")
    assert checkpoint.rebind(tmp_path / "out") == 3


@pytest.mark.long
def test_one_that_misses_files_is_refused_by_their_names(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, source in enumerate(checkpoint.sources("completed")):
        new = tmp_path / f"new{number}"
        shutil.copytree(tmp_path / "out", new)
        gone = Path(source.files[0]).relative_to(tmp_path / "out")
        (new / gone).unlink()
        # Elsewhere in the folder it is a copy.
        shutil.copy(tmp_path / "out" / gone, new / "copy.parquet")
        with pytest.raises(CheckpointError, match=str(gone)):
            checkpoint.rebind(new)
        assert main(["rebind", str(checkpoint.path), str(new)]) == 1
        assert str(gone) in capsys.readouterr().err
        assert checkpoint.status().sink == str(tmp_path / "out")
    with pytest.raises(CheckpointError, match="2 output files of completed sources are not in"):
        checkpoint.rebind(tmp_path / "nowhere")


def test_it_is_refused_while_a_run_is_at_work_or_there_is_no_folder(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_resume.checkpoint.local.backend._MAX_DEATH_DETECTION_S", 0)
    lease = Lease.acquire(tmp_path / "ckpt", Owner.here("f" * 12), Claim(frozenset()), wait_s=0)
    shutil.copytree(tmp_path / "out", tmp_path / "new")
    with pytest.raises(CheckpointError, match="in use"):
        checkpoint.rebind(tmp_path / "new")
    lease.end(wait_s=0)
    assert checkpoint.rebind(tmp_path / "new") == 3
    directory = LocalBackend(tmp_path / "other")
    directory.ensure()
    with pytest.raises(CheckpointError, match="has no output yet"):
        Checkpoint(directory.path).rebind(tmp_path / "new")
    directory.bind("datasink Iceberg db.table", "0" * 12)
    with pytest.raises(CheckpointError, match="no folder"):
        Checkpoint(directory.path).rebind(tmp_path / "new")


@pytest.mark.extended
@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_a_job_goes_on_in_the_new_folder(tmp_path: Path) -> None:
    def run(out: Path) -> RunSummary:
        checkpoint = tmp_path / "ckpt"
        ds = resumable_read(ray.data.read_parquet, str(tmp_path / "in"), checkpoint=checkpoint)
        return resumable_write(ds, out)

    write_source(tmp_path / "in", files=2, rows=5)
    run(tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "new")
    write_file(tmp_path / "in" / "00002.parquet", 10, 15)
    with pytest.raises(CheckpointError, match="ray-resume rebind"):
        run(tmp_path / "new")
    Checkpoint(tmp_path / "ckpt").rebind(tmp_path / "new")
    summary = run(tmp_path / "new")
    assert (summary.sources_completed, summary.sources_skipped) == (1, 2)
    assert ids_in(tmp_path / "new") == list(range(15))
