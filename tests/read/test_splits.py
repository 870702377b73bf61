"""Splits: each line of a file is read once, wherever its ranges of bytes are cut."""

from __future__ import annotations

import csv as csv_module
import gzip
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
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
    "a header of a tab": (b"\t\nx\tu\ny\tv\n", parsed(delimiter="\t")),
    "empty lines are values": (b"\na\n1\n\n2\n", parsed(ignore_empty_lines=False)),
    "names without a header": (b"1,x\n2,y\n3,z\n", {"read_options": AUTOMATIC}),
    "some columns": (b"a,b\n1,x\n2,7\n", {"convert_options": SOME}),
    "numbers that are text": (b"id\nabc\n007\n008\n", {}),
    "a mark within the file": (b"a\r\n1\r\nx\n\xef\xbb\xbf\n\xef\xbb\xbfy\n", {}),
    "two columns of a name": (b"a,a\nx,y\n1,2\n", {}),
    "numbers with and without a point": (b"a;b\n1.5;yes\n2;true\n", parsed(delimiter=";")),
}


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("name", ODD_CSV)
def test_each_cut_of_an_odd_csv_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    content, options = ODD_CSV[name]
    (tmp_path / "odd.csv").write_bytes(content)
    check_cuts(ray.data.read_csv, tmp_path / "odd.csv", options, range(1, len(content) + 1))


class Outcomes:
    """What plain Ray Data reads from a file, and what each of its splits is read as."""

    def __init__(
        self, reader: Callable[..., Any], path: Path, split_bytes: int, **options: Any
    ) -> None:
        arguments: dict[str, Any] = {"file_extensions": None, **options}
        files = DatasourceFiles.planned("name", reader, [str(path)], arguments)
        sources = list_files(LOCAL, [str(path)], extensions=None, keep=None, ignore_missing=False)
        splits = split_files(reader.__name__, arguments, files, sources, LOCAL)
        table = list_splits(sources, split_bytes)
        self.plain = self._rows(files, sources)
        self.splits = [self._rows(splits, table[n : n + 1]) for n in range(len(table))]

    @staticmethod
    def _rows(reads: Any, of: SourceTable) -> list[str] | Exception:
        tasks, _ = reads.task_factory(Selection())
        found: list[str] = []
        try:
            for task in tasks(of):
                for block in task():
                    rows: Any = BlockAccessor.for_block(block).iter_rows(public_row_format=True)
                    found += map(repr, rows)
            return found
        except Exception as error:
            return error

    @property
    def errors(self) -> list[Exception]:
        return [rows for rows in self.splits if isinstance(rows, Exception)]

    def check(self) -> None:
        """Make sure that each split has rows of the file, in order, or is refused."""
        rows = [row for rows in self.splits if not isinstance(rows, Exception) for row in rows]
        assert not isinstance(self.plain, Exception)
        if not self.errors:
            assert rows == self.plain
        assert all(isinstance(error, ResumeError) for error in self.errors)
        left = iter(self.plain)
        assert all(row in left for row in rows), "they are in no line of the file"


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("reader", [ray.data.read_csv, ray.data.read_json, ray.data.read_text])
def test_a_file_without_rows_is_what_it_is_for_plain_ray_data(reader: Any, tmp_path: Path) -> None:
    for number, content in enumerate((b"", b"\n", b"\r\n\n", b"\n\r")):
        path = tmp_path / str(number)
        path.write_bytes(content)
        for split_bytes in (1, 2, 9):
            found = Outcomes(reader, path, split_bytes)
            if isinstance(found.plain, Exception):
                assert {type(error) for error in found.errors} == {type(found.plain)}
                # Some have no beginning of a line.
                assert all(isinstance(rows, Exception) or not rows for rows in found.splits)
            else:
                found.check()


# The last ones have lines that look like rows.
LONG_VALUES = ["x\ny", "k\n1,2\n3,4\n5,6\n", '","\n","', '",\n",\n']


@pytest.mark.usefixtures("cluster")
def test_splits_within_a_quoted_value_are_refused(tmp_path: Path) -> None:
    chance = random.Random(1)
    path = tmp_path / "quoted.csv"
    refused = 0
    for _ in range(30):
        values = ["a", "007", "2.5", "", 'd "e"', "b,c", *(LONG_VALUES * chance.randint(0, 1))]
        lines = [[chance.choice(values) for _ in "ab"] for _ in range(chance.randint(2, 8))]
        with path.open("w", newline="") as file:
            csv_module.writer(file, lineterminator=chance.choice(["\n", "\r\n"])).writerows(
                [["a", "b"], *lines]
            )
        for split_bytes in (3, 7, 16):
            found = Outcomes(ray.data.read_csv, path, split_bytes)
            found.check()
            refused += bool(found.errors)
    assert 10 < refused < 60


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("indent", [None, 0, 1])
@pytest.mark.parametrize("rows", [{"id": 1, "b": {"c": 1}}, [{"id": 1}, {"id": 2}]])
def test_splits_of_a_json_document_are_refused(rows: Any, indent: int | None, path: Path) -> None:
    path.write_text(json.dumps(rows, indent=indent))
    for split_bytes in range(1, path.stat().st_size):
        found = Outcomes(ray.data.read_json, path, split_bytes)
        found.check()
        assert found.errors or (indent is None and isinstance(rows, dict))
    # In one piece, it is a file as any other.
    found = Outcomes(ray.data.read_json, path, path.stat().st_size)
    assert not found.errors
    found.check()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "document.json"


@pytest.mark.usefixtures("cluster")
def test_a_column_without_values_at_first_is_what_it_is_for_plain_ray_data(tmp_path: Path) -> None:
    """Of PyArrow's first block it has a type, and later values do not fit."""
    path = tmp_path / "late.csv"
    path.write_bytes(b"a,b\n" + b"1,\n" * 9 + b"2,x\n")
    blocks = {"read_options": pyarrow.csv.ReadOptions(block_size=16)}
    found = Outcomes(ray.data.read_csv, path, 11, **blocks)
    (error,) = found.errors
    assert type(error) is type(found.plain) is ValueError
    whole = Outcomes(ray.data.read_csv, path, 11)
    assert not whole.errors
    whole.check()


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
    lines = pyarrow.json.ParseOptions(newlines_in_values=True)
    with pytest.raises(NonResumableError, match="a value may have several lines"):
        read(ray.data.read_json, plain, file_extensions=None, parse_options=lines)
    (tmp_path / "a#rg0").write_text("a")
    with pytest.raises(NonResumableError, match=r"a#rg0 is named as a part of another file"):
        read(ray.data.read_text, tmp_path / "a#rg0", granularity="auto")
    with pytest.raises(NonResumableError, match="files of lines"):
        read(ray.data.read_binary_files, plain)
    with pytest.raises(ValueError, match="at least 1"):
        read(ray.data.read_csv, plain, split_bytes=0)
    with pytest.raises(TypeError, match="split_bytes is for"):
        read(ray.data.read_csv, plain, split_bytes=5, granularity="file")


@pytest.mark.extended
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
    # What was completed as a whole stays whole. An array can only be read from its start.
    whole = {"small.jsonl", "old.jsonl", "array.json#rows=0-10000"}
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
