"""Types that no output has any more, types that nothing holds, and files of an earlier layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import ray

from ray_resume import Checkpoint, ResumeError, resumable, resumable_read, resumable_write

pytestmark = [pytest.mark.extended, pytest.mark.long, pytest.mark.usefixtures("cluster")]


def rows_of(checkpoint: Path) -> list[dict[str, Any]]:
    tables = [pq.ParquetFile(path).read() for path in Checkpoint(checkpoint).files()]
    return sorted((row for t in tables for row in t.to_pylist()), key=lambda row: row["id"])


def types_of(checkpoint: Path) -> list[dict[str, pa.DataType]]:
    """Return the different schemas of the files that are listed."""
    found: list[dict[str, pa.DataType]] = []
    for path in Checkpoint(checkpoint).files():
        types = {one.name: one.type for one in pq.read_schema(path)}
        if types not in found:
            found.append(types)
    return found


@pytest.mark.parametrize("values", [(2**53 + 1, 0.5), (0.5, 2**53 + 1)])
def test_values_that_no_type_holds_are_refused_in_any_order(
    values: tuple[float, float], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for number, value in enumerate(values):
        (tmp_path / f"in/{number}.json").write_text(json.dumps({"id": number, "n": value}))
    # Plain Ray Data gives each file a type of its own; read as one, the integer would change.
    types = [ray.data.read_json(f"{tmp_path}/in/{i}.json").schema().types[1] for i in (0, 1)]
    assert set(types) == {pa.int64(), pa.float64()}
    for _ in range(2):
        ds = resumable_read(
            ray.data.read_json, f"{tmp_path}/in", checkpoint=tmp_path / "c", override_num_blocks=2
        )
        with pytest.raises(ResumeError, match="cannot be unified: column 'n' has type") as caught:
            resumable_write(ds, tmp_path / "out", concurrency=1)
        for number in (0, 1):
            assert f"{tmp_path}/in/{number}.json" in str(caught.value)
        assert len(types_of(tmp_path / "c")) <= 1


class Job:
    """A pipeline whose UDF leaves the types of its files as they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "in").mkdir()

    def put(self, number: int, **columns: Any) -> None:
        path = self.folder / f"in/{number}.json"
        path.write_text(json.dumps({"id": number, **columns}))

    def run(self, refuse: Callable[[int], bool] = lambda _: False, **options: Any) -> Any:
        @resumable(on_error="mark_failed")
        def check(table: Any) -> Any:
            if refuse(table["id"][0].as_py()):
                raise RuntimeError("no")
            return table

        ds = resumable_read(
            ray.data.read_json,
            str(self.folder / "in"),
            checkpoint=self.folder / "c",
            on_pipeline_change="continue",
            override_num_blocks=2,
        )
        ds = ds.map_batches(check, batch_format="pyarrow")
        return resumable_write(ds, self.folder / "out", **options)

    def plain(self) -> list[dict[str, Any]]:
        rows = ray.data.read_json(str(self.folder / "in")).take_all()
        return sorted(rows, key=lambda row: row["id"])


def test_a_type_goes_with_the_source_that_had_it(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.put(0, n=0.5, c="text")
    job.put(1, n=1)
    job.put(2, n=2)
    assert job.run().sources_completed == 3
    assert types_of(tmp_path / "c") == [{"id": pa.int64(), "n": pa.float64(), "c": pa.string()}]
    # The odd one gets the types of the others, and one that would not go with what it had.
    job.put(0, n=2**60, c=7)
    assert job.run().sources_completed == 1
    whole = {"id": pa.int64(), "n": pa.int64(), "c": pa.int64()}
    assert types_of(tmp_path / "c") == [whole]
    expected = [{"c": None, **row} for row in job.plain()]
    assert rows_of(tmp_path / "c") == expected
    assert Checkpoint(tmp_path / "c").check().ok
    # Its earlier output stays if it fails. Files have one schema then, too.
    job.put(0, n=0.5, c=7)
    assert job.run().sources_completed == 1
    job.put(0, n=1, c=7, more=1)
    job.put(3, n=3)
    summary = job.run(lambda number: number == 0)
    assert (summary.sources_completed, summary.sources_failed) == (1, 1)
    tables = [pq.ParquetFile(path).read() for path in (tmp_path / "out").glob("*.parquet")]
    assert {str(table.schema.field("n").type) for table in tables} == {"double"}
    assert sum(table.num_rows for table in tables) == 4
    # Nothing is left of a type once all is forgotten.
    job.put(0, n="text")
    job.put(1, n="text")
    job.put(2, n="text")
    job.put(3, n="text")
    Checkpoint(tmp_path / "c").reset(state="all")
    assert job.run().sources_completed == 4
    assert types_of(tmp_path / "c") == [{"id": pa.int64(), "n": pa.string()}]
    assert rows_of(tmp_path / "c") == job.plain()


def test_files_of_an_earlier_layout_get_the_types_that_were_agreed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path)
    job.put(0, n=0, p="a")
    assert job.run(partition_cols=["p"]).sources_completed == 1
    job.put(1, n=0.5, p="b")
    with monkeypatch.context() as patch:
        # As if the driver had been killed before the files get one schema.
        patch.setattr("ray_resume.write.targets.retype_output", lambda *_: {})
        assert job.run(compression="zstd").sources_completed == 1
    job.put(2, n=2, p="c", more="x")
    assert job.run(format="feather").sources_completed == 1
    out = tmp_path / "out"
    (first,) = out.glob("p=a/*.parquet")
    (second,) = out.glob("*.parquet")
    (third,) = out.glob("*.feather")
    assert pq.ParquetFile(first).read().to_pylist() == [{"id": 0, "n": 0.0, "more": None}]
    assert pq.ParquetFile(second).read().to_pylist() == [
        {"id": 1, "n": 0.5, "p": "b", "more": None}
    ]
    assert pq.ParquetFile(second).metadata.row_group(0).column(0).compression == "ZSTD"
    assert pyarrow.feather.read_table(third).to_pylist() == [
        {"id": 2, "n": 2.0, "p": "c", "more": "x"}
    ]
    for schema in (pq.read_schema(first), pq.read_schema(second)):
        assert schema.field("n").type == pa.float64()
        assert schema.field("more").type == pa.string()
    assert Checkpoint(tmp_path / "c").check().ok
    # All is as it should be, so nothing is written again.
    before = sorted(out.rglob("*.*"))
    assert job.run(format="feather").sources_skipped == 3
    assert sorted(out.rglob("*.*")) == before


def test_one_damaged_file_keeps_no_other_from_its_types(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(tmp_path)
    job.put(0, n=0)
    job.put(1, n=1)
    assert job.run(file_per_source=True).sources_completed == 2
    damaged, other = sorted(
        (tmp_path / "out").glob("*.parquet"),
        key=lambda path: int(pq.read_table(path)["id"][0].as_py()),
    )
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    job.put(2, n=0.5)
    with caplog.at_level("WARNING", "ray_resume"):
        assert job.run(file_per_source=True).sources_completed == 1
    assert damaged.name in caplog.text
    assert not other.exists(), "it was rewritten"
    files = set((tmp_path / "out").glob("*.parquet")) - {damaged}
    assert {pq.read_schema(path).field("n").type for path in files} == {pa.float64()}
    # The next run tries again.
    damaged.write_bytes(whole)
    job.run(file_per_source=True)
    assert rows_of(tmp_path / "c") == [{"id": i, "n": n} for i, n in enumerate((0.0, 1.0, 0.5))]
    assert len(types_of(tmp_path / "c")) == 1
