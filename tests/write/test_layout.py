"""How rows become files: subfolders as plain Ray Data names them, formats, options, sizes."""

from __future__ import annotations

import datetime as dt
import decimal
import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset as pds
import pyarrow.parquet as pq
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from ray_resume import Checkpoint, ResumeError, resumable_read, resumable_write
from ray_resume.core.filenames import OutputName
from ray_resume.write.formats import checked_format
from ray_resume.write.partitions import checked_columns, partitions_of

NAN = float("nan")
DAY = dt.date(2026, 1, 2)
NOON = dt.datetime(2026, 1, 2, 12, 0, 1, 5)

# Four values of each type that can name folders, some of them alike.
KEYS: dict[str, pa.Array] = {
    "float": pa.array([NAN, -0.0, 0.0, NAN]),
    "large float": pa.array([1e20, 2.0, None, 0.1], pa.float32()),
    "bool": pa.array([True, False, None, True]),
    "byte": pa.array([-1, 1, None, 1], pa.int8()),
    "uint64": pa.array([2**64 - 1, 1, None, 1], pa.uint64()),
    "decimal": pa.array([decimal.Decimal("1.50"), None, decimal.Decimal("2.00"), None]),
    "text": pa.array(["a b", "", "x y/z=%é", None]),
    "large text": pa.array(["a", None, "b", "a"], pa.large_string()),
    "bytes": pa.array([b"\x01\xff", b"abc", None, b""]),
    "two bytes": pa.array([b"ab", b"cd", None, b"ab"], pa.binary(2)),
    "time": pa.array([NOON, None, dt.datetime(1969, 12, 31), NOON], pa.timestamp("us")),
    "zone": pa.array([NOON, None, NOON, NOON], pa.timestamp("ns", "Europe/Berlin")),
    "date": pa.array([DAY, None, DAY, dt.date(1, 1, 1)]),
    "date64": pa.array([DAY, None, DAY, DAY], pa.date64()),
    "clock": pa.array([dt.time(1, 2, 3)] * 3 + [None], pa.time64("us")),
    "duration": pa.array([dt.timedelta(1, 2)] * 3 + [None], pa.duration("s")),
    "null": pa.nulls(4),
    "dictionary": pa.array(["a b", "a b", None, "ü"]).dictionary_encode(),
    "numbers": pa.array([1, 1, None, 2]).dictionary_encode(),
}


def layout_of(root: Path, column: str = "id") -> dict[str, list[Any]]:
    """Return the values of ``column`` by subfolder, sorted."""
    found: dict[str, list[Any]] = {}
    for path in sorted(root.rglob("*.parquet")):
        values = pq.ParquetFile(path).read([column]).column(column).to_pylist()
        found.setdefault(str(path.parent.relative_to(root)), []).extend(values)
    return {folder: sorted(values) for folder, values in found.items()}


@pytest.mark.parametrize("name", KEYS)
def test_folders_are_called_as_arrow_calls_them(name: str, tmp_path: Path) -> None:
    table = pa.table({"id": range(4), name: KEYS[name], "k": ["p", "q", "p", "p"]})
    for number, columns in enumerate(([name], ["k", name], [name, "k"])):
        root = tmp_path / str(number)
        pds.write_dataset(
            table, root, partitioning=columns, partitioning_flavor="hive", format="parquet"
        )
        ours = {
            folder.removesuffix("/"): rows.column("id").to_pylist()
            for folder, rows, _ in partitions_of(table, columns)
        }
        assert ours == layout_of(root)


def test_types_that_arrow_does_not_partition_by_in_every_version() -> None:
    halves = np.array([1.5, np.nan, 1.5, -0.0], np.float16)
    for keys, folders in (
        (pa.array(halves), {"k=1.5/", "k=nan/", "k=-0/"}),
        (pa.array(["a", None, "b", "a"], pa.string_view()), {"k=a/", "k=b/", DEFAULT}),
    ):
        table = pa.table({"id": range(4), "k": keys})
        assert {folder for folder, _, _ in partitions_of(table, ["k"])} == folders


DEFAULT = "k=__HIVE_DEFAULT_PARTITION__/"


@given(
    st.lists(
        st.tuples(st.one_of(st.none(), st.sampled_from([NAN, -0.0, 0.0, 1.0])), st.integers(0, 3)),
        max_size=30,
    ),
    st.integers(1, 30),
)
def test_each_row_is_in_its_partition_in_order(rows: list[Any], length: int) -> None:
    whole = pa.table(
        {
            "id": pa.array(range(len(rows)), pa.int64()),
            "f": pa.array([f for f, _ in rows], pa.float64()),
            "n": pa.array([n for _, n in rows], pa.int64()),
        }
    )
    # In chunks, since a task gets its rows so.
    chunks = [whole.slice(start, length) for start in range(0, len(rows), length)]
    table = pa.concat_tables([whole.slice(0, 0), *chunks])
    expected: dict[tuple[str, int], list[int]] = {}
    for i, (f, n) in enumerate(rows):
        expected.setdefault((repr(f), n), []).append(i)
    parts = list(partitions_of(table, ["f", "n"]))
    found = [part.column("id").to_pylist() for _, part, _ in parts]
    assert sorted(found) == sorted(expected.values())
    assert [np.arange(len(rows))[which].tolist() for _, _, which in parts] == found
    assert len({folder for folder, _, _ in parts}) == len(parts)


def test_many_partition_columns_with_many_values() -> None:
    columns = {f"c{i}": np.arange(5000) * (i + 1) % 4999 for i in range(6)}
    table = pa.table({"id": range(5000), **columns})
    parts = [part.column("id").to_pylist() for _, part, _ in partitions_of(table, list(columns))]
    # Rows 0 and 4999 are alike.
    assert sorted(parts) == [[0, 4999], *([i] for i in range(1, 4999))]


@pytest.mark.parametrize(
    "keys",
    [
        pa.array([{"a": 1}]),
        pa.array([[1]]),
        pa.RunEndEncodedArray.from_arrays([1], ["a"]),
        pa.array([[1, 2]], pa.list_(pa.int64(), 2)),
    ],
)
def test_types_that_cannot_name_folders(keys: pa.Array) -> None:
    with pytest.raises(ResumeError, match=r"'k', and values of its type, .* cannot name folders"):
        list(partitions_of(pa.table({"id": [1], "k": keys}), ["k"]))


def test_partition_columns_that_are_refused() -> None:
    table = pa.table({"a": [1, 2], "b": ["x", "y"]})
    with pytest.raises(ResumeError, match=r"^partition_cols names every column"):
        list(partitions_of(table, ["a", "b"]))
    with pytest.raises(ResumeError, match="names 'c', and the rows have the columns a, b"):
        list(partitions_of(table, ["c"]))
    with pytest.raises(TypeError, match=r"\['ab'\], not 'ab'"):
        checked_columns("ab")
    with pytest.raises(TypeError, match="list of names"):
        checked_columns([1])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="twice"):
        checked_columns(["a", "a"])
    with pytest.raises(ValueError, match="cannot be part"):
        checked_columns(["a/b"])
    assert checked_columns(None) == ()


@pytest.mark.extended
@pytest.mark.usefixtures("cluster")
def test_a_job_has_the_folders_of_plain_ray_data(tmp_path: Path) -> None:
    keys = ["dictionary", "float", "bool", "time", "bytes"]
    (tmp_path / "in").mkdir()
    for number in range(2):
        table = pa.table({"id": range(4 * number, 4 * number + 4), **{k: KEYS[k] for k in keys}})
        pq.write_table(table, tmp_path / "in" / f"{number}.parquet")

    def ours(columns: list[str], **options: Any) -> Any:
        ds = resumable_read(ray.data.read_parquet, str(tmp_path / "in"), checkpoint=tmp_path / "c")
        out = tmp_path / "ours"
        return resumable_write(ds, out, partition_cols=columns, max_rows_per_file=1, **options)

    with pytest.raises(ResumeError, match=r"^partition_cols names every column"):
        ours(["id", *keys])
    ray.data.read_parquet(str(tmp_path / "in")).write_parquet(
        str(tmp_path / "plain"), partition_cols=keys
    )
    summary = ours(keys)
    assert layout_of(tmp_path / "ours") == layout_of(tmp_path / "plain")
    assert (summary.rows_written, summary.files) == (8, 8)
    assert {str(p) for p in (tmp_path / "ours").rglob("*.parquet")} == set(
        Checkpoint(tmp_path / "c").files()
    )


@pytest.mark.parametrize("given", ["json", "csv"])
@pytest.mark.parametrize("how", ["compression", "arrow_open_stream_args"])
def test_compressed_text_is_called_so_that_readers_see_it(
    given: str, how: str, tmp_path: Path
) -> None:
    value = "gzip" if how == "compression" else {"compression": "gzip", "buffer_size": 1024}
    written = checked_format(given, {how: value})
    assert written.suffix == f"{given}.gz"
    path = tmp_path / f"rows.{written.suffix}"
    with path.open("wb") as file:
        written.write_table(pa.table({"x": [1, 2]}), file)
        assert not file.closed
    assert len(gzip.decompress(path.read_bytes()).splitlines()) == (2 if given == "json" else 3)
    rows = pd.read_json(path, lines=True) if given == "json" else pd.read_csv(path)
    assert rows["x"].tolist() == [1, 2]
    assert OutputName.parse(f"{'c' * 8}-{'a' * 12}-{'0' * 16}-{'1' * 16}.{written.suffix}")


def test_options_of_plain_ray_data() -> None:
    def written(name: str, options: dict[str, Any]) -> bytes:
        buffer = io.BytesIO()
        checked_format(name, options).write_table(pa.table({"x": [1, 2]}), buffer)
        return buffer.getvalue()

    options: dict[str, Any]
    for options in (
        {"compression": "zstd"},
        {"arrow_parquet_args": {"compression": "zstd"}},
        {"arrow_parquet_args_fn": lambda: {"compression": "zstd"}, "compression": "gzip"},
        {"arrow_open_stream_args": {"compression": "zstd"}},
    ):
        metadata = pq.ParquetFile(io.BytesIO(written("parquet", options))).metadata
        assert metadata.row_group(0).column(0).compression == "ZSTD"
    header = pyarrow.csv.WriteOptions(include_header=False)
    for options in (
        {"include_header": False},
        {"write_options": header},
        {"arrow_csv_args_fn": lambda: {"write_options": header}},
    ):
        assert written("csv", options) == b"1\n2\n"
    assert written("json", {"pandas_json_args_fn": lambda: {"orient": "split", "lines": False}})
    assert written("orc", {"arrow_orc_args_fn": lambda: {"compression": "zlib"}})
    # What asks for nothing.
    nothing = dict.fromkeys(("min_rows_per_file", "filename_provider", "arrow_parquet_args_fn"))
    assert checked_format("parquet", {**nothing, "try_create_dir": True}).suffix == "parquet"


@pytest.mark.parametrize(
    ("options", "substitute"),
    [
        ({"min_rows_per_file": 10}, "target_file_bytes"),
        ({"num_rows_per_file": 10}, "target_file_bytes"),
        ({"min_bytes_per_file": 10}, "target_file_bytes"),
        ({"mode": "overwrite"}, "append=True"),
        ({"filename_provider": object()}, r"Checkpoint\(...\).files\(\)"),
        ({"partitioning_flavor": None}, "Hive"),
        ({"try_create_dir": False}, "leave this option out"),
        ({"arrow_open_stream_args": {"metadata": {}}}, "compression and buffer_size"),
    ],
)
def test_options_with_a_substitute(options: dict[str, Any], substitute: str) -> None:
    with pytest.raises(TypeError, match=substitute) as caught:
        checked_format("parquet", options)
    assert next(iter(options)) in str(caught.value)
    assert "__cinit__" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("parquet", {"max_rows_per_file": 0}),
        ("parquet", {"codec": "zstd"}),
        ("parquet", {"compression": "no such"}),
        ("csv", {"compression": "no such"}),
        ("csv", {"include_header": False, "write_options": pyarrow.csv.WriteOptions()}),
        ("json", {"compression": "no such"}),
        ("orc", {"arrow_open_stream_args": {"compression": "gzip"}}),
        ("xml", {}),
    ],
)
def test_options_that_are_wrong(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"resumable_write got options|must be|ORC files"):
        checked_format(name, options)
