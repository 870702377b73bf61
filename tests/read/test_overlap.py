"""Input, output and checkpoint in one another: no run reads what runs write."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
from conftest import write_source
from pyarrow.fs import LocalFileSystem

from ray_resume import CheckpointError, resumable_read, resumable_write
from ray_resume.read.listing import list_files
from ray_resume.read.overlap import InputFolders, filesystem_type


def inputs_of(root: Path) -> InputFolders:
    filesystem = LocalFileSystem()
    files = list_files(filesystem, [str(root)], extensions=None, keep=None, ignore_missing=False)
    return InputFolders.of(filesystem, [str(root)], files.ids())


def test_what_a_listing_would_find_is_what_is_refused(tmp_path: Path) -> None:
    """The answer is held against a listing, with a file put into the folder in question."""
    write_source(tmp_path / "in" / "sub", files=1, rows=1)
    write_source(tmp_path / "elsewhere" / "deep", files=1, rows=1)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "to in").symlink_to(tmp_path / "in")
    (tmp_path / "beside").mkdir()
    inside = ["in", "in/new", "in/sub/_new", "in/link/new", "elsewhere/deep", "to in/new"]
    outside = ["in/_new", "in/.new", "in beside", "beside/new", "to in/_new"]
    for root in ("in", "to in"):
        for name in inside + outside:
            inputs = inputs_of(tmp_path / root)
            folder = tmp_path / name
            made = not folder.exists()
            folder.mkdir(exist_ok=True)
            (folder / "new.parquet").write_bytes(b"")
            found = list_files(
                LocalFileSystem(),
                [str(tmp_path / root)],
                extensions=None,
                keep=None,
                ignore_missing=False,
            )
            is_read = any(path.endswith("/new.parquet") for path in found.ids())
            assert is_read == (name in inside), name
            if name != "in/link/new":  # One level further, nothing was listed there yet.
                assert (inputs.reads_from("local", str(folder)) is not None) == is_read, name
            assert inputs_of(tmp_path / root).reads_from("s3", str(folder)) is None
            (folder / "new.parquet").unlink()
            if made:
                folder.rmdir()
    # The input is in it.
    inputs = inputs_of(tmp_path / "in")
    for name in ("", "elsewhere", "elsewhere/deep", "in/sub"):
        assert inputs.reads_from("local", str(tmp_path / name)) is not None
    assert inputs.reads_from("local", str(tmp_path / "beside")) is None


def test_places_in_a_bucket_are_compared_by_their_paths() -> None:
    inputs = InputFolders("s3", {"bucket/raw": "s3://bucket/raw"}, frozenset({"bucket/raw/a"}))
    assert filesystem_type("s3://key:secret@bucket/x", None) == "s3"
    assert filesystem_type("gs://bucket", None) == "gcs"
    assert inputs.reads_from("s3", "bucket/raw/ckpt") == "s3://bucket/raw"
    assert inputs.reads_from("s3", "bucket/raw/a/") is not None
    assert inputs.reads_from("s3", "bucket") is not None
    for path in ("bucket/raw/_ckpt", "bucket/rawer", "bucket/out"):
        assert inputs.reads_from("s3", path) is None


@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_each_direction_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_source(source, files=2, rows=3)
    for checkpoint in (source / "ckpt", source):
        with pytest.raises(CheckpointError, match=f"checkpoint {checkpoint} is in the input"):
            resumable_read(ray.data.read_parquet, str(source), checkpoint=checkpoint)
    assert sorted(path.name for path in source.iterdir()) == ["00000.parquet", "00001.parquet"]
    ckpt, out = tmp_path / "ckpt", tmp_path / "out"
    resumable_write(resumable_read(ray.data.read_parquet, str(source), checkpoint=ckpt), out)
    # Its own output, and its own checkpoint, by links.
    (tmp_path / "to out").symlink_to(out)
    (tmp_path / "to ckpt").symlink_to(ckpt)
    (ckpt / "dead-letters").mkdir()
    write_source(ckpt / "dead-letters", files=1, rows=1)
    for letters in (tmp_path / "to ckpt" / "dead-letters", tmp_path / "to ckpt"):
        with pytest.raises(CheckpointError, match="by a symbolic link"):
            resumable_read(ray.data.read_parquet, str(letters), checkpoint=ckpt)
    ds = resumable_read(ray.data.read_parquet, str(tmp_path / "to out"), checkpoint=ckpt)
    with pytest.raises(CheckpointError, match="by a symbolic link"):
        resumable_write(ds, out)
    # An output that is in the input by its real path.
    (source / "res").mkdir()
    (tmp_path / "to res").symlink_to(source / "res")
    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=ckpt)
    with pytest.raises(CheckpointError, match=f"is in the input {source}"):
        resumable_write(ds, tmp_path / "to res")
