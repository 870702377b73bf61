"""A cluster that can never run a pipeline is found before anything starts, and no other one is.

Where actors have all CPUs, writes get on all the same.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import ids_in, write_source

from ray_resume import Checkpoint, NonResumableError, resumable, resumable_read, resumable_write
from ray_resume.raydata.capacity import Need, blocked

FILES, ROWS = 9, 5
ENOUGH = FILES // 3
LONGEST_WAIT_S = 20

READ = Need("Read", {"CPU": 1})


def pool(actors: int, **each: float) -> Need:
    return Need("Pool", each or {"CPU": 1}, actors)


@pytest.mark.parametrize(
    ("needs", "nodes", "blocked_by"),
    [
        ([READ], [{"CPU": 1}], None),
        ([READ, pool(1)], [{"CPU": 2}], None),
        ([READ, pool(1)], [{"CPU": 1}], "Pool"),
        ([READ, pool(2)], [{"CPU": 2}], "Pool"),
        ([READ, pool(1), pool(1)], [{"CPU": 2}], "Pool"),
        ([READ, pool(1, CPU=0.5)], [{"CPU": 1}], "Pool"),
        ([READ, pool(1, CPU=0.5)], [{"CPU": 1.5}], None),
        # A pool that the reads are fused with, and what comes after it.
        ([pool(1), Need("Write", {"CPU": 1})], [{"CPU": 1}], None),
        ([pool(1), pool(1), READ], [{"CPU": 1}], None),
        # GPUs hold no CPUs.
        ([READ, pool(4, GPU=1)], [{"CPU": 1, "GPU": 4}], None),
        ([READ, pool(4, GPU=1, CPU=1)], [{"CPU": 4, "GPU": 4}], "Pool"),
        ([READ, pool(2, fake_gpu=1, CPU=1)], [{"CPU": 3, "fake_gpu": 2}], None),
        # Only two of its actors find a GPU, and the others take nothing.
        ([READ, pool(3, fake_gpu=1, CPU=1)], [{"CPU": 3, "fake_gpu": 2}], None),
        # One CPU of each node fits no actor.
        ([READ, pool(3, CPU=2)], [{"CPU": 3}, {"CPU": 3}], None),
        ([READ, pool(3, CPU=1)], [{"CPU": 2}, {"CPU": 1}], "Pool"),
        ([READ, pool(3, CPU=1)], [{"CPU": 2}, {"CPU": 2}], None),
        # No node is large enough, whatever else there is.
        ([Need("Map", {"CPU": 4})], [{"CPU": 2}, {"CPU": 2}], "Map"),
        ([READ, pool(1, GPU=1)], [{"CPU": 8}], "Pool"),
    ],
)
def test_an_operator_is_blocked_if_and_only_if_it_can_never_start(
    needs: list[Need], nodes: list[Any], blocked_by: str | None
) -> None:
    problem = blocked(needs, nodes)
    assert (problem is None) == (blocked_by is None), problem
    assert blocked_by is None or blocked_by in str(problem)


class Slow:
    """Takes 20 ms a row. The last file fails when others are committed, if it can be."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def __call__(self, batch: Any) -> Any:
        time.sleep(0.02 * len(batch["id"]))
        if batch["id"].max() == FILES * ROWS - 1 and not (self.folder / "repaired").exists():
            deadline = time.monotonic() + LONGEST_WAIT_S
            while time.monotonic() < deadline and committed(self.folder) < ENOUGH:
                time.sleep(0.2)
            raise ValueError("the last row")
        return batch


def committed(folder: Path) -> int:
    return Checkpoint(folder / "ckpt").status().completed


class Same:
    def __call__(self, batch: Any) -> Any:
        return batch


def same(batch: Any) -> Any:
    return batch


def run(folder: Path, sizes: tuple[int, ...], *, tail: bool, **each: Any) -> Any:
    """Run a pipeline with pools of these sizes, whose actors need ``each``."""
    read: dict[str, Any] = {"override_num_blocks": FILES}
    if not each.get("resources"):
        # So that reads share the actors.
        read["ray_remote_args"] = each
    ds = resumable_read(
        ray.data.read_parquet, str(folder / "in"), checkpoint=folder / "ckpt", **read
    )
    for number, size in enumerate(sizes):
        ds = ds.map_batches(
            resumable(Same if number else Slow),
            fn_constructor_args=() if number else (str(folder),),
            compute=ray.data.ActorPoolStrategy(size=size),
            batch_size=None,
            **each,
        )
    if tail:
        ds = ds.map_batches(resumable(same))
    return resumable_write(ds, str(folder / "out"), commit_interval_s=0.3)


def commits_before_its_end(folder: Path, sizes: tuple[int, ...], *, tail: bool, **each: Any) -> int:
    """Return how many sources were committed when the last one failed; then run to the end."""
    write_source(folder / "in", files=FILES, rows=ROWS)
    with pytest.raises(Exception, match="the last row"):
        run(folder, sizes, tail=tail, **each)
    before = committed(folder)
    (folder / "repaired").touch()
    run(folder, sizes, tail=tail, **each)
    assert sorted(ids_in(folder / "out")) == list(range(FILES * ROWS))
    return before


@pytest.mark.extended
def test_rows_are_committed_while_actors_have_all_cpus(cluster: str, tmp_path: Path) -> None:
    """The cluster has four. A task comes after the actors."""
    assert commits_before_its_end(tmp_path, (2,), tail=True, num_cpus=2) >= ENOUGH


@pytest.mark.extended
@pytest.mark.long
def test_a_pool_that_leaves_its_reads_no_cpu_is_refused(cluster: str, tmp_path: Path) -> None:
    write_source(tmp_path / "in", files=2, rows=ROWS)

    def start(size: int) -> Any:
        ds = resumable_read(
            ray.data.read_parquet, str(tmp_path / "in"), checkpoint=tmp_path / "ckpt"
        )
        # As it needs two, the reads do not share the actors.
        pool = ray.data.ActorPoolStrategy(size=size)
        ds = ds.map_batches(resumable(Same), compute=pool, num_cpus=2)
        return resumable_write(ds, str(tmp_path / "out"))

    with pytest.raises(NonResumableError, match=r"can never run .* a task of .*Read.* needs 1 CPU"):
        start(2)
    assert not (tmp_path / "out").exists()
    assert start(1).sources_completed == 2
