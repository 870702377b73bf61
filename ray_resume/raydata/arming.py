"""Arms a pipeline: rewrites a private copy of its plan for a run.

Internals of Ray's that are used, beside operators and plans (`plan`):

* ``Dataset.copy(_deep_copy=True)`` and ``Dataset._from_parent``: the user's dataset stays as it is.
* ``eval_projection``: to evaluate projections exactly as Ray Data itself does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ray.data import Dataset
from ray.data.datasource import Datasource

from ray_resume.core.tokens import SOURCE_COLUMN, TOKEN_COLUMN
from ray_resume.raydata.internals import check_used, unknown_ray
from ray_resume.raydata.plan import Chain, dropped_columns, method_of

try:
    from ray.data._internal.logical.interfaces import LogicalOperator, LogicalPlan
    from ray.data._internal.logical.operators import Filter, FlatMap, MapBatches, MapRows, Project
    from ray.data._internal.planner.plan_expression.expression_evaluator import eval_projection
    from ray.data.expressions import StarExpr, col
except ImportError as error:
    raise unknown_ray(error) from error

__all__ = ["arm", "udf_operators"]

check_used({Dataset: "_from_parent copy"})


def arm(
    chain: Chain,
    datasource: Datasource,
    read_tasks: int,
    arm_udf: Callable[[str, Any], Any],
    arm_predicate: Callable[[Any], Any],
) -> Dataset:
    """Rewrite a private copy of the pipeline to read from ``datasource`` and run armed UDFs.

    Args:
        chain: an optimized one: what Ray's optimizer would push under an operator, it has pushed.
            Armed, operators keep their order: a filter is a UDF for Ray from here on.
        datasource: replaces the chain's own; its blocks have the two columns.
        read_tasks: how many read tasks it is asked for.
        arm_udf: maps the method that a decorated UDF was given to (``map_batches``, ``map``,
            ``filter``, ``flat_map``), and the UDF, to a UDF for ``map_batches``.
        arm_predicate: maps the expression of a filter to a UDF for ``map_batches``.
    """
    dataset = Dataset.copy(chain.dataset, _deep_copy=True)
    operator: LogicalOperator = dataclasses.replace(
        chain.read,
        datasource=datasource,
        datasource_or_legacy_reader=datasource,
        num_outputs=None,
        detected_parallelism=None,
        # With a number of its own choice, Ray would split the output of each read task into many
        # blocks. It could no longer fuse the read with the operators above.
        parallelism=read_tasks,
    )
    for above in chain.operators:
        operator = _armed(above, operator, arm_udf, arm_predicate)
    return Dataset._from_parent(dataset, LogicalPlan(operator, dataset.context))


def udf_operators(chain: Chain) -> list[Any]:
    """Return the operators with a UDF that `arm` rewrites by ``arm_udf``, in this order."""
    return [
        operator
        for operator in chain.operators
        if (isinstance(operator, (MapRows, FlatMap)))
        or (isinstance(operator, Filter) and not operator.is_expression_based())
        or (isinstance(operator, MapBatches) and dropped_columns(operator) is None)
    ]


def _armed(
    operator: Any,
    below: LogicalOperator,
    arm_udf: Callable[[str, Any], Any],
    arm_predicate: Callable[[Any], Any],
) -> LogicalOperator:
    if isinstance(operator, Project):
        return _block_wise(operator, below, _projection(operator))
    if isinstance(operator, Filter) and operator.is_expression_based():
        return _block_wise(operator, below, arm_predicate(operator.predicate_expr))
    if isinstance(operator, (MapRows, FlatMap, Filter)):
        return _block_wise(
            operator,
            below,
            arm_udf(str(method_of(operator)), operator.fn),
            fn_args=operator.fn_args,
            fn_kwargs=operator.fn_kwargs,
            fn_constructor_args=operator.fn_constructor_args,
            fn_constructor_kwargs=operator.fn_constructor_kwargs,
        )
    changes: dict[str, Any] = {"input_dependencies": [below]}
    if isinstance(operator, MapBatches) and dropped_columns(operator) is None:
        changes["fn"] = arm_udf("map_batches", operator.fn)
    armed: LogicalOperator = dataclasses.replace(operator, **changes)
    return armed


def _block_wise(operator: Any, below: LogicalOperator, udf: Any, **arguments: Any) -> MapBatches:
    """Return an operator that calls ``udf`` with each block that has rows, as it is."""
    return MapBatches(
        fn=udf,
        input_dependencies=[below],
        can_modify_num_rows=True,
        batch_size=None,
        batch_format=None,
        compute=operator.compute,
        ray_remote_args_fn=operator.ray_remote_args_fn,
        ray_remote_args=operator.ray_remote_args,
        **arguments,
    )


def _projection(operator: Project) -> Callable[[Any], Any]:
    """Return a UDF that does to a block what a projection does, and keeps the two columns.

    As a UDF, it is out of the reach of Ray's optimizer, and is called with no empty block. Ray's
    own projections fail on those without columns, if they evaluate shared parts first.
    """
    exprs = list(operator.exprs)
    if not any(isinstance(expression, StarExpr) for expression in exprs):
        exprs += [col(SOURCE_COLUMN), col(TOKEN_COLUMN)]
    shared = getattr(operator, "_common_sub_exprs", None)
    options = {"common_sub_exprs": list(shared)} if shared else {}

    def project(block: Any) -> Any:
        return eval_projection(exprs, block, **options)

    return project
