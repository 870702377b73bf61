"""Sources that are gone, called otherwise or rewritten: the same rows are never there twice."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import ids_in, write_file, write_source
from pyarrow.fs import LocalFileSystem
from snapshots import snapshot_of, whole_files

from ray_resume import (
    Checkpoint,
    CheckpointError,
    NonResumableError,
    RunSummary,
    SourceChangedError,
    resumable_read,
    resumable_write,
)
from ray_resume.core.digests import source_digest
from ray_resume.core.gone import Gone, gone_from, judge_gone, same_files
from ray_resume.core.identity import HEADER_KEY, ids_of, part_file, refuse_other_ids
from ray_resume.core.records import Fingerprint, Record, State
from ray_resume.core.shards import Shard
from ray_resume.core.snapshot import Snapshot
from ray_resume.core.sources import Source, SourceTable
from ray_resume.read.footers import list_row_groups
from ray_resume.read.listing import list_files

# The rules ----------------------------------------------------------------------------------------

RUN = "0123456789ab"
LOOK = Fingerprint(100, 1_700_000_000_123_456_789)


def union_of(*records: Record) -> Snapshot:
    return snapshot_of({RUN: records})


def done(source_id: str, fingerprint: Fingerprint = LOOK, **values: Any) -> Record:
    return Record(source_id, State.COMPLETED, 1, RUN, fingerprint=fingerprint, **values)


def listing(*ids: str, fingerprint: Fingerprint = LOOK) -> SourceTable:
    return SourceTable.of(Source(name, name, fingerprint) for name in ids)


def judged(snapshot: Snapshot, listed: SourceTable, policy: str | None) -> str | None:
    gone = gone_from(snapshot, listed, remove=policy == "remove")
    return judge_gone(snapshot, gone, listed, policy, "/ckpt")


def test_some_that_are_gone_are_told_or_refused() -> None:
    snapshot = union_of(done("/d/a"), done("/d/b"))
    for policy in (None, "keep"):
        told = str(judged(snapshot, listing("/d/b", "/d/c"), policy))
        assert "1 completed sources are not in the input any more, /d/a for one" in told
    with pytest.raises(SourceChangedError, match=r"1 completed sources .* /d/a for one"):
        judged(snapshot, listing("/d/b"), "error")
    assert "Their output is removed" in str(judged(snapshot, listing("/d/b"), "remove"))
    for policy in (None, "keep", "remove", "error"):
        assert judged(snapshot, listing("/d/a", "/d/b", "/d/c"), policy) is None


def test_output_files_of_another_pipeline_are_told_apart() -> None:
    files = [f"/mid/aaaaaaaa-{RUN}-{0:016x}-{n:016x}.parquet" for n in range(2)]
    told = str(judged(union_of(*map(done, files)), listing(files[0]), None))
    assert "output files of another resumable pipeline" in told
    assert "Checkpoint(...)" in told
    told = str(judged(union_of(done("/d/a"), done("/d/b")), listing("/d/b"), None))
    assert "pipeline" not in told


def test_another_input_is_an_error_that_shows_an_old_and_a_new_id() -> None:
    snapshot = union_of(done("/d/a"), Record("/d/f", State.FAILED, 2, RUN))
    with pytest.raises(SourceChangedError) as caught:
        judged(snapshot, listing("/other/x"), None)
    for word in ("/d/a", "/other/x", "/ckpt", '"keep"', '"remove"'):
        assert word in str(caught.value)
    assert "/d/a for one" in str(judged(snapshot, listing("/other/x"), "keep"))
    # A source that failed before says that it is the same input; an empty one brings no rows.
    assert judged(snapshot, listing("/d/f"), None) is not None
    assert judged(snapshot, listing(), None) is not None


def test_the_same_file_under_another_path_is_known_by_its_looks() -> None:
    snapshot = union_of(done("/mnt/one/a"), done("/mnt/one/b"))
    with pytest.raises(SourceChangedError, match=r"(?s)/mnt/one/a.*/mnt/two/a"):
        judged(snapshot, listing("/mnt/one/b", "/mnt/two/a"), None)
    for other in ("/mnt/two/c", "/mnt/two/b"):  # another name; one that is still there
        assert judged(snapshot, listing("/mnt/one/b", other), None) is not None
    other_look = listing("/mnt/two/a", fingerprint=Fingerprint(100, 5))
    gone = gone_from(snapshot, other_look)
    assert same_files(snapshot, gone.sources, other_look) == []
    moved = listing("/mnt/two/a", "/x/b")
    assert same_files(snapshot, gone_from(snapshot, moved).sources, moved) == [
        ("/mnt/one/a", "/mnt/two/a"),
        ("/mnt/one/b", "/x/b"),
    ]


def test_what_failed_or_was_reset_and_has_output_goes_too_and_only_from_its_share() -> None:
    file = f"aaaaaaaa-{RUN}-{source_digest('r')[:8].hex()}-0123456789abcdef.parquet"
    snapshot = union_of(
        Record("r", State.RESET, 1, RUN, parts=whole_files(file)),
        Record("s", State.FAILED, 2, RUN, error="boom", parts=whole_files(file, "x")),
        Record("t", State.RESET, 3, RUN),
        Record("u", State.FAILED, 4, RUN, error="boom"),
        *(done(f"v{number}") for number in range(20)),
    )
    removed = set()
    for index in range(3):
        share = Shard(index, 3)
        gone = gone_from(snapshot, listing(), share=share, remove=True)
        own = {snapshot.record(row).source_id for row in gone.removed(snapshot).tolist()}
        assert all(map(share.holds, own))
        removed |= own
    assert removed == {"r", "s", "u", *(f"v{number}" for number in range(20))}
    assert len(Gone(gone.sources).removed(snapshot)) == 0
    kept = gone_from(snapshot, listing()).sources.tolist()
    assert "u" not in {snapshot.record(row).source_id for row in kept}


def test_other_ids_are_refused_while_output_of_the_old_ones_is_there() -> None:
    headers = {RUN: {HEADER_KEY: ids_of("file")}, "ffffffffffff": {}}
    snapshot = union_of(done("/d/a"))
    refuse_other_ids(snapshot, headers, ids_of("file"), "/ckpt")
    for other in (ids_of("row_group"), ids_of("file", relative=True), ids_of("key")):
        with pytest.raises(CheckpointError, match=r"the paths of files .*/d/a for one"):
            refuse_other_ids(snapshot, headers, other, "/ckpt")
        refuse_other_ids(snapshot, {}, other, "/ckpt")  # of a version that did not note it
        bare = union_of(Record("/d/a", State.FAILED, 1, RUN, error="boom"))
        refuse_other_ids(bare, headers, other, "/ckpt")
    several = union_of(
        Record("a", State.RESET, 1, RUN, parts=whole_files("x.parquet", "y.parquet"))
    )
    reset = {RUN: {HEADER_KEY: [ids_of("file"), ids_of("key")]}}
    with pytest.raises(CheckpointError, match="keys"):
        refuse_other_ids(several, reset, ids_of("file"), "/ckpt")


def test_row_groups_are_known_by_their_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": range(5)}), tmp_path / "a#rg1.parquet", row_group_size=2)
    filesystem = LocalFileSystem()
    files = list_files(
        filesystem, [str(tmp_path)], extensions=None, keep=None, ignore_missing=False
    )
    groups = list_row_groups(filesystem, files)
    for relative in (False, True):
        ids = ids_of("row_group", relative=relative)
        assert {part_file(ids, name) for name in groups.ids()} == set(files.ids())
        assert part_file(ids, "no group") is None
    assert part_file(ids_of("file"), "a#rg1") is None


# Jobs ---------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_source(tmp_path / "in", files=3, rows=5)
    return tmp_path / "in"


def run(source: Any, append: bool = False, target: int | None = None, **options: Any) -> RunSummary:
    home = Path(os.fspath(source)).parent
    options = {"checkpoint": home / "ckpt", **options}
    ds = resumable_read(ray.data.read_parquet, os.fspath(source), **options)
    return resumable_write(ds, home / "out", append=append, target_file_bytes=target)


def assert_output(folder: Path, ids: Any) -> None:
    """The output has ``ids``, each once, and nothing that the checkpoint does not list."""
    checkpoint = Checkpoint(folder / "ckpt")
    assert ids_in(folder / "out") == sorted(ids)
    assert checkpoint.files() == sorted(map(str, (folder / "out").iterdir()))
    assert checkpoint.check(), checkpoint.check()


@pytest.mark.extended
@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_a_file_that_is_rewritten_with_fewer_row_groups(tmp_path: Path) -> None:
    def write(group: int) -> None:
        (tmp_path / "in").mkdir(exist_ok=True)
        pq.write_table(pa.table({"id": range(30)}), tmp_path / "in/a.parquet", row_group_size=group)

    def again(**options: Any) -> RunSummary:
        return run(tmp_path / "in", granularity="row_group", **options)

    write(10)
    again()
    write(30)
    with pytest.raises(SourceChangedError, match=r"3 sources.*a.parquet#rg2"):
        again(on_source_change="error")
    # What stays, stays whole: of the file as it is now, nothing is read beside it.
    assert again(on_source_change="ignore").sources_skipped == 1
    assert_output(tmp_path, range(30))
    summary = again()
    assert (summary.sources_completed, summary.sources_removed) == (1, 2)
    assert_output(tmp_path, range(30))
    write(15)
    assert again(on_source_change="ignore").sources_skipped == 2
    assert_output(tmp_path, range(30))
    assert again().sources_completed == 2
    pq.ParquetWriter(tmp_path / "in/a.parquet", pa.schema({"id": pa.int64()})).close()
    summary = again()
    assert (summary.sources_total, summary.sources_removed) == (0, 2)
    assert_output(tmp_path, [])


@pytest.mark.extended
@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_other_ids_for_the_same_rows_are_refused_or_take_their_place(
    source: Path, tmp_path: Path
) -> None:
    run(source)
    (tmp_path / "mount").symlink_to(source)
    refused: list[tuple[type[Exception], Any, dict[str, Any]]] = [
        (CheckpointError, source, {"granularity": "row_group"}),
        (CheckpointError, source, {"source_root": source}),
        (CheckpointError, source, {"granularity": "row_group", "on_source_gone": "keep"}),
        (SourceChangedError, tmp_path / "mount", {}),
        (SourceChangedError, tmp_path / "mount", {"on_source_gone": "error"}),
    ]
    for error, path, options in refused:
        with pytest.raises(error, match="on_source_gone"):
            run(path, **options)
        assert_output(tmp_path, range(15))
    # Forgetting them does not take their output away.
    Checkpoint(tmp_path / "ckpt").reset(state="all")
    with pytest.raises(CheckpointError, match="on_source_gone"):
        run(source, granularity="row_group")
    run(source)
    for path, options in (
        (source, {"granularity": "row_group"}),
        (source, {"source_root": source}),
        (tmp_path / "mount", {}),
    ):
        summary = run(path, **options, on_source_gone="remove")
        assert (summary.sources_completed, summary.sources_removed) == (3, 3)
        assert_output(tmp_path, range(15))
        assert run(path, **options).sources_skipped == 3


@pytest.mark.extended
@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_output_follows_the_input(source: Path, tmp_path: Path) -> None:
    run(source)
    (source / "00001.parquet").unlink()
    with pytest.raises(SourceChangedError, match=r"00001.parquet for one"):
        run(source, on_source_gone="error")
    assert run(source, on_source_gone="keep").sources_removed == 0
    assert_output(tmp_path, range(15))
    # Each shard removes what is its own, and only one has it.
    shares = [run(source, shard=(index, 2), on_source_gone="remove") for index in range(2)]
    assert sorted(summary.sources_removed for summary in shares) == [0, 1]
    assert_output(tmp_path, [*range(5), *range(10, 15)])
    # With something to read beside it, and back again.
    (source / "00000.parquet").unlink()
    write_file(source / "00007.parquet", 100, 105)
    summary = run(source, on_source_gone="remove")
    assert (summary.sources_completed, summary.sources_removed) == (1, 1)
    assert "removed the output of 1 source no longer in the input" in str(summary)
    assert_output(tmp_path, [*range(10, 15), *range(100, 105)])
    status = Checkpoint(tmp_path / "ckpt").status()
    assert (status.total, status.completed, status.pending) == (2, 2, 0)
    write_file(source / "00000.parquet", 0, 5)
    assert run(source).sources_completed == 1
    assert_output(tmp_path, [*range(5), *range(10, 15), *range(100, 105)])
    # One that has failed is forgotten once it is gone.
    (source / "00009.parquet").write_bytes(b"PAR1, and no more")
    with pytest.raises(Exception, match=r"00009.parquet"):
        run(source)
    (source / "00009.parquet").unlink()
    assert run(source, on_source_gone="remove").complete
    assert Checkpoint(tmp_path / "ckpt").status().complete
    shutil.rmtree(source)
    write_source(source, files=1, rows=5)
    options: dict[str, Any] = {"checkpoint": tmp_path / "other", "on_source_gone": "remove"}
    ds = resumable_read(ray.data.read_parquet, str(source), **options)
    with pytest.raises(NonResumableError, match="on_source_gone"):
        resumable_write(ds, RecordingSink())


class RecordingSink(ray.data.Datasink[None]):
    def write(self, blocks: Any, ctx: Any) -> None:
        return


@pytest.mark.extended
@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_sources_that_shared_a_file_with_one_that_is_gone_are_not_read_again(
    source: Path, tmp_path: Path
) -> None:
    run(source, target=1 << 20)
    assert len(Checkpoint(tmp_path / "ckpt").files()) == 1
    (source / "00001.parquet").unlink()
    summary = run(source, on_source_gone="remove", target=1 << 20)
    assert (summary.sources_skipped, summary.sources_removed) == (2, 1)
    assert summary.rows_read == 0
    assert_output(tmp_path, [*range(5), *range(10, 15)])


@pytest.mark.parametrize("policy", ["no", ""])
def test_an_unknown_policy_is_refused(policy: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_source_gone must be one of keep, remove, error"):
        resumable_read(ray.data.read_parquet, "x", checkpoint=tmp_path / "c", on_source_gone=policy)
