"""Whether a cluster can ever run a pipeline, and whether its writes get CPUs before the end.

The actors of a pool start before any task, and hold their resources until they have had all of
their input. A task that comes before them in the pipeline, a read for one, must find room beside
them, or Ray Data waits without end, and says nothing.

A task that comes after the last pool gets the actors' CPUs in the end. Nothing could be committed
before. So it asks for no CPU where the cluster has none for it (:func:`free_tail`).

Internals of Ray's that are used:

* ``get_execution_plan``: which operators are fused, and so share a task, is up to Ray's optimizer.
* ``MapOperator._ray_remote_args``, the size of an actor pool, and ``Node.is_head``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray._private.worker
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy

from ray_resume.errors import NonResumableError
from ray_resume.raydata.internals import check_used, unknown_ray
from ray_resume.raydata.plan import Chain

try:
    from ray._private.node import Node
    from ray.data._internal.execution.operators.actor_pool_map_operator import (
        ActorPoolMapOperator,
        _ActorPool,
    )
    from ray.data._internal.execution.operators.map_operator import MapOperator
    from ray.data._internal.logical.interfaces import LogicalPlan
    from ray.data._internal.logical.optimizers import get_execution_plan
except ImportError as error:
    raise unknown_ray(error) from error

__all__ = ["Need", "blocked", "check_capacity", "free_tail", "is_fixed", "needs_of"]

check_used(
    {
        MapOperator: "_ray_remote_args _logical_operators",
        ActorPoolMapOperator: "_actor_pool",
        _ActorPool: "min_size",
        Node: "is_head",
    }
)

logger = logging.getLogger("ray_resume")

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Need:
    """The resources that an operator needs to run at all.

    Attributes:
        name: the operator's, as Ray shows it.
        each: of one task, or of one actor.
        actors: how many actors it starts at once; 0 if it has tasks.
    """

    name: str
    each: Resources
    actors: int = 0


def check_capacity(needs: Sequence[Need]) -> None:
    """Make sure that the cluster can run operators that need so much.

    A cluster that the driver did not start itself may get more nodes. There, it is a warning.

    Raises:
        NonResumableError: some operator would never run.
    """
    problem = blocked(needs, _nodes())
    if problem is None:
        return
    if is_fixed():
        raise NonResumableError(f"{problem} Nothing was started. {_WAY_OUT}")
    logger.warning("%s The run waits until the cluster has more nodes. %s", problem, _WAY_OUT)


def is_fixed() -> bool:
    """Say whether the driver has started the cluster, as one node, so that it gets no other."""
    node: Any = ray._private.worker._global_node
    return node is not None and node.is_head() and len(_nodes()) == 1


def free_tail(chain: Chain, needs: Sequence[Need], read_tasks: int) -> tuple[Chain, int | None]:
    """Let the tasks after the last pool run without a CPU, if the rest of a pipeline takes all.

    Only in a cluster that stays as it is: the number of such tasks, writes included, is bounded by
    its CPUs, whose time they share with the rest. (Without a bound, Ray starts a process for each
    block that waits.) Operators for which the user gives resources are left alone.

    So the rows between the last UDF and the disk are bounded: each of these tasks holds a flush,
    and the blocks that wait for one are in Ray's object store, whose budget holds up the actors.

    Args:
        needs: those of the chain.
        read_tasks: how many it has. Ray warns of a bound that is above the number of tasks.

    Returns:
        The chain, and how many of these tasks may run at once; None leaves it to Ray Data.
    """
    pools = [place for place, one in enumerate(chain.operators) if _is_pool(one)]
    if not pools or not is_fixed():
        return chain, None
    cpus = sum(node.get("CPU", 0) for node in _nodes())
    most = max(1, min(int(cpus), read_tasks))
    kept, tail = chain.operators[: pools[-1] + 1], chain.operators[pools[-1] + 1 :]
    if not tail:
        return chain, most
    if _cpus_at_once(needs) <= cpus or not all(map(_has_default_resources, tail)):
        return chain, None
    freed = (
        dataclasses.replace(
            one,
            compute=TaskPoolStrategy(most),
            ray_remote_args={**(one.ray_remote_args or {}), "num_cpus": 0},
        )
        for one in tail
    )
    return dataclasses.replace(chain, operators=(*kept, *freed)), most


def _is_pool(operator: Any) -> bool:
    return isinstance(getattr(operator, "compute", None), ActorPoolStrategy)


def _cpus_at_once(needs: Sequence[Need]) -> float:
    return sum(max(1, need.actors) * need.each.get("CPU", 0) for need in needs)


def _has_default_resources(operator: Any) -> bool:
    compute = getattr(operator, "compute", None)
    given = getattr(operator, "ray_remote_args", None) or {}
    return (
        isinstance(compute, TaskPoolStrategy)
        and compute.size is None
        and getattr(operator, "ray_remote_args_fn", None) is None
        and not given.keys() & {"num_cpus", "num_gpus", "memory", "resources"}
    )


def _nodes() -> list[Resources]:
    known: Any = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in known if node["Alive"]]


_WAY_OUT = (
    "Give the pool fewer actors, or each of its actors a smaller num_cpus, or the cluster more "
    "(ray.init(num_cpus=...))."
)


def needs_of(dataset: Dataset) -> list[Need]:
    """Return what the operators of ``dataset`` need, as Ray fuses them, in the order of the data.

    Operators that cannot be known before they run (``ray_remote_args_fn``, placement groups) need
    nothing here.
    """
    logical = LogicalPlan(dataset._logical_plan.dag, dataset.context)
    plan, _ = get_execution_plan(logical)
    needs = []
    for operator in plan.dag.post_order_iter():
        if not isinstance(operator, MapOperator):
            continue
        arguments = operator._ray_remote_args
        strategy = arguments.get("scheduling_strategy")
        # An operator has a function of Ray's as well, which only adds memory.
        known = (strategy is None or isinstance(strategy, str)) and not any(
            getattr(one, "ray_remote_args_fn", None) for one in operator._logical_operators
        )
        actors = 0
        if isinstance(operator, ActorPoolMapOperator):
            actors = operator._actor_pool.min_size()
        needs.append(Need(operator.name, _resources(arguments) if known else {}, actors))
    return needs


def _resources(arguments: Mapping[str, Any]) -> Resources:
    given = {
        "CPU": arguments.get("num_cpus"),
        "GPU": arguments.get("num_gpus"),
        "memory": arguments.get("memory"),
        **(arguments.get("resources") or {}),
    }
    return {name: float(amount) for name, amount in given.items() if amount}


def blocked(needs: Sequence[Need], nodes: Sequence[Resources]) -> str | None:
    """Say which operator can never run on ``nodes``, and why; None if all can."""
    for place, need in enumerate(needs):
        if not any(_fits(need.each, node) for node in nodes):
            what = "an actor" if need.actors else "a task"
            return (
                f"This cluster can never run this pipeline: {what} of {need.name} needs "
                f"{_format(need.each)}, and no node has as much."
            )
        pools = [later for later in needs[place + 1 :] if later.actors]
        if not need.actors and pools and not _fits_beside(need.each, pools, nodes):
            pool = max(pools, key=lambda one: one.actors)
            return (
                f"This cluster can never run this pipeline: a task of {need.name} needs "
                f"{_format(need.each)}, and the {sum(one.actors for one in pools)} actors of "
                f"{pool.name} and of other pools after it hold all that there is until they have "
                "had all of their input."
            )
    return None


def _fits_beside(each: Resources, pools: Sequence[Need], nodes: Sequence[Resources]) -> bool:
    # Where actors go is up to Ray. So there is room if there could be: enough for all together, or
    # something that is left where no actor fits any more.
    wanted: dict[str, float] = dict(each)
    for pool in pools:
        for name, amount in pool.each.items():
            wanted[name] = wanted.get(name, 0) + pool.actors * amount
    if all(amount <= sum(node.get(name, 0) for node in nodes) for name, amount in wanted.items()):
        return True
    left = [dict(node) for node in nodes]
    for pool in pools:
        for _ in range(pool.actors):
            node = next((node for node in left if _fits(pool.each, node)), None)
            if node is None:
                break
            for name, amount in pool.each.items():
                node[name] -= amount
    return any(_fits(each, node) for node in left)


def _fits(each: Resources, node: Resources) -> bool:
    return all(amount <= node.get(name, 0) + 1e-6 for name, amount in each.items())


def _format(each: Resources) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in each.items())
