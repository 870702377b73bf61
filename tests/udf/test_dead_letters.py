"""Dead letters: their files, and when they come and go with a source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ids_in, write_source
from udf_job import FILES, ROWS, run

from ray_resume import Checkpoint, resumable
from ray_resume.checkpoint.dead_letters import DeadLetterStore
from ray_resume.checkpoint.local.objects import LocalObjects
from ray_resume.core.messages import DeadLetter

# Ray Data starts Ray to estimate the size of a block of rows.
pytestmark = pytest.mark.usefixtures("cluster")


def letter_of(table: pa.Table, errors: Sequence[str]) -> DeadLetter:
    return DeadLetter.of(0, 1, "map(f)", table, errors)


def test_a_letter_of_what_parquet_cannot_hold(tmp_path: Path) -> None:
    union = pa.UnionArray.from_dense(
        pa.array([0, 1], pa.int8()), pa.array([0, 0], pa.int32()), [pa.array([1]), pa.array(["a"])]
    )
    table = pa.table({"u": union, "ray_resume_error": ["mine", "mine"], "n": [1, None]})
    folder = DeadLetterStore(LocalObjects(str(tmp_path)))
    name = folder.write("a" * 12, "s\udcff", letter_of(table, ["e1", "e2"]))
    read = pq.read_table(tmp_path / "dead-letters" / name)
    assert read["u"].to_pylist() == ["1", "'a'"]
    assert read["ray_resume_error"].to_pylist() == ["mine", "mine"]
    assert read["_ray_resume_error"].to_pylist() == ["e1", "e2"]
    assert read["ray_resume_source"].to_pylist() == ["s\\udcff"] * 2
    assert read["n"].to_pylist() == [1, None]


def test_left_over_letters_are_removed_and_others_stay(tmp_path: Path) -> None:
    folder = DeadLetterStore(LocalObjects(str(tmp_path)))
    folder.remove_leftovers({"a" * 12}, ())
    table = pa.table({"x": [1]})
    names = [folder.write(run * 12, "s", letter_of(table, ["e"])) for run in "aabc"]
    inside = tmp_path / "dead-letters"
    (inside / f".{'a' * 12}-{'0' * 16}-{'0' * 16}.parquet").touch()
    (inside / "mine.parquet").touch()
    folder.remove_leftovers({"a" * 12, "c" * 12}, {names[0]})
    assert {path.name for path in inside.iterdir()} == {names[0], names[2], "mine.parquet"}


@pytest.fixture
def source(tmp_path: Path) -> None:
    write_source(tmp_path / "in", files=FILES, rows=ROWS)


@pytest.mark.extended
@pytest.mark.long
@pytest.mark.usefixtures("source")
def test_dead_letters_are_there_once_for_each_completed_source(tmp_path: Path) -> None:
    @resumable(on_error="dead_letter")
    def odd(row: Any) -> Any:
        if row["id"] % 10 == 3:
            raise ValueError(f"bad row {row['id']}")
        return row

    @resumable(on_error="mark_failed")
    def later(batch: Any) -> Any:
        if 0 in batch["id"]:
            raise ValueError("this source fails after all")
        return batch

    summary = run(tmp_path, lambda ds: ds.map(odd).map_batches(later))
    assert (summary.sources_completed, summary.sources_failed) == (FILES - 1, 1)
    assert summary.rows_dead_lettered == 2 * (FILES - 1)

    def check(expected: list[int]) -> None:
        letters = Checkpoint(tmp_path / "ckpt").dead_letters()
        assert sorted(map(str, (tmp_path / "ckpt" / "dead-letters").iterdir())) == letters
        rows = [row for path in letters for row in pq.read_table(path).to_pylist()]
        assert sorted(row["id"] for row in rows) == expected
        for row in rows:
            assert f"bad row {row['id']}" in row["ray_resume_error"]
            assert row["ray_resume_stage"] == "map(odd)"
            assert f"{row['id'] // ROWS:04d}" in row["ray_resume_source"]

    bad = [i for i in range(FILES * ROWS) if i % 10 == 3]
    check([i for i in bad if i >= ROWS])
    assert run(tmp_path, lambda ds: ds.map(odd)).rows_dead_lettered == 2
    check(bad)
    good = sorted(set(range(FILES * ROWS)) - set(bad))
    assert ids_in(tmp_path / "out") == good
    # Processed anew, without errors: the letters go with the output that they belonged to.
    Checkpoint(tmp_path / "ckpt").reset(state="completed")
    check(bad)
    run(tmp_path, lambda ds: ds)
    check([])
    assert ids_in(tmp_path / "out") == list(range(FILES * ROWS))
