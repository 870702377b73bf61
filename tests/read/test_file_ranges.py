"""Ranges of bytes of files as columns: many of them, their names, and what travels."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable

import numpy as np

from ray_resume.core.identity import part_file
from ray_resume.core.sources import SourceTable
from ray_resume.read.line_ranges import ByteRange
from ray_resume.read.splits import list_splits, split_sizes


def test_a_million_splits_are_listed_as_fast_as_files() -> None:
    """That is in less than two seconds, where nothing else runs."""

    def seconds(listed: Callable[[], SourceTable]) -> tuple[float, SourceTable]:
        start = time.process_time()
        table = listed()
        assert len(table.digests) == 1_000_000
        return time.process_time() - start, table

    file = SourceTable.of_files(["/data/one.jsonl"], [64_000_000 - 1], [1])
    took, splits = seconds(lambda: list_splits(file, 64))
    names = list(splits.ids())
    limit, _ = seconds(lambda: SourceTable.of_files(names, [64] * len(names), [1] * len(names)))
    assert took < 2 * limit
    assert split_sizes(splits).sum() == 64_000_000 - 1
    last = splits[999_999]
    assert last.source_id == "/data/one.jsonl#bytes=63999936-63999999"
    assert last.item == ("/data/one.jsonl", ByteRange(63_999_936, 63_999_999))


def test_files_that_are_named_as_parts_have_parts_of_their_own() -> None:
    files = SourceTable.of_files(["/a", "/a#bytes=0-5"], [5, 5], [1, 1])
    names = list(list_splits(files, 5).ids())
    assert names == ["/a#bytes=0-5", "/a#bytes=0-5#bytes=0-5"]
    assert [part_file("split of 5 bytes", name) for name in names] == ["/a", "/a#bytes=0-5"]


def test_a_read_task_gets_the_paths_of_its_own_splits() -> None:
    names = [f"/data/{number:04}-\udcff.jsonl" for number in range(1000)]
    files = SourceTable.of_files(names, [130] * 1000, [1] * 1000)
    splits = list_splits(files, 64)
    some = pickle.loads(pickle.dumps(splits.take(np.array([5, 3, 2999])).packed()))
    assert [source.source_id for source in some] == [
        f"{names[1]}#bytes=128-130",
        f"{names[1]}#bytes=0-64",
        f"{names[999]}#bytes=128-130",
    ]
    assert some[0].item == (names[1], ByteRange(128, 130))
    assert len(pickle.dumps(some)) < 3000
