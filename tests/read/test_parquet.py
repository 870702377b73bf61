"""Planning by the first files of a read; files that cannot be opened; the paths of files."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import ids_in, write_file
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.fs import FileSelector, FileSystem, LocalFileSystem
from ray.data.datasource.path_util import _resolve_paths_and_filesystem

from ray_resume import (
    Checkpoint,
    ResumeError,
    resumable,
    resumable_read,
    resumable_write,
)
from ray_resume.core.sources import SourceTable
from ray_resume.raydata.filereads import Selection, fail, row_group_of
from ray_resume.read import footers
from ray_resume.read.paths import PlainPaths, located, normalized
from ray_resume.read.workdir import local_at

HAS_SCANS = bool(ray.data.DataContext.get_current().use_datasource_v2)


def write_damaged(folder: Path) -> None:
    """Write files that cannot be opened: a cut footer, no Parquet at all, a bad length."""
    write_file(folder / "00.parquet", 0, 50)
    content = (folder / "00.parquet").read_bytes()
    (folder / "00.parquet").write_bytes(content[: len(content) // 2])
    (folder / "01.parquet").write_bytes(b"no Parquet")
    (folder / "02.parquet").write_bytes(b"PAR1 not really PAR1")


@pytest.mark.extended
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("granularity", ["file", "row_group"])
def test_files_that_cannot_be_opened_keep_no_others(tmp_path: Path, granularity: str) -> None:
    """They came first, so each run opened them to plan, and no run did anything."""
    (tmp_path / "in").mkdir()
    write_damaged(tmp_path / "in")

    def job() -> Any:
        ds = resumable_read(
            ray.data.read_parquet,
            str(tmp_path / "in"),
            checkpoint=tmp_path / "ckpt",
            granularity=granularity,
            max_failed_runs=2,
        )
        ds.context.max_errored_blocks = -1
        return resumable_write(ds.select_columns(["id"]), tmp_path / "out")

    # Nothing that can be opened: they fail, and the run ends as others do.
    summary = job()
    assert (summary.sources_total, summary.sources_failed) == (3, 3)
    for number in (3, 4):
        write_file(tmp_path / "in" / f"{number:02d}.parquet", number * 10, number * 10 + 10)
    summary = job()
    assert (summary.sources_completed, summary.sources_quarantined) == (2, 3)
    records = list(Checkpoint(tmp_path / "ckpt").sources("quarantined"))
    names = [record.source_id.rpartition("/")[2].partition("#")[0] for record in records]
    assert sorted(names) == ["00.parquet", "01.parquet", "02.parquet"]
    assert all("arquet" in str(record.error) for record in records)
    assert ids_in(tmp_path / "out") == list(range(30, 50))
    # A repaired file is read again once it was reset.
    write_file(tmp_path / "in" / "00.parquet", 0, 10)
    Checkpoint(tmp_path / "ckpt").reset(state="quarantined")
    summary = job()
    assert (summary.sources_completed, summary.sources_failed) == (1, 2)
    assert ids_in(tmp_path / "out") == [*range(10), *range(30, 50)]


@pytest.mark.extended
@pytest.mark.long
@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(not HAS_SCANS, reason="plain Ray Data itself loses the column")
def test_output_does_not_tell_where_a_run_failed(tmp_path: Path) -> None:
    """What was pending decided on the schema, so a column was lost until the first resume."""
    (tmp_path / "in").mkdir()
    for number in range(4):
        columns = {"id": [number], "text": ["t"], **({"lang": ["en"]} if number else {})}
        pq.write_table(pa.table(columns), tmp_path / "in" / f"{number}.parquet")
    paths = str(tmp_path / "in")
    options: Any = {"columns": ["id", "lang"]}

    def job(failing: set[int]) -> Any:
        @resumable(on_error="mark_failed")
        def fails(batch: Any) -> Any:
            if set(batch["id"].tolist()) & failing:
                raise RuntimeError("not yet")
            return batch

        ds = resumable_read(ray.data.read_parquet, paths, checkpoint=tmp_path / "ckpt", **options)
        return resumable_write(ds.map_batches(fails, batch_size=None), tmp_path / "out")

    assert job({2, 3}).sources_completed == 2
    assert job(set()).sources_completed == 2
    rows = [r for f in (tmp_path / "out").glob("*.parquet") for r in pq.read_table(f).to_pylist()]
    expected = ray.data.read_parquet(paths, **options).take_all()
    assert sorted(rows, key=str) == sorted(expected, key=str)


@pytest.mark.extended
@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_what_a_dataset_tells_is_what_plain_ray_data_tells(tmp_path: Path) -> None:
    inputs: dict[str, Any] = {"read_parquet": write_file, "read_csv": None, "read_images": None}
    image = pytest.importorskip("PIL.Image")
    for name in inputs:
        folder = tmp_path / name
        folder.mkdir()
        for number in range(2):
            if name == "read_parquet":
                write_file(folder / f"{number}.parquet", 0, 5)
            elif name == "read_csv":
                (folder / f"{number}.csv").write_text("id\n1\n2\n")
            else:
                image.new("L", (3, 3)).save(folder / f"{number}.png")
        plain = getattr(ray.data, name)(str(folder))
        ours = resumable_read(
            getattr(ray.data, name), str(folder), checkpoint=tmp_path / f"{name}.ckpt"
        )
        asked = ["count", "input_files", "columns", "schema", "size_bytes"]
        if not HAS_SCANS:
            asked.remove("size_bytes")
        for what in asked:
            expected, got = getattr(plain, what)(), getattr(ours, what)()
            if (name, what) == ("read_parquet", "size_bytes"):
                # It is measured, of blocks that tasks cut otherwise.
                assert expected / 1.5 < got < expected * 1.5
            else:
                assert str(got) == str(expected), (name, what)
        assert str(ours.schema(fetch_if_missing=False)) == str(
            plain.schema(fetch_if_missing=False)
        ), name


@pytest.mark.parametrize("reader", ["read_parquet", "read_csv", "read_text"])
@pytest.mark.usefixtures("cluster")
def test_relative_paths_mean_the_same_on_every_worker(
    reader: str, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "in" / "k=1").mkdir(parents=True)
    suffix = reader.removeprefix("read_")
    if reader == "read_parquet":
        write_file(tmp_path / "in" / "k=1" / "a.parquet", 0, 2)
    else:
        (tmp_path / "in" / "k=1" / f"a.{suffix}").write_text("id\n0\n1\n")
    options: Any = {"file_extensions": [suffix]} if reader != "read_text" else {}
    monkeypatch.chdir(tmp_path)
    ds = resumable_read(
        getattr(ray.data, reader), "./in/", checkpoint="ckpt", include_paths=True, **options
    )
    reading: Any = ds._logical_plan.dag
    reading = reading.datasource.input
    assert list(reading.sources.ids()) == [str(tmp_path / "in" / "k=1" / f"a.{suffix}")]
    # A worker has another working directory.
    monkeypatch.chdir("/")
    tasks, _ = reading.open(reading.sources, Selection(), ds.context)
    dumps: Any = ray.cloudpickle.dumps
    (task,) = pickle.loads(dumps(tasks(range(1))))(reading.sources.packed())
    tables = [pa.table(block) if isinstance(block, dict) else block for block in task()]
    assert {path for table in tables for path in table.column("path").to_pylist()} == {
        f"./in/k=1/a.{suffix}"
        if reader != "read_parquet" or HAS_SCANS
        else str(tmp_path / "in" / "k=1" / f"a.{suffix}")
    }
    assert not reading.change_check()(reading.sources[0])
    (tmp_path / "in" / "k=1" / f"a.{suffix}").write_text("other")
    assert reading.change_check()(reading.sources[0])


def test_a_footer_that_cannot_be_read_is_a_source_that_fails(tmp_path: Path) -> None:
    write_damaged(tmp_path)
    write_file(tmp_path / "03.parquet", 0, 10)
    (tmp_path / "04.parquet").touch()
    names = sorted(map(str, tmp_path.iterdir()))
    sizes = [os.path.getsize(name) for name in names]
    files = SourceTable.of_files(names, sizes, [1] * len(names))
    groups = footers.list_row_groups(LocalFileSystem(), files)
    assert [name.rpartition("/")[2] for name in groups.ids()] == [
        *(f"0{number}.parquet#rg0" for number in range(4)),
    ]
    assert [type(source.item[1]).__name__ for source in groups] == ["Unreadable"] * 3 + ["int"]
    assert footers.readable(LocalFileSystem(), names, 16) == [names[3]]
    # All of the first ones are damaged: the next ones count.
    assert footers.readable(LocalFileSystem(), names, 2) == [names[3]]
    assert footers.readable(LocalFileSystem(), names[:3], 2) == []
    path, reason = row_group_of(groups[0])
    with pytest.raises(ResumeError, match=r"footer of .*00\.parquet could not be read"):
        fail(path, reason)


def test_a_busy_store_is_asked_again_for_a_footer(tmp_path: Path, monkeypatch: Any) -> None:
    write_file(tmp_path / "a.parquet", 0, 10)
    filesystem = local_at(str(tmp_path))
    answers = iter([OSError("AWS Error SLOW_DOWN"), OSError("AWS Error SLOW_DOWN")])
    opened = filesystem.handler.open_input_file

    def busy(path: str) -> Any:
        for error in answers:
            raise error
        return opened(path)

    monkeypatch.setattr(filesystem.handler, "open_input_file", busy)
    monkeypatch.setattr(footers, "_RETRY_DELAYS_S", (0.0, 0.0))
    assert footers.readable(filesystem, ["a.parquet"], 16) == ["a.parquet"]


def test_ways_up_from_links_and_from_what_is_missing(tmp_path: Path, monkeypatch: Any) -> None:
    for folder in ("in", "sub", "other/in", "other/deep"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to("other/deep")
    monkeypatch.chdir(tmp_path)
    for given_, root, opened in (
        ("sub/../in", "in", "sub/../in"),
        # The system does not go up from a folder that is missing.
        ("x/../in", "in", "in"),
        ("sub/x/../../in", "in", "in"),
        # From a link, it goes up from the link's target.
        ("link/../in", "other/in", "link/../in"),
        ("link/..", "other", "link/.."),
        (f"{tmp_path}/link/../in", "other/in", f"{tmp_path}/link/../in"),
    ):
        filesystem, paths = located(given_, None)
        assert paths == [opened]
        assert normalized(filesystem, paths)[1] == [str(tmp_path / root)]
        assert Path(opened).samefile(root)


parts = st.sampled_from(["a", "b", "..", ".", "ü"])
spellings = st.builds(
    lambda start, inside, end: f"{start}{'/'.join(inside)}{end}",
    st.sampled_from(["", "./", "/", "//"]),
    st.lists(parts, min_size=1, max_size=3),
    st.sampled_from(["", "/", "//"]),
)


@given(st.lists(spellings, min_size=1, max_size=3))
def test_files_have_the_paths_that_plain_ray_data_has(given_: list[str]) -> None:
    resolved, filesystem = _resolve_paths_and_filesystem(given_, None)
    roots = tuple(os.path.abspath(path).replace("//", "/") for path in resolved)
    inside = ["x.csv", "d/y.csv"]
    listed = [f"{root.rstrip('/')}/{name}" for root in roots for name in inside]
    plain = [
        f"{path if path.endswith('/') else f'{path}/'}{name}"
        for path in resolved
        for name in inside
    ]
    plain_paths = PlainPaths(roots, tuple(resolved))
    if len(set(roots)) == len(roots) and not _nested(roots):
        assert plain_paths.of(listed) == plain
        table = SourceTable.of_files(listed, [1] * len(listed), [1] * len(listed))
        found = table.found_by(plain_paths.items(table.ids()))
        assert [source.item for source in found] == plain
        assert list(found.ids()) == listed
        assert [source.item for source in pickle.loads(pickle.dumps(found[1:]))] == plain[1:]
        if plain_paths.is_identity:
            assert listed == plain
    assert isinstance(filesystem, FileSystem)


def _nested(roots: Iterable[str]) -> bool:
    folders = [f"{root.rstrip('/')}/" for root in roots]
    return any(a != b and a.startswith(b) for a in folders for b in folders)


def test_items_stay_the_same_when_ids_become_relative() -> None:
    table = SourceTable.of_files(["/data/in/a", "/data/in/b/c"], [1, 2], [1, 2])
    for plain_paths in (PlainPaths(("/data/in",), ("in",)), PlainPaths(("/data/in",), ("x//in/",))):
        found = table.found_by(plain_paths.items(table.ids()))
        items = [source.item for source in found]
        assert items == plain_paths.of(table.ids())
        for base in ("/", "/data/", "/data/in/"):
            assert [source.item for source in found.relative_to(base)] == items


def test_a_local_file_system_at_a_folder(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_text("x")
    there = pickle.loads(pickle.dumps(local_at(str(tmp_path))))
    assert there == local_at(str(tmp_path))
    assert [info.path for info in there.get_file_info(FileSelector("d"))] == ["d/a"]
    assert there.open_input_stream("d/a").read() == b"x"
    assert there.get_file_info(str(tmp_path / "d" / "a")).size == 1
    with pytest.raises(NotImplementedError):
        there.delete_file("d/a")
