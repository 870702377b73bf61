"""Rows of output files copied into one: in order, with their types, and text byte by byte."""

from __future__ import annotations

import bz2
import csv
import decimal
import gzip
import io
import itertools
import json
import lzma
import random
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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

from ray_resume.core.parts import FilePart
from ray_resume.errors import ResumeError
from ray_resume.files import atomic_put
from ray_resume.write import line_files
from ray_resume.write.folder import Folder, folder_at
from ray_resume.write.formats import FileFormat, checked_format
from ray_resume.write.row_copies import IncompatibleFilesError, copy_rows

STREAM: dict[str, Callable[[str], dict[str, Any]]] = {
    "arrow": lambda codec: {"arrow_open_stream_args": {"compression": codec}},
    "pandas": lambda codec: {"compression": codec},
}

# Each format with each compression that it can be written with.
TYPED = [
    *(
        ("parquet", {"compression": codec})
        for codec in ("none", "snappy", "gzip", "brotli", "lz4", "zstd")
    ),
    ("parquet", {"row_group_size": 7}),
    *(
        ("orc", {"compression": codec})
        for codec in ("uncompressed", "zlib", "snappy", "lz4", "zstd")
    ),
    *(("feather", {"compression": codec}) for codec in ("uncompressed", "lz4", "zstd")),
    ("feather", {"chunksize": 5}),
    ("feather", {"version": 1}),
]
# Which pyarrow 17 does not know.
HAS_EOL = hasattr(pyarrow.csv.WriteOptions(), "eol")
TEXT = [
    ("csv", {}),
    ("csv", {"include_header": False}),
    *([("csv", {"eol": "\r\n", "delimiter": ";"})] if HAS_EOL else []),
    ("json", {}),
    ("json", {"force_ascii": False}),
    *(
        (name, STREAM["arrow"](codec))
        for name in ("csv", "json")
        for codec in ("gzip", "bz2", "brotli", "lz4", "zstd")
    ),
    *(("json", STREAM["pandas"](codec)) for codec in ("gzip", "bz2", "xz", "zip", "tar")),
]
IDS = [f"{name}-{options}" for name, options in (*TYPED, *TEXT)]

# Values that are hard to cut: quotes, ends of lines of all kinds, escapes, nothing at all.
WORDS = [
    *(
        "",
        '"',
        '""',
        "\n",
        "\r\n",
        "a\nb",
        'say "x\n"',
        "\u2028 \u2029\x85\x0b\x0c\x1c",
        "ü\r",
        "\\n",
    ),
    *("é" * 9, "{}\n{", "}", "a,b;c", None, "\x00", "😀", "id"),
]


def table_of(rows: int, seed: int, *, version_1: bool = False) -> pa.Table:
    chosen = random.Random(seed)
    columns = {
        "id": pa.array([seed * 1000 + i for i in range(rows)], pa.int64()),
        "text": pa.array(chosen.choices(WORDS, k=rows), pa.string()),
        "x": pa.array([chosen.choice([None, 0.1, 1e300, -0.0]) for _ in range(rows)], pa.float64()),
    }
    if not version_1:
        lists = [[i] * (i % 3) or None for i in range(rows)]
        columns["nested"] = pa.array(lists, pa.list_(pa.int64()))
    return pa.table(columns)


def format_of(name: str, options: dict[str, Any]) -> FileFormat:
    checked = checked_format(name, options)
    if options.get("version") == 1:
        return FileFormat(name, options)
    return checked


@dataclass
class Written:
    """Files with the rows of tables, and what reads them by other means than ours."""

    folder: Folder
    format: FileFormat
    tables: list[pa.Table]

    def __post_init__(self) -> None:
        for name, table in zip(self.names, self.tables, strict=True):
            content = io.BytesIO()
            self.format.write_table(table, content)
            self.store(name, content.getvalue())

    def store(self, name: str, content: bytes) -> None:
        if self.folder.is_local:
            # Faster than what is durable.
            path = Path(self.folder.path, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        else:
            atomic_put(self.folder.filesystem, f"{self.folder.path}/{name}", content)

    @property
    def names(self) -> list[str]:
        return [f"k=1.5/old{i}.{self.format.suffix}" for i in range(len(self.tables))]

    @property
    def new(self) -> str:
        return f"k=1.5/new.{self.format.suffix}"

    def part(self, file: int, first: int, stop: int) -> FilePart:
        return FilePart(self.names[file], first, stop - first, self.tables[file].num_rows)

    def content(self, name: str) -> bytes:
        with self.folder.filesystem.open_input_file(f"{self.folder.path}/{name}") as file:
            return bytes(file.read())


def written(
    root: Path, case: tuple[str, dict[str, Any]], rows: Sequence[int], seed: int = 0
) -> Written:
    name, options = case
    tables = [
        table_of(count, seed + i, version_1=options.get("version") == 1)
        for i, count in enumerate(rows)
    ]
    if name == "csv":
        tables = [table.drop_columns(["nested"]) for table in tables]
    return Written(folder_at(root), format_of(name, options), tables)


def read(name: str, data: bytes) -> pa.Table:
    if name == "parquet":
        return pq.ParquetFile(io.BytesIO(data)).read()
    if name == "orc":
        return pa.orc.ORCFile(io.BytesIO(data)).read()
    return pa.feather.read_table(io.BytesIO(data))


def decompressed(suffix: str, data: bytes) -> bytes:
    ending = suffix.partition(".")[2]
    if ending == "zip":
        archive = zipfile.ZipFile(io.BytesIO(data))
        (member,) = archive.namelist()
        return archive.read(member)
    if ending == "tar":
        tar = tarfile.open(fileobj=io.BytesIO(data))  # noqa: SIM115
        (entry,) = tar.getmembers()
        file = tar.extractfile(entry)
        assert file is not None
        return file.read()
    codecs: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        "gz": gzip.decompress,
        "bz2": bz2.decompress,
        "xz": lzma.decompress,
    }
    if ending in codecs:
        return codecs[ending](data)
    codec = {"br": "brotli", "lz4": "lz4", "zst": "zstd"}[ending]
    return bytes(pa.CompressedInputStream(pa.BufferReader(data), codec).read())


def rows_of_text(name: str, text: bytes) -> list[bytes]:
    """Cut text into rows, character by character."""
    rows, row, quoted = [], bytearray(), False
    for character in text:
        row.append(character)
        quoted ^= name == "csv" and character == ord('"')
        if character == ord("\n") and not quoted:
            rows.append(bytes(row))
            row.clear()
    assert not row
    return rows


def random_parts(files: Written, chosen: random.Random) -> list[FilePart]:
    """Choose rows that do not overlap, in any order, now and then next to each other."""
    parts = []
    for file, table in enumerate(files.tables):
        cuts = sorted(chosen.sample(range(table.num_rows + 1), k=min(6, table.num_rows + 1)))
        parts += [files.part(file, a, b) for a, b in itertools.pairwise(cuts)]
    chosen.shuffle(parts)
    if chosen.random() < 0.5:
        parts.sort()
    return parts[: chosen.randint(1, len(parts))]


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


def table_ids(files: Written, part: FilePart) -> list[int]:
    table = files.tables[files.names.index(part.file)]
    ids: list[int] = table["id"].slice(part.first_row, part.rows).to_pylist()
    return ids


def parsed_ids(case: tuple[str, dict[str, Any]], text: bytes, header: bool) -> list[int]:
    if case[0] == "json":
        return [json.loads(line)["id"] for line in text.split(b"\n")[:-1]]
    lines = io.StringIO(text.decode(), newline="")
    rows = list(csv.reader(lines, delimiter=case[1].get("delimiter", ",")))
    return [int(row[0]) for row in rows[header:]]


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


# Columns of Parquet and Feather files whose types a copy could lose.
TYPES: dict[str, pa.Array] = {
    "dictionary": pa.array(["a", None, "b", "a"] * 25).dictionary_encode(),
    "ordered": pa.DictionaryArray.from_arrays(
        pa.array([0, 1, 0, None] * 25, pa.int8()), ["a", "b"], ordered=True
    ),
    "decimal": pa.array([decimal.Decimal("1.50"), None] * 50, pa.decimal128(30, 4)),
    "decimal256": pa.array([decimal.Decimal("1.50"), None] * 50, pa.decimal256(60, 4)),
    "zone": pa.array(range(100), pa.timestamp("us", "Europe/Berlin")),
    "naive": pa.array(range(100), pa.timestamp("ns")),
    "seconds": pa.array([1000 * i for i in range(100)], pa.timestamp("s")),
    "date": pa.array(range(100), pa.date32()),
    "time": pa.array(range(100), pa.time64("ns")),
    "duration": pa.array(range(100), pa.duration("ms")),
    "uint8": pa.array(range(100), pa.uint8()),
    "uint64": pa.array([2**64 - 1] * 100, pa.uint64()),
    "half": pa.array(np.arange(100, dtype=np.float16)),
    "large": pa.array(["a", None] * 50, pa.large_string()),
    "view": pa.array(["a", "long enough to be elsewhere"] * 50, pa.string_view()),
    "fixed": pa.array([b"ab"] * 100, pa.binary(2)),
    "null": pa.nulls(100),
    "struct": pa.array([{"a": 1, "b": [{"c": "x"}]}, None] * 50),
    "list": pa.array([[1, 2], None, [], [None]] * 25, pa.large_list(pa.int16())),
    "fixed list": pa.array([[1.0, 2.0]] * 100, pa.list_(pa.float32(), 2)),
    "map": pa.array([[("k", 1)], []] * 50, pa.map_(pa.string(), pa.int32())),
    "in struct": pa.StructArray.from_arrays(
        [pa.array(["a", "b"] * 50).dictionary_encode()], names=["d"]
    ),
}


def typed_table(names: Sequence[str], start: int = 0) -> pa.Table:
    fields = [
        pa.field(name, TYPES[name].type, nullable=name != "date", metadata={"of": name})
        for name in names
    ]
    schema = pa.schema(fields, metadata={"who": "me", "": ""})
    return pa.table([TYPES[name] for name in names], schema).slice(start)


@pytest.mark.parametrize("name", ["parquet", "feather"])
def test_types_and_metadata_stay(name: str, tmp_path: Path) -> None:
    kinds = [kind for kind in TYPES if can_write(name, kind)]
    assert len(kinds) > 18
    more = {"parquet": {"row_group_size": 30}, "feather": {"chunksize": 30}}[name]
    for options in ({}, more):
        # Arrow does not read them from several row groups.
        kinds = [kind for kind in kinds if kind != "in struct" or not options]
        tables = [typed_table(kinds), typed_table(kinds, 40)]
        files = Written(folder_at(tmp_path), checked_format(name, options), tables)
        parts = [files.part(0, 25, 65), files.part(1, 0, 1), files.part(0, 2, 3)]
        for given in (None, files.format):
            for schema in (None, read(name, files.content(files.names[0])).schema):
                copy_rows(files.folder, parts, files.new, format=given, schema=schema)
                old = [read(name, files.content(file)) for file in files.names]
                expected = pa.concat_tables([old[0][25:65], old[1][:1], old[0][2:3]])
                made = read(name, files.content(files.new))
                assert made.schema.equals(old[0].schema, check_metadata=True)
                assert made.to_pylist() == expected.to_pylist()


def can_write(name: str, kind: str) -> bool:
    try:
        checked_format(name, {}).write_table(typed_table([kind]), io.BytesIO())
    except pa.ArrowException:
        return False
    return True


def test_orc_files_of_slices_have_the_nulls_of_their_rows(tmp_path: Path) -> None:
    structs = pa.array([None, {"a": 1}, {"a": None}, {"a": 3}, None])
    lists = pa.array([[{"a": 1}, None], None, [None], [], [{"a": 2}]])
    table = pa.table({"s": structs, "l": lists})
    for start in range(5):
        content = io.BytesIO()
        checked_format("orc", {}).write_table(table.slice(start), content)
        assert read("orc", content.getvalue()).to_pylist() == table.slice(start).to_pylist()


def test_types_of_orc_stay(tmp_path: Path) -> None:
    kinds = [kind for kind in TYPES if can_write("orc", kind)]
    assert len(kinds) >= 8
    files = Written(folder_at(tmp_path), checked_format("orc", {}), [typed_table(kinds)])
    copy_rows(files.folder, [files.part(0, 33, 77), files.part(0, 1, 2)], files.new)
    old, new = (read("orc", files.content(name)) for name in (files.names[0], files.new))
    assert new.schema.equals(old.schema, check_metadata=True)
    assert new.equals(pa.concat_tables([old[33:77], old[1:2]]))


class Celsius(pa.ExtensionType):  # type: ignore[misc]
    """A type that only this process knows."""

    def __init__(self) -> None:
        super().__init__(pa.float64(), "test.celsius")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"degrees"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> Celsius:
        return cls()


@pytest.fixture
def celsius() -> Iterator[Celsius]:
    pa.register_extension_type(Celsius())
    yield Celsius()
    pa.unregister_extension_type("test.celsius")


COPY = """
import sys
import pyarrow as pa
from ray_resume.core.parts import FilePart
from ray_resume.write.folder import folder_at
from ray_resume.write.row_copies import copy_rows
schema = pa.schema({"x": pa.int64()}) if sys.argv[3] == "schema" else None
parts = [FilePart(sys.argv[2], 1, 2, 3)]
copy_rows(folder_at(sys.argv[1]), parts, "new." + sys.argv[4], schema=schema)
print(sorted({name.partition(".")[0] for name in sys.modules} & {"ray"}))
"""


@pytest.mark.parametrize("name", ["parquet", "feather"])
def test_a_process_without_an_extension_type_keeps_it(
    name: str, tmp_path: Path, celsius: Celsius
) -> None:
    warm = pa.ExtensionArray.from_storage(celsius, pa.array([1.0, None, 3.0]))
    table = pa.table({"warm": warm, "x": pa.array([1, 2, 3], pa.int32())})
    checked_format(name, {}).write_table(table, (tmp_path / f"old.{name}").open("wb"))
    for schema, kind in (("none", pa.int32()), ("schema", pa.int64())):
        arguments = [str(tmp_path), f"old.{name}", schema, name]
        result = subprocess.run(
            [sys.executable, "-c", COPY, *arguments], capture_output=True, text=True
        )
        assert (result.stdout, result.stderr) == ("[]\n", "")
        made = read(name, (tmp_path / f"new.{name}").read_bytes())
        assert made.schema.names == ["warm", "x"]
        assert made.schema.field("warm").type == celsius
        assert made.schema.field("x").type == kind
        assert made.column("warm").to_pylist() == [None, 3.0]
        # One that is of another type for the process does not mix with it.
    if name == "parquet":
        plain = pa.table({"warm": pa.array([1.0]), "x": pa.array([1], pa.int32())})
        files = Written(folder_at(tmp_path / "mix"), checked_format(name, {}), [table, plain])
        for given in (None, pa.schema({"x": pa.int64()})):
            with pytest.raises(IncompatibleFilesError):
                copy_rows(
                    files.folder,
                    [files.part(0, 0, 3), files.part(1, 0, 1)],
                    files.new,
                    schema=given,
                )


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


def test_the_schema_of_the_output(tmp_path: Path) -> None:
    tables = [
        pa.table({"a": pa.array([1, 2], pa.int32()), "b": pa.nulls(2)}),
        pa.table({"c": [True], "a": pa.array([2**40], pa.int64())}),
    ]
    schema = pa.schema({"a": pa.int64(), "b": pa.string(), "c": pa.bool_()})
    for name in ("parquet", "orc", "feather"):
        kind = checked_format(name, {})
        if name == "orc":
            tables[0] = tables[0].drop_columns(["b"])
        files = Written(folder_at(tmp_path), kind, tables)
        parts = [files.part(1, 0, 1), files.part(0, 0, 2)]
        with pytest.raises(IncompatibleFilesError, match="different schemas") as caught:
            copy_rows(files.folder, parts, files.new)
        assert all(file in str(caught.value) for file in files.names)
        copy_rows(files.folder, parts, files.new, schema=schema)
        made = read(name, files.content(files.new))
        assert made.schema.equals(schema)
        assert made["a"].to_pylist() == [2**40, 1, 2]
        assert made["c"].to_pylist() == [True, None, None]
        with pytest.raises(IncompatibleFilesError, match=r"old1.*'a' of type int64 cannot be made"):
            copy_rows(files.folder, parts, files.new, schema=pa.schema({"a": pa.int32()}))


@pytest.mark.parametrize("metadata", [None, {"unit": "m"}])
def test_columns_that_differ_in_little(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    fields = [
        pa.field("x", pa.int64()),
        pa.field("x", pa.int64(), metadata=metadata, nullable=metadata is not None),
    ]
    tables = [pa.table([pa.array([1, 2])], pa.schema([one])) for one in fields]
    files = Written(folder_at(tmp_path), checked_format("parquet", {}), tables)
    with pytest.raises(IncompatibleFilesError, match="column 'x'"):
        copy_rows(files.folder, [files.part(0, 0, 1), files.part(1, 0, 1)], files.new)


def test_dictionaries_that_do_not_fit_together(tmp_path: Path) -> None:
    tables = [
        pa.table(
            {
                "d": pa.DictionaryArray.from_arrays(
                    pa.array(range(100), pa.int8()), [f"{n}-{i}" for i in range(100)]
                )
            }
        )
        for n in range(2)
    ]
    files = Written(folder_at(tmp_path), checked_format("feather", {}), tables)
    with pytest.raises(ResumeError, match=r"new\.feather cannot be written") as caught:
        copy_rows(files.folder, [files.part(0, 0, 100), files.part(1, 0, 100)], files.new)
    assert "Nothing was changed" in str(caught.value)


@pytest.mark.parametrize("name", ["parquet", "feather"])
def test_dictionaries_that_differ(name: str, tmp_path: Path) -> None:
    words = [["a", "b", None, "a"], ["c", None, "b"]]
    tables = [pa.table({"d": pa.array(some).dictionary_encode()}) for some in words]
    files = Written(folder_at(tmp_path), checked_format(name, {}), tables)
    parts = [files.part(1, 1, 3), files.part(0, 0, 4), files.part(1, 0, 1)]
    copy_rows(files.folder, parts, files.new)
    made = read(name, files.content(files.new))
    assert made.schema == tables[0].schema
    assert made["d"].to_pylist() == [None, "b", "a", "b", None, "a", "c"]


def test_headers_that_differ(tmp_path: Path) -> None:
    tables = [pa.table({"a": [1, 2], "b": [3, 4]}), pa.table({"b": [1], "a": [3]})]
    files = Written(folder_at(tmp_path), checked_format("csv", {}), tables)
    parts = [files.part(0, 0, 1), files.part(1, 0, 1)]
    with pytest.raises(IncompatibleFilesError, match="different headers") as caught:
        copy_rows(files.folder, parts, files.new)
    assert all(file in str(caught.value) for file in files.names)
    # A file without one does not go with a file that has one.
    headless = checked_format("csv", {"include_header": False})
    (tmp_path / files.names[1]).unlink()
    files.folder.write_file(files.names[1], lambda file: headless.write_table(tables[1], file))
    with pytest.raises(IncompatibleFilesError, match="different headers"):
        copy_rows(files.folder, parts, files.new)


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


@pytest.mark.extended
@pytest.mark.parametrize("case", [*TYPED, *TEXT], ids=str)
def test_files_that_are_not_as_they_were_written(
    case: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    files = written(tmp_path, case, [20, 20])
    path = tmp_path / files.names[1]
    whole = path.read_bytes()
    parts = [files.part(0, 0, 20), files.part(1, 3, 5)]

    def refused(parts: Sequence[FilePart]) -> str:
        before = {one.name: one.read_bytes() for one in path.parent.iterdir()}
        for given in (files.format, None):
            with pytest.raises(ResumeError, match="Nothing was changed") as caught:
                copy_rows(files.folder, parts, files.new, format=given)
            assert f"{tmp_path}/{files.names[1]} " in str(caught.value)
            assert "put it back, or reset" in str(caught.value)
        assert {one.name: one.read_bytes() for one in path.parent.iterdir()} == before
        return str(caught.value)

    for rows in (18, 22, 23):
        message = refused([parts[0], parts[1]._replace(file_rows=rows)])
        assert f"and {rows} were written" in message
    # An archive ends in nothing that matters.
    is_tar = case[1].get("compression") == "tar"
    for size in (0, 1, 600) if is_tar else (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(parts)
    path.write_bytes(b"\xfe garbage \n" * 19)
    refused(parts)
    path.unlink()
    assert "it is missing" in refused(parts)
    path.write_bytes(whole)
    copy_rows(files.folder, parts, files.new)


@pytest.mark.parametrize(
    "options",
    [
        {"orient": "split", "lines": False},
        {"orient": "records", "lines": False},
        {"orient": "columns", "lines": False},
        {"orient": "index", "lines": False, "indent": 1},
        {"orient": "values", "lines": False, "indent": 1},
        {"indent": 2},
    ],
    ids=str,
)
def test_json_that_has_no_line_for_each_row(options: dict[str, Any], tmp_path: Path) -> None:
    for rows in range(1, 12):
        table = pa.table({"x": range(rows)})
        files = Written(folder_at(tmp_path), checked_format("json", options), [table])
        for given in (files.format, None):
            with pytest.raises(ResumeError, match="lines"):
                copy_rows(files.folder, [files.part(0, 0, 1)], files.new, format=given)
        assert not (tmp_path / files.new).exists()


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


def test_misuse(tmp_path: Path) -> None:
    files = written(tmp_path, ("csv", {}), [5])
    part = files.part(0, 0, 5)
    for parts, new in (
        ([], files.new),
        ([part], "new.json"),
        ([part], "new.csv.gz"),
        ([part._replace(file="old.txt")], "new.txt"),
        ([part._replace(rows=6)], files.new),
        ([part._replace(rows=0)], files.new),
        ([part._replace(first_row=-1)], files.new),
        ([part, part._replace(file_rows=6)], files.new),
    ):
        with pytest.raises(ValueError, match=r"."):
            copy_rows(files.folder, parts, new)
