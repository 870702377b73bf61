"""Types of columns that a copy of rows could lose, and files whose types do not fit together."""

from __future__ import annotations

import decimal
import io
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.orc
import pytest
from written_files import Written, read

from ray_resume.errors import ResumeError
from ray_resume.write.folder import folder_at
from ray_resume.write.formats import checked_format
from ray_resume.write.row_copies import IncompatibleFilesError, copy_rows

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
