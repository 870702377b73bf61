"""Splits: each line of a file is read once, wherever its ranges of bytes are cut."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import ray
from conftest import ids_in
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem
from ray.data.block import BlockAccessor

from ray_resume import (
    Checkpoint,
    CheckpointError,
    NonResumableError,
    ResumeError,
    resumable,
    resumable_read,
    resumable_write,
)
from ray_resume.core.sources import SourceTable
from ray_resume.raydata.filereads import DatasourceFiles, Selection
from ray_resume.read.line_ranges import ByteRange, Quotes, check_quotes, lines_of
from ray_resume.read.listing import list_files
from ray_resume.read.splits import is_document, list_splits, split_files
from ray_resume.testing import kill_at

LOCAL = LocalFileSystem()


def test_a_file_that_cannot_be_opened_is_not_cut(tmp_path: Path) -> None:
    """So it fails alone, where it is read."""
    assert is_document(LOCAL, str(tmp_path / "gone.json"))


LINES = st.lists(st.sampled_from([b"", b"a", b"\r", b"bc\r", "ü\u2028".encode(), b"x" * 40]))


@given(LINES, st.booleans(), st.integers(1, 60))
def test_ranges_have_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ended: bool, split_bytes: int
) -> None:
    path = str(tmp_path_factory.getbasetemp() / "lines.txt")
    content = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    Path(path).write_bytes(content)
    found: list[bytes] = []
    for first in range(0, len(content), split_bytes):
        data = lines_of(LOCAL, path, ByteRange(first, min(first + split_bytes, len(content))))
        if data is not None:
            # A line belongs where its first byte is.
            start = sum(len(part) for part in found)
            assert first <= start < first + split_bytes
            found.append(bytes(data))
    assert b"".join(found) == content
    assert all(part.endswith(b"\n") for part in found[:-1])


VALUES = ["", "a", '"', "b,c", 'd "e" f', "ü", '"",']


@given(st.lists(st.tuples(st.sampled_from(VALUES), st.sampled_from([*VALUES, "x\ny", '"\n,']))))
def test_quoted_newlines_are_found(rows: list[tuple[str, str]]) -> None:
    def spelt(value: str) -> str:
        return '"' + value.replace('"', '""') + '"' if set(value) & set('",\n') else value

    text = "".join(f"{spelt(first)},{spelt(second)}\n" for first, second in rows).encode()
    quotes = Quotes(b'"', b",")
    if any("\n" in value for row in rows for value in row):
        with pytest.raises(ResumeError, match="goes on in the next line"):
            check_quotes(pa.py_buffer(text), quotes)
        # A split that ends there is refused, too: its lines end within a value.
        cut = text.index(b"\n", next(n for n in range(len(text)) if text[:n].count(b'"') % 2)) + 1
        if text[:cut].count(b'"') % 2:
            with pytest.raises(ResumeError, match="goes on in the next line"):
                check_quotes(pa.py_buffer(text[:cut]), quotes)
    else:
        check_quotes(pa.py_buffer(text), quotes)


def json_lines(number: int, chance: np.random.Generator) -> str:
    return json.dumps({"id": number, "text": "ü" * chance.integers(0, 30), "of": [number] * 2})


def text(number: int, chance: np.random.Generator) -> str:
    return ["", " ", f"line {number}", "a\rb", "x\u2028y"][chance.integers(0, 5)]


def csv(number: int, chance: np.random.Generator) -> str:
    return f'{number},"a ""b"", {"c" * chance.integers(0, 30)}",{number / 4}'


FORMATS: dict[str, tuple[Callable[..., Any], Callable[..., str], str, dict[str, Any]]] = {
    "json": (ray.data.read_json, json_lines, "", {}),
    "json by pandas": (ray.data.read_json, json_lines, "", {"lines": True}),
    "text": (ray.data.read_text, text, "", {"drop_empty_lines": False}),
    "csv": (ray.data.read_csv, csv, '\nid,"the text",share\n', {}),
    "csv without a header": (
        ray.data.read_csv,
        csv,
        "",
        {"read_options": pyarrow.csv.ReadOptions(column_names=["id", "text", "share"])},
    ),
}


def check_cuts(
    reader: Callable[..., Any], path: Path, options: dict[str, Any], cuts: Iterable[int]
) -> int:
    """Make sure that rows and types are those of the whole file; return how many rows it has."""
    arguments = {"file_extensions": None, **options}
    files = DatasourceFiles.planned("name", reader, [str(path)], arguments)
    sources = list_files(LOCAL, [str(path)], extensions=None, keep=None, ignore_missing=False)

    def read(reads: Any, of: SourceTable) -> list[Any]:
        tasks, _ = reads.task_factory(Selection())
        found: list[Any] = []
        for task in tasks(of):
            for block in task():
                rows: Any = BlockAccessor.for_block(block).iter_rows(public_row_format=True)
                # The type of a value is that of its column.
                found += map(repr, rows)
        return found

    expected = read(files, sources)
    splits = split_files(reader.__name__, arguments, files, sources, LOCAL)
    for split_bytes in cuts:
        assert read(splits, list_splits(sources, split_bytes)) == expected, split_bytes
    return len(expected)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("name", FORMATS)
def test_all_cuts_of_a_file_give_the_same_rows(name: str, tmp_path: Path) -> None:
    reader, line, header, options = FORMATS[name]
    chance = np.random.default_rng(len(name))
    lines = [line(number, chance) for number in range(60)]
    path = tmp_path / f"{name}.{name[:4].strip()}"
    path.write_text(header + "\n".join(lines) + "\n")
    size = path.stat().st_size
    cuts = {1 + int(n) for n in chance.integers(20, size + 10, 20)} | {size, 7}
    assert check_cuts(reader, path, options, cuts) >= 60


def parsed(**options: Any) -> dict[str, Any]:
    return {"parse_options": pyarrow.csv.ParseOptions(**options)}


AUTOMATIC = pyarrow.csv.ReadOptions(autogenerate_column_names=True)
SOME = pyarrow.csv.ConvertOptions(include_columns=["b", "c"], include_missing_columns=True)
ODD_CSV: dict[str, tuple[bytes, dict[str, Any]]] = {
    "a byte order mark": (b"\xef\xbb\xbf\r\na,b\r\n1,x\r\n2,y\r\n3,z", {}),
    "a carriage return ends the header": (b"a,b\r1,2\n3,4\n5,6\n", {}),
    "empty lines": (b"\n\r\n\na,b\n\n1,2\n\n\n3,4\n\n", {}),
    "a header of a space": (b" \nx\ny\nz\n", {}),
    "a header of a tab": (b"\t\nx\t1\ny\t2\n", parsed(delimiter="\t")),
    "empty lines are values": (b"\na\n1\n\n2\n", parsed(ignore_empty_lines=False)),
    "names without a header": (b"1,x\n2,y\n3,z\n", {"read_options": AUTOMATIC}),
    "some columns": (b"a,b\n1,x\n2,7\n", {"convert_options": SOME}),
    "numbers that are text": (b"id\nabc\n007\n008\n", {}),
    "numbers with and without a point": (b"a;b\n1.5;yes\n2;true\n", parsed(delimiter=";")),
}


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("name", ODD_CSV)
def test_each_cut_of_an_odd_csv_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    content, options = ODD_CSV[name]
    (tmp_path / "odd.csv").write_bytes(content)
    check_cuts(ray.data.read_csv, tmp_path / "odd.csv", options, range(1, len(content) + 1))


@resumable
def same(batch: pa.Table) -> pa.Table:
    return batch


def write(path: Path, ids: range) -> None:
    path.write_text("".join(json.dumps({"id": n, "text": "x" * 90}) + "\n" for n in ids))


@pytest.mark.usefixtures("cluster")
def test_one_file_resumes_within_itself(tmp_path: Path) -> None:
    def read(split_bytes: int = 10_000, **options: Any) -> Any:
        ds = resumable_read(
            ray.data.read_json,
            str(tmp_path / "raw.jsonl"),
            checkpoint=tmp_path / "ckpt",
            granularity="split",
            split_bytes=split_bytes,
            **options,
        )
        return ds.map_batches(same, batch_format="pyarrow")

    write(tmp_path / "raw.jsonl", range(1000))
    # Half of its splits, and a worker dies.
    with kill_at("sink.before_drain"):
        half = resumable_write(read(shard=(0, 2)), tmp_path / "out")
    assert 0 < half.sources_completed < 12
    rest = resumable_write(read(), tmp_path / "out", require_complete=True)
    assert rest.sources_skipped == half.sources_completed
    assert ids_in(tmp_path / "out") == list(range(1000))
    ids = {source.source_id for source in Checkpoint(tmp_path / "ckpt").sources()}
    assert f"{tmp_path}/raw.jsonl#bytes=10000-20000" in ids
    # A shorter file has fewer splits: all are replaced, and those that are gone removed.
    write(tmp_path / "raw.jsonl", range(5000, 5300))
    resumable_write(read(), tmp_path / "out", require_complete=True)
    assert ids_in(tmp_path / "out") == list(range(5000, 5300))
    with pytest.raises(CheckpointError, match=r"of 10,000 bytes.*of 9,000 bytes"):
        resumable_write(read(9_000), tmp_path / "out")


@pytest.mark.usefixtures("cluster")
def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    def read(reader: Any, path: Path, **options: Any) -> None:
        options = {"granularity": "split", **options}
        resumable_read(reader, str(path), checkpoint=tmp_path / "ckpt", **options)

    plain, packed = tmp_path / "a.csv", tmp_path / "a.jsonl.gz"
    plain.write_text("a,b\n1,2\n")
    packed.write_bytes(gzip.compress(b'{"a": 1}\n'))
    csv_options: dict[str, Any] = {
        "newlines_in_values": {"parse_options": pyarrow.csv.ParseOptions(newlines_in_values=True)},
        "escape_char": {"parse_options": pyarrow.csv.ParseOptions(escape_char="\\")},
        "skip_rows": {"read_options": pyarrow.csv.ReadOptions(skip_rows=1)},
        "utf-16": {"read_options": pyarrow.csv.ReadOptions(encoding="utf-16")},
    }
    for words, options in csv_options.items():
        with pytest.raises(NonResumableError, match=words):
            read(ray.data.read_csv, plain, **options)
    with pytest.raises(NonResumableError, match=r"a\.jsonl\.gz is compressed"):
        read(ray.data.read_json, packed, file_extensions=None)
    with pytest.raises(NonResumableError, match="utf-16"):
        read(ray.data.read_text, plain, encoding="utf-16")
    with pytest.raises(NonResumableError, match="files of lines"):
        read(ray.data.read_binary_files, plain)
    with pytest.raises(ValueError, match="at least 1"):
        read(ray.data.read_csv, plain, split_bytes=0)
    with pytest.raises(TypeError, match="split_bytes is for"):
        read(ray.data.read_csv, plain, split_bytes=5, granularity="file")


@pytest.mark.usefixtures("cluster")
def test_large_files_alone_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_resume.read.granularity.AUTO_BYTES", 5_000)
    raw = tmp_path / "raw"
    raw.mkdir()
    write(raw / "small.jsonl", range(10))
    write(raw / "old.jsonl", range(1000, 1100))

    def read(granularity: str = "auto") -> Any:
        options: dict[str, Any] = {"split_bytes": 4_000} if granularity == "auto" else {}
        ds = resumable_read(
            ray.data.read_json,
            str(raw),
            checkpoint=tmp_path / "ckpt",
            granularity=granularity,
            file_extensions=None,
            **options,
        )
        return ds.map_batches(same, batch_format="pyarrow")

    def sources() -> set[str]:
        every = Checkpoint(tmp_path / "ckpt").sources("completed")
        return {source.source_id.removeprefix(f"{raw}/") for source in every}

    resumable_write(read("file"), tmp_path / "out", require_complete=True)
    write(raw / "large.jsonl", range(100, 200))
    (raw / "array.json").write_text(
        json.dumps([{"id": n, "text": "y" * 90} for n in range(50, 100)])
    )
    resumable_write(read(), tmp_path / "out", require_complete=True)
    # What was completed as a whole stays whole, as do arrays.
    whole = {"small.jsonl", "old.jsonl", "array.json"}
    assert whole < sources()
    assert {name.partition("#")[0] for name in sources() - whole} == {"large.jsonl"}
    assert len(sources()) == 3 + 3
    assert ids_in(tmp_path / "out") == [*range(10), *range(50, 200), *range(1000, 1100)]
    # A file that has grown is cut, and replaces what it was as a whole.
    write(raw / "small.jsonl", range(60, 10, -1))
    (raw / "array.json").unlink()
    write(raw / "array.json", range(61, 65))
    resumable_write(read(), tmp_path / "out", require_complete=True)
    assert "small.jsonl" not in sources()
    assert ids_in(tmp_path / "out") == [*range(11, 65), *range(100, 200), *range(1000, 1100)]
    with pytest.raises(CheckpointError, match="parts of large ones"):
        resumable_write(read("file"), tmp_path / "out")
