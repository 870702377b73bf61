"""Which operators a pipeline may have, and how it is armed.

On a Ray outside of ``TESTED_RAY``, or where something that is used has moved, the import of this
module fails and says so. Each internal that is used:

* ``Dataset._logical_plan.dag`` and the operator classes: Ray has no public view of a plan, and the
  plan is what has to be judged and rewritten before anything runs.
* ``Dataset.copy(_deep_copy=True)`` and ``Dataset._from_parent``: to rewrite a private copy, so that
  the user's dataset stays as it was.
* ``LogicalOptimizer``: an armed pipeline is what Ray's optimizer makes of the user's, so filters
  and columns are pushed where plain Ray Data pushes them, and under the same names.
* ``DelegatingBlockBuilder``, ``eval_expr``, ``eval_projection``, ``concat``: to make blocks of
  rows, to evaluate expressions and to join blocks exactly as Ray Data itself does.
"""

from __future__ import annotations

import dataclasses
import dis
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data.block import BlockAccessor
from ray.data.datasource import Datasink, Datasource

from ray_resume.core.tokens import SOURCE_COLUMN, TOKEN_COLUMN
from ray_resume.errors import NonResumableError
from ray_resume.raydata import expressions

# From the first to before the second. `pyproject.toml` says the same to pip, but an image of a
# cluster often has its own Ray, or gets another one later, and then pip only warns. Here it is an
# error, not a warning: that no row is lost rests on what Ray does (which read tasks it runs, what
# its optimizer moves), and a Ray that does it otherwise need not have renamed anything.
TESTED_RAY = ((2, 56), (2, 61))


def unknown_ray(reason: object) -> ImportError:
    """Make the error for a Ray whose insides are not those that this package was tested with."""
    first, beyond = (".".join(map(str, version)) for version in TESTED_RAY)
    return ImportError(
        f"ray_resume does not know the insides of Ray {ray.__version__}: {reason}. "
        f"Install one that it was tested with: pip install 'ray[data]>={first},<{beyond}'"
    )


if not TESTED_RAY[0] <= tuple(map(int, ray.__version__.split(".")[:2])) < TESTED_RAY[1]:
    raise unknown_ray("it was never tested with it")

try:
    from ray.data._internal.arrow_ops.transform_pyarrow import concat
    from ray.data._internal.delegating_block_builder import DelegatingBlockBuilder
    from ray.data._internal.logical.interfaces import LogicalOperator, LogicalPlan
    from ray.data._internal.logical.operators import (
        Filter,
        FlatMap,
        InputData,
        MapBatches,
        MapRows,
        Project,
        Read,
        ReadFiles,
        StreamingRepartition,
    )
    from ray.data._internal.logical.optimizers import LogicalOptimizer
    from ray.data._internal.planner.plan_expression.expression_evaluator import (
        eval_expr,
        eval_projection,
    )
    from ray.data._internal.planner.plan_udf_map_op import _validate_batch_output
    from ray.data._internal.planner.plan_write_op import WRITE_UUID_KWARG_NAME
    from ray.data.datasource.file_datasink import _FileDatasink
    from ray.data.expressions import Expr, StarExpr, col
except ImportError as error:
    raise unknown_ray(error) from error

__all__ = [
    "GATHERS_BY_SIZE",
    "WRITE_UUID_KWARG_NAME",
    "Chain",
    "arm",
    "block_of",
    "check_output",
    "check_used",
    "concat_tables",
    "dropped_columns",
    "is_file_datasink",
    "mask_of",
    "method_of",
    "position_of_write",
    "rows_of",
    "unknown_ray",
    "validate",
]

GATHERS_BY_SIZE = hasattr(Datasink, "min_bytes_per_write")
"""Whether Ray Data gives a write task as many blocks as its datasink asks for by their size."""

_WAY_OUT = (
    "Write the rows that go into it with resumable_write, then start a second pipeline "
    "from the written files."
)

_MIXES = "it brings rows of all sources together"
_JOINS = "its rows come from several datasets, and may come twice"
_LEAVES_OUT = "which rows it leaves out differs from run to run"

# What is refused, as Ray calls it: the call that makes it, and why. Only what is in `_check_kind`
# passes; what is not here, such as an operator of a newer Ray, is refused in general terms.
_REFUSED: dict[str, tuple[str, str]] = {
    "Aggregate": ("groupby or an aggregation", _MIXES),
    "Download": (
        "an expression",
        "ray_resume cannot follow rows through it. A @resumable UDF that downloads is fine",
    ),
    "Join": ("join", _JOINS),
    "Limit": ("limit", _LEAVES_OUT),
    "Mix": ("mix", _JOINS),
    "RandomShuffle": ("random_shuffle", _MIXES),
    "RandomizeBlocks": ("randomize_block_order", _MIXES),
    "Repartition": ("repartition, or groupby for map_groups", _MIXES),
    "Sort": ("sort, or groupby for map_groups", _MIXES),
    "Union": ("union", _JOINS),
    "Zip": ("zip", _JOINS),
}

# So many operators on either side of a refused one are spelt in a message.
_NEIGHBOURS = 3
_LONGEST_NAME = 60

_UDF_OPERATORS: dict[Any, str] = {
    MapBatches: "map_batches",
    MapRows: "map",
    Filter: "filter",
    FlatMap: "flat_map",
}

_UDF_TYPES: Any = tuple(_UDF_OPERATORS)

# What is used of Ray's classes without being imported by name.
_USED: dict[Any, str] = {
    Dataset: "_logical_plan _from_parent copy context",
    DataContext: "checkpoint_config",
    LogicalPlan: "dag",
    LogicalOperator: "input_dependencies name",
    Read: "datasource datasource_or_legacy_reader num_outputs detected_parallelism parallelism "
    "per_block_limit",
    **dict.fromkeys(
        _UDF_TYPES,
        "fn fn_args fn_kwargs fn_constructor_args fn_constructor_kwargs compute "
        "ray_remote_args_fn ray_remote_args per_block_limit input_dependencies",
    ),
    Project: "exprs per_block_limit input_dependencies",
    StreamingRepartition: "per_block_limit input_dependencies",
}


@dataclass(frozen=True)
class Chain:
    """A pipeline that may be armed: a read, and the operators above it in the order of the data."""

    dataset: Dataset
    read: Any
    operators: tuple[Any, ...]

    @property
    def datasource(self) -> Datasource:
        """The datasource of the read."""
        datasource: Datasource = self.read.datasource
        return datasource

    @property
    def read_tasks(self) -> int | None:
        """How many read tasks the user has asked for, if he has."""
        return None if self.read.parallelism == -1 else int(self.read.parallelism)

    def optimized(self) -> Chain:
        """Return the chain that Ray's optimizer makes of it: what plain Ray Data would execute.

        Its read has the filters and the columns that Ray pushes into it. The dataset stays as it
        is, though Ray itself puts such a plan in its place whenever the dataset is iterated over.
        """
        plan = LogicalPlan(self.dataset._logical_plan.dag, self.dataset.context)
        read, *above = _operators_below(LogicalOptimizer().optimize(plan).dag)
        return Chain(self.dataset, read, tuple(above))

    def schema(self) -> pa.Schema | None:
        """Return the schema of what comes out, None if Ray does not know it before it executes."""
        schema = (self.read, *self.operators)[-1].infer_schema()
        return schema if isinstance(schema, pa.Schema) else None

    def refuse(self, operator: Any, problem: str, way_out: str) -> NonResumableError:
        """Make the error for ``operator``: what is wrong with it, where it is, and what to do."""
        operators = (self.read, *self.operators)
        where = _position([*map(_title, operators), "resumable_write"], operators.index(operator))
        return NonResumableError(f"{problem} It is in brackets here: {where}. {way_out}")


def validate(
    dataset: Dataset, *, resumable_datasource: type, is_decorated: Callable[[Any], bool]
) -> Chain:
    """Judge the plan of ``dataset``: one chain of known operators above one resumable read.

    Raises:
        NonResumableError: it is anything else. Nothing was started.
    """
    if not isinstance(dataset, Dataset):
        raise NonResumableError(
            f"resumable_write got a value of type {type(dataset).__name__}, not a "
            "ray.data.Dataset: what split, streaming_split, iterator, unique and aggregations "
            "return is no pipeline any more. "
            f"{_READ_WAY_OUT}"
        )
    if dataset.context.checkpoint_config is not None:
        raise NonResumableError(
            "DataContext.checkpoint_config is set: Ray Data's own checkpointing would skip rows "
            "that ray_resume waits for. Set it to None, or do without resumable_write."
        )
    start, *above = _operators_below(dataset._logical_plan.dag)
    chain = Chain(dataset, start, tuple(above))
    # All kinds first, since there is no use in mending the read of a union, or in decorating what
    # a shuffle rules out.
    for operator in chain.operators:
        _check_kind(chain, operator)
    _check_start(chain, resumable_datasource)
    for operator in chain.operators:
        _check_udf(chain, operator, is_decorated)
    return chain


def arm(
    chain: Chain,
    datasource: Datasource,
    read_tasks: int,
    retries: int,
    arm_udf: Callable[[str, Any], Any],
    arm_predicate: Callable[[Any], Any],
) -> Dataset:
    """Rewrite a private copy of the pipeline to read from ``datasource`` and run armed UDFs.

    Args:
        chain: an optimized one: what Ray's optimizer would push under an operator, it has pushed.
            Armed, operators keep their order: a filter is a UDF for Ray from here on.
        datasource: takes the place of the chain's own; its blocks have the two columns.
        read_tasks: how many read tasks it is asked for.
        retries: how often a task is executed again whose worker died. (Ray Data's own default is
            for ever, also if it kills its worker each time.)
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
        ray_remote_args={"max_retries": retries, **(chain.read.ray_remote_args or {})},
        # With a number of its own choice, Ray would split the output of each read task into many
        # blocks, and could no longer fuse the read with what follows.
        parallelism=read_tasks,
    )
    for above in chain.operators:
        operator = _retried(_armed(above, operator, arm_udf, arm_predicate), retries)
    return Dataset._from_parent(dataset, LogicalPlan(operator, dataset.context))


def is_file_datasink(datasink: Any) -> bool:
    """Say whether ``datasink`` is one of Ray's own for files in a folder."""
    return isinstance(datasink, _FileDatasink)


def rows_of(block: Any) -> Iterator[dict[str, Any]]:
    """Iterate over a block's rows as Ray gives them to row-wise UDFs."""
    rows: Iterator[dict[str, Any]] = BlockAccessor.for_block(block).iter_rows(
        public_row_format=True
    )
    return rows


def check_output(batch: Any) -> None:
    """Refuse what plain Ray Data refuses as an output of ``map_batches``, in the same words.

    Raises:
        ValueError: it is no batch.
    """
    _validate_batch_output(batch)
    if isinstance(batch, np.ndarray):
        BlockAccessor.batch_to_block(batch)


def block_of(rows: Iterable[dict[str, Any]]) -> Any:
    """Make a block of rows as Ray makes one of what row-wise UDFs return."""
    builder = DelegatingBlockBuilder()  # type: ignore[no-untyped-call]
    for row in rows:
        builder.add(row)
    return builder.build()


def mask_of(expression: Expr, block: Any) -> npt.NDArray[np.bool_]:
    """Say for each row of a block whether it satisfies ``expression``; null is no."""
    mask = eval_expr(expression, block)
    if isinstance(mask, (pa.Array, pa.ChunkedArray)):
        return np.asarray(mask.fill_null(False)).astype(bool)
    if isinstance(mask, (bool, np.bool_)):
        return np.full(BlockAccessor.for_block(block).num_rows(), bool(mask))
    return np.asarray(mask.fillna(False), dtype=bool)


def concat_tables(tables: Sequence[pa.Table]) -> pa.Table:
    """Concatenate blocks whose schemas may differ as Ray's own writers allow, in their order."""
    if len(tables) == 1:
        return tables[0]
    return concat(list(tables), promote_types=True, **_IN_ORDER)


# By default, newer versions put those first that need no conversion.
_IN_ORDER = (
    {"preserve_order": True} if "preserve_order" in inspect.signature(concat).parameters else {}
)


_READ_WAY_OUT = (
    "Read with resumable_read(ray.data.read_..., ..., checkpoint=...), and give resumable_write "
    "the dataset itself, not one that was materialized or split."
)


def position_of_write(dataset: Dataset) -> str:
    """Format a pipeline with a write at its end, which is in brackets."""
    names = [*map(_title, _operators_below(dataset._logical_plan.dag)), "write"]
    return _position(names, len(names) - 1)


def _operators_below(operator: Any) -> list[Any]:
    """Return ``operator`` and what is below it in the order of the data, along first inputs."""
    operators = [operator]
    # What lists files below a plain read is that read's own affair.
    while operators[-1].input_dependencies and not isinstance(operators[-1], ReadFiles):
        operators.append(operators[-1].input_dependencies[0])
    return operators[::-1]


def _position(names: Sequence[str], index: int) -> str:
    """Spell a pipeline with brackets around one operator, and without what is far from it."""
    spelt: list[str] = []
    for i, name in enumerate(names):
        if i in (0, len(names) - 1) or abs(i - index) <= _NEIGHBOURS:
            spelt.append(f"[{name}]" if i == index else name)
        elif spelt[-1] != "...":
            spelt.append("...")
    return " -> ".join(spelt)


def _title(operator: Any) -> str:
    """Spell an operator for people: as Ray names it, after what it is."""
    kind, name = type(operator).__name__, str(operator.name)
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}..."
    # Of a map, the name alone says what it is.
    telling = isinstance(operator, _UDF_TYPES) or name.startswith(kind)
    title = name if telling else f"{kind}({name})"
    inputs = len(operator.input_dependencies)
    return title if inputs < 2 else f"{title} of {inputs} datasets"


def _check_kind(chain: Chain, operator: Any) -> None:
    if not isinstance(operator, (*_UDF_TYPES, Project, StreamingRepartition)):
        call, why = _REFUSED.get(
            type(operator).__name__, ("", "ray_resume cannot follow rows through it")
        )
        raise chain.refuse(
            operator,
            f"{_title(operator)}{call and f' (from {call})'} cannot stand between resumable_read "
            f"and resumable_write: {why}.",
            _WAY_OUT,
        )
    _check_limit(chain, operator)


def _check_start(chain: Chain, resumable_datasource: type) -> None:
    start = chain.read
    if isinstance(start, InputData):
        problem = (
            "The pipeline starts with a dataset that was materialized, by materialize, split, "
            "split_at_indices or train_test_split: which source a row came from is lost."
        )
    elif not isinstance(start, Read) or not isinstance(start.datasource, resumable_datasource):
        problem = f"The pipeline starts with {_title(start)}, which is not resumable."
    else:
        _check_limit(chain, start)
        return
    raise chain.refuse(start, problem, _READ_WAY_OUT)


def _check_udf(chain: Chain, operator: Any, is_decorated: Callable[[Any], bool]) -> None:
    if isinstance(operator, Filter) and operator.is_expression_based():
        _check_expression(chain, operator, operator.predicate_expr)
    elif _is_drop_columns(operator):
        return
    elif isinstance(operator, _UDF_TYPES) and _is_rays_own(operator.fn):
        raise chain.refuse(
            operator,
            f"{_title(operator)} runs a UDF of Ray Data's own, which cannot be decorated.",
            "Say it by with_column, select_columns or rename_columns, or with a @resumable UDF. "
            "(A sample, or a split into training and test rows: by a hash of something in the "
            "row, so that it is the same in every run.)",
        )
    elif isinstance(operator, _UDF_TYPES) and not is_decorated(operator.fn):
        raise chain.refuse(
            operator,
            f"{_title(operator)} runs a UDF that is not decorated.",
            "Put @resumable on it, if each call's output comes from that call's rows alone. A UDF "
            "that buffers, deduplicates or aggregates over calls cannot be resumed: write with "
            "resumable_write before it, then start a second pipeline from the written files.",
        )
    elif isinstance(operator, Project):
        for expression in _expressions(operator):
            _check_expression(chain, operator, expression)


def method_of(operator: Any) -> str | None:
    """Return the method of a dataset that makes such an operator of a UDF, None if none does."""
    return _UDF_OPERATORS.get(type(operator))


def dropped_columns(operator: Any) -> list[str] | None:
    """Return the columns that an operator of ``drop_columns`` drops, None of another operator."""
    if not _is_drop_columns(operator):
        return None
    return list(inspect.getclosurevars(operator.fn).nonlocals["cols"])


def _is_drop_columns(operator: Any) -> bool:
    # Without a schema, Ray says drop_columns with a UDF of its own, which keeps rows and order.
    return (
        isinstance(operator, MapBatches)
        and _is_rays_own(operator.fn)
        and operator.fn.__qualname__.startswith("Dataset.drop_columns.")
    )


def _is_rays_own(udf: Any) -> bool:
    return getattr(udf, "__module__", None) == Dataset.__module__


def _check_limit(chain: Chain, operator: Any) -> None:
    if operator.per_block_limit is not None:
        raise chain.refuse(
            operator,
            f"A limit was pushed into {_title(operator)}: rows that it leaves out are lost "
            "without a trace.",
            _WAY_OUT,
        )


def _check_expression(chain: Chain, operator: Any, expression: Any) -> None:
    if expression.name in (SOURCE_COLUMN, TOKEN_COLUMN):
        raise chain.refuse(
            operator,
            f"{_title(operator)} makes a column called {expression.name}, a name that ray_resume "
            "uses itself.",
            "Give it another name.",
        )
    refusal = expressions.refusal_of(expression)
    if refusal is not None:
        raise chain.refuse(operator, f"{_title(operator)} {refusal.problem}", refusal.way_out)


def _expressions(project: Project) -> list[Any]:
    # All that it holds: beside what comes out, newer versions keep shared parts in a second field.
    held = (getattr(project, field.name) for field in dataclasses.fields(project))
    lists = (values for values in held if isinstance(values, list))
    return [value for values in lists for value in values if isinstance(value, Expr)]


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
            arm_udf(_UDF_OPERATORS[type(operator)], operator.fn),
            fn_args=operator.fn_args,
            fn_kwargs=operator.fn_kwargs,
            fn_constructor_args=operator.fn_constructor_args,
            fn_constructor_kwargs=operator.fn_constructor_kwargs,
        )
    changes: dict[str, Any] = {"input_dependencies": [below]}
    if isinstance(operator, MapBatches) and not _is_drop_columns(operator):
        changes["fn"] = arm_udf(_UDF_OPERATORS[MapBatches], operator.fn)
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
    """Return what makes of a block what a projection does, and keeps the two columns.

    As a UDF, it is out of the reach of Ray's optimizer, and is called with no empty block: Ray's
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


def _retried(operator: Any, retries: int) -> Any:
    given = getattr(operator, "ray_remote_args", None)
    if given is None:
        return operator
    in_actors = isinstance(getattr(operator, "compute", None), ActorPoolStrategy)
    name = "max_task_retries" if in_actors else "max_retries"
    return dataclasses.replace(operator, ray_remote_args={name: retries, **given})


def check_used(used: Mapping[Any, str]) -> None:
    """Find at import what has moved in Ray, not in the middle of a run.

    Args:
        used: for each class of Ray's, the names that are used of it, separated by spaces.

    Raises:
        ImportError: a class has not all of them.
    """
    for owner, names in used.items():
        known = set(dir(owner))
        if dataclasses.is_dataclass(owner):
            known |= {field.name for field in dataclasses.fields(owner)}
        # What only exists in instances is found where a method sets it.
        methods = (value for base in owner.__mro__ for value in vars(base).values())
        steps = (
            step
            for method in methods
            if inspect.isfunction(method)
            for step in dis.get_instructions(inspect.unwrap(method))
        )
        known |= {step.argval for step in steps if step.opname == "STORE_ATTR"}
        missing = [name for name in names.split() if name not in known]
        if missing:
            raise unknown_ray(f"{owner.__name__} has no {', '.join(missing)}")


check_used(_USED)
