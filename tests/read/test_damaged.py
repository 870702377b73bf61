"""Damaged input files: named, recorded with the reader's words, counted, in no other's way."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.orc
import pytest
import ray
from ray.data import DataContext
from reader_files import write_avro, write_csv, write_image, write_orc, write_webdataset

from ray_resume import Checkpoint, resumable, resumable_read, resumable_write

pytestmark = pytest.mark.usefixtures("cluster")


@dataclass(frozen=True)
class Damage:
    """A damaged file; ``words`` are what its reader says of it."""

    name: str
    content: bytes
    words: str


def half(write: Callable[[Path, int], None], path: Path) -> bytes:
    """Return the first half of a sound file."""
    write(path, 1)
    content = path.read_bytes()
    path.unlink()
    return content[: len(content) // 2]


def cut_gzip(text: str) -> bytes:
    return gzip.compress(np.random.default_rng(1).bytes(50_000).hex().encode() + text.encode())[:-9]


def cut_tar(path: Path) -> bytes:
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("sample1.txt")
        info.size = 5_000
        tar.addfile(info, io.BytesIO(bytes(5_000)))
    content = path.read_bytes()
    path.unlink()
    return content[:3_000]


def write_json(path: Path, number: int) -> None:
    path.write_text(f'{{"id": {number}}}\n{{"id": {number + 100}}}\n')


def write_text(path: Path, number: int) -> None:
    path.write_text(f"line {number}\n")


def write_array(path: Path, number: int) -> None:
    np.save(path, np.arange(number, number + 6))


def csv_damage(_: Path) -> list[Damage]:
    return [
        Damage("00.csv", b"id,name\n1,a\n2,b,c\n", "Expected 2 columns, got 3"),
        Damage("01.csv", "id,name\n1,a\n".encode("utf-16"), "Failed to read CSV file"),
        Damage("02.csv", b"", "Empty CSV file"),
        Damage(
            "03.csv", b"id" + b"," * 12 + b"\n1" + b",x" * 12 + b"\n", 'Field "" exists 12 times'
        ),
        Damage("04.csv.gz", cut_gzip("id,name\n"), "Truncated compressed stream"),
    ]


def json_damage(_: Path) -> list[Damage]:
    return [
        Damage("00.json", b'{"id": 1}\n{"id": 2', "JSON"),
        Damage("01.json", b'{"id": 1}\n\xff\xfe\n', "codec can't decode"),
    ]


def text_damage(_: Path) -> list[Damage]:
    return [Damage("00.txt", "Käse\n".encode("latin-1"), "UnicodeDecodeError")]


def image_damage(_: Path) -> list[Damage]:
    return [Damage("00.png", b"no image", "couldn't load image file")]


def tar_damage(folder: Path) -> list[Damage]:
    return [Damage("00.tar", cut_tar(folder / "cut.tar"), "ReadError")]


def orc_damage(folder: Path) -> list[Damage]:
    return [Damage("00.orc", half(write_orc, folder / "cut.orc"), "postscript")]


def avro_damage(folder: Path) -> list[Damage]:
    return [Damage("00.avro", half(write_avro, folder / "cut.avro"), "Error")]


def array_damage(folder: Path) -> list[Damage]:
    return [Damage("00.npy", half(write_array, folder / "cut.npy"), "Error")]


READERS: dict[str, tuple[Any, Callable[[Path, int], None], Callable[[Path], list[Damage]]]] = {
    ".csv": (ray.data.read_csv, write_csv, csv_damage),
    ".json": (ray.data.read_json, write_json, json_damage),
    ".txt": (ray.data.read_text, write_text, text_damage),
    ".png": (ray.data.read_images, write_image, image_damage),
    ".tar": (ray.data.read_webdataset, write_webdataset, tar_damage),
    ".orc": (getattr(ray.data, "read_orc", None), write_orc, orc_damage),
    ".avro": (ray.data.read_avro, write_avro, avro_damage),
    ".npy": (ray.data.read_numpy, write_array, array_damage),
}
SLOW = [pytest.param(suffix, marks=pytest.mark.slow) for suffix in READERS if suffix != ".csv"]


def root_of(error: BaseException) -> type:
    return type(getattr(error, "cause", error))


@pytest.mark.parametrize("suffix", [".csv", *SLOW])
def test_damaged_files_fail_by_name_and_the_others_go_on(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, write, damage_of = READERS[suffix]
    if reader is None:
        pytest.skip("this version of Ray Data does not have the reader")
    folder = tmp_path / "in"
    folder.mkdir()
    damaged = damage_of(tmp_path)
    for damage in damaged:
        (folder / damage.name).write_bytes(damage.content)
    # Two sound ones after them, and one that comes with the second run.
    for number in (7, 8):
        write(folder / f"{number:02}{suffix}", number)

    def run() -> Any:
        # The files share read tasks.
        ds = resumable_read(
            reader,
            str(folder),
            checkpoint=tmp_path / "ckpt",
            max_failed_runs=2,
            override_num_blocks=2,
            file_extensions=None,
        )
        return resumable_write(ds, tmp_path / "out")

    # As by default, the run raises, but at its end.
    with pytest.raises(Exception, match="could not be read") as raised:
        run()
    plain: list[BaseException] = []
    for damage in damaged:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            reader(str(folder / damage.name), file_extensions=None).materialize()
        plain.append(caught.value)
    assert root_of(raised.value) in map(root_of, plain)
    assert isinstance(raised.value, root_of(raised.value))
    status = Checkpoint(tmp_path / "ckpt").status()
    assert (status.completed, status.failed) == (2, len(damaged))

    monkeypatch.setattr(DataContext.get_current(), "max_errored_blocks", -1)
    write(folder / f"09{suffix}", 9)
    summary = run()
    assert summary.sources_completed == 1
    assert summary.sources_quarantined == len(damaged)
    records = {r.source_id: r for r in Checkpoint(tmp_path / "ckpt").sources("quarantined")}
    for damage, error in zip(damaged, plain, strict=True):
        record = records[str(folder / damage.name)]
        assert record.failed_runs == 2
        assert damage.words in str(record.error)
        assert root_of(error).__name__ in str(record.error)
        assert "DataContext" not in str(record.error)

    monkeypatch.undo()
    assert run().sources_completed == 0
    # Mended, and asked for, they are read again.
    for damage in damaged:
        (folder / damage.name).unlink()
        write(folder / f"{damage.name[:2]}{suffix}", 1)
    Checkpoint(tmp_path / "ckpt").reset(state="quarantined")
    assert run().sources_completed == len(damaged)


@pytest.mark.extended
@pytest.mark.long
def test_readers_that_users_wrote_fail_alone_and_how_many_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {1, 4}

    def load(key: int) -> Any:
        yield {"id": np.array([key * 10])}
        if key in bad:
            raise KeyError(f"key {key} is not there")
        yield {"id": np.array([key * 10 + 1])}

    @resumable
    def same(batch: Any) -> Any:
        return batch

    def run(allowed: int) -> Any:
        monkeypatch.setattr(DataContext.get_current(), "max_errored_blocks", allowed)
        ds = resumable_read(
            load, keys=range(6), checkpoint=tmp_path / "ckpt", override_num_blocks=2
        )
        return resumable_write(ds.map_batches(same, batch_size=7), tmp_path / "out")

    with pytest.raises(KeyError, match=r"key [14] is not there"):
        run(1)
    with pytest.raises(ray.exceptions.RayTaskError, match="2 of 6 sources could not be read"):
        run(1)
    ids = pa.parquet.read_table(tmp_path / "out")["id"].to_pylist()
    assert sorted(ids) == [k * 10 + i for k in range(6) for i in range(2) if k not in bad]
    bad.remove(4)
    summary = run(1)
    assert (summary.sources_completed, summary.sources_quarantined) == (1, 1)
    (record,) = Checkpoint(tmp_path / "ckpt").sources("quarantined")
    assert "its reader failed after 1 row: KeyError: 'key 1 is not there'" in str(record.error)


@pytest.mark.extended
@pytest.mark.long
def test_a_reader_that_has_read_nothing_yet_does_not_quarantine(tmp_path: Path) -> None:
    """The reader or its arguments are wrong, as long as no source could be read."""
    for number in range(3):
        write_csv(tmp_path / f"in{number}.csv", number)
    files = [str(tmp_path / f"in{number}.csv") for number in range(3)]

    def run(reader: Any) -> Any:
        ds = resumable_read(
            reader,
            files,
            checkpoint=tmp_path / "ckpt",
            max_failed_runs=1,
            on_pipeline_change="continue",
            file_extensions=None,
        )
        return resumable_write(ds, tmp_path / "out")

    with pytest.raises(ray.exceptions.RayTaskError, match="3 of 3 sources could not be read"):
        run(ray.data.read_images)
    failed = list(Checkpoint(tmp_path / "ckpt").sources("failed"))
    assert [record.failed_runs for record in failed] == [0, 0, 0]
    assert run(ray.data.read_csv).sources_completed == 3
