"""Formats of which a file cannot hold any rows: WebDataset shards, NumPy files."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from conftest import write_source
from divided_outputs import checked_files
from ray.data.block import BlockAccessor

from ray_resume import Checkpoint, ResumeError, resumable, resumable_read
from ray_resume import resumable_write as write
from ray_resume.core.filenames import OutputName, stem_of
from ray_resume.core.parts import FilePart
from ray_resume.write import array_files, line_files, sample_files
from ray_resume.write.folder import folder_at
from ray_resume.write.formats import checked_format
from ray_resume.write.layout import Layout
from ray_resume.write.new_files import UnwritableRowsError
from ray_resume.write.row_copies import IncompatibleFilesError, copy_rows
from ray_resume.write.source_rows import SourceRows

Members = list[tuple[str, bytes, int, str, str]]

PICTURE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
SAMPLES = pa.table(
    {
        "__key__": ["0001", "folder.d/0002", "é" * 60, "k" * 150, "5"],
        "__url__": ["ignored"] * 5,
        "caption.txt": ["a\nb", "", "ü", "é" * 700, "end"],
        "cls": [1, 2, 3, 4, 5],
        "raw": [b"x" * 512, None, b"", b"y" * 513, b"z" * 5000],
        "json": [{"a": [1], "b": None}] * 5,
    }
)


def table_of(columns: dict[str, Any]) -> pa.Table:
    return BlockAccessor.for_block(BlockAccessor.batch_to_arrow_block(columns)).to_arrow()


def files_of(table: pa.Table, name: str, **options: Any) -> list[tuple[int, bytes]]:
    """Return the rows and the content of each file that a table is written to."""
    found = []
    for new in checked_format(name, options).files_of(table):
        file = io.BytesIO()
        new.write(file)
        found.append((new.rows, file.getvalue()))
    return found


def members(content: bytes) -> Members:
    found = []
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for entry in tar:
            file = tar.extractfile(entry)
            assert file is not None
            found.append((entry.name, file.read(), entry.mode, entry.uname, entry.gname))
    return found


def by_ray(datasink: type[Any], table: pa.Table, **attributes: Any) -> bytes:
    sink = object.__new__(datasink)
    vars(sink).update(attributes)
    file = io.BytesIO()
    sink.write_block_to_file(BlockAccessor.for_block(table), file)
    return file.getvalue()


@pytest.mark.parametrize("encoder", [True, None, lambda row: {**row, "more": b"1"}, [True, dict]])
def test_a_shard_has_the_members_that_plain_ray_data_writes(encoder: Any) -> None:
    from ray.data._internal.datasource.webdataset_datasink import WebDatasetDatasink

    table = SAMPLES if encoder in (True, [True, dict]) else SAMPLES.drop_columns(["cls", "json"])
    if encoder is True:
        pictures = table_of({"png": np.stack([PICTURE] * 5), "npy": np.arange(10).reshape(5, 2)})
        for name in pictures.column_names:
            table = table.append_column(pictures.schema.field(name), pictures.column(name))
    ((rows, content),) = files_of(table, "webdataset", encoder=encoder)
    assert rows == 5
    assert len(content) % tarfile.RECORDSIZE == 0
    assert members(content) == members(by_ray(WebDatasetDatasink, table, encoder=encoder))


def test_no_shard_has_a_key_twice() -> None:
    table = pa.table({"__key__": list("abcabdd"), "n": [str(i) for i in range(7)]})
    found = files_of(table, "webdataset")
    assert [rows for rows, _ in found] == [3, 3, 1]
    assert [m[:2] for _, content in found for m in members(content)] == [
        (f"{key}.n", b"%d" % i) for i, key in enumerate("abcabdd")
    ]
    assert [rows for rows, _ in files_of(table, "webdataset", max_rows_per_file=2)] == [2, 2, 2, 1]
    # Rows without a key get one.
    ((rows, content),) = files_of(table.drop_columns(["__key__"]), "webdataset")
    assert (rows, len({name for name, *_ in members(content)})) == (7, 7)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"__key__": ["v1.1", "v1.2"], "n": [b"1", b"2"]}, r"join the rows 'v1.1' and 'v1.2'"),
        ({"__key__": ["a"], "n": pa.nulls(1, pa.binary())}, "all its values are null"),
        ({"__key__": [".a"], "n": [b"1"]}, "would not find all members"),
        ({"__key__": ["a\0b"], "n": [b"1"]}, "would not find all members"),
        ({"__key__": ["a"], "n": [b"1"], "x/y": [b"1"]}, "would not find all members"),
        ({"__key__": ["a"], "n": [1]}, r"'n' of the row 'a' has a value of type int"),
        ({"__key__": ["a", "b"], "txt": ["x", None]}, r"The row 'b' cannot be encoded \(Attr"),
        ({"npy": [[1], [2]], "png": [b"1", None]}, r"Row 0 cannot be encoded \("),
    ],
)
def test_rows_that_a_shard_cannot_hold(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UnwritableRowsError, match=message):
        files_of(pa.table(columns), "webdataset")


def test_what_is_no_image_and_what_an_encoder_of_the_users_raises() -> None:
    for values in (["text"], [[0.5, 0.5]], [None]):
        with pytest.raises(UnwritableRowsError, match=r"column 'x' of row 0 cannot be encoded"):
            files_of(pa.table({"x": values}), "images", column="x")
    # Their code has a fault, perhaps, so the job ends as it would in a UDF.
    with pytest.raises(ZeroDivisionError):
        files_of(SAMPLES, "webdataset", encoder=lambda row: {"x": 1 // 0})


ARRAYS = {
    "numbers": np.arange(9),
    "half": np.arange(9, dtype=np.float16),
    "bools": np.arange(9) % 2 == 0,
    "times": np.arange(9).astype("M8[us]"),
    "images": np.arange(9 * 12, dtype=np.uint8).reshape(9, 2, 2, 3),
    "by columns": np.asfortranarray(np.arange(27.0).reshape(9, 3)),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_file_has_the_bytes_that_plain_ray_data_writes(name: str) -> None:
    from ray.data._internal.datasource.numpy_datasink import NumpyDatasink

    table = table_of({"x": ARRAYS[name], "other": np.arange(9)})
    assert files_of(table, "numpy", column="x") == [(9, by_ray(NumpyDatasink, table, column="x"))]


def test_an_array_file_has_rows_of_one_shape() -> None:
    ragged = np.empty(5, object)
    ragged[:] = [np.full(shape, i) for i, shape in enumerate([(2,), (2,), (3,), (2, 2), (2, 2)])]
    found = files_of(table_of({"x": ragged}), "numpy", column="x")
    arrays = [np.load(io.BytesIO(content)) for _, content in found]
    assert [rows for rows, _ in found] == [2, 1, 2]
    assert [array.tolist() for array in arrays] == [
        [[0, 0], [1, 1]],
        [[2, 2, 2]],
        [[[3, 3], [3, 3]], [[4, 4], [4, 4]]],
    ]
    every: list[list[Any]] = [["a"], [None, b"x"], [{"a": 1}], [True, None], [["a", "b"]]]
    for objects in every:
        with pytest.raises(UnwritableRowsError, match=r"'x' are objects to NumPy"):
            files_of(pa.table({"x": objects}), "numpy", column="x")
    with pytest.raises(UnwritableRowsError, match=r"writes the column 'y', and rows have .* x"):
        files_of(pa.table({"x": [1]}), "numpy", column="y")


def test_parts_say_where_the_rows_of_each_source_are(tmp_path: Path) -> None:
    table = table_of({"__key__": list("abcab"), "n": list("vwxyz")})
    pictures = table_of({"x": np.stack([PICTURE + i for i in range(5)])})
    table = table.append_column(pictures.schema.field("x"), pictures.column("x"))
    sources = np.array([1, 1, 4, 4, 7], np.int32)
    rows = SourceRows.of(table, sources, np.arange(5, dtype=np.uint64))
    folder = folder_at(tmp_path)
    for name, options, expected in (
        ("webdataset", {"encoder": lambda row: {**row, "x": None}}, [[0, 1, 2], [3, 4]]),
        ("numpy", {"column": "x"}, [[0, 1, 2, 3, 4]]),
        ("numpy", {"column": "x", "max_rows_per_file": 2}, [[0, 1], [2, 3], [4]]),
        ("images", {"column": "x", "name_column": "n"}, [[0], [1], [2], [3], [4]]),
    ):
        layout = Layout(checked_format(name, options))
        parts = layout.write_files(folder, "0" * 8 + "-" + "1" * 12, None, rows)
        files = list(dict.fromkeys(part.file for some in parts.values() for part in some))
        found: list[list[int]] = [[] for _ in files]
        for source, some in parts.items():
            for part in some:
                file = files.index(part.file)
                assert part.file_rows == len(expected[file])
                places = expected[file][part.first_row : part.first_row + part.rows]
                assert set(sources[places].tolist()) == {source}
                found[file] += places
                assert name != "images" or part.file.endswith(f"~{'vwxyz'[places[0]]}.png")
        assert found == expected
        assert set(files) == set(folder.list_files())
        for file_name in files:
            folder.remove(file_name)


# Copies -------------------------------------------------------------------------------------------


def shard(seed: int, rows: int) -> tuple[bytes, list[Members]]:
    chosen = random.Random(seed)
    columns: dict[str, list[Any]] = {
        "__key__": [f"{seed}/{'é' * chosen.choice([0, 1, 60])}{i}" for i in range(rows)],
        "a": [chosen.choice([b"", b"a" * 511, b"b" * 1536]) for _ in range(rows)],
        "b.c": [chosen.choice([None, "", "text", "ü" * 2000]) for _ in range(rows)],
    }
    ((_, content),) = files_of(pa.table(columns), "webdataset")
    every = members(content)
    keys = map(str, columns["__key__"])
    return content, [[one for one in every if one[0].startswith(f"{key}.")] for key in keys]


def array_file(seed: int, rows: int, shape: tuple[int, ...] = (3, 2)) -> tuple[bytes, list[Any]]:
    array = np.random.default_rng(seed).integers(0, 99, (rows, *shape))
    ((_, content),) = files_of(table_of({"x": array}), "numpy", column="x")
    return content, array.tolist()


MAKE: dict[str, Callable[..., tuple[bytes, list[Any]]]] = {"tar": shard, "npy": array_file}


def content_of(ending: str, rows: list[Any]) -> list[Any]:
    return [member for row in rows for member in row] if ending == "tar" else rows


def read_back(ending: str, path: Path) -> list[Any]:
    return members(path.read_bytes()) if ending == "tar" else np.load(path).tolist()


@pytest.mark.parametrize("ending", MAKE)
@pytest.mark.parametrize("chunk_bytes", [512, 1 << 20])
def test_copies_have_the_rows_and_no_others(
    ending: str, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_files, "_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(array_files, "_CHUNK_BYTES", chunk_bytes)
    folder = folder_at(tmp_path)
    files = [MAKE[ending](seed, rows) for seed, rows in enumerate((1, 17, 40))]
    for i, (content, _) in enumerate(files):
        (tmp_path / f"{i}.{ending}").write_bytes(content)
    chosen = random.Random(0)
    for attempt in range(20):
        parts, expected = [], []
        for i in chosen.sample(range(3), chosen.randint(1, 3)):
            rows = files[i][1]
            cuts = sorted(chosen.sample(range(len(rows) + 1), min(4, len(rows) + 1)))
            pairs = list(zip(cuts[::2], cuts[1::2], strict=False))
            chosen.shuffle(pairs)
            for first, stop in pairs:
                parts.append(FilePart(f"{i}.{ending}", first, stop - first, len(rows)))
                expected += rows[first:stop]
        name = f"new{attempt}.{ending}"
        copy_rows(folder, parts, name)
        assert read_back(ending, tmp_path / name) == content_of(ending, expected)
        # It can be copied again.
        whole = FilePart(name, 0, len(expected), len(expected))
        copy_rows(folder, [whole], f"again.{ending}")
        assert (tmp_path / f"again.{ending}").read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("ending", MAKE)
def test_damaged_files_are_not_copied(ending: str, tmp_path: Path) -> None:
    content, rows = MAKE[ending](1, 3)
    path = tmp_path / f"old.{ending}"
    part = FilePart(path.name, 0, 1, len(rows))
    end = content.rindex(content.rstrip(b"\0")[-1:]) + 1 if ending == "tar" else len(content)
    for size in range(0, end, 128 if ending == "tar" else 7):
        path.write_bytes(content[:size])
        with pytest.raises(ResumeError, match="cannot be copied"):
            copy_rows(folder_at(tmp_path), [part], f"new.{ending}")
    path.write_bytes(content)
    for other in (part._replace(file_rows=2), part._replace(file_rows=4)):
        with pytest.raises(ResumeError, match="it has 3 rows"):
            copy_rows(folder_at(tmp_path), [other], f"new.{ending}")
    assert not (tmp_path / f"new.{ending}").exists()


def test_a_shard_that_was_cut_off_between_members_is_not_copied(tmp_path: Path) -> None:
    table = pa.table({"__key__": ["a", "b"], "x": [b"1", b"2"], "y": [b"3", b"4"]})
    ((_, content),) = files_of(table, "webdataset")
    # One member takes two blocks; without its end, the file would have two rows as well.
    (tmp_path / "old.tar").write_bytes(content[: 3 * 1024])
    with pytest.raises(ResumeError, match="it has no end"):
        copy_rows(folder_at(tmp_path), [FilePart("old.tar", 0, 1, 2)], "new.tar")


def test_files_that_cannot_become_one(tmp_path: Path) -> None:
    folder = folder_at(tmp_path)
    for i in (0, 1):
        (tmp_path / f"{i}.tar").write_bytes(shard(7, 2)[0])
        (tmp_path / f"{i}.npy").write_bytes(array_file(7, 2, (2 + i,))[0])
    for ending, message in (
        ("tar", r"0.tar and .*1.tar both have a row with the key"),
        ("npy", r"rows of int64 of the shape \(2,\) and of int64 of the shape \(3,\)"),
    ):
        parts = [FilePart(f"{i}.{ending}", 0, 1, 2) for i in (0, 1)]
        with pytest.raises(IncompatibleFilesError, match=message):
            copy_rows(folder, parts, f"new.{ending}")
        copy_rows(folder, parts[:1], f"new.{ending}")
    # The keys of rows that are not copied do not matter.
    copy_rows(folder, [FilePart("0.tar", 0, 1, 2), FilePart("1.tar", 1, 1, 2)], "both.tar")


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "old.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ResumeError, match="not written by ray_resume"):
        copy_rows(folder_at(tmp_path), [FilePart("old.npy", 0, 1, 1)], "new.npy")


def test_images_are_files_of_one_row_with_its_name(tmp_path: Path) -> None:
    from ray.data._internal.datasource.image_datasink import ImageDatasink

    pictures = np.stack([PICTURE, PICTURE + 100])
    table = table_of({"x": pictures}).append_column("id", pa.array(["a/é .~b" * 30, None]))
    new = list(checked_format("images", {"column": "x", "name_column": "id"}).files_of(table))
    assert [one.rows for one in new] == [1, 1]
    sink = object.__new__(ImageDatasink)
    sink.column, sink.file_format = "x", "png"
    for one, picture in zip(new, pictures, strict=True):
        files: list[Any] = [io.BytesIO(), io.BytesIO()]
        one.write(files[0])
        sink.write_row_to_file({"x": picture}, files[1])
        assert files[0].getvalue() == files[1].getvalue()

    names = [f"{stem_of('0' * 8 + '-' + '1' * 12, None, label=one.label)}.png" for one in new]
    assert "~a%2F%C3%A9%20%2E%7Eb" in names[0]
    assert "~" not in names[1]
    for name in (*names, f".{names[0]}"):
        parsed = OutputName.parse(name)
        assert parsed is not None
        assert (parsed.checkpoint, parsed.run_id) == ("0" * 8, "1" * 12)
    assert len(names[0]) < 200
    # A name that a user made of one of ours.
    assert OutputName.parse(names[0].replace("~a", "~a b")) is None

    with pytest.raises(IncompatibleFilesError, match="has one image, and no file holds"):
        copy_rows(folder_at(tmp_path), [FilePart(name, 0, 1, 1) for name in names], "new.png")
    with pytest.raises(UnwritableRowsError, match="needs the column 'y'"):
        files_of(table, "images", column="y")


def records(lengths: list[int]) -> tuple[bytes, list[bytes]]:
    """Make TFRecords; their checksums are not looked at."""
    rows = [
        b"".join([length.to_bytes(8, "little"), b"HEAD", bytes([i]) * length, b"TAIL"])
        for i, length in enumerate(lengths)
    ]
    return b"".join(rows), rows


@pytest.mark.slow
def test_tfrecords_have_the_bytes_that_plain_ray_data_writes() -> None:
    from ray.data._internal.datasource.tfrecords_datasink import TFRecordDatasink

    table = pa.table({"id": [1, 2], "text": ["", "é"], "raw": [b"", b"x" * 999], "l": [[0.5], []]})
    assert files_of(table, "tfrecords") == [(2, by_ray(TFRecordDatasink, table, tf_schema=None))]


def test_tfrecords_are_copied_record_by_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_files, "_CHUNK_BYTES", 64)
    content, rows = records([0, 1, 500, 10, 10, 3, 70])
    folder, path = folder_at(tmp_path), tmp_path / "old.tfrecords"
    path.write_bytes(content)
    for first in range(7):
        for stop in range(first + 1, 8):
            copy_rows(folder, [FilePart(path.name, first, stop - first, 7)], "new.tfrecords")
            assert (tmp_path / "new.tfrecords").read_bytes() == b"".join(rows[first:stop])
    some = [FilePart(path.name, first, 1, 7) for first in (5, 0, 2)]
    copy_rows(folder, some, "new.tfrecords")
    assert (tmp_path / "new.tfrecords").read_bytes() == rows[5] + rows[0] + rows[2]
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(ResumeError, match=r"cut off|it has \d rows, and 7 were written"):
            copy_rows(folder, some, "new.tfrecords")


def test_options_that_are_refused() -> None:
    for name, options, message in (
        ("numpy", {}, "format='numpy' needs column="),
        ("numpy", {"column": "x", "encoder": True}, "not written with: encoder. They take column"),
        ("webdataset", {"compression": "gzip"}, "not written with: compression"),
        ("webdataset", {"arrow_open_stream_args": {"compression": "gzip"}}, "compressed webdatas"),
        ("webdataset", {"max_rows_per_file": 0}, "at least 1"),
        ("images", {"column": "x", "max_rows_per_file": 2}, "a file of its own"),
        ("images", {"column": "x", "file_format": "jp2"}, "one of png, jpeg"),
    ):
        with pytest.raises(ValueError, match=message):
            checked_format(name, options)
    with pytest.raises(TypeError, match="takes no filename_provider"):
        checked_format("webdataset", {"filename_provider": object()})


# On a cluster -------------------------------------------------------------------------------------

ROWS = 5


@pytest.mark.extended
@pytest.mark.usefixtures("cluster")
def test_a_source_with_a_row_that_a_shard_cannot_hold_fails_alone(tmp_path: Path) -> None:
    @resumable
    def keyed(batch: Any) -> Any:
        keys = [f"{'.' * int(i == 7)}{i}" for i in batch["id"]]
        return {"__key__": np.array(keys), "cls": batch["id"]}

    write_source(tmp_path / "in", files=4, rows=ROWS)
    ds = resumable_read(
        ray.data.read_parquet,
        str(tmp_path / "in"),
        checkpoint=tmp_path / "ckpt",
        override_num_blocks=1,
    ).map_batches(keyed)
    summary = write(ds, tmp_path / "out", format="webdataset")
    assert (summary.sources_completed, summary.sources_failed) == (3, 1)
    (failed,) = Checkpoint(tmp_path / "ckpt").sources("failed")
    assert failed.source_id.endswith("00001.parquet")
    assert "would not find all members of the row '.7'" in str(failed.error)
    found = [name for path in checked_files(tmp_path) for name, *_ in members(path.read_bytes())]
    assert sorted(found) == sorted(f"{i}.cls" for i in range(20) if i // ROWS != 1)
