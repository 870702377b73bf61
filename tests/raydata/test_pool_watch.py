"""Actors of a pool that exit in their constructor, or are gone for good: the run ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import ids_in, write_source
from ray.exceptions import ActorDiedError

from ray_resume import Checkpoint, resumable, resumable_read, resumable_write

pytestmark = pytest.mark.usefixtures("cluster")


def run(folder: Path, udf: Any, **options: Any) -> Any:
    write_source(folder / "in", files=4, rows=10)
    ds = resumable_read(ray.data.read_parquet, str(folder / "in"), checkpoint=folder / "ckpt")
    options = {"num_cpus": 0.5, "batch_size": 10, **options}
    ds = ds.map_batches(udf, compute=ray.data.ActorPoolStrategy(size=1), **options)
    return resumable_write(ds, str(folder / "out"))


@pytest.mark.parametrize(
    ("how", "options", "said"),
    [
        ("sys.exit", {}, "The constructor of Model asked its process to exit"),
        pytest.param(
            "exit_actor", {}, "The constructor of Model asked", marks=pytest.mark.extended
        ),
        # Ray starts it again for ever.
        pytest.param("os._exit", {}, "becomes ready", marks=pytest.mark.extended),
        pytest.param("os._exit", {"max_restarts": 0}, "died", marks=pytest.mark.extended),
    ],
)
def test_a_constructor_that_exits_is_an_error_and_no_sources_fault(
    tmp_path: Path, how: str, options: dict[str, Any], said: str
) -> None:
    @resumable
    class Model:
        def __init__(self) -> None:
            if how == "sys.exit":
                sys.exit(3)
            if how == "exit_actor":
                ray.actor.exit_actor()  # type: ignore[no-untyped-call]
            os._exit(3)

        def __call__(self, batch: Any) -> Any:
            return batch

    with pytest.raises(ActorDiedError, match=said) as died:
        run(tmp_path, Model, **options)
    assert died.value.actor_init_failed
    assert list(Checkpoint(tmp_path / "ckpt").sources()) == []


@pytest.mark.extended
@pytest.mark.parametrize(
    "errors", ["as by default", pytest.param("tolerated", marks=pytest.mark.long)]
)
def test_an_actor_that_is_gone_for_good_costs_only_the_source_that_killed_it(
    tmp_path: Path, errors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool's only actor dies at a row, each time, and may not be started again."""
    if errors == "tolerated":
        context = ray.data.DataContext.get_current()
        monkeypatch.setattr(context, "max_errored_blocks", -1)

    @resumable
    class Model:
        def __call__(self, batch: Any) -> Any:
            if 25 in batch["id"]:
                os._exit(3)
            return batch

    summary = run(tmp_path, Model, max_restarts=0)
    assert (summary.sources_completed, summary.sources_failed) == (3, 1)
    assert [name[-13:] for name in summary.lost_alone] == ["00002.parquet"]
    assert ids_in(tmp_path / "out") == [i for i in range(40) if i // 10 != 2]


@pytest.mark.long
@pytest.mark.extended
def test_actors_of_a_pass_that_crashed_leave_their_cpus_to_the_next(tmp_path: Path) -> None:
    """Ray starts the actor again, while the pass is over. Two actors would take all CPUs."""

    @resumable
    class Model:
        def __call__(self, batch: Any) -> Any:
            if 25 in batch["id"]:
                sys.exit(3)
            return batch

    summary = run(tmp_path, Model, num_cpus=2, max_task_retries=0)
    assert (summary.sources_completed, summary.sources_failed) == (3, 1)
    assert ids_in(tmp_path / "out") == [i for i in range(40) if i // 10 != 2]
