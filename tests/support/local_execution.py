"""Executes the physical plan of a dataset in this process: what Ray plans, without its scheduling.

A pipeline on a cluster costs seconds, and this costs milliseconds; so thousands of plans can be
compared. What runs is what Ray's optimizer and planner make of the pipeline, operator by operator.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import pyarrow as pa
import ray
from direct_client import DirectClient
from ray.data import Dataset
from ray.data._internal.execution.interfaces.task_context import TaskContext
from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator
from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer
from ray.data._internal.execution.operators.map_operator import _map_task
from ray.data._internal.logical import optimizers
from ray.data._internal.logical.operators import StreamingRepartition
from ray.data.block import BlockAccessor

from ray_resume.core.ledger import Ledger
from ray_resume.core.messages import Drain, Event, Failure, Message, ReadFailure
from ray_resume.core.tokens import MODULUS, SOURCE_COLUMN, TOKEN_COLUMN
from ray_resume.raydata import arming, plan
from ray_resume.read.datasource import ArmedDatasource, ResumableDatasource
from ray_resume.udf.decorator import options_of
from ray_resume.udf.stage import instrument, instrument_predicate

# An older Ray has no actors that read footers.
_FOOTERS: Any = "ray.data._internal.datasource_v2.formats.parquet"
try:
    footer_file_indexer: Any = importlib.import_module(f"{_FOOTERS}.footer_file_indexer")
    footer_reader: Any = importlib.import_module(f"{_FOOTERS}.footer_reader")
except ImportError:
    footer_file_indexer = footer_reader = None

__all__ = ["execute", "execute_armed", "sources_of", "without_shared_parts"]


class UnaccountedError(BaseException):
    """Rows were lost or doubled on their way. No error of a pipeline's, as all others are."""


class LocalClient(DirectClient):
    """Stands in for the ledger's client, with the ledger itself behind it."""

    run_id = "run"
    pass_number = 1

    _all: ClassVar[list[LocalClient]] = []

    def __init__(self, source_count: int) -> None:
        self.ledger = Ledger(self.run_id, source_count)
        self.ledger.begin_pass(self.pass_number)
        self.failures: list[Event] = []
        self._all.append(self)

    def __reduce__(self) -> Any:
        # Read tasks go through the object store, and are to come back with this very ledger.
        return _client, (self._all.index(self),)

    def send(self, *events: Event) -> None:
        self.failures += [event for event in events if isinstance(event, (Failure, ReadFailure))]
        self.ledger.apply(Message(self.run_id, self.pass_number, events))


def _client(number: int) -> LocalClient:
    return LocalClient._all[number]


def execute(dataset: Dataset) -> list[pa.Table]:
    """Return the blocks of ``dataset`` that have rows. Ray rewrites its plan, as it always does."""
    physical, _ = optimizers.get_execution_plan(dataset._logical_plan)
    with _without_footer_actors():
        bundles = _outputs(physical.dag, dataset.context)
    tables = [BlockAccessor.for_block(block).to_arrow() for bundle in bundles for block in bundle]
    return [table for table in tables if table.num_rows]


def execute_armed(dataset: Dataset) -> list[pa.Table]:
    """As :func:`execute`, of the armed pipeline: without the two columns, and accounted for."""
    chain = _validated(dataset).optimized()
    base: Any = chain.datasource
    sources = base.sources
    client: Any = LocalClient(len(sources))
    pipeline = arming.arm(
        chain,
        ArmedDatasource(base, sources, range(len(sources)), client),
        len(sources),
        lambda method, udf: instrument(udf, client, method),
        lambda expression: instrument_predicate(expression, client),
    )
    tables = []
    for table in execute(pipeline):
        numbers = table.column(SOURCE_COLUMN).to_pylist()
        drained: dict[int, int] = {}
        for number, token in zip(numbers, table.column(TOKEN_COLUMN).to_pylist(), strict=True):
            drained[number] = (drained.get(number, 0) + token) % MODULUS
        client.send(*(Drain(number, -total % MODULUS) for number, total in drained.items()))
        tables.append(table.drop_columns([SOURCE_COLUMN, TOKEN_COLUMN]))
    if client.failures:
        raise RuntimeError(f"a run would fail: {client.failures[0].error}")
    pending = client.ledger.pending()
    if pending:
        raise UnaccountedError([client.ledger.explain(number) for number in pending])
    return tables


def sources_of(dataset: Dataset) -> dict[str, Any]:
    """Return the ids of the sources of a resumable pipeline, with their fingerprints."""
    datasource: Any = _validated(dataset).datasource
    return {source.source_id: source.fingerprint for source in datasource.sources}


def _validated(dataset: Dataset) -> plan.Chain:
    return plan.validate(
        dataset,
        resumable_datasource=ResumableDatasource,
        is_decorated=lambda udf: options_of(udf) is not None,
    )


def without_shared_parts() -> Any:
    """Have Ray's optimizer leave expressions as they are.

    By itself it lets them share parts, and those it evaluates on empty blocks without columns, too,
    which is an error. Whether there is such a block depends on how operators are executed.
    """
    if not hasattr(optimizers, "CommonSubExprElimination"):
        return contextlib.nullcontext()
    nothing = SimpleNamespace(apply=lambda plan: plan)
    return mock.patch.object(optimizers, "CommonSubExprElimination", return_value=nothing)


class _LocalFooterReader:
    """Reads Parquet footers in this process, instead of 32 actors that start for each listing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        reader = footer_reader.FooterReader(*args, **kwargs)
        self.read_footers = SimpleNamespace(remote=reader.read_footers)

    @classmethod
    def options(cls, **_: Any) -> Any:
        return SimpleNamespace(remote=cls)


def _without_footer_actors() -> Any:
    if footer_file_indexer is None:
        return contextlib.nullcontext()
    rays = SimpleNamespace(get=lambda value: value, kill=lambda _: None)
    return mock.patch.multiple(footer_file_indexer, ray=rays, FooterReaderActor=_LocalFooterReader)


def _outputs(operator: Any, context: Any) -> list[list[Any]]:
    """Return the blocks that ``operator`` puts out, in bundles."""
    if isinstance(operator, InputDataBuffer):
        bundles = operator._input_data if operator._is_input_initialized else None
        if bundles is None:
            bundles = operator._input_data_factory(context.target_max_block_size)
        get: Any = ray.get
        return [get(list(bundle.block_refs)) for bundle in bundles]
    (below,) = operator.input_dependencies
    inputs = _outputs(below, context)
    if any(isinstance(logical, StreamingRepartition) for logical in operator._logical_operators):
        inputs = [[block for bundle in inputs for block in bundle]]
    outputs = []
    for index, blocks in enumerate(inputs):
        if not blocks:
            continue
        task = TaskContext(task_idx=index, op_name=operator.name)
        transformer = operator.get_map_transformer()
        if isinstance(operator, ActorPoolMapOperator):
            # As an actor of its pool begins. Of one operator there is one at a time.
            with mock.patch.object(ray.data, "_map_actor_context", None):
                # Ray runs the loop of this thread in another one, which is never stopped.
                asyncio.set_event_loop(asyncio.new_event_loop())
                transformer.init()
                outputs.append(list(_map_task(transformer, context, task, *blocks))[::2])
            continue
        # Blocks, each of them followed by its metadata.
        outputs.append(list(_map_task(transformer, context, task, *blocks))[::2])
    return outputs
