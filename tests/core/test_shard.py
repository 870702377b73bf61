"""Shares: disjoint, together everything, the same in every process, whatever a scheduler says."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.core.shards import ArrayTask, Shard, shard_of
from ray_resume.errors import CheckpointError, ResumeError

pytestmark = pytest.mark.long

Environment = dict[str, str]

IDS = st.lists(st.text(st.characters(codec=None)), unique=True, max_size=30)
ARRAYS = st.sets(st.integers(0, 40), min_size=1, max_size=9)


def slurm(indexes: Iterable[int], index: int, job: int = 4711) -> Environment:
    """Return what SLURM tells task ``index``; of a list it says that its step is 1."""
    indexes = set(indexes)
    variables = {"JOB_ID": job, "TASK_ID": index, "TASK_COUNT": len(indexes), "TASK_STEP": 1}
    variables |= {"TASK_MIN": min(indexes), "TASK_MAX": max(indexes)}
    return {f"SLURM_ARRAY_{name}": str(value) for name, value in variables.items()}


def pbs(index: int, job: str = "12[{}].head") -> Environment:
    return {"PBS_ARRAY_INDEX": str(index), "PBS_JOBID": job.format(index)}


def lsf(index: int) -> Environment:
    return {"LSB_JOBINDEX": str(index), "LSB_JOBINDEX_END": "99", "LSB_JOBID": "12"}


def drawn(checkpoint: LocalBackend, value: Any, environ: Environment) -> Shard:
    """Do as `resumable_read` does."""
    share = shard_of(value, environ)
    if isinstance(share, ArrayTask):
        return Shard(checkpoint.rank_of(share), share.count)
    return share


@pytest.fixture
def checkpoint(tmp_path: Path) -> LocalBackend:
    made = LocalBackend(tmp_path / "ckpt")
    made.ensure()
    return made


# Which sources are in a share.


@given(IDS, st.integers(1, 12))
def test_every_source_is_in_one_share(ids: list[str], count: int) -> None:
    shards = [Shard(index, count) for index in range(count)]
    for source_id in ids:
        assert sum(shard.holds(source_id) for shard in shards) == 1


def test_a_share_is_the_same_for_ever() -> None:
    """What is written down here must never change: a requeued task may run on another machine."""
    ids = [f"/data/{n:03}.parquet" for n in range(12)]
    assert [next(i for i in range(5) if Shard(i, 5).holds(id_)) for id_ in ids] == SHARES


SHARES = [2, 1, 0, 0, 1, 3, 0, 4, 1, 3, 0, 3]


def test_shares_are_about_equal() -> None:
    ids = [f"/data/{n}.parquet" for n in range(8000)]
    sizes = [sum(Shard(index, 8).holds(source_id) for source_id in ids) for index in range(8)]
    assert min(sizes) > 900
    assert max(sizes) < 1100


# What a user passes.


class Seven:
    def __index__(self) -> int:
        return 7


@pytest.mark.parametrize("value", [(7, 8), [7, 8], (Seven(), 8)])
def test_index_and_count(value: Any) -> None:
    assert shard_of(value, {}) == Shard(7, 8)
    assert str(shard_of(value, {})) == "shard 7 of 8"


@pytest.mark.parametrize("value", [(8, 8), (-1, 8), (0, 0), ("slurm", 0), "sge", ("sge", 8)])
def test_what_is_out_of_range_or_unknown(value: Any) -> None:
    with pytest.raises(ValueError, match="shard"):
        shard_of(value, {})


@pytest.mark.parametrize("value", [3, (1, 2, 3), (0.0, 8), (0, "8"), {0: 8}])
def test_what_is_no_share_at_all(value: Any) -> None:
    with pytest.raises(TypeError, match=r"must be \(index, count\)"):
        shard_of(value, {})


# SLURM.


@given(first=st.integers(0, 50), count=st.integers(1, 20))
def test_an_array_without_gaps_needs_nothing_but_its_environment(first: int, count: int) -> None:
    indexes = range(first, first + count)
    shares = [shard_of("slurm", slurm(indexes, index)) for index in indexes]
    assert shares == [Shard(rank, count) for rank in range(count)]


@given(ARRAYS, st.randoms(use_true_random=False), st.sampled_from(["slurm", "pbs", "lsf"]))
def test_tasks_of_any_array_have_all_shares_once(
    tmp_path_factory: pytest.TempPathFactory,
    indexes: set[int],
    order: random.Random,
    scheduler: str,
) -> None:
    """Whatever indexes there are, in whatever order tasks start, are requeued, start again."""
    checkpoint = LocalBackend(tmp_path_factory.mktemp("array") / "ckpt")
    checkpoint.ensure()
    indexes = {index + 1 for index in indexes}
    starts = [*indexes, *order.choices(sorted(indexes), k=5)]
    order.shuffle(starts)
    value = scheduler if scheduler == "slurm" else (scheduler, len(indexes))
    environments = {"slurm": lambda index: slurm(indexes, index), "pbs": pbs, "lsf": lsf}
    shares: dict[int, Shard] = {}
    for index in starts:
        share = drawn(checkpoint, value, environments[scheduler](index))
        assert shares.setdefault(index, share) == share
    expected = {Shard(rank, len(indexes)) for rank in range(len(indexes))}
    assert set(shares.values()) == expected


def test_an_array_of_the_failed_tasks_shares_everything_anew(
    checkpoint: LocalBackend,
) -> None:
    for job, indexes in enumerate(([1, 3, 7], [3, 7], [7])):
        shares = [drawn(checkpoint, "slurm", slurm(indexes, i, job)) for i in reversed(indexes)]
        assert shares == [Shard(rank, len(indexes)) for rank in range(len(indexes))]
    assert drawn(checkpoint, "slurm", slurm([1, 3, 7], 3, job=0)) == Shard(1, 3)


def test_a_step_that_does_not_tell_is_not_trusted(checkpoint: LocalBackend) -> None:
    """With the step of the first range of a list, 2, and three numbers, two might get one rank."""
    shares = set()
    for index in (0, 2, 3):
        environment = {**slurm([0, 2, 3], index), "SLURM_ARRAY_TASK_STEP": "2"}
        shares.add(drawn(checkpoint, "slurm", environment))
    assert len(shares) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"TASK_ID": "9"},
        {"TASK_ID": "0"},
        {"TASK_COUNT": "8"},
        {"TASK_COUNT": "0"},
        {"TASK_ID": "x"},
        {"TASK_ID": "-1"},
        {"TASK_MIN": ""},
        {"JOB_ID": ""},
    ],
)
def test_an_environment_that_is_not_slurms(changes: Environment) -> None:
    changed = {f"SLURM_ARRAY_{name}": value for name, value in changes.items()}
    with pytest.raises(ResumeError, match=next(iter(changed))):
        shard_of("slurm", {**slurm([1, 3, 7], 3), **changed})


def test_no_environment_names_what_was_looked_for() -> None:
    for name, variables in (
        ("slurm", ["ID", "COUNT", "MIN", "MAX"]),
        ("torchrun", ["RANK", "WORLD_SIZE"]),
        ("pbs", ["PBS_ARRAY_INDEX", "PBS_ARRAYID"]),
        ("lsf", ["LSB_JOBINDEX"]),
    ):
        with pytest.raises(ResumeError) as raised:
            shard_of(name, {})
        assert all(variable in str(raised.value) for variable in variables)
        assert "shard=(index, count)" in str(raised.value)
    with pytest.raises(ResumeError, match=r'PBS_ARRAY_INDEX is set: is it shard=\("pbs", count\)'):
        shard_of("slurm", pbs(3))


# The others.


@pytest.mark.parametrize(("name", "environment"), [("pbs", pbs(3)), ("lsf", lsf(3))])
def test_who_does_not_know_the_count_must_be_told(name: str, environment: Environment) -> None:
    with pytest.raises(ResumeError, match=rf'shard=\("{name}", 8\)'):
        shard_of(name, environment)


@pytest.mark.parametrize("job", ["12[{}].head", "12-{}.head", "3[{}].head3"])
def test_tasks_of_pbs_name_one_array(job: str) -> None:
    tasks = [shard_of(("pbs", 4), pbs(index, job)) for index in (3, 12)]
    torque = {"PBS_ARRAYID": "3", "PBS_JOBID": job.format(3)}
    assert all(isinstance(task, ArrayTask) for task in tasks)
    assert len({task.array for task in tasks if isinstance(task, ArrayTask)}) == 1
    assert shard_of(("pbs", 4), torque) == tasks[0]


def test_a_job_of_lsf_that_is_no_array() -> None:
    with pytest.raises(ResumeError, match="not a task of an array"):
        shard_of(("lsf", 4), lsf(0))


def test_ranks_of_processes() -> None:
    environment = {"RANK": "2", "WORLD_SIZE": "4"}
    assert shard_of("torchrun", environment) == Shard(2, 4)
    with pytest.raises(ResumeError, match="contradicts"):
        shard_of("torchrun", {**environment, "RANK": "4"})


@pytest.mark.parametrize(
    ("name", "environment"),
    [("slurm", slurm(range(4), 2)), ("torchrun", {"RANK": "2", "WORLD_SIZE": "4"})],
)
def test_a_count_beside_the_environments_own(name: str, environment: Environment) -> None:
    assert shard_of((name, 4), environment) == Shard(2, 4)
    with pytest.raises(ResumeError, match="nobody's"):
        shard_of((name, 5), environment)


# Drawing ranks.


def test_one_task_too_many(checkpoint: LocalBackend) -> None:
    for index in (7, 3):
        checkpoint.rank_of(ArrayTask("array", index, 2))
    with pytest.raises(CheckpointError, match=r"tasks 7, 3, and task 5 is one more"):
        checkpoint.rank_of(ArrayTask("array", 5, 2))
    assert checkpoint.rank_of(ArrayTask("array", 3, 2)) == 1
    assert checkpoint.rank_of(ArrayTask("another", 5, 2)) == 0


def test_what_is_no_rank_counts_for_no_task(checkpoint: LocalBackend) -> None:
    checkpoint.rank_of(ArrayTask("a", 7, 2))
    (drawn,) = (checkpoint.path / "arrays").rglob("*-7")
    for name in (".000001-3", "000001-3.bak", "x-3", "readme"):
        (drawn.parent / name).touch()
    assert checkpoint.rank_of(ArrayTask("a", 3, 2)) == 1


DRAW = """
import os, sys
from pathlib import Path
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.core.shards import Shard, shard_of

start, go = os.pipe()
for index in map(int, sys.argv[2:]):
    if not os.fork():
        os.close(go)
        os.read(start, 1)
        task = shard_of("slurm", {**os.environ, "SLURM_ARRAY_TASK_ID": str(index)})
        print(f"{index} {LocalBackend(sys.argv[1]).rank_of(task)}", flush=True)
        os._exit(0)
os.close(go)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""


def race(checkpoint: LocalBackend, indexes: Sequence[int]) -> dict[int, int]:
    result = subprocess.run(
        [sys.executable, "-c", DRAW, str(checkpoint.path), *map(str, indexes)],
        env=slurm(indexes, indexes[0]) | {"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    pairs = (line.split() for line in result.stdout.splitlines())
    return {int(index): int(rank) for index, rank in pairs}


def test_tasks_that_draw_at_once(checkpoint: LocalBackend) -> None:
    indexes = [1, 3, 4, 9, 11, 12, 13, 20, 21, 22, 30, 31]
    ranks = race(checkpoint, indexes)
    assert sorted(ranks) == indexes
    assert sorted(ranks.values()) == list(range(len(indexes)))
    assert race(checkpoint, indexes) == ranks
