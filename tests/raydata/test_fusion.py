"""Armed, a pipeline has the tasks and actors that plain Ray Data would give it.

Ray is stopped when it has planned an execution, so that nothing is read or written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import ray
from conftest import write_source
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator
from ray.data.expressions import col

from ray_resume import resumable, resumable_read, resumable_write

pytestmark = pytest.mark.usefixtures("cluster")


class PlannedError(Exception):
    """Ends an execution before it starts."""


class Stop(ExecutionCallback):
    """Keeps what Ray would start: the name of each operator, and where its steps run."""

    plan: list[tuple[str, list[str]]]
    actors: ClassVar[list[Any]] = []

    def before_execution_starts(self, executor: Any) -> None:
        Stop.plan = [
            (type(operator).__name__, operator.name.split("->")) for operator in executor._topology
        ]
        for operator in executor._topology:
            if isinstance(operator, ActorPoolMapOperator):
                pool: Any = operator._actor_pool
                Stop.actors += [*pool._running_actors, *pool._pending_actors.values()]
        raise PlannedError


@pytest.fixture(autouse=True)
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    context = ray.data.DataContext.get_current()
    classes = [*context.custom_execution_callback_classes, Stop]
    monkeypatch.setattr(context, "custom_execution_callback_classes", classes)
    # Its reads have an operator that lists the files.
    monkeypatch.setattr(context, "use_datasource_v2", False, raising=False)


def same(batch: Any) -> Any:
    return batch


class Same:
    def __call__(self, batch: Any) -> Any:
        return batch


def many(row: Any) -> Any:
    return [row, row]


def is_even(row: Any) -> Any:
    return row["id"] % 2 == 0


def in_pool(ds: Any, of: Any, **options: Any) -> Any:
    return ds.map_batches(of(Same), compute=ray.data.ActorPoolStrategy(size=1), **options)


PIPELINES: dict[str, Callable[[Any, Any], Any]] = {
    "nothing": lambda ds, of: ds,
    "a task": lambda ds, of: ds.map_batches(of(same)),
    "batches of a size": lambda ds, of: ds.map_batches(of(same), batch_size=10),
    "rows": lambda ds, of: ds.map(of(same)).flat_map(of(many)).filter(of(is_even)),
    "expressions": lambda ds, of: (
        ds.filter(expr=col("id") > 3).with_column("more", col("id") + 1).map_batches(of(same))
    ),
    "actors": lambda ds, of: in_pool(ds, of),
    "a filter and actors": lambda ds, of: in_pool(ds.filter(of(is_even)), of),
    "actors and a task": lambda ds, of: in_pool(ds, of).map_batches(of(same)),
    "two pools": lambda ds, of: in_pool(in_pool(ds, of), of),
    "actors that ask for more": lambda ds, of: in_pool(ds, of, num_cpus=2),
    "tasks that ask for less": lambda ds, of: ds.map_batches(of(same), num_cpus=0.5),
    "a number of retries": lambda ds, of: ds.map_batches(of(same), max_retries=1),
}


def planned(run: Callable[[], object]) -> list[tuple[str, int]]:
    """Return the kinds of operators that ``run`` would start, and how many steps each has."""
    with pytest.raises(PlannedError):
        run()
    # References in cycles would keep them, and their CPUs, from what comes next.
    while Stop.actors:
        ray.kill(Stop.actors.pop())
    return [(kind, len(names)) for kind, names in Stop.plan]


# Ray takes seconds to end an execution whose actors it has just started.
_IN_SUITE = {"a task", "rows"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in _IN_SUITE else pytest.mark.extended)
        for name in PIPELINES
    ],
)
def test_steps_share_a_task_where_they_do_in_plain_ray_data(tmp_path: Path, name: str) -> None:
    source = str(tmp_path / "in")
    write_source(tmp_path / "in", files=8, rows=10)
    transform = PIPELINES[name]
    tasks: dict[str, Any] = {"override_num_blocks": 8}
    ds = transform(ray.data.read_parquet(source, **tasks), lambda udf: udf)
    plain = planned(lambda: ds.write_parquet(str(tmp_path / "plain")))
    armed = resumable_read(
        ray.data.read_parquet, source, checkpoint=tmp_path / "checkpoint", **tasks
    )
    armed = transform(armed, resumable)
    assert planned(lambda: resumable_write(armed, str(tmp_path / "out"))) == plain
