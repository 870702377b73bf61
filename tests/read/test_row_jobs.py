"""Jobs over row ranges, whose rows go to dead letters and to another pipeline."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import ids_in

from ray_resume import Checkpoint, RunSummary, resumable, resumable_read, resumable_write

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.extended]


class Chain:
    """Two pipelines in a row: over row ranges of files, and over its output."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bad = folder, folder / "bad"
        (folder / "in").mkdir()
        self.bad.touch()

    def write(self, name: str, ids: Iterable[int]) -> None:
        with gzip.open(self.folder / "in" / f"{name}.json.gz", "wt") as file:
            file.writelines(json.dumps({"id": number}) + "\n" for number in ids)

    def first(self) -> RunSummary:
        bad = self.bad

        @resumable(on_error="dead_letter")
        def strict(row: Any) -> Any:
            if str(row["id"]) in bad.read_text().split():
                raise ValueError("a bad row")
            return row

        ds = resumable_read(
            ray.data.read_json,
            str(self.folder / "in"),
            checkpoint=self.folder / "ckpt1",
            granularity="rows",
            split_rows=10,
        )
        return resumable_write(ds.map(strict), self.folder / "mid")

    def second(self) -> RunSummary:
        ds = resumable_read(
            ray.data.read_parquet, self.checkpoint(1), checkpoint=self.folder / "ckpt2"
        )
        return resumable_write(ds, self.folder / "out")

    def checkpoint(self, number: int) -> Checkpoint:
        return Checkpoint(self.folder / f"ckpt{number}")

    def check(self, expected: Iterable[int]) -> None:
        assert sorted(ids_in(self.folder / "out")) == list(expected)
        ids = [{s.source_id for s in self.checkpoint(n).sources("completed")} for n in (1, 2)]
        assert ids[0] == ids[1]
        assert not any("end" in source_id for source_id in ids[1])
        assert self.checkpoint(2).status().complete
        assert self.checkpoint(2).check()


def counts(summary: RunSummary) -> tuple[int, int, int]:
    return summary.sources_completed, summary.sources_skipped, summary.sources_removed


def test_row_ranges_flow_through_two_pipelines(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    chain.write("a", range(45))
    chain.write("b", range(100, 130))
    chain.bad.write_text("7 44")
    assert chain.first().rows_dead_lettered == 2
    letters = pa.concat_tables(map(pq.read_table, chain.checkpoint(1).dead_letters()))
    assert sorted(letters["id"].to_pylist()) == [7, 44]
    assert counts(chain.second()) == (8, 0, 0)
    chain.check([n for n in [*range(45), *range(100, 130)] if n not in (7, 44)])
    # Only the ranges with dead letters are processed again.
    chain.bad.write_text("")
    chain.checkpoint(1).reset(dead_letters=True)
    assert counts(chain.first()) == (2, 6, 0)
    assert counts(chain.second()) == (2, 6, 0)
    chain.check([*range(45), *range(100, 130)])
    # All ranges of a changed file are others, and it has fewer.
    chain.write("a", range(1000, 1013))
    chain.write("c", range(2000, 2001))
    assert chain.first().complete
    assert counts(chain.second()) == (3, 3, 3)
    chain.check([*range(100, 130), *range(1000, 1013), *range(2000, 2001)])
