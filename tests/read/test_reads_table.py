"""The table of readers in `examples/what_works.md`: each row, armed, beside plain Ray Data.

Most are executed in this process (`local_execution`): what Ray plans, with a real ledger, in
milliseconds. Each reader as a job on the cluster is an extended test.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import ray
from conftest import ids_in, write_source
from lake_tables import Delta, Iceberg, Lance, Table
from local_execution import execute, execute_armed, sources_of
from own_datasource import Pages
from page_tables import rows_of
from ray.data import Dataset
from ray.data.block import BlockAccessor
from reader_files import READS, Files, table

from ray_resume import (
    Checkpoint,
    NonResumableError,
    resumable,
    resumable_read,
    resumable_write,
)
from ray_resume.read import granularity

pytestmark = pytest.mark.usefixtures("cluster")

ROWS = rows_of("Reads")
# A gigabyte for one reader: `pip install tensorflow-cpu`, then `pytest -m slow -k tfrecords`.
SLOW = {"read_tfrecords"}


def reader_of(name: str) -> Any:
    if not hasattr(ray.data, name):
        pytest.skip(f"this Ray has no {name}")
    return getattr(ray.data, name)


def content(tables: list[pa.Table]) -> Counter[str]:
    """Count the rows, each with its columns in their order, and the types of these."""
    found: Counter[str] = Counter()
    for one in tables:
        columns = [(field.name, str(field.type)) for field in one.schema]
        rows: Any = BlockAccessor.for_block(one).iter_rows(public_row_format=False)
        for row in rows:
            found[repr((columns, [np.asarray(value).tolist() for value in row.values()]))] += 1
    return found


def check(ours: Dataset, plain: Dataset) -> None:
    """Compare an armed read with a plain one; unarmed, it reads the same."""
    expected = content(execute(plain))
    assert expected
    assert content(execute_armed(ours)) == expected
    assert content(execute(ours)) == expected


def file_reader(name: str, folder: Path) -> None:
    reader = reader_of(name)
    for number, files in enumerate(READS[name]):
        source = folder / f"in{number}"
        files.fill(source, range(3))
        (source / "_SUCCESS").touch()
        (source / ".hidden").touch()
        checkpoint = folder / f"ckpt{number}"
        read = partial(resumable_read, reader, str(source), checkpoint=checkpoint, **files.options)
        before = sources_of(read())
        assert len(before) == 3
        # One path, since of several Ray's own reader may resolve two at once, and fail.
        check(read(), reader(str(source), **files.options))
        files.write(source / f"9{files.ending}", 9)
        after = sources_of(read())
        assert len(after) == 4
        assert before.items() <= after.items(), "a later run would not skip it"


def row_groups(folder: Path) -> None:
    (folder / "in" / "part=x").mkdir(parents=True)
    path = folder / "in" / "part=x" / "a.parquet"
    pq.write_table(pa.table({"id": range(100)}), path, row_group_size=30)
    options: dict[str, Any] = {"include_paths": True}
    ours = resumable_read(
        *(ray.data.read_parquet, str(folder / "in")),
        checkpoint=folder / "ckpt",
        granularity="row_group",
        **options,
    )
    assert {name.rpartition("/")[2] for name in sources_of(ours)} == {
        f"a.parquet#rg{number}" for number in range(4)
    }
    check(ours, ray.data.read_parquet(str(folder / "in"), **options))


def row_ranges(folder: Path) -> None:
    """As a job, in which they come to be; `test_row_ranges` has other readers."""
    write_lines(folder / "in", "csv")
    options: dict[str, Any] = {"include_paths": True}
    ours = resumable_read(
        *(ray.data.read_csv, str(folder / "in")),
        checkpoint=folder / "ckpt",
        granularity="rows",
        split_rows=3,
        **options,
    )
    resumable_write(ours, folder / "out")
    tables = [pq.read_table(file) for file in Checkpoint(folder / "ckpt").files()]
    plain = execute(ray.data.read_csv(str(folder / "in"), **options))
    assert content(tables) == content(plain)
    ids = {source.source_id for source in Checkpoint(folder / "ckpt").sources()}
    assert f"{folder}/in/1.csv#rows=0-3" in ids


def write_lines(folder: Path, ending: str) -> None:
    folder.mkdir()
    for number in range(2):
        path = folder / f"{number}.{ending}"
        if ending == "csv":
            pyarrow.csv.write_csv(table(number), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in table(number).to_pylist()))


def splits(name: str, ending: str, folder: Path) -> None:
    reader = reader_of(name)
    write_lines(folder / "in", ending)
    options: dict[str, Any] = {"include_paths": True, "file_extensions": [ending]}
    ours = resumable_read(
        *(reader, str(folder / "in")),
        checkpoint=folder / "ckpt",
        granularity="split",
        split_bytes=20,
        **options,
    )
    assert f"{folder}/in/1.{ending}#bytes=20-40" in sources_of(ours)
    check(ours, reader(str(folder / "in"), **options))


def auto(folder: Path) -> None:
    for ending, reader, part in (
        ("txt", ray.data.read_text, "0.txt#bytes=0-30"),
        ("jsonl", ray.data.read_json, "0.jsonl#bytes=30-60"),
        ("parquet", ray.data.read_parquet, "0.parquet#rg1"),
        ("csv", ray.data.read_csv, "0.csv"),
    ):
        within = folder / ending
        write_lines(within, ending)
        (within / f"1.{ending}").write_bytes((within / f"0.{ending}").read_bytes()[:40])
        if ending == "parquet":
            pq.write_table(table(0), within / "0.parquet", row_group_size=2)
            (within / "1.parquet").unlink()
        read: Any = reader
        options: dict[str, Any] = {"file_extensions": [ending]}
        ours = resumable_read(
            *(read, str(within)),
            checkpoint=folder / f"ckpt-{ending}",
            granularity="auto",
            split_bytes=30,
            **options,
        )
        names = {name.rpartition("/")[2] for name in sources_of(ours)}
        assert part in names
        assert f"1.{ending}" in names or ending == "parquet"
        if ending != "jsonl":
            check(ours, read(str(within), **options))


@resumable
def few_names(batch: Any) -> dict[str, Any]:
    return {"id": batch["id"], "name": [f"n{i % 2}" for i in batch["id"]]}


@resumable
def samples(batch: Any) -> dict[str, Any]:
    return {"__key__": [f"s{i}" for i in batch["id"]], "txt": [f"text {i}" for i in batch["id"]]}


@resumable
def pictures(batch: Any) -> dict[str, Any]:
    return {"image": np.stack([np.full((2, 3, 3), i, np.uint8) for i in batch["id"]])}


WRITTEN_AS: dict[str, dict[str, Any]] = {
    "read_parquet": {"partition_cols": ["name"]},
    "read_json": {"format": "json"},
    "read_csv": {"format": "csv", "compression": "gzip"},
    "read_orc": {"format": "orc"},
    "read_webdataset": {"format": "webdataset"},
    "read_numpy": {"format": "numpy", "column": "id"},
    "read_images": {"format": "images", "column": "image", "file_format": "bmp"},
}


def upstream(name: str, folder: Path) -> None:
    reader = reader_of(name)
    write_source(folder / "in", files=3, rows=10)
    ds = resumable_read(ray.data.read_parquet, str(folder / "in"), checkpoint=folder / "1")
    udf = {"read_webdataset": samples, "read_images": pictures}.get(name, few_names)
    resumable_write(ds.map_batches(udf), folder / "mid", **WRITTEN_AS[name])
    # What does not read such files says which reader does.
    other: Any = ray.data.read_csv if name == "read_json" else ray.data.read_json
    with pytest.raises(NonResumableError, match=rf"Pass ray\.data\.{name}"):
        resumable_read(other, Checkpoint(folder / "1"), checkpoint=folder / "2")
    ds = resumable_read(reader, Checkpoint(folder / "1"), checkpoint=folder / "2")
    assert set(sources_of(ds)) == {f"{folder}/in/{number:05d}.parquet" for number in range(3)}
    plain = reader(Checkpoint(folder / "1").files())
    assert sorted(map(str, ds.take_all())) == sorted(map(str, plain.take_all()))
    check(ds, plain)


def keys(folder: Path) -> None:
    def load(key: int) -> pa.Table:
        return table(key)

    ds = resumable_read(load, keys=[3, 4], checkpoint=folder / "ckpt", override_num_blocks=1)
    check(ds, ray.data.from_arrow([table(3), table(4)]))
    assert set(sources_of(ds)) == {"3", "4"}


def own_datasource(folder: Path) -> None:
    ds = resumable_read(Pages(named=True), checkpoint=folder / "ckpt")
    check(ds, ray.data.read_datasource(Pages(named=True)))
    assert set(sources_of(ds)) == {f"page-{10 * page}" for page in range(5)}


def lake(kind: type[Table], folder: Path) -> None:
    made: Table = kind(folder)
    made.append(range(10))
    made.append(range(10, 20))
    made.delete(13)
    ours = made.read(resumable_read, checkpoint=folder / "ckpt")
    assert len(sources_of(ours)) == 2
    check(ours, made.read(lambda reader, *args, **kwargs: reader(*args, **kwargs)))


def refused(name: str, folder: Path) -> None:
    names = [name] if "*" not in name else dir(ray.data)
    matching = [one for one in names if one.startswith(name.removesuffix("*"))]
    assert matching
    for one in matching:
        with pytest.raises(NonResumableError, match=rf"^{one} .*keys="):
            resumable_read(reader_of(one), checkpoint=folder / "ckpt")
    assert not (folder / "ckpt").exists()


Check = Callable[[Path], None]
TABLES: dict[str, type[Table]] = {"iceberg": Iceberg, "delta": Delta, "lance": Lance}
LINES = {"read_json": "jsonl", "read_text": "txt", "read_csv": "csv"}
CHECKS: dict[str, Check] = {
    **{name: partial(file_reader, name) for name in READS},
    'read_parquet with granularity="row_group"': row_groups,
    **{
        f'{name} with granularity="split"': partial(splits, name, ending)
        for name, ending in LINES.items()
    },
    'any reader of files with granularity="rows"': row_ranges,
    'any reader of files with granularity="auto"': auto,
    **{f'{name} with Checkpoint("stage1/ckpt")': partial(upstream, name) for name in WRITTEN_AS},
    "any load(key) with keys=[...]": keys,
    "a Datasource of your own": own_datasource,
    **{f"read_{name}": partial(lake, kind) for name, kind in TABLES.items()},
    **{row.name: partial(refused, row.name) for row in ROWS if row.text.startswith("refused")},
}
# What needs a pipeline, or a while.
EXTENDED = {f'{name} with Checkpoint("stage1/ckpt")' for name in WRITTEN_AS} - {
    'read_json with Checkpoint("stage1/ckpt")'
}
EXTENDED |= {'any reader of files with granularity="rows"'}


def marks(name: str) -> list[pytest.MarkDecorator]:
    if name in SLOW:
        return [pytest.mark.slow]
    return [pytest.mark.extended, pytest.mark.long] if name in EXTENDED else []


@pytest.mark.parametrize("name", [pytest.param(row.name, marks=marks(row.name)) for row in ROWS])
def test_a_row_of_the_table(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(granularity, "AUTO_BYTES", 50)
    assert name in CHECKS, "it is in the table, and has no test"
    CHECKS[name](tmp_path)


def test_what_is_tested_is_in_the_table() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names))
    assert set(names) == set(CHECKS)


@resumable
def digest_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row as one string, whatever is in it."""
    spelt = repr({name: np.asarray(value).tolist() for name, value in sorted(row.items())})
    return {"digest": hashlib.sha256(spelt.encode()).hexdigest()}


@pytest.mark.extended
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in READS])
def test_a_reader_as_a_job(name: str, tmp_path: Path) -> None:
    reader = reader_of(name)
    files: Files = READS[name][-1]
    files.fill(tmp_path / "in", range(3))

    def job() -> Any:
        read = partial(resumable_read, reader, str(tmp_path / "in"), checkpoint=tmp_path / "ckpt")
        return resumable_write(read(**files.options).map(digest_of), tmp_path / "out")

    assert job().sources_completed == 3
    plain = reader(str(tmp_path / "in"), **files.options)
    expected = [digest_of(row)["digest"] for row in plain.take_all()]
    assert ids_in(tmp_path / "out", "digest") == sorted(expected)
    files.write(tmp_path / "in" / f"9{files.ending}", 9)
    second = job()
    assert (second.sources_skipped, second.sources_completed) == (3, 1)
