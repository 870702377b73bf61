"""Files that are no store, or a damaged one: each is one clear error."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest
from children import run_python
from raw_store import put_block
from store_files import done

from ray_resume.checkpoint.local.lmdb_file import FORMAT_VERSION, WriterFile, read_writer
from ray_resume.errors import CheckpointError


def _garbage(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(100_000))


def _foreign(path: Path) -> None:
    with lmdb.open(str(path), subdir=False) as env, env.begin(write=True) as transaction:
        transaction.put(b"k", b"v")


def _foreign_with_our_names(path: Path) -> None:
    with lmdb.open(str(path), subdir=False, max_dbs=2) as env:
        env.open_db(b"meta"), env.open_db(b"records")


def _cut(path: Path, *, keep: float) -> None:
    writer = WriterFile.create(path.parent, path.stem, {})
    writer.commit([done(f"s{i}", size=200) for i in range(500)])
    writer.close()
    os.truncate(path, int(path.stat().st_size * keep))


def _short_value(path: Path) -> None:
    WriterFile.create(path.parent, path.stem, {}).close()
    put_block(path, b"\x01")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": Path.touch,
    "one byte": lambda path: path.write_bytes(b"x"),
    "garbage": _garbage,
    "zeros": lambda path: path.write_bytes(bytes(50_000)),
    "directory": Path.mkdir,
    "foreign": _foreign,
    "foreign, our names": _foreign_with_our_names,
    "cut in its head": lambda path: _cut(path, keep=0.02),
    "cut in half": lambda path: _cut(path, keep=0.5),
    "cut at its end": lambda path: _cut(path, keep=0.9999),
}


@pytest.mark.parametrize("live", [False, True])
def test_a_file_that_is_no_store_is_one_clear_error(tmp_path: Path, live: bool) -> None:
    paths = {damage: tmp_path / str(number) / "run.mdb" for number, damage in enumerate(DAMAGE)}
    for damage, path in paths.items():
        path.parent.mkdir()
        DAMAGE[damage](path)
    # In a process of its own: reading past the end of a file kills the one that does it.
    reader = run_python(READ, live, *paths.values())
    assert reader.returncode == 0, reader
    told = json.loads(reader.stdout)
    for (damage, path), (kind, message) in zip(paths.items(), told, strict=True):
        assert kind == "CheckpointError", (damage, message)
        assert str(path) in message, damage
        assert "Move it" in message or "restore it" in message, damage


READ = """
import json, sys
from pathlib import Path
from ray_resume.checkpoint.local.lmdb_file import read_writer

told = []
for path in sys.argv[2:]:
    try:
        read_writer(Path(path), live=sys.argv[1] == "True")
        told.append(("nothing", path))
    except Exception as error:
        told.append((type(error).__name__, str(error)))
    print(path, file=sys.stderr)
print(json.dumps(told))
"""


def test_a_value_that_is_no_block_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "run.mdb"
    _short_value(path)
    with pytest.raises(CheckpointError):
        read_writer(path, live=False)


@pytest.mark.parametrize(
    ("version", "way_out"),
    [(FORMAT_VERSION + 1, "pip install -U ray-resume"), (2, "start over with an empty checkpoint")],
)
def test_another_format_is_refused(tmp_path: Path, version: int, way_out: str) -> None:
    path = tmp_path / "run.mdb"
    WriterFile.create(tmp_path, "run", {}).close()
    with lmdb.open(str(path), subdir=False, max_dbs=2) as env:
        meta = env.open_db(b"meta")
        with env.begin(db=meta, write=True) as transaction:
            header = json.loads(transaction.get(b"header") or b"")
            header["format"] = version
            transaction.put(b"header", json.dumps(header).encode())
    with pytest.raises(CheckpointError, match=way_out) as caught:
        read_writer(path, live=False)
    assert str(path) in str(caught.value)
    assert f"format {version}" in str(caught.value)


def test_a_missing_directory_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing/run\.mdb cannot be made"):
        WriterFile.create(tmp_path / "missing", "run", {})


def test_reading_a_dead_run_leaves_the_directory_as_it_was(tmp_path: Path) -> None:
    WriterFile.create(tmp_path, "run", {}).close()
    assert os.listdir(tmp_path) == ["run.mdb"]
    read_writer(tmp_path / "run.mdb", live=False)
    assert os.listdir(tmp_path) == ["run.mdb"]
