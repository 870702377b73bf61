"""Odd inputs of every reader: unarmed and armed, they give what plain Ray Data gives.

These are the same rows, columns in their order, and types; or an error where plain Ray Data has
one. Each input is read in this process (`local_execution`), which takes some 30 ms.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import tarfile
import traceback
import wave
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.orc
import pyarrow.parquet as pq
import pytest
import ray
from local_execution import execute, execute_armed
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from ray.data.datasource.partitioning import Partitioning, PartitionStyle
from ray.data.expressions import col

from ray_resume import resumable_read
from ray_resume.raydata.paths import resolving

pytestmark = pytest.mark.usefixtures("cluster")

Write = Callable[[Path], Any]
Steps = Callable[[Any], Any]

HAS_SCANS = bool(ray.data.DataContext.get_current().use_datasource_v2)


def as_it_is(dataset: Any) -> Any:
    return dataset


@dataclass(frozen=True)
class Case:
    """An input: files by name and how each is written, the reader's options, and what follows."""

    name: str
    files: dict[str, Write]
    options: dict[str, Any] = field(default_factory=dict)
    steps: Steps = as_it_is
    paths: Callable[[Path], Any] = str
    granularity: str = "file"


def parquet(columns: Any, **options: Any) -> Write:
    made = columns if isinstance(columns, pa.Table) else pa.table(columns)
    return lambda path: pq.write_table(made, path, **options)


def text(content: str | bytes, encoding: str = "utf-8") -> Write:
    data = content if isinstance(content, bytes) else content.encode(encoding)
    return lambda path: path.write_bytes(data)


def select(*names: str) -> Steps:
    return lambda dataset: dataset.select_columns(list(names))


def where(predicate: Any) -> Steps:
    return lambda dataset: dataset.filter(expr=predicate)


def then(*steps: Steps) -> Steps:
    def all_of(dataset: Any) -> Any:
        for step in steps:
            dataset = step(dataset)
        return dataset

    return all_of


IDS = {"id": [1, 2, 3]}
HIVE = {f"k={k}/f.parquet": parquet({"k": [k * 100], "id": [k]}) for k in (1, 2)}
PARTS = {f"y={y}/m={m}/f.parquet": parquet({"id": [y + m]}) for y in (1, 2) for m in (7, 8)}
MIXED = {
    "1.parquet": parquet({"id": [1, 2], "a": [1, 2]}),
    "2.parquet": parquet({"id": [3, 4], "b": ["x", "y"]}),
}
GROUPS = {
    "a.parquet": parquet({"id": range(30)}, row_group_size=10),
    "b.parquet": parquet({"id": range(30, 35)}),
}
STRUCTS = {
    "1.parquet": parquet({"s": [{"a": 1}, None]}),
    "2.parquet": parquet({"s": [{"a": 2, "b": "x"}, {"a": 3, "b": None}]}),
}
LATE = {
    f"{i:02d}.parquet": parquet({"id": [i]} if i < 20 else {"id": [i], "late": [i]})
    for i in range(22)
}

PARQUET = [
    Case("a hive key that is a column", HIVE),
    Case("a hive key that is a column, selected", HIVE, steps=select("k", "id")),
    Case("a hive key that is a column, filtered", HIVE, steps=where(col("k") == 1)),
    Case("hive keys", PARTS),
    Case("hive keys, filtered", PARTS, steps=where((col("y") == "1") & (col("id") > 8))),
    Case("hive keys, filtered by either", PARTS, steps=where((col("y") == "1") | (col("id") > 9))),
    Case(
        "hive keys of types",
        PARTS,
        {"partitioning": Partitioning(PartitionStyle.HIVE, field_types={"y": int})},
    ),
    Case(
        "hive keys of types, filtered",
        PARTS,
        {"partitioning": Partitioning(PartitionStyle.HIVE, field_types={"y": int})},
        where(col("y") > 1),
    ),
    Case("no partitioning", PARTS, {"partitioning": None}),
    Case("columns that files lack", MIXED),
    Case("columns that files lack, selected", MIXED, steps=select("id", "b")),
    Case("columns that files lack, in another order", MIXED, steps=select("b", "a", "id")),
    Case("columns that files lack, filtered", MIXED, steps=where(col("a") > 1)),
    Case("columns that files lack, filtered by null", MIXED, steps=where(col("a").is_null())),
    Case("columns=", MIXED, {"columns": ["id", "b"]}),
    Case("columns= of which none is there", MIXED, {"columns": ["nope"]}),
    Case("columns= and paths", MIXED, {"columns": ["id"], "include_paths": True}),
    Case("columns= and a filter by another", MIXED, {"columns": ["id"]}, where(col("id") > 2)),
    Case("a column that is nowhere, selected", MIXED, steps=select("nope")),
    Case("a column of the 21st file", LATE),
    Case(
        "int beside double", {"1.parquet": parquet({"v": [1]}), "2.parquet": parquet({"v": [2.5]})}
    ),
    Case(
        "int32 beside int64",
        {
            "1.parquet": parquet({"v": pa.array([1], pa.int32())}),
            "2.parquet": parquet({"v": [1 << 40]}),
        },
    ),
    Case("int beside text", {"1.parquet": parquet({"v": [1]}), "2.parquet": parquet({"v": ["x"]})}),
    Case(
        "null beside text",
        {"1.parquet": parquet({"v": [None]}), "2.parquet": parquet({"v": ["x"]})},
    ),
    Case(
        "text beside large text",
        {
            "1.parquet": parquet({"v": ["a"]}),
            "2.parquet": parquet({"v": pa.array(["x"], pa.large_string())}),
        },
    ),
    Case(
        "timestamps of two units",
        {
            "1.parquet": parquet({"v": pa.array([1], pa.timestamp("ms"))}),
            "2.parquet": parquet({"v": pa.array([1], pa.timestamp("ns"))}),
        },
    ),
    Case("structs with other fields", STRUCTS),
    Case(
        "lists of structs",
        {
            "1.parquet": parquet({"v": [[{"a": 1}], []]}),
            "2.parquet": parquet({"v": [[{"a": 2}], None]}),
        },
    ),
    Case(
        "dictionaries",
        {
            "1.parquet": parquet({"v": pa.array(["a", "b", "a"]).dictionary_encode()}),
            "2.parquet": parquet({"v": ["c"]}),
        },
    ),
    Case(
        "another order of columns",
        {"1.parquet": parquet({"a": [1], "b": [2]}), "2.parquet": parquet({"b": [3], "a": [4]})},
    ),
    Case("a file of no bytes", {"0.parquet": text(""), "1.parquet": parquet(IDS)}),
    Case("files of no bytes alone", {"0.parquet": text("")}),
    Case(
        "a file of no rows",
        {"0.parquet": parquet({"id": pa.array([], pa.int64())}), "1.parquet": parquet(IDS)},
    ),
    Case("files of no rows alone", {"0.parquet": parquet({"id": pa.array([], pa.int64())})}),
    Case("files of no columns", {"0.parquet": parquet(pa.table({}))}),
    Case("paths", GROUPS, {"include_paths": True}),
    Case("paths, others selected", GROUPS, {"include_paths": True}, select("id")),
    Case("paths, selected", GROUPS, {"include_paths": True}, select("path")),
    Case(
        "a column that is called path",
        {"1.parquet": parquet({"path": [1], "id": [2]})},
        {"include_paths": True},
    ),
    Case("hashes", GROUPS, {"include_row_hash": True}),
    Case("hashes after a filter", GROUPS, {"include_row_hash": True}, where(col("id") > 15)),
    Case(
        "hashes after a filter of no order",
        GROUPS,
        {"include_row_hash": True},
        where((col("id") % 7) == 3),
    ),
    Case("hashes and a selection", GROUPS, {"include_row_hash": True}, select("row_hash", "id")),
    Case("hashes after a selection without them", GROUPS, {"include_row_hash": True}, select("id")),
    Case(
        "hashes in a file without row groups",
        {"0.parquet": parquet({"id": pa.array([], pa.int64())})},
        {"include_row_hash": True},
    ),
    Case(
        "dataset_kwargs",
        {"1.parquet": parquet({"s": ["x", "y", "x"]})},
        {"dataset_kwargs": {"read_dictionary": ["s"]}},
    ),
    Case("a schema", MIXED, {"schema": pa.schema({"id": pa.int32(), "b": pa.string()})}),
    Case("arrow_parquet_args", GROUPS, {"batch_size": 3, "use_threads": False}),
    Case("a filter of pyarrow's", GROUPS, {"filter": pa.compute.field("id") > 5}),
    Case("an option that is none", GROUPS, {"no_such_option": 1}),
    Case(
        "file_extensions",
        {"a.dat": parquet(IDS), "b.parquet": parquet({"id": [9]})},
        {"file_extensions": ["dat"]},
    ),
    Case(
        "file_extensions=None",
        {"a.dat": parquet(IDS), "b.parquet": parquet({"id": [9]})},
        {"file_extensions": None},
    ),
    Case(
        "other names of files",
        {
            "a.parquet.gz": text("no"),
            "b.PARQUET": parquet(IDS),
            "_c.parquet": text("no"),
            "d/_e.parquet": parquet({"id": [7]}),
            "_f/g.parquet": text("no"),
        },
    ),
    Case("row groups", GROUPS, granularity="row_group"),
    Case(
        "row groups and hashes",
        GROUPS,
        {"include_row_hash": True, "include_paths": True},
        granularity="row_group",
    ),
    Case(
        "row groups, hashes, a filter",
        GROUPS,
        {"include_row_hash": True},
        where(col("id") > 15),
        granularity="row_group",
    ),
    Case(
        "row groups of files that lack columns",
        MIXED,
        steps=where(col("id") > 1),
        granularity="row_group",
    ),
    Case(
        "row groups and a file of no bytes",
        {"0.parquet": text(""), **GROUPS},
        granularity="row_group",
    ),
    Case(
        "select and filter",
        GROUPS,
        {"include_paths": True},
        then(where(col("id") > 3), select("id"), where(col("id") < 33)),
    ),
    Case("nothing is selected", GROUPS, steps=select()),
    Case(
        "tensors",
        {
            "1.parquet": parquet(
                {"t": pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12.0).reshape(3, 2, 2))}
            )
        },
    ),
    Case(
        "two files by name, in this order",
        MIXED,
        paths=lambda root: [f"{root}/2.parquet", f"{root}/1.parquet"],
    ),
    Case("a relative path", GROUPS, {"include_paths": True}, paths=lambda root: root.name),
    Case(
        "a relative path and hashes",
        GROUPS,
        {"include_row_hash": True},
        paths=lambda root: f"./{root.name}/",
    ),
    Case(
        "a part of a filesystem",
        GROUPS,
        {"include_paths": True, "filesystem": "part"},
        paths=lambda root: root.name,
    ),
    Case("a filesystem", GROUPS, {"include_paths": True, "filesystem": LocalFileSystem()}),
]


def write_image(mode: str, size: tuple[int, int]) -> Write:
    def write(path: Path) -> None:
        image = pytest.importorskip("PIL.Image")
        image.new(mode, size, 3).save(path)

    return write


def write_numpy(array: Any, **options: Any) -> Write:
    return lambda path: np.save(path, array, **options)


def write_tar(*members: tuple[str, bytes]) -> Write:
    def write(path: Path) -> None:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    return write


def write_avro(kind: Any, *rows: dict[str, Any], codec: str = "null") -> Write:
    def write(path: Path) -> None:
        fastavro = pytest.importorskip("fastavro")
        fields = [{"name": name, "type": of} for name, of in kind.items()]
        schema = {"type": "record", "name": "row", "fields": fields}
        with path.open("wb") as file:
            fastavro.writer(file, schema, rows, codec=codec)

    return write


def write_orc(columns: Any, **options: Any) -> Write:
    return lambda path: pa.orc.write_table(pa.table(columns), path, **options)


def write_audio(channels: int, rate: int, width: int = 2) -> Write:
    def write(path: Path) -> None:
        pytest.importorskip("soundfile")
        with wave.open(str(path), "wb") as file:
            file.setnchannels(channels)
            file.setsampwidth(width)
            file.setframerate(rate)
            file.writeframes(bytes(range(120)) * width)

    return write


LINES = "".join(json.dumps({"id": i, "s": "ü" * i}) + "\n" for i in range(4))
CSV = {"read_options": pyarrow.csv.ReadOptions(autogenerate_column_names=True)}
UTF16 = {"read_options": pyarrow.csv.ReadOptions(encoding="utf-16")}

READERS: dict[str, list[Case]] = {
    "read_csv": [
        Case("plain", {"a.csv": text("id,s\n1,a\n2,\n"), "b.csv": text("id,s\n3,c\n")}),
        Case("other columns", {"a.csv": text("id,s\n1,a\n"), "b.csv": text("s,x\nc,1\n")}),
        Case("other types", {"a.csv": text("v\n1\n"), "b.csv": text("v\nx\n")}),
        Case("a header alone", {"a.csv": text("id,s\n"), "b.csv": text("id,s\n1,a\n")}),
        Case("no bytes", {"a.csv": text(""), "b.csv": text("id\n1\n")}),
        Case(
            "compressed",
            {
                "a.csv.gz": text(gzip.compress(b"id\n1\n2\n")),
                "b.csv.bz2": text(bz2.compress(b"id\n3\n")),
            },
        ),
        Case(
            "compression by option",
            {"a.csv": text(gzip.compress(b"id\n1\n"))},
            {"arrow_open_stream_args": {"compression": "gzip"}},
        ),
        Case("no header", {"a.csv": text("1,a\n2,b\n")}, CSV),
        Case("utf-16", {"a.csv": text("id,s\n1,ü\n", "utf-16")}, UTF16),
        Case("not utf-8", {"a.csv": text("id,s\n1,ü\n", "latin-1")}),
        Case(
            "quotes and line breaks",
            {"a.csv": text('id,s\n1,"a,\n""b"""\n')},
            {"parse_options": pyarrow.csv.ParseOptions(newlines_in_values=True)},
        ),
        Case("a bad row", {"a.csv": text("id,s\n1,a,b\n2,c\n")}),
        Case("nulls and NaN", {"a.csv": text("v,w\n,NaN\n1.5,null\n")}),
        Case(
            "paths and hive",
            {"y=1/a.csv": text("id\n1\n"), "y=2/a.csv": text("id\n2\n")},
            {"include_paths": True, "partitioning": Partitioning(PartitionStyle.HIVE)},
        ),
        Case("other extensions", {"a.tsv": text("id\n1\n"), "b.csv": text("id\n2\n")}),
        Case(
            "a relative path",
            {"a.csv": text("id\n1\n")},
            {"include_paths": True},
            paths=lambda root: root.name,
        ),
        Case(
            "a filter",
            {"a.csv": text("id,s\n1,a\n2,b\n")},
            steps=then(where(col("id") > 1), select("s")),
        ),
    ],
    "read_json": [
        Case("lines", {"a.jsonl": text(LINES), "b.jsonl": text('{"id": 9}\n')}),
        Case("lines by option", {"a.json": text(LINES)}, {"lines": True}),
        Case("a document", {"a.json": text('[{"id": 1}, {"id": 2, "s": "x"}]')}),
        Case("one object", {"a.json": text('{"id": 1, "s": {"a": [1, null]}}')}),
        Case("nested", {"a.jsonl": text('{"s": {"a": 1}, "l": [1, 2]}\n{"s": null, "l": []}\n')}),
        Case("other types", {"a.jsonl": text('{"v": 1}\n{"v": "x"}\n')}),
        Case(
            "other types of files", {"a.jsonl": text('{"v": 1}\n'), "b.jsonl": text('{"v": "x"}\n')}
        ),
        Case("no bytes", {"a.jsonl": text(""), "b.jsonl": text('{"v": 1}\n')}),
        Case("an empty list", {"a.json": text("[]")}),
        Case("compressed", {"a.jsonl.gz": text(gzip.compress(LINES.encode()))}),
        Case("damaged", {"a.jsonl": text('{"v": 1}\n{"v": \n')}),
        Case("blank lines", {"a.jsonl": text('\n{"v": 1}\n\n{"v": 2}\n')}),
        Case(
            "paths",
            {"a.jsonl": text(LINES)},
            {"include_paths": True},
            paths=lambda root: f"{root.name}//",
        ),
        Case(
            "options of pyarrow's",
            {"a.jsonl": text(LINES)},
            {"read_options": pyarrow.json.ReadOptions(block_size=64)},
        ),
    ],
    "read_text": [
        Case("lines", {"a.txt": text("a\n\nb"), "b.txt": text("ü\r\nx\r\n")}),
        Case("empty lines kept", {"a.txt": text("a\n\nb\n")}, {"drop_empty_lines": False}),
        Case("no bytes", {"a.txt": text(""), "b.txt": text("a")}),
        Case("latin-1", {"a.txt": text("ü\n", "latin-1")}, {"encoding": "latin-1"}),
        Case("not utf-8", {"a.txt": text("ü\n", "latin-1")}),
        Case("compressed", {"a.txt.gz": text(gzip.compress(b"a\nb\n"))}),
        Case("other line ends", {"a.txt": text("a\rb\x0bc\u2028d\x85e\n")}),
        Case("a zero byte", {"a.txt": text("a\0b\n")}),
        Case(
            "paths", {"d/a.txt": text("a\n")}, {"include_paths": True}, paths=lambda root: root.name
        ),
        Case("no extension", {"LICENSE": text("a\n"), "b.md": text("b\n")}),
    ],
    "read_binary_files": [
        Case("bytes", {"a.bin": text(b"\0\xff"), "b.bin": text(b"")}),
        Case("paths", {"a.bin": text(b"a"), "d/b": text(b"b")}, {"include_paths": True}),
        Case("compressed", {"a.gz": text(gzip.compress(b"a"))}),
        Case(
            "not decompressed",
            {"a.gz": text(gzip.compress(b"a"))},
            {"arrow_open_stream_args": {"compression": None}},
        ),
        Case("extensions", {"a.x": text(b"a"), "b.y": text(b"b")}, {"file_extensions": ["y"]}),
        Case("hidden", {".a": text(b"a"), "_b": text(b"b"), "c": text(b"c")}),
        Case("hive", {"k=1/a": text(b"a")}, {"partitioning": Partitioning(PartitionStyle.HIVE)}),
        Case(
            "a buffer size",
            {"a": text(b"ab" * 99), "b": text(b"b")},
            {"arrow_open_stream_args": {"buffer_size": 64}},
        ),
        Case(
            "a relative path",
            {"a": text(b"a")},
            {"include_paths": True},
            paths=lambda root: f"{root.name}/a",
        ),
        Case(
            "two roots",
            {"a/x": text(b"a"), "b/y": text(b"b")},
            {"include_paths": True},
            paths=lambda root: [f"{root.name}/b", f"{root}/a"],
        ),
    ],
    "read_numpy": [
        Case("arrays", {"a.npy": write_numpy(np.arange(6).reshape(3, 2))}),
        Case("one dimension", {"a.npy": write_numpy(np.arange(3.0))}),
        Case(
            "other shapes",
            {"a.npy": write_numpy(np.ones((2, 2))), "b.npy": write_numpy(np.ones((1, 3)))},
        ),
        Case(
            "other types",
            {
                "a.npy": write_numpy(np.ones(2, np.float32)),
                "b.npy": write_numpy(np.ones(2, np.int8)),
            },
        ),
        Case("a scalar", {"a.npy": write_numpy(np.float64(1))}),
        Case("no rows", {"a.npy": write_numpy(np.ones((0, 2)))}),
        Case("texts", {"a.npy": write_numpy(np.array(["a", "ü"]))}),
        Case("objects", {"a.npy": write_numpy(np.array([{}, 1], object), allow_pickle=True)}),
        Case(
            "objects, allowed",
            {"a.npy": write_numpy(np.array(["a", None], object), allow_pickle=True)},
            {"numpy_load_args": {"allow_pickle": True}},
        ),
        Case("damaged", {"a.npy": text(b"\x93NUMPY")}),
        Case("no bytes", {"a.npy": text(b"")}),
    ],
    "read_images": [
        Case(
            "one size", {"a.png": write_image("RGB", (4, 3)), "b.png": write_image("RGB", (4, 3))}
        ),
        Case(
            "other sizes",
            {"a.png": write_image("RGB", (4, 3)), "b.png": write_image("RGB", (2, 2))},
        ),
        Case(
            "other modes", {"a.png": write_image("L", (2, 2)), "b.png": write_image("RGBA", (2, 2))}
        ),
        Case(
            "a mode",
            {"a.png": write_image("L", (2, 2)), "b.png": write_image("RGBA", (2, 2))},
            {"mode": "RGB"},
        ),
        Case(
            "a size",
            {"a.png": write_image("RGB", (4, 3)), "b.png": write_image("RGB", (2, 2))},
            {"size": (2, 3)},
        ),
        Case(
            "paths",
            {"a.png": write_image("L", (2, 2))},
            {"include_paths": True},
            paths=lambda root: root.name,
        ),
        Case("damaged", {"a.png": text(b"no image"), "b.png": write_image("L", (2, 2))}),
        Case("no bytes", {"a.png": text(b""), "b.png": write_image("L", (2, 2))}),
        Case("a palette", {"a.gif": write_image("P", (2, 2))}),
        Case("16 bits", {"a.tiff": write_image("I", (2, 2))}),
        Case("other files beside", {"a.png": write_image("L", (2, 2)), "b.txt": text("no")}),
    ],
    "read_webdataset": [
        Case(
            "samples",
            {"a.tar": write_tar(("1.txt", b"a"), ("1.cls", b"3"), ("2.txt", "ü".encode()))},
        ),
        Case("json", {"a.tar": write_tar(("1.json", b'{"a": [1]}'), ("1.bin", b"\0"))}),
        Case("missing members", {"a.tar": write_tar(("1.txt", b"a"), ("2.cls", b"3"))}),
        Case("no members", {"a.tar": write_tar()}),
        Case("folders", {"a.tar": write_tar(("d/1.txt", b"a"), ("e/1.txt", b"b"))}),
        Case("compressed", {"a.tar.gz": write_tar(("1.txt", b"a"))}),
        Case(
            "suffixes",
            {"a.tar": write_tar(("1.txt", b"a"), ("1.cls", b"3"))},
            {"suffixes": ["txt"]},
        ),
        Case("not decoded", {"a.tar": write_tar(("1.txt", b"a"))}, {"decoder": None}),
        Case(
            "a relative path", {"a.tar": write_tar(("1.txt", b"a"))}, paths=lambda root: root.name
        ),
        Case("damaged", {"a.tar": text(b"no tar" * 100)}),
        Case("no bytes", {"a.tar": text(b"")}),
    ],
    "read_avro": [
        Case("rows", {"a.avro": write_avro({"id": "long", "s": "string"}, {"id": 1, "s": "ü"})}),
        Case("nulls", {"a.avro": write_avro({"v": ["null", "long"]}, {"v": None}, {"v": 2})}),
        Case(
            "nested",
            {
                "a.avro": write_avro(
                    {"v": {"type": "array", "items": "long"}}, {"v": [1]}, {"v": []}
                )
            },
        ),
        Case(
            "maps",
            {"a.avro": write_avro({"v": {"type": "map", "values": "long"}}, {"v": {"a": 1}})},
        ),
        Case("no rows", {"a.avro": write_avro({"id": "long"})}),
        Case("deflate", {"a.avro": write_avro({"id": "long"}, {"id": 1}, codec="deflate")}),
        Case(
            "other columns",
            {
                "a.avro": write_avro({"a": "long"}, {"a": 1}),
                "b.avro": write_avro({"b": "long"}, {"b": 1}),
            },
        ),
        Case("bytes", {"a.avro": write_avro({"v": "bytes"}, {"v": b"\0\xff"})}),
        Case("paths", {"a.avro": write_avro({"id": "long"}, {"id": 1})}, {"include_paths": True}),
        Case("damaged", {"a.avro": text(b"Obj\x01no")}),
        Case("no bytes", {"a.avro": text(b"")}),
    ],
    "read_orc": [
        Case("rows", {"a.orc": write_orc(IDS), "b.orc": write_orc({"id": [9]})}),
        Case("other columns", {"a.orc": write_orc(IDS), "b.orc": write_orc({"b": [9]})}),
        Case("other types", {"a.orc": write_orc({"v": [1]}), "b.orc": write_orc({"v": [1.5]})}),
        Case("no rows", {"a.orc": write_orc({"id": pa.array([], pa.int64())})}),
        Case("nulls", {"a.orc": write_orc({"v": [None, 1]})}),
        Case("nested", {"a.orc": write_orc({"v": [[1], None], "s": [{"a": 1}, {"a": None}]})}),
        Case("compressed", {"a.orc": write_orc(IDS, compression="zstd")}),
        Case("a selection", {"a.orc": write_orc({"a": [1], "b": [2]})}, steps=select("b")),
        Case(
            "paths",
            {"a.orc": write_orc(IDS)},
            {"include_paths": True},
            paths=lambda root: root.name,
        ),
        Case("damaged", {"a.orc": text(b"ORC no")}),
        Case("no bytes", {"a.orc": text(b"")}),
    ],
    "read_audio": [
        Case("mono", {"a.wav": write_audio(1, 8000), "b.wav": write_audio(1, 8000)}),
        Case("stereo", {"a.wav": write_audio(2, 8000)}),
        Case("other rates", {"a.wav": write_audio(1, 8000), "b.wav": write_audio(2, 44100)}),
        Case("three bytes", {"a.wav": write_audio(1, 8000, 3)}),
        Case(
            "paths",
            {"a.wav": write_audio(1, 8000)},
            {"include_paths": True},
            paths=lambda root: root.name,
        ),
        Case("damaged", {"a.wav": text(b"RIFF no")}),
        Case("no bytes", {"a.wav": text(b"")}),
        Case("other files beside", {"a.wav": write_audio(1, 8000), "b.txt": text("no")}),
        Case(
            "hive",
            {"k=1/a.wav": write_audio(1, 8000)},
            {"partitioning": Partitioning(PartitionStyle.HIVE)},
        ),
        Case(
            "ignored paths",
            {"a.wav": write_audio(1, 8000)},
            {"ignore_missing_paths": True},
            paths=lambda root: [str(root), f"{root}/none.wav"],
        ),
    ],
}

CASES = {"read_parquet": PARQUET, **READERS}

# What plain Ray Data cannot read.
REFUSED: dict[str, set[str]] = {
    "read_parquet": {
        "a hive key that is a column, filtered",
        "int beside text",
        "dictionaries",
        "files of no bytes alone",
        "a filter of pyarrow's",
    },
    "read_csv": {"no bytes", "a bad row"},
    "read_json": {"other types", "damaged"},
    "read_text": {"not utf-8"},
    "read_numpy": {"a scalar", "objects", "objects, allowed", "damaged", "no bytes"},
    "read_images": {"damaged", "no bytes"},
    "read_webdataset": {"damaged", "no bytes"},
    "read_avro": {"damaged", "no bytes"},
    "read_orc": {"damaged", "no bytes"},
    "read_audio": {"damaged", "no bytes"},
    "read_binary_files": set(),
}


# Where an older reader of Ray's does otherwise, each for a reason.
OF_SCANS = {
    "read_parquet": {
        # Which null columns there are depends on which files a read task has.
        "a column of the 21st file",
        # Refused: rows of two row groups would get the same hash.
        "row groups and hashes",
        "row groups, hashes, a filter",
        # Plain Ray Data refuses it.
        "row groups and a file of no bytes",
        # Plain Ray Data waits without end, as its workers are in another directory.
        "a relative path",
        "a relative path and hashes",
    }
}


def outcome(run: Callable[[], list[pa.Table]]) -> Any:
    """Return rows and types, or the error: its text, of which only that there is one counts."""
    try:
        tables = run()
    except Exception as error:
        return "".join(traceback.format_exception(error))
    rows = sorted(repr(list(row.items())) for table in tables for row in _rows(table))
    return rows, {str(table.schema.remove_metadata()) for table in tables}


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    # A column twice would be one in a dictionary.
    columns = [column.to_pylist() for column in table.columns]
    for values in zip(*columns, strict=True):
        yield {
            f"{i} {name}": value
            for i, (name, value) in enumerate(zip(table.column_names, values, strict=True))
        }
    if not columns:
        yield from ({} for _ in range(table.num_rows))


def differences(case: Case, name: str, folder: Path) -> list[str]:
    """Read a case plainly, unarmed and armed, and say where they differ."""
    root = folder / "in"
    for file, write in case.files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        write(root / file)
    if not HAS_SCANS and case.name in OF_SCANS.get(name, ()):
        return []
    options = dict(case.options)
    if options.get("filesystem") == "part":
        options["filesystem"] = SubTreeFileSystem(str(folder), LocalFileSystem())
    reader = getattr(ray.data, name)
    paths = case.paths(root)

    def ours() -> Any:
        ckpt = folder / "ckpt"
        read = resumable_read(
            reader, paths, checkpoint=ckpt, granularity=case.granularity, **options
        )
        return case.steps(read)

    # Where aiohttp is missing, Ray's own threads race for an import if they are given two paths.
    with resolving():
        # Ray writes into what it is given.
        expected = outcome(lambda: execute(case.steps(reader(paths, **deepcopy(options)))))
    if HAS_SCANS:
        # Older versions refuse other inputs; here is nothing that is refused by mistake.
        assert isinstance(expected, str) == (case.name in REFUSED[name]), (case.name, expected)
    found = []
    for how, got in (
        ("unarmed", outcome(lambda: execute(ours()))),
        ("armed", outcome(lambda: execute_armed(ours()))),
    ):
        both_errors = isinstance(expected, str) and isinstance(got, str)
        if not both_errors and expected != got:
            found.append(f"{name}, {case.name}, {how}:\n  plain {expected}\n  ours  {got}")
    return found


# These two have the most rules of their own; CI runs the others, too.
# Two readers are in the suite; one also runs with the oldest versions, where Ray has another.
MARKS = {"read_parquet": [], "read_csv": [pytest.mark.long]}
ELSEWHERE = [pytest.mark.extended, pytest.mark.long]


@pytest.mark.parametrize("name", [pytest.param(n, marks=MARKS.get(n, ELSEWHERE)) for n in CASES])
@pytest.mark.filterwarnings("ignore")
def test_odd_inputs(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    if not hasattr(ray.data, name):
        pytest.skip("came with a later Ray")
    found = []
    for number, case in enumerate(CASES[name]):
        place = tmp_path / str(number)
        place.mkdir()
        monkeypatch.chdir(place)
        found += differences(case, name, place)
    assert not found, "\n".join(found)
