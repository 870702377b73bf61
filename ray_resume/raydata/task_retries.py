"""How often Ray retries a task of an armed pipeline whose worker died.

By Ray Data's own default there is no bound, even for a task that kills its worker each time. A rule
sets one once operators are fused. Before that, it would keep Ray from fusing reads with a pool of
actors, which has another argument for it. Then reads would need CPUs beside those of the pool.

Internals of Ray's that are used:

* ``MapOperator._ray_remote_args``: Ray reads it when it submits a task, or starts an actor.
"""

from __future__ import annotations

from typing import Any

from ray.data import Dataset
from typing_extensions import override

from ray_resume.raydata.internals import check_used, unknown_ray
from ray_resume.raydata.rules import ask_for

try:
    from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator
    from ray.data._internal.execution.operators.map_operator import MapOperator
    from ray.data._internal.logical.interfaces import Rule
    from ray.data._internal.logical.rules import FuseOperators
except ImportError as error:
    raise unknown_ray(error) from error

__all__ = ["bound_retries"]

check_used({MapOperator: "_ray_remote_args _logical_operators"})

# In the context of a dataset: how many.
_RETRIES = "ray_resume.task_retries"


def bound_retries(dataset: Dataset, retries: int) -> None:
    """Have Ray retry a task of ``dataset`` at most so often, unless the user has given a number.

    Args:
        dataset: it has a context of its own.
    """
    ask_for(_BoundRetries, dataset, _RETRIES, retries)


class _BoundRetries(Rule):
    @classmethod
    @override
    def dependencies(cls) -> list[type[Rule]]:
        return [FuseOperators]

    @override
    def apply(self, plan: Any) -> Any:
        retries = plan.context.get_config(_RETRIES)
        if retries is not None:
            for operator in plan.dag.post_order_iter():
                if isinstance(operator, MapOperator):
                    _bound(operator, retries)
        return plan


def _bound(operator: MapOperator, retries: int) -> None:
    in_actors = isinstance(operator, ActorPoolMapOperator)
    name = "max_task_retries" if in_actors else "max_retries"
    given = (getattr(one, "ray_remote_args", None) for one in operator._logical_operators)
    if not any(name in arguments for arguments in given if arguments):
        operator._ray_remote_args[name] = retries
