"""Rules of ours in Ray's optimizer, for armed pipelines alone.

A rule is the one place that sees the operators and steps of a plan as Ray executes them. It is
added once for a process. It leaves plans whose context does not ask for it as they are.

Internals of Ray's that are used: ``get_physical_ruleset``.
"""

from __future__ import annotations

from typing import Any

from ray.data import Dataset

from ray_resume.raydata.internals import unknown_ray

try:
    from ray.data._internal.logical.interfaces import Rule
    from ray.data._internal.logical.optimizers import get_physical_ruleset
except ImportError as error:
    raise unknown_ray(error) from error

__all__ = ["ask_for"]


def ask_for(rule: type[Rule], dataset: Dataset, option: str, value: Any) -> None:
    """Have plans of ``dataset`` changed by ``rule``.

    Args:
        dataset: it has a context of its own.
        option: where the rule looks for ``value`` in the plan's context.
    """
    dataset.context.set_config(option, value)
    if rule not in get_physical_ruleset():
        get_physical_ruleset().add(rule)
