"""Sources, files and columns of any name, in a pipeline."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import ids_in
from hostile_names import HOSTILE

from ray_resume import (
    Checkpoint,
    CheckpointError,
    ResumeError,
    resumable,
    resumable_read,
    resumable_write,
)
from ray_resume.cli import main
from ray_resume.core.tokens import SOURCE_COLUMN, TOKEN_COLUMN

pytestmark = pytest.mark.long

# Ray types a UDF's argument as the union of all batch formats.
Batch: TypeAlias = Any


@pytest.mark.extended
@pytest.mark.usefixtures("cluster")
def test_ids_of_any_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, out = tmp_path / "ckpt", tmp_path / "out"

    def load(key: str) -> pa.Table:
        return pa.table({"id": [HOSTILE.index(key)] * 3})

    @resumable(on_error="dead_letter")
    def some(batch: Batch) -> Batch:
        if batch["id"][0] % 2:
            raise ValueError(HOSTILE[batch["id"][0]])
        return batch

    def job() -> Any:
        ds = resumable_read(load, keys=HOSTILE, checkpoint=checkpoint)
        return resumable_write(ds.map_batches(some), out)

    assert job().sources_completed == len(HOSTILE)
    assert {source.source_id for source in Checkpoint(checkpoint).sources()} == set(HOSTILE)
    assert ids_in(out) == sorted(3 * list(range(0, len(HOSTILE), 2)))
    assert ids_in(checkpoint / "dead-letters") == sorted(3 * list(range(1, len(HOSTILE), 2)))
    assert job().sources_skipped == len(HOSTILE)
    assert Checkpoint(checkpoint).reset(HOSTILE[:5]) == 5
    summary = job()
    assert (summary.sources_completed, summary.sources_skipped) == (5, len(HOSTILE) - 5)
    assert ids_in(out) == sorted(3 * list(range(0, len(HOSTILE), 2)))
    report = Checkpoint(checkpoint).check()
    assert (report.ok, report.notes) == (True, ())
    assert main(["sources", str(checkpoint)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(HOSTILE)


NAMES = [
    "plain",
    "a b",
    "per%20cent",
    "hash#rg0",
    "what?x=1",
    "star*[a]",
    "\x1b[31mred",
    "del\x7f\x01",
    "naïve ☃",
    "back\\slash",
    "quote'\"",
    "ß" * 100,
]


@pytest.mark.usefixtures("cluster")
def test_files_of_any_name(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number, name in enumerate(NAMES):
        pq.write_table(pa.table({"id": [number]}), str(source / f"{name}.parquet"))

    def job() -> Any:
        ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
        return resumable_write(ds, out)

    assert job().sources_completed == len(NAMES)
    assert job().sources_skipped == len(NAMES)
    assert ids_in(out) == list(range(len(NAMES)))
    assert Checkpoint(tmp_path / "ckpt").check().ok


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("name", [b"tab\t", b"line\nbreak", b"return\r", b"\xff\xfe"])
def test_files_whose_name_ray_cannot_open_are_refused(tmp_path: Path, name: bytes) -> None:
    source = tmp_path / "in"
    source.mkdir()
    pq.write_table(pa.table({"id": [1]}), str(source / "good.parquet"))
    os.link(source / "good.parquet", os.fsencode(source) + b"/" + name + b".parquet")
    with pytest.raises(ResumeError, match="Rename it") as caught:
        resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
    assert str(caught.value).isprintable()


@pytest.mark.usefixtures("cluster")
def test_somebody_elses_file_of_any_name_stays(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / os.fsdecode(b"\xff")).write_text("mine")
    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="did not make"):
        resumable_write(ds, out)
    assert resumable_write(ds, out, append=True).sources_completed == 7
    assert (out / os.fsdecode(b"\xff")).read_text() == "mine"


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("name", [SOURCE_COLUMN, TOKEN_COLUMN])
def test_input_with_a_column_of_ours_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"id": [1], name: [1]}), str(tmp_path / "in" / "a.parquet"))
    ds = resumable_read(ray.data.read_parquet, str(tmp_path / "in"), checkpoint=tmp_path / "ckpt")
    with pytest.raises(ValueError, match=r"is ray_resume's own\. Give the column another name"):
        resumable_write(ds, tmp_path / "out")
    assert Checkpoint(tmp_path / "ckpt").status().completed == 0
    assert list((tmp_path / "out").iterdir()) == []
