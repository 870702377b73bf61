"""Whose files are whose: copies that users made, and output of other checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import ids_in, write_file, write_source

from ray_resume import Checkpoint, CheckpointError, RunSummary, resumable_read, resumable_write
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.core.filenames import OutputName, stem_of
from ray_resume.core.output_files import OutputFileSet

PREFIX = "aaaaaaaa-0123456789ab"


def test_a_copy_in_another_folder_is_not_ours() -> None:
    for folder in ("", "k=1/", "k=1/l=ü/"):
        for digest in (None, bytes(range(8))):
            bare = f"{stem_of(PREFIX, digest, folder)}.parquet"
            name = OutputName.parse(f"{folder}{bare}")
            assert name is not None
            assert (name.in_place, name.is_shared) == (True, digest is None)
            assert OutputName.parse(f"{folder}.{bare}") == name  # half written
            for other in {"", "k=1/", "k=1/l=ü/", "k=2/", "backup/", "backup/k=1/"} - {folder}:
                copy = OutputName.parse(f"{other}{bare}")
                assert copy is None or not copy.in_place
                copies = OutputFileSet.of([f"{other}{bare}"])
                assert not copies.made_by("aaaaaaaa", {"0123456789ab"}, known=True)
                assert list(copies.not_of("aaaaaaaa")) == [f"{other}{bare}"]
                assert not copies.checkpoints()


def run(folder: Path, checkpoint: str = "ckpt", **options: Any) -> RunSummary:
    ds = resumable_read(ray.data.read_parquet, str(folder / "in"), checkpoint=folder / checkpoint)
    return resumable_write(ds, folder / "out", **options)


def copy_output(folder: Path, *subfolders: str) -> None:
    for sub in subfolders:
        (folder / "out" / sub).mkdir(exist_ok=True)
        for file in Checkpoint(folder / "ckpt").files():
            shutil.copy(file, folder / "out" / sub)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("columns", [(), ("part",)])
def test_copies_of_output_files_stay(tmp_path: Path, columns: tuple[str, ...]) -> None:
    source, subfolders = tmp_path / "in", ("backup", "date=2026-01-01", "part=7", "part=1")
    options: dict[str, Any] = {"partition_cols": columns}
    rows = 6

    def read() -> Any:
        ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
        return ds.rename_columns({"name": "part"}) if columns else ds

    write_source(source, files=2, rows=rows)
    resumable_write(read(), tmp_path / "out", **options)
    copy_output(tmp_path, *subfolders)
    before = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    write_file(source / "00005.parquet", 100, 101)
    with pytest.raises(CheckpointError, match="append=True"):
        resumable_write(read(), tmp_path / "out", **options)
    # Left-overs of a run go, those in partitions too, and nothing of what it listed.
    identity = LocalBackend(tmp_path / "ckpt").identity()
    dead = next((tmp_path / "ckpt").glob("*.mdb")).stem
    sub = "part=row 1/" if columns else ""
    left = tmp_path / "out" / f"{sub}{stem_of(f'{identity}-{dead}', bytes(8), sub)}.parquet"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"left over")
    resumable_write(read(), tmp_path / "out", append=True, **options)
    after = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert before < after
    listed = Checkpoint(tmp_path / "ckpt").files()
    assert after - before == set(map(Path, listed)) - before


@pytest.mark.usefixtures("cluster")
def test_files_of_another_checkpoint_are_named_and_not_written_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_source(tmp_path / "in", files=2, rows=5)
    run(tmp_path)
    identity = LocalBackend(tmp_path / "ckpt").identity()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ds = resumable_read(ray.data.read_parquet, str(tmp_path / "in"), checkpoint="ckpt")
    with pytest.raises(CheckpointError) as caught:
        resumable_write(ds, tmp_path / "out")
    message = str(caught.value)
    assert "2 files that this checkpoint did not make: ray_resume made them" in message
    assert f"for the checkpoint with the id {identity}" in message
    assert f"{tmp_path / 'elsewhere' / 'ckpt'} (id " in message
    assert "is new: no run has used it" in message
    assert "append=True" not in message
    # Removed, and so made again.
    shutil.rmtree(tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="made them for the checkpoint with the id"):
        run(tmp_path)
    assert ids_in(tmp_path / "out") == list(range(10))
    # What the user asks for is done, and the user is told.
    run(tmp_path, append=True)
    assert "append=True writes beside them" in caplog.text
