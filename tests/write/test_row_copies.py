"""Rows of output files copied into one: in order, read once, and text byte by byte."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.orc
import pyarrow.parquet as pq
import pytest
from buckets import S3
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem
from written_files import (
    HAS_EOL,
    TEXT,
    TYPED,
    Written,
    decompressed,
    parsed_ids,
    random_parts,
    read,
    rows_of_text,
    table_ids,
    table_of,
    written,
)

from ray_resume.core.parts import FilePart
from ray_resume.errors import ResumeError
from ray_resume.write import line_files
from ray_resume.write.folder import Folder, folder_at
from ray_resume.write.formats import checked_format
from ray_resume.write.row_copies import copy_rows


@pytest.mark.parametrize("case", TYPED, ids=str)
def test_random_rows_of_typed_files(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    chosen = random.Random(str(case))
    for seed in range(12):
        files = written(tmp_path / str(seed), case, [chosen.randint(1, 40) for _ in range(3)], seed)
        parts = random_parts(files, chosen)
        given = chosen.choice([files.format, None])
        copy_rows(files.folder, parts, files.new, format=given)
        stored = {name: read(case[0], files.content(name)) for name in files.names}
        expected = pa.concat_tables([stored[p.file].slice(p.first_row, p.rows) for p in parts])
        made = read(case[0], files.content(files.new))
        assert made.schema.equals(expected.schema, check_metadata=True)
        assert repr(made.to_pylist()) == repr(expected.to_pylist())
        assert made.equals(expected)


@pytest.mark.parametrize("chunk", [17, pytest.param(16 << 20, marks=pytest.mark.extended)])
@pytest.mark.parametrize("case", TEXT, ids=str)
def test_random_rows_of_text(
    case: tuple[str, dict[str, Any]], chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_files, "_CHUNK_BYTES", chunk)
    chosen = random.Random(f"{case}{chunk}")
    for seed in range(6):
        files = written(tmp_path / str(seed), case, [chosen.randint(1, 40) for _ in range(3)], seed)
        suffix = files.format.suffix
        parts = random_parts(files, chosen)
        given = chosen.choice([files.format, None])
        copy_rows(files.folder, parts, files.new, format=given)
        rows = {}
        header = b""
        for name in files.names:
            rows[name] = rows_of_text(case[0], decompressed(suffix, files.content(name)))
            if case[0] == "csv" and case[1].get("include_header", True):
                header = rows[name].pop(0)
        expected = [row for p in parts for row in rows[p.file][p.first_row : p.first_row + p.rows]]
        made = decompressed(suffix, files.content(files.new))
        assert made == header + b"".join(expected)
        # The rows are the rows: a reader finds the ids of the parts, in their order.
        ids = [table_ids(files, part) for part in parts]
        assert parsed_ids(case, made, bool(header)) == [one for some in ids for one in some]


@pytest.mark.extended
@pytest.mark.parametrize("case", [*TYPED, *TEXT], ids=str)
def test_a_whole_file(case: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    files = written(tmp_path, case, [57])
    for given in (files.format, None):
        copy_rows(files.folder, [files.part(0, 0, 57)], files.new, format=given)
        old, new = files.content(files.names[0]), files.content(files.new)
        if case in TYPED:
            assert read(case[0], new).equals(read(case[0], old), check_metadata=True)
        else:
            suffix = files.format.suffix
            assert decompressed(suffix, new) == decompressed(suffix, old)
            assert ("." in suffix) or new == old


def test_more_rows_than_a_chunk_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_files, "_CHUNK_BYTES", 1 << 16)
    for name in ("json", "csv"):
        table = pa.table({"x": range(30_000), "s": ['a"\n'] * 29_999 + ["long" * 100_000]})
        files = Written(folder_at(tmp_path / name), checked_format(name, {}), [table])
        parts = [files.part(0, first, first + 10) for first in range(29_990, 0, -3000)]
        copy_rows(files.folder, parts, files.new)
        rows = rows_of_text(name, files.content(files.names[0]))[name == "csv" :]
        expected = [row for p in parts for row in rows[p.first_row : p.first_row + p.rows]]
        assert rows_of_text(name, files.content(files.new))[name == "csv" :] == expected


def test_row_groups_without_wanted_rows_are_not_read(tmp_path: Path) -> None:
    files = written(tmp_path, ("parquet", {"row_group_size": 10, "compression": "none"}), [40])
    path = tmp_path / files.names[0]
    group = pq.ParquetFile(path).metadata.row_group(2)
    start = min(group.column(i).data_page_offset for i in range(group.num_columns))
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * 40)
    parts = [files.part(0, 30, 40), files.part(0, 5, 20)]
    copy_rows(files.folder, parts, files.new)
    made = read("parquet", files.content(files.new))
    assert made["id"].to_pylist() == [*range(30, 40), *range(5, 20)]
    with pytest.raises(ResumeError, match=r"old0\.parquet cannot be copied"):
        copy_rows(files.folder, [files.part(0, 15, 25)], files.new)


def test_options_of_the_old_file(tmp_path: Path) -> None:
    def metadata(options: dict[str, Any], rows: int = 40) -> Any:
        files = written(tmp_path, ("parquet", options), [rows, 20])
        parts = [files.part(0, 3, rows), files.part(1, 0, 20)]
        copy_rows(files.folder, parts, files.new)
        return pq.ParquetFile(tmp_path / files.new).metadata

    codecs = {"id": "zstd", "text": "none", "x": "gzip", "nested.list.element": "lz4"}
    found = metadata({"compression": codecs})
    assert found.num_row_groups == 1
    columns = [found.row_group(0).column(i) for i in range(4)]
    assert [c.compression for c in columns] == ["ZSTD", "UNCOMPRESSED", "GZIP", "LZ4"]
    found = metadata({"row_group_size": 15})
    assert [found.row_group(i).num_rows for i in range(found.num_row_groups)] == [15, 15, 15, 12]
    assert b"ARROW:schema" not in (metadata({"store_schema": False}).metadata or {})
    for codec in ("zlib", "uncompressed", "zstd"):
        files = written(tmp_path, ("orc", {"compression": codec}), [20])
        copy_rows(files.folder, [files.part(0, 3, 9)], files.new)
        assert pa.orc.ORCFile(str(tmp_path / files.new)).compression == codec.upper()
    sizes = {}
    for codec in ("uncompressed", "lz4", "zstd"):
        table = pa.table({"x": ["a" * 1000] * 300})
        files = Written(
            folder_at(tmp_path), checked_format("feather", {"compression": codec}), [table]
        )
        copy_rows(files.folder, [files.part(0, 0, 300)], files.new)
        sizes[codec] = len(files.content(files.new))
        assert sizes[codec] == len(files.content(files.names[0]))
    assert len(set(sizes.values())) == 3


def test_options_that_are_given(tmp_path: Path) -> None:
    options = {"row_group_size": 15, "compression": "zstd", "sorting_columns": sorting()}
    files = written(tmp_path, ("parquet", {}), [40, 20])
    parts = [files.part(1, 0, 20), files.part(0, 3, 40)]
    copy_rows(files.folder, parts, files.new, format=checked_format("parquet", options))
    found = pq.ParquetFile(tmp_path / files.new).metadata
    assert [found.row_group(i).num_rows for i in range(found.num_row_groups)] == [15, 15, 15, 12]
    assert found.row_group(0).column(0).compression == "ZSTD"
    # The rows of files that are sorted are not, one after the other.
    assert not found.row_group(0).sorting_columns
    # Options for other files say nothing about these.
    copy_rows(files.folder, parts, files.new, format=checked_format("csv", {}))
    assert pq.ParquetFile(tmp_path / files.new).metadata.num_rows == 57


def sorting() -> list[Any]:
    return [pq.SortingColumn(0)]


def test_a_header_is_no_row(tmp_path: Path) -> None:
    files = written(tmp_path, ("csv", {}), [5])
    path = tmp_path / files.names[0]
    rows = rows_of_text("csv", path.read_bytes())
    path.write_bytes(b"".join(rows[:-1]))
    # Without its last row, it has as many as a file without a header.
    with pytest.raises(ResumeError, match="has 4 rows, and 5 were written"):
        copy_rows(files.folder, [files.part(0, 0, 2)], files.new, format=files.format)
    headless = checked_format("csv", {"include_header": False})
    path.write_bytes(b"".join(rows))
    with pytest.raises(ResumeError, match="has 6 rows, and 5 were written"):
        copy_rows(files.folder, [files.part(0, 0, 2)], files.new, format=headless)


@pytest.mark.skipif(not HAS_EOL, reason="this pyarrow knows one end of lines")
def test_rows_that_end_otherwise(tmp_path: Path) -> None:
    files = written(tmp_path, ("csv", {"eol": "\r"}), [5])
    with pytest.raises(ResumeError, match="eol"):
        copy_rows(files.folder, [files.part(0, 0, 1)], files.new)


@pytest.mark.parametrize("case", [("parquet", {"row_group_size": 5}), ("json", {}), ("csv", {})])
def test_each_file_is_opened_once_and_read_once(
    case: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    class Handler(FSSpecHandler):  # type: ignore[misc]
        opened: list[str] = []  # noqa: RUF012
        most = 0

        def open_input_file(self, path: str) -> Any:
            self.opened.append(path)
            descriptors = [str(one.resolve()) for one in Path("/proc/self/fd").iterdir()]
            self.most = max(self.most, sum(str(tmp_path) in one for one in descriptors))
            return super().open_input_file(path)

    local = written(tmp_path, case, [10] * 40)
    handler = Handler(LocalFileSystem())
    folder = Folder(PyFileSystem(handler), str(tmp_path), str(tmp_path))
    firsts = [*range(6, 10), *range(4), 4]
    parts = [local.part(file, first, first + 1) for first in firsts for file in range(40)]
    copy_rows(folder, parts, local.new)
    assert sorted(handler.opened) == sorted(f"{tmp_path}/{name}" for name in local.names)
    assert handler.most <= 17
    expected = [one for part in parts for one in table_ids(local, part)]
    content = local.content(local.new)
    if case[0] == "parquet":
        assert read("parquet", content)["id"].to_pylist() == expected
    else:
        assert parsed_ids(case, content, case[0] == "csv") == expected


@pytest.mark.extended
def test_few_rows_of_many_do_not_keep_the_others_in_memory(tmp_path: Path) -> None:
    # 64 row groups of 8 MB, of which some rows are wanted, in three pieces or in one.
    rows = 1 << 20
    table = pa.table({"x": np.arange(rows), "y": np.arange(rows)})
    with pq.ParquetWriter(tmp_path / "old.parquet", table.schema, compression="none") as file:
        for _ in range(16):
            file.write_table(table, row_group_size=rows)
    for wanted in ((5,), (5, 90, 1000)):
        parts = [
            FilePart("old.parquet", group * rows + row, 2, 16 * rows)
            for group in range(16)
            for row in wanted
        ]
        pa.default_memory_pool().release_unused()
        before, peak = pa.total_allocated_bytes(), [0]
        done = threading.Event()

        def watch(done: threading.Event = done, peak: list[int] = peak) -> None:
            while not done.wait(0.002):
                peak[0] = max(peak[0], pa.total_allocated_bytes())

        thread = threading.Thread(target=watch)
        thread.start()
        copy_rows(folder_at(tmp_path), parts, "new.parquet")
        done.set()
        thread.join()
        made = pq.read_table(tmp_path / "new.parquet")
        assert made["x"].to_pylist() == [
            row + i for _ in range(16) for row in wanted for i in (0, 1)
        ]
        assert peak[0] - before < 6 * table.nbytes


@pytest.mark.extended
@pytest.mark.parametrize("name", ["parquet", "csv", "json", "orc", "feather"])
def test_object_storage(name: str, s3: S3) -> None:
    folder = Folder(s3.filesystem, s3.key(f"copies-{name}"), "s3://bucket/copies")
    options = {"compression": "gzip"} if name in ("csv", "json") else {}
    tables = [table_of(rows, rows, version_1=True) for rows in (30, 20)]
    files = Written(folder, checked_format(name, options), tables)
    parts = [files.part(1, 3, 9), files.part(0, 0, 30)]
    copy_rows(folder, parts, files.new)
    assert files.new in s3.names(f"copies-{name}")
    made = files.content(files.new)
    if name in ("csv", "json"):
        text = decompressed(files.format.suffix, made)
        ids = parsed_ids((name, {}), text, name == "csv")
    else:
        ids = read(name, made)["id"].to_pylist()
    assert ids == [one for part in parts for one in table_ids(files, part)]
    with pytest.raises(ResumeError, match="it is missing"):
        copy_rows(folder, [parts[0]._replace(file="gone." + files.format.suffix)], files.new)
