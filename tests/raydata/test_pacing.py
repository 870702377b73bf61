"""Steps of a task hand on what they have in time, and nothing else changes."""

from __future__ import annotations

import os
import time
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray.data._internal.execution.operators.map_transformer import (
    BatchMapTransformFn,
    BlockMapTransformFn,
)
from ray.data._internal.output_buffer import OutputBlockSizeOption

from ray_resume import Checkpoint, resumable, resumable_read, resumable_write
from ray_resume.core.tokens import SOURCE_COLUMN
from ray_resume.raydata import pacing

INPUT_FILES, INPUT_ROWS = 24, 5


class Clock:
    """Stands still but for what is added."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def table_of(sources: list[int]) -> pa.Table:
    return pa.table(
        {"id": range(len(sources)), SOURCE_COLUMN: pa.array(sources, pa.int32())},
    )


def ids_of(blocks: Any) -> list[list[int]]:
    # Where there was nothing, Ray makes a block without columns.
    return [block["id"].to_pylist() if block.num_rows else [] for block in blocks]


def shaping(step_bytes: int, wait_s: float) -> Any:
    option = OutputBlockSizeOption.of(target_max_block_size=step_bytes)
    step = BlockMapTransformFn(lambda blocks, _: blocks, output_block_size_option=option)
    return pacing._ShapeBlocks(step, wait_s)


@given(st.lists(st.integers(0, 30), max_size=8), st.sampled_from([40, 400, 1 << 20]))
def test_without_a_wait_blocks_are_rays_own(counts: list[int], step_bytes: int) -> None:
    results = [table_of([0] * count) for count in counts]
    paced = shaping(step_bytes, 3600)
    own = type(paced.step)._shape_blocks(paced.step, results)
    assert ids_of(paced(results)) == ids_of(own)


@given(st.lists(st.integers(0, 30), max_size=8), st.sampled_from([40, 400, 1 << 20]))
def test_each_row_is_handed_on_once_and_in_order(counts: list[int], step_bytes: int) -> None:
    ends = np.cumsum([0, *counts]).tolist()
    whole = table_of([0] * ends[-1])
    results = [whole.slice(a, b - a) for a, b in pairwise(ends)]
    blocks = list(shaping(step_bytes, 0)(results))
    assert list(chain(*ids_of(blocks))) == whole["id"].to_pylist()
    # Even without any row, as Ray does.
    assert len(blocks) >= 1


def test_a_step_hands_on_what_has_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def results() -> Any:
        for number in range(6):
            clock.now += 1
            yield pa.table({"id": [number]})

    # Each takes a second: the third one finds that the first has waited for two.
    assert ids_of(shaping(1 << 20, 2)(results())) == [[0, 1, 2], [3, 4, 5]]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_a_block_is_cut_between_sources(counts: list[int], random: Any) -> None:
    sources = [source for source, count in enumerate(counts) for _ in range(count)]
    block = table_of(sources)
    assert pacing._is_mixed(block) == (len(counts) > 1)
    slices = list(pacing._slices(block, random.choice([0.0, 3600.0])))
    assert list(chain(*ids_of(slices))) == block["id"].to_pylist()
    of_slices = [set(one[SOURCE_COLUMN].to_pylist()) for one in slices]
    assert sum(map(len, of_slices)) == len(counts)


def test_slices_grow_while_they_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    lengths: list[int] = []
    one: Any
    for one in pacing._slices(table_of(list(range(64))), 1.0):
        lengths.append(one.num_rows)
        clock.now += 0.2 * one.num_rows
    # 0.2 s, 0.4, 0.8 (which is right), and never more than a second.
    assert lengths[:4] == [1, 2, 4, 4]
    assert max(lengths) == 4


@pytest.mark.parametrize(
    ("sources", "mixed"), [([], False), ([3, 3], False), ([1, 2], True), ([1, 2, 1], False)]
)
def test_only_what_is_in_order_is_cut(sources: list[int], mixed: bool) -> None:
    assert pacing._is_mixed(table_of(sources)) == mixed
    assert not pacing._is_mixed(pa.table({"id": [1, 2]}))


def test_batches_of_many_blocks_stay_whole() -> None:
    make: Any = BatchMapTransformFn
    step = make(lambda batches, _: batches, batch_size=None, batch_format="pyarrow")
    alike = [table_of([7, 7]), table_of([8])]
    mixed = table_of([1, 1, 2, 3])
    batches = list(pacing._PreProcess(step, 3600)([*alike, mixed, alike[1]]))
    assert ids_of(batches) == [[0, 1], [0], [0, 1], [2, 3], [0]]


def write_input(folder: Path) -> None:
    folder.mkdir()
    for number in range(INPUT_FILES):
        ids = range(number * INPUT_ROWS, (number + 1) * INPUT_ROWS)
        pq.write_table(pa.table({"id": list(ids)}), folder / f"{number:03}.parquet")


class Trap:
    """Takes its time for a row, and cannot do with the last one until the file is there."""

    def __init__(self, repaired: str, row_s: float = 0.02) -> None:
        self.repaired, self.row_s = repaired, row_s

    def __call__(self, batch: Any) -> Any:
        time.sleep(self.row_s * len(batch["id"]))
        if batch["id"][-1] == INPUT_FILES * INPUT_ROWS - 1 and not os.path.exists(self.repaired):
            raise ValueError("the last row")
        return batch


@pytest.mark.parametrize(
    "shape",
    ["one task", pytest.param("an actor pool", marks=[pytest.mark.extended, pytest.mark.long])],
)
def test_what_was_done_is_committed_before_its_task_is_over(
    cluster: str, tmp_path: Path, shape: str
) -> None:
    """All is in one block of one task, which ends with an error at its last row."""
    write_input(tmp_path / "in")
    repaired = str(tmp_path / "repaired")

    def run() -> Any:
        ds = resumable_read(
            ray.data.read_parquet,
            str(tmp_path / "in"),
            checkpoint=str(tmp_path / "checkpoint"),
            override_num_blocks=1,
        )
        if shape == "one task":
            ds = ds.map_batches(resumable(Trap(repaired).__call__), batch_size=None)
        else:
            # The write is another task, whose worker takes a while to start.
            ds = ds.map_batches(
                resumable(Trap),
                fn_constructor_args=(repaired, 0.05),
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(size=1),
            )
        return resumable_write(ds, str(tmp_path / "out"), commit_interval_s=0.3)

    with pytest.raises(Exception, match="the last row"):
        run()
    # It worked for 2.4 s at least. Before, nothing was committed.
    assert Checkpoint(tmp_path / "checkpoint").status().completed >= INPUT_FILES // 3
    Path(repaired).touch()
    run()
    assert Checkpoint(tmp_path / "checkpoint").status().completed == INPUT_FILES
    ids = pq.read_table(tmp_path / "out")["id"].to_pylist()
    assert sorted(ids) == list(range(INPUT_FILES * INPUT_ROWS))
