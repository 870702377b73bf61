"""The two datasources: what `resumable_read` gives to Ray Data, and what replaces it when armed.

Importable on workers: knows neither checkpoints nor lmdb. A read task's work is
:class:`ResumableReadTask`: read one source after another, add the two columns, seal each.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from ray.data import DataContext
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from ray_resume.core.ledger import Failure, ReadFailure, Seal
from ray_resume.core.sources import (
    ChangeCheck,
    Input,
    ReadTaskFactory,
    Selection,
    Source,
    SourceTable,
)
from ray_resume.core.tokens import (
    MODULUS,
    SOURCE_COLUMN,
    SOURCE_TYPE,
    TOKEN_COLUMN,
    TOKEN_TYPE,
    fresh_nonce,
    read_nonce,
    token_sum,
    tokens,
)
from ray_resume.errors import NonResumableError, SourceChangedError
from ray_resume.failpoints import reached
from ray_resume.raydata import blocks as batches
from ray_resume.raydata import plan
from ray_resume.raydata.expressions import is_repeatable
from ray_resume.read.read_errors import is_rays_own, is_transient, read_failure, retries_of
from ray_resume.run.client import LedgerClient

__all__ = ["ArmedDatasource", "ResumableDatasource", "ResumableReadTask"]

logger = logging.getLogger("ray_resume")

# As many tasks as Ray Data makes at least of an input that is large enough.
_SPREAD_OVER_TASKS = 200

# Seals of small sources travel together, but none waits for more than a block after this.
_SEAL_INTERVAL_S = 0.1

# The longest pause before a read is repeated.
_MAX_BACKOFF_S = 32

_CHANGED = "the read: the source changed after it was listed. The next run reads it as it is then"


class _SourceDatasource(Datasource):
    """What both have in common: sources that are known, and tasks that are made when needed."""

    def __init__(self, input_: Input, sources: SourceTable) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.input = input_
        self.sources = sources
        self._projection_map: dict[str, str] | None = None
        self._predicates: tuple[Any, ...] = ()

    def get_name(self) -> str:
        return self.input.name

    def estimate_inmemory_data_size(self) -> int | None:
        return _total(self.input.sizes_bytes(self.sources))

    @property
    def supports_distributed_reads(self) -> bool:
        return self.input.distributed

    def supports_projection_pushdown(self) -> bool:
        return False

    def supports_predicate_pushdown(self) -> bool:
        return False

    @property
    def selected_columns(self) -> tuple[str, ...] | None:
        """The columns that Ray Data has told it to read; None: all."""
        selected = self._projection_map
        return None if selected is None else tuple(selected)

    @property
    def column_names(self) -> Sequence[str] | None:
        """The columns that there are before any are selected, None if they are not known."""
        schema = self.input.schema(None)
        return None if schema is None else list(schema.names)

    @property
    def predicates(self) -> tuple[Any, ...]:
        """The filters that Ray Data has told it to read with; all must hold."""
        return self._predicates

    def _placeholders(self, parallelism: int) -> list[ReadTask]:
        # Ray asks for tasks several times to count them, before the call whose tasks run.
        # Opening sources only to be counted would cost as much as reading their footers.
        groups = _grouped(range(len(self.sources)), parallelism)
        schema = self._schema() if groups else None
        return [
            ReadTask(_never_run, self._metadata(self.sources[group.start : group.stop]), schema)
            for group in groups
        ]

    def _schema(self) -> pa.Schema | None:
        # Where Ray does not know it, its optimizer takes a path that loses columns.
        return self.input.schema(self.selected_columns)

    def _metadata(self, sources: SourceTable) -> BlockMetadata:
        return BlockMetadata(
            num_rows=None,
            size_bytes=_total(self.input.sizes_bytes(sources)),
            input_files=None,
            exec_stats=None,
        )

    def _reads(
        self, parallelism: int, data_context: DataContext
    ) -> Iterator[tuple[range, SourceTable, ReadTaskFactory, Selection]]:
        """Open the sources, and cut them into at most ``parallelism`` groups, by position."""
        selection = Selection(self._predicates, self.selected_columns)
        tasks_of, left = self.input.open(self.sources, selection, data_context)
        for positions in _grouped(range(len(self.sources)), parallelism):
            group = self.sources[positions.start : positions.stop].packed()
            yield positions, group, tasks_of(positions), left


class ResumableDatasource(_SourceDatasource):
    """The sources of a resumable read. Not armed, it reads what plain Ray Data would of them.

    ``sources`` are those of the read's shard, or all that were listed. ``checkpoint`` and
    ``options`` are what `resumable_write` needs to know of the read.
    """

    def __init__(self, input_: Input, sources: SourceTable, checkpoint: Any, options: Any) -> None:
        super().__init__(input_, sources)
        self.checkpoint = checkpoint
        self.options = options

    # What plain Ray Data would push into this read, its optimizer pushes into this one.
    def supports_projection_pushdown(self) -> bool:
        return self.input.selects

    def supports_predicate_pushdown(self) -> bool:
        return self.input.selects

    def apply_projection(self, projection_map: dict[str, str] | None) -> Any:
        before = self._projection_map
        narrowed: Any = super().apply_projection(projection_map)
        if self.input.reorders and before and projection_map is not None:
            narrowed._projection_map = {name: name for name in projection_map if name in before}
        return narrowed

    def apply_predicate(self, predicate_expr: Any) -> ResumableDatasource:
        # Tokens are given out by position in what was read, so that must be the same each time.
        if not is_repeatable(predicate_expr):
            return self
        narrowed = copy.copy(self)
        narrowed._predicates = (*self._predicates, predicate_expr)
        return narrowed

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        if data_context is None and parallelism == 1 and self.sources:
            # Ray asks for what it tells of a dataset: its size, its files, its number of rows.
            metadata = self.input.metadata(self.sources) or self._metadata(self.sources)
            return [ReadTask(_never_run, metadata, self._schema())]
        if data_context is None or not self.sources:
            return self._placeholders(parallelism)
        return [
            ReadTask(
                PlainReadTask(group, tasks, left),
                self._metadata(group),
                per_task_row_limit=per_task_row_limit,
            )
            for _, group, tasks, left in self._reads(parallelism, data_context)
        ]


class ArmedDatasource(_SourceDatasource):
    """The pending sources of one pass, numbered as in the run's table.

    Nothing can be pushed into it: Ray's optimizer has pushed it into the ``base`` already.
    """

    def __init__(
        self,
        base: ResumableDatasource,
        sources: SourceTable,
        numbers: Sequence[int],
        client: LedgerClient,
    ) -> None:
        super().__init__(base.input, sources)
        self._projection_map = base._projection_map
        self._predicates = base._predicates
        self._numbers = numbers
        self._client = client

    def _schema(self) -> pa.Schema | None:
        schema = super()._schema()
        if schema is None:
            return None
        ours = [pa.field(SOURCE_COLUMN, SOURCE_TYPE), pa.field(TOKEN_COLUMN, TOKEN_TYPE)]
        return pa.schema([*schema, *ours], schema.metadata)

    def preferred_read_tasks(self, target_bytes: int) -> int:
        """Say how many read tasks suit these sources: enough to spread them, few tiny ones.

        Args:
            target_bytes: in-memory size that a task's output should not exceed by much.
        """
        size = self.estimate_inmemory_data_size() or 0
        return min(len(self.sources), max(_SPREAD_OVER_TASKS, -(-size // target_bytes)))

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        if per_task_row_limit is not None:
            raise NonResumableError("A limit cannot stand in a resumable pipeline.")
        if data_context is None:
            return self._placeholders(parallelism)
        return [
            ReadTask(
                ResumableReadTask(
                    group,
                    self._numbers[positions.start : positions.stop],
                    tasks,
                    left,
                    self.input.repeatable,
                    self.input.change_check(),
                    self._client,
                ),
                self._metadata(group),
            )
            for positions, group, tasks, left in self._reads(parallelism, data_context)
        ]


@dataclass(frozen=True)
class PlainReadTask:
    """Reads sources one after another, as plain Ray Data does."""

    # Ray names a read function by this where it warns of a task that is large.
    __name__ = "ray_resume read"

    sources: SourceTable
    tasks: ReadTaskFactory
    left: Selection

    def __call__(self) -> Iterator[Any]:
        for task in self.tasks(self.sources):
            if task is not None:
                yield from _selected(task(), self.left)


@dataclass(frozen=True)
class ResumableReadTask:
    """Reads sources one after another, gives each row its token, seals each source.

    ``numbers`` are the sources' in the run's table.
    Rows that ``left`` leaves out are no rows of their source.

    Guarantees: a source is sealed only after its reader is exhausted and each of its rows was
    taken by whoever iterates, and it is still what it was when it was listed. If its reader raises,
    the source is not sealed: its failure is reported in place of the seal, and the other sources
    are read. An iteration that ends early seals nothing, and the source stays pending.

    Raises:
        Exception: a reader's, if it is transient (see `read_errors`): then the other sources would
            fail as well.
    """

    __name__ = "ray_resume read"

    sources: SourceTable
    numbers: Sequence[int]
    tasks: ReadTaskFactory
    left: Selection
    repeatable: bool
    has_changed: ChangeCheck
    client: LedgerClient

    def __call__(self) -> Iterator[Any]:
        report = _Report(self.client)
        for number, source, read in zip(self.numbers, self.sources, self._reads(), strict=True):
            nonce = self._nonce(source.source_id)
            total = start = 0
            blocks = _Blocks(read, repeatable=self.repeatable)
            for block in blocks:
                count = batches.num_rows(block)
                values = tokens(nonce, start, count)
                total = (total + token_sum(values)) % MODULUS
                start += count
                report.send_if_due()
                yield batches.with_tracking_columns(
                    block, np.full(count, number, dtype=np.int32), values
                )
                reached("read.between_blocks")
            report.add(self._outcome(number, source, total, start, blocks.error))
            if blocks.error is not None and is_transient(blocks.error):
                report.send()
                raise blocks.error
        report.send()

    def _reads(self) -> Iterator[Callable[[], Iterable[Any]]]:
        """Make, for each source, what reads it; what cannot be opened raises when it is read."""
        try:
            tasks = self.tasks(self.sources)
        except NonResumableError:
            raise
        except Exception:
            # One of the sources is to blame. Each by itself shows which.
            for position in range(len(self.sources)):
                yield partial(self._read_alone, position)
            return
        for task in tasks:
            yield partial(self._read, task)

    def _read(self, task: Any) -> Iterable[Any]:
        return _selected(task(), self.left) if task is not None else ()

    def _read_alone(self, position: int) -> Iterable[Any]:
        (task,) = self.tasks(self.sources[position : position + 1].packed())
        return self._read(task)

    def _outcome(
        self, number: int, source: Source, total: int, rows: int, error: Exception | None
    ) -> Seal | Failure | ReadFailure:
        """Say what becomes of a source of which ``rows`` rows were read, up to its end or error."""
        try:
            # Only now, since what comes after this was not read any more.
            changed = self.has_changed(source)
        except Exception as unknown:
            error, changed = error or unknown, False
        if changed:
            return Failure(number, total, rows, _CHANGED)
        if error is None:
            return Seal(number, total, rows)
        if isinstance(error, SourceChangedError):
            # The input says so itself, of a source that it does not have any more.
            return Failure(number, total, rows, f"the read: {error}")
        failure = read_failure(number, total, rows, error)
        logger.warning(
            "The source %s could not be read: %s. It fails in this run, which goes on with the "
            "other sources.",
            source.source_id,
            failure.error,
        )
        return failure

    def _nonce(self, source_id: str) -> int:
        if not self.repeatable:
            return fresh_nonce()
        return read_nonce(self.client.run_id, self.client.pass_number, source_id)


class _Blocks:
    """Iterates once over what ``read()`` gives; an exception ends it, and stays in ``error``.

    A read is repeated as often as the user asks Ray Data to repeat a task
    (``DataContext.retried_map_errors``). A reader that is not ``repeatable`` is not asked for its
    rows again once some of them have left.
    """

    def __init__(self, read: Callable[[], Iterable[Any]], *, repeatable: bool) -> None:
        self.error: Exception | None = None
        self._read = read
        self._repeatable = repeatable
        self._rows = 0

    def __iter__(self) -> Iterator[Any]:
        attempt = 0
        while True:
            yield from self._remaining()
            error, self.error = self.error, None
            if error is None:
                return
            if attempt >= retries_of(error) or (self._rows and not self._repeatable):
                self.error = error
                return
            time.sleep(min(2**attempt, _MAX_BACKOFF_S))
            attempt += 1

    def _remaining(self) -> Iterator[Any]:
        """Read from the start, and give the rows that have not left yet."""
        skip = self._rows
        # Not around the yield: an exception that is raised there is not the reader's.
        try:
            blocks = iter(self._read())
        except Exception as error:
            self._keep(error)
            return
        while True:
            try:
                block = next(blocks)
                count = batches.num_rows(block)
                if skip:
                    block = batches.take(block, np.arange(min(skip, count), count))
            except StopIteration:
                return
            except Exception as error:
                self._keep(error)
                return
            skip, seen = max(0, skip - count), min(skip, count)
            self._rows += count - seen
            yield block

    def _keep(self, error: Exception) -> None:
        if is_rays_own(error):
            raise error
        self.error = error


class _Report:
    """Collects what became of sources, and sends it in few messages."""

    def __init__(self, client: LedgerClient) -> None:
        self._client = client
        self._events: list[Seal | Failure | ReadFailure] = []
        self._sent_at = time.monotonic()

    def add(self, event: Seal | Failure | ReadFailure) -> None:
        self._events.append(event)

    def send_if_due(self) -> None:
        if time.monotonic() - self._sent_at >= _SEAL_INTERVAL_S:
            self.send()

    def send(self) -> None:
        self._sent_at = time.monotonic()
        if self._events:
            reached("read.before_seal")
            self._client.send(*self._events)
            reached("read.after_seal")
            self._events = []


def _selected(blocks: Iterable[Any], left: Selection) -> Iterator[Any]:
    for block in blocks:
        selected = block
        for predicate in left.predicates:
            selected = batches.take(selected, plan.mask_of(predicate, selected))
        if left.columns is not None:
            selected = BlockAccessor.for_block(selected).select(list(left.columns))
        batches.refuse_repeated_names(selected)
        yield selected


def _total(sizes_bytes: npt.NDArray[np.float64] | None) -> int | None:
    return None if sizes_bytes is None else round(sizes_bytes.sum())


def _never_run() -> list[Any]:
    raise AssertionError("a placeholder was run: Ray asked for these tasks only to count them")


def _grouped(items: range, count: int) -> list[range]:
    """Cut ``items`` into at most ``count`` runs of nearly equal length, none of them empty."""
    n = min(max(count, 1), len(items))
    return [items[i * len(items) // n : (i + 1) * len(items) // n] for i in range(n)]
