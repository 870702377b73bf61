"""Tidies of real folders and checkpoints, without a cluster."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_resume import Checkpoint, CheckpointError
from ray_resume.checkpoint.backend import new_run_id
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.core.digests import Digests, source_digest
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Record, State
from ray_resume.core.rewrites import Rewrite, plan_rewrites
from ray_resume.write.folder import folder_at
from ray_resume.write.formats import checked_format
from ray_resume.write.rewriter import Outcome, Rewriter
from ray_resume.write.row_copies import copy_rewrite
from ray_resume.write.tidying import copy_here, tidy_output

RUN = "0123456789ab"


class Output:
    """A folder of Parquet files, each with two rows of its source; the first have a dead row."""

    def __init__(self, folder: Path, files: int, unclean: int = 1) -> None:
        self.backend = LocalBackend(folder / "ckpt")
        prefix = f"{self.backend.ensure()}-{RUN}"
        self.out = folder / "out"
        self.out.mkdir()
        self.backend.bind(str(self.out), RUN)
        writer = WriterFile.create(self.backend.path, RUN, {"sources_total": files})
        records = []
        for number in range(files):
            name = f"{prefix}-{0:016x}-{number:016x}.parquet"
            dead = int(number < unclean)
            rows = [-1] * dead + [10 * number, 10 * number + 1]
            pq.write_table(pa.table({"id": rows}), self.out / name)
            part = FilePart(name, dead, 2, len(rows))
            records.append(Record(f"s{number}", State.COMPLETED, number + 1, RUN, 2, (part,)))
        writer.commit(records)
        writer.close()
        self.names = [record.files[0] for record in records]

    def tidy(self, target_bytes: int | None = None) -> Outcome:
        folder = folder_at(self.out)
        return tidy_output(
            self.backend, folder, copy_here(folder), target_file_bytes=target_bytes, wait_s=0
        )

    def rows(self) -> list[int]:
        files = Checkpoint(self.backend.path).files()
        return [i for file in files for i in pq.read_table(file)["id"].to_pylist()]


def counts(outcome: Outcome) -> tuple[int, int]:
    """Count the files that were replaced, and those in their place."""
    return len(outcome.moved), len(set(outcome.moved.values()))


def test_one_damaged_file_keeps_no_other_from_being_merged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = Output(tmp_path, 8)
    (output.out / output.names[5]).write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING, "ray_resume"):
        output.tidy(1 << 20)
    assert output.names[5] in caplog.text
    left = {file.name for file in output.out.iterdir()}
    assert output.names[5] in left
    assert len(left) <= 4, "all others were merged, in a few pieces"
    (output.out / output.names[5]).unlink()
    listed = [Path(file) for file in Checkpoint(output.backend.path).files()]
    rows = [i for file in listed if file.exists() for i in pq.read_table(file)["id"].to_pylist()]
    assert sorted(rows) == [10 * n + i for n in range(8) if n != 5 for i in range(2)]


def test_an_unclean_file_is_rewritten_alone_if_it_cannot_be_merged(tmp_path: Path) -> None:
    output = Output(tmp_path, 2)
    pq.write_table(pa.table({"other": ["x", "y"]}), output.out / output.names[1])
    outcome = output.tidy(1 << 20)
    assert (*counts(outcome), len(outcome.faults)) == (1, 1, 1)
    (new,) = {file.name for file in output.out.iterdir()} - {output.names[1]}
    assert pq.read_table(output.out / new)["id"].to_pylist() == [0, 1]
    assert Checkpoint(output.backend.path).check().ok


def test_files_of_a_run_at_work_wait_and_no_others(tmp_path: Path) -> None:
    output = Output(tmp_path, 3, unclean=3)
    live = output.backend.acquire(
        Owner.here("aaaaaaaaaaaa"), Claim([source_digest("s1")]), wait_s=0
    )
    assert counts(output.tidy()) == (2, 2)
    assert sorted(output.rows()) == [0, 1, 20, 21], "the file that waits is not clean"
    with pytest.raises(CheckpointError, match="is working on the same sources"):
        output.tidy()
    live.end(wait_s=0)
    assert counts(output.tidy()) == (1, 1)
    assert sorted(output.rows()) == [0, 1, 10, 11, 20, 21]


def test_a_run_merges_only_files_of_its_own_sources(tmp_path: Path) -> None:
    output = Output(tmp_path, 4)
    folder = folder_at(output.out)
    own = Digests.of(source_digest("s1") + source_digest("s2"))
    tidied = tidy_output(
        output.backend, folder, copy_here(folder), target_file_bytes=1 << 20, own=own, wait_s=0
    )
    assert counts(tidied) == (3, 2), "two become one, and the unclean one is rewritten alone"
    assert sorted(output.rows()) == [10 * n + i for n in range(4) for i in range(2)]


def test_merging_is_idempotent_and_keeps_all_rows(tmp_path: Path) -> None:
    output = Output(tmp_path, 5)
    assert counts(output.tidy(1 << 20)) == (5, 1)
    assert output.rows() == [10 * n + i for n in range(5) for i in range(2)]
    assert output.tidy(1 << 20) == Outcome()
    assert Checkpoint(output.backend.path).check().ok
    assert Checkpoint(output.backend.path).compact() == 2
    assert Checkpoint(output.backend.path).check().ok


def test_files_that_a_merge_has_filled_stay_although_they_became_small(tmp_path: Path) -> None:
    output = Output(tmp_path, 8, unclean=0)
    size = min((output.out / name).stat().st_size for name in output.names)
    assert counts(output.tidy(2 * size)) == (8, 4)
    small = [path.stat().st_size for path in output.out.iterdir()]
    assert 4 * max(small) < 6 * size, "two of them would have room in one"
    assert output.tidy(2 * size) == Outcome()
    assert counts(output.tidy(4 * size))[1] < 4, "a larger target is another matter"
    assert output.rows() == [10 * n + i for n in range(8) for i in range(2)]
    assert Checkpoint(output.backend.path).check().ok


def test_the_storage_needs_room_for_one_step_only(tmp_path: Path) -> None:
    output = Output(tmp_path, 6, unclean=6)
    size = max((output.out / name).stat().st_size for name in output.names)
    run_id = new_run_id()
    lease = output.backend.acquire(Owner.here(run_id), Claim(None), wait_s=0)
    folder = folder_at(output.out)
    snapshot = output.backend.committed_by_dead_runs(run_id).snapshot
    sizes = dict(folder.sizes())
    plan = plan_rewrites(snapshot, sizes=sizes, target_bytes=2 * size, max_rows=4)
    assert [len(rewrite.files) for rewrite in plan] == [2, 2, 2]
    seen = []

    def copy(rewrites: Sequence[tuple[Rewrite, str]]) -> Iterable[str | None]:
        seen.append((len(rewrites), len(list(output.out.iterdir()))))
        return copy_here(folder)(rewrites)

    rewriter = Rewriter(output.backend, folder, run_id, lease, purpose="tidy", step_bytes=3 * size)
    assert counts(rewriter.execute(snapshot, plan, copy)) == (6, 3)
    assert seen == [(1, 6), (1, 5), (1, 4)], "the old files of a step go before the next step"
    lease.end(wait_s=0)
    assert sorted(output.rows()) == [10 * n + i for n in range(6) for i in range(2)]
    assert Checkpoint(output.backend.path).check().ok


def test_live_rows_whose_values_would_change_keep_their_types(tmp_path: Path) -> None:
    """Retyping has left such a file as it was; dead rows leave it all the same."""
    pq.write_table(pa.table({"x": [1, 2**60 + 1]}), tmp_path / "f.parquet")
    rewrite = Rewrite(("f.parquet",), (FilePart("f.parquet", 1, 1, 2),))
    schema = pa.schema({"x": pa.float64()})
    options = checked_format("parquet", {})
    folder = folder_at(tmp_path)
    assert copy_rewrite(folder, rewrite, "g.parquet", format=options, schema=schema) is None
    assert pq.read_table(tmp_path / "g.parquet")["x"].to_pylist() == [2**60 + 1]


@pytest.mark.parametrize(
    ("options", "apart"),
    [({}, True), ({"lines": False}, False), ({"orient": "records"}, True), ({"indent": 2}, False)],
)
def test_json_files_whose_rows_cannot_be_told_apart(
    options: dict[str, object], apart: bool
) -> None:
    assert checked_format("json", options).has_rows_apart == apart
    assert checked_format("csv", {}).has_rows_apart
