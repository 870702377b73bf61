"""Files whose rows cannot be copied: they are damaged, or do not belong together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.orc
import pytest
from written_files import TEXT, TYPED, Written, written

from ray_resume.core.parts import FilePart
from ray_resume.errors import ResumeError
from ray_resume.write.folder import folder_at
from ray_resume.write.formats import checked_format
from ray_resume.write.row_copies import IncompatibleFilesError, copy_rows


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
