"""Output files of every format and compression, and what reads them by other means than ours."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import random
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.orc
import pyarrow.parquet as pq

from ray_resume.core.parts import FilePart
from ray_resume.files import atomic_put
from ray_resume.write.folder import Folder, folder_at
from ray_resume.write.formats import FileFormat, checked_format

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
