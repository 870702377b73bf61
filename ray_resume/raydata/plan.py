"""Which operators a pipeline may have between the read and the write.

Internals of Ray's that are used:

* ``Dataset._logical_plan.dag`` and the operator classes: Ray has no public view of a plan, and a
  plan is checked and rewritten before anything runs.
* ``LogicalOptimizer``: an armed pipeline is what Ray's optimizer makes of the user's. So filters
  and columns are pushed where plain Ray Data pushes them, and under the same names.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow as pa
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data.datasource import Datasource

from ray_resume.core.tokens import SOURCE_COLUMN, TOKEN_COLUMN
from ray_resume.errors import NonResumableError
from ray_resume.raydata import expressions
from ray_resume.raydata.internals import check_used, unknown_ray

try:
    from ray.data._internal.logical.interfaces import LogicalOperator, LogicalPlan
    from ray.data._internal.logical.operators import (
        Download,
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
    from ray.data.expressions import Expr
except ImportError as error:
    raise unknown_ray(error) from error

__all__ = ["Chain", "downloads", "dropped_columns", "method_of", "position_of_write", "validate"]

_WAY_OUT = (
    "Write the rows that go into it with resumable_write, and run it with plain Ray Data on the "
    "written files. A second pipeline goes on from there, or from the first one's checkpoint: "
    "examples/deduplicate.py has both."
)

_READ_WAY_OUT = (
    "Read with resumable_read(ray.data.read_..., ..., checkpoint=...), and give resumable_write "
    "the dataset itself, not one that was materialized or split."
)

_MIXES = "it brings rows of all sources together"
_JOINS = "its rows come from several datasets, and may come twice"
_LEAVES_OUT = "which rows it leaves out differs from run to run"

# By the class of an operator: the call that makes it, and why it is refused. `_check_kind` lists
# what passes. An operator in neither list, such as one of a newer Ray, is refused in general terms.
_REFUSED: dict[str, tuple[str, str]] = {
    "Aggregate": ("groupby or an aggregation", _MIXES),
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

# A message shows so many operators on either side of the refused one.
_NEIGHBOURS = 3
_LONGEST_NAME = 60

_UDF_OPERATORS: dict[Any, str] = {
    MapBatches: "map_batches",
    MapRows: "map",
    Filter: "filter",
    FlatMap: "flat_map",
}

_UDF_TYPES: Any = tuple(_UDF_OPERATORS)

# Attributes of Ray's classes that this package uses.
_USED: dict[Any, str] = {
    Dataset: "_logical_plan context",
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
    Download: "uri_column_names output_bytes_column_names input_dependencies",
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
        """How many read tasks the user has asked for; None leaves it to Ray Data."""
        return None if self.read.parallelism == -1 else int(self.read.parallelism)

    @property
    def ends_in_actors(self) -> bool:
        """Whether the last operator is a pool of actors, with which Ray fuses no write."""
        last = (self.read, *self.operators)[-1]
        return isinstance(getattr(last, "compute", None), ActorPoolStrategy)

    def optimized(self) -> Chain:
        """Return the chain that Ray's optimizer makes of it: what plain Ray Data would execute.

        Its read has the filters and the columns that Ray pushes into it. The dataset stays as it
        is. (Ray itself replaces the plan of a dataset by such a plan when it is iterated over.)
        """
        plan = LogicalPlan(self.dataset._logical_plan.dag, self.dataset.context)
        read, *above = _operators_below(LogicalOptimizer().optimize(plan).dag)
        return Chain(self.dataset, read, tuple(above))

    def schema(self) -> pa.Schema | None:
        """Return the schema of what comes out, None if Ray does not know it before it executes."""
        schema = (self.read, *self.operators)[-1].infer_schema()
        return schema if isinstance(schema, pa.Schema) else None

    def refuse(self, operator: Any, problem: str, way_out: str) -> NoReturn:
        """Refuse ``operator``: say what is wrong with it, where it is, and what to do.

        Raises:
            NonResumableError: always.
        """
        operators = (self.read, *self.operators)
        where = _position([*map(_title, operators), "resumable_write"], operators.index(operator))
        raise NonResumableError(f"{problem} It is in brackets here: {where}. {way_out}")


def validate(
    dataset: Dataset, *, resumable_datasource: type, is_decorated: Callable[[Any], bool]
) -> Chain:
    """Check the plan of ``dataset``: one chain of known operators above one resumable read.

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
    # Kinds come first: it is no use to mend the read of a union, or to decorate a UDF of a shuffle.
    for operator in chain.operators:
        _check_kind(chain, operator)
    _check_start(chain, resumable_datasource)
    for operator in chain.operators:
        _check_udf(chain, operator, is_decorated)
    return chain


def position_of_write(dataset: Dataset) -> str:
    """Format a pipeline with a write at its end, which is in brackets."""
    names = [*map(_title, _operators_below(dataset._logical_plan.dag)), "write"]
    return _position(names, len(names) - 1)


def _operators_below(operator: Any) -> list[Any]:
    """Return ``operator`` and what is below it in the order of the data, along first inputs."""
    operators = [operator]
    # Below a plain read, Ray has operators that list its files.
    while operators[-1].input_dependencies and not isinstance(operators[-1], ReadFiles):
        operators.append(operators[-1].input_dependencies[0])
    return operators[::-1]


def _position(names: Sequence[str], index: int) -> str:
    """Format a pipeline with brackets around one operator, and without those far from it."""
    shown: list[str] = []
    for i, name in enumerate(names):
        if i in (0, len(names) - 1) or abs(i - index) <= _NEIGHBOURS:
            shown.append(f"[{name}]" if i == index else name)
        elif shown[-1] != "...":
            shown.append("...")
    return " -> ".join(shown)


def _title(operator: Any) -> str:
    """Format an operator for a message: Ray's name of it, after its kind."""
    kind, name = type(operator).__name__, str(operator.name)
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}..."
    # The name of a map says what kind it is.
    telling = isinstance(operator, _UDF_TYPES) or name.startswith(kind)
    title = name if telling else f"{kind}({name})"
    inputs = len(operator.input_dependencies)
    return title if inputs < 2 else f"{title} of {inputs} datasets"


def _check_kind(chain: Chain, operator: Any) -> None:
    if not isinstance(operator, (*_UDF_TYPES, Project, StreamingRepartition, Download)):
        call, why = _REFUSED.get(
            type(operator).__name__, ("", "ray_resume cannot follow rows through it")
        )
        chain.refuse(
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
    chain.refuse(start, problem, _READ_WAY_OUT)


def _check_udf(chain: Chain, operator: Any, is_decorated: Callable[[Any], bool]) -> None:
    if isinstance(operator, Filter) and operator.is_expression_based():
        _check_expression(chain, operator, operator.predicate_expr)
    elif _is_drop_columns(operator):
        return
    elif isinstance(operator, _UDF_TYPES) and _is_rays_own(operator.fn):
        chain.refuse(
            operator,
            f"{_title(operator)} runs a UDF of Ray Data's own, which cannot be decorated.",
            "Say it by with_column, select_columns or rename_columns, or with a @resumable UDF. "
            "(Take a sample, or a split into training and test rows, by a hash of something in "
            "the row, so that it is repeatable.)",
        )
    elif isinstance(operator, _UDF_TYPES) and not is_decorated(operator.fn):
        chain.refuse(
            operator,
            f"{_title(operator)} runs a UDF that is not decorated.",
            "Put @resumable on it, if each call's output comes from that call's rows alone. A UDF "
            "that buffers, deduplicates or aggregates over calls cannot be resumed. Write with "
            "resumable_write before it, run it with plain Ray Data on the written files, and start "
            "a second pipeline from there, as examples/deduplicate.py does.",
        )
    elif isinstance(operator, Project):
        for expression in _expressions(operator):
            _check_expression(chain, operator, expression)
    elif isinstance(operator, Download):
        for name in operator.output_bytes_column_names:
            _check_name(chain, operator, name)


def method_of(operator: Any) -> str | None:
    """Return the method of a dataset that makes such an operator of a UDF, None if none does."""
    return _UDF_OPERATORS.get(type(operator))


def downloads(operator: Any) -> list[tuple[str, str]]:
    """Return the column of addresses, and that of bytes, of each download that an operator makes.

    It keeps all rows and columns, and takes a null for what it cannot download.
    """
    if not isinstance(operator, Download):
        return []
    return list(zip(operator.uri_column_names, operator.output_bytes_column_names, strict=True))


def dropped_columns(operator: Any) -> list[str] | None:
    """Return the columns that an operator of ``drop_columns`` drops, None of another operator."""
    if not _is_drop_columns(operator):
        return None
    return list(inspect.getclosurevars(operator.fn).nonlocals["cols"])


def _is_drop_columns(operator: Any) -> bool:
    # Without a schema, Ray implements drop_columns by a UDF of its own, which keeps rows and order.
    return (
        isinstance(operator, MapBatches)
        and _is_rays_own(operator.fn)
        and operator.fn.__qualname__.startswith("Dataset.drop_columns.")
    )


def _is_rays_own(udf: Any) -> bool:
    return getattr(udf, "__module__", None) == Dataset.__module__


def _check_limit(chain: Chain, operator: Any) -> None:
    if getattr(operator, "per_block_limit", None) is not None:
        chain.refuse(
            operator,
            f"A limit was pushed into {_title(operator)}: rows that it leaves out are lost "
            "without a trace.",
            _WAY_OUT,
        )


def _check_name(chain: Chain, operator: Any, name: str | None) -> None:
    if name in (SOURCE_COLUMN, TOKEN_COLUMN):
        chain.refuse(
            operator,
            f"{_title(operator)} makes a column called {name}, a name that ray_resume uses itself.",
            "Give it another name.",
        )


def _check_expression(chain: Chain, operator: Any, expression: Any) -> None:
    _check_name(chain, operator, expression.name)
    refusal = expressions.refusal_of(expression)
    if refusal is not None:
        chain.refuse(operator, f"{_title(operator)} {refusal.problem}", refusal.way_out)


def _expressions(project: Project) -> list[Any]:
    # Newer versions of Ray keep parts that expressions share in a second field.
    held = (getattr(project, field.name) for field in dataclasses.fields(project))
    lists = (values for values in held if isinstance(values, list))
    return [value for values in lists for value in values if isinstance(value, Expr)]


check_used(_USED)
