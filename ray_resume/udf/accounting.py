"""The accounts of a UDF call, apart from who makes the call.

:func:`account_call` is a generator of steps. A runner (`stage`) carries them out, in a thread or on
an event loop. A step asks for a call or for its next output, or says what to drain or to emit. So
every rule about rows is here once, and none knows Ray, a ledger or async code.

Invariant (see `tokens.CallAccount`): what comes into a call of a source leaves the call, in the
tokens of its output rows or as a delta. The tokens of failed rows are reported apart.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ray_resume.core.messages import Drain
from ray_resume.core.tokens import CallAccount, SourceArray, TokenArray
from ray_resume.core.value_index import ValueIndex
from ray_resume.raydata import blocks, user_batches
from ray_resume.raydata.retries import backoff_s
from ray_resume.udf.attribution_columns import index_of, numbers_in, origins_in
from ray_resume.udf.failures import Failures, Raised
from ray_resume.udf.steps import (
    END,
    Attribution,
    FailedRows,
    Kept,
    RowsWithOrigins,
    Step,
    StepKind,
    Steps,
)

__all__ = ["account_call"]


@dataclass(frozen=True)
class _CallInput:
    """A batch without the two columns, and the two columns.

    ``original`` is a copy that the UDF cannot change, or None if nothing needs it. ``index`` is of
    the column that says which source an output row is of, if one does.
    """

    rows: Any
    sources: SourceArray
    tokens: TokenArray
    original: Any
    index: ValueIndex | None = None

    def at(self, positions: npt.NDArray[np.intp]) -> _CallInput:
        """Return some of the rows as they came."""
        kept = blocks.take(self.original, positions)
        return self._part(user_batches.deep_copied(kept), positions, kept)

    def cut(self, numbers: npt.NDArray[np.int32]) -> Iterator[_CallInput]:
        """Yield the rows of each number, one for each row."""
        if (numbers == numbers[0]).all():
            yield self
            return
        for _, rows, positions in blocks.split(self.rows, numbers):
            kept = None if self.original is None else blocks.take(self.original, positions)
            yield self._part(rows, positions, kept)

    def _part(self, rows: Any, positions: npt.NDArray[np.intp], original: Any) -> _CallInput:
        index = None if self.index is None else self.index.at(positions)
        return _CallInput(rows, self.sources[positions], self.tokens[positions], original, index)


def account_call(
    batch: Any,
    attribution: Attribution,
    column: str | None = None,
    *,
    keep_input: bool = False,
    isolate: bool = False,
    retries_of: Callable[[Exception], int] | None = None,
) -> Steps:
    """Account for ``batch``, which has the two columns, going through a UDF.

    Args:
        column: its name, for ``ORIGIN_COLUMN`` and ``BY_COLUMN``.
        keep_input: failed rows are reported as they came in, whatever the UDF makes of its input;
            otherwise only their errors are.
        isolate: when a call raises, call the UDF with either half of its rows, and so on, to find
            the rows that it raises for.
        retries_of: returns how often a call that raised an error is made again, with its input as
            it came in, before its rows fail. Then no output leaves before its call has ended:
            outputs of two calls must not mix.

    Raises:
        ValueError, TypeError: what the UDF returned cannot be attributed.
        RuntimeError: the batch has rows and not the two columns.
    """
    rows, sources, tokens = blocks.split_tracking_columns(batch)
    if len(sources) == 0:
        yield Step(StepKind.EMIT, batch)
        return
    kept = None
    if keep_input or isolate or retries_of is not None:
        kept = user_batches.deep_copied(rows)
    whole = _CallInput(rows, sources, tokens, kept)
    parts: Iterable[_CallInput] = (whole,)
    if attribution is Attribution.BY_SOURCE:
        parts = whole.cut(sources)
    elif attribution is Attribution.BY_COLUMN:
        assert column is not None
        # Before the UDF can change its input.
        index = index_of(rows, column, sources)
        parts = replace(whole, index=index).cut(index.cuts())
    for part in parts:
        yield from _call(part, attribution, column, isolate, retries_of)


def _call(
    part: _CallInput,
    attribution: Attribution,
    column: str | None,
    isolate: bool,
    retries_of: Callable[[Exception], int] | None,
) -> Steps:
    isolate = isolate and len(part.sources) > 1
    if not isolate and retries_of is None:
        yield from _account(part, attribution, column)
        return
    for attempt in itertools.count():
        steps = _account(part, attribution, column)
        raised, leaving = yield from _complete(steps, isolate, attempt, retries_of)
        if raised is None:
            yield from leaving
            return
        if not _is_retried(raised, attempt, retries_of):
            break
        yield Step(StepKind.PAUSE, backoff_s(attempt))
        part = part.at(np.arange(len(part.sources)))
    for half in np.array_split(np.arange(len(part.sources)), 2):
        yield from _call(part.at(half), attribution, column, isolate, retries_of)


def _is_retried(
    error: Exception, attempt: int, retries_of: Callable[[Exception], int] | None
) -> bool:
    return retries_of is not None and attempt < retries_of(error)


def _complete(
    steps: Steps, isolate: bool, attempt: int, retries_of: Callable[[Exception], int] | None
) -> Generator[Step, Any, tuple[Exception | None, list[Step]]]:
    """Run a call to its end; return the steps that are left to carry out.

    If the call has to be made again, return what it raised.
    """
    leaving: list[Step] = []
    reply: Any = None
    with contextlib.suppress(StopIteration):
        while True:
            step = steps.send(reply)
            reply = None
            if step.kind in (StepKind.CALL, StepKind.NEXT):
                reply = yield step
                if isinstance(reply, Raised) and (
                    isolate or _is_retried(reply.error, attempt, retries_of)
                ):
                    return reply.error, []
            else:
                leaving.append(step)
    return None, leaving


def _account(part: _CallInput, attribution: Attribution, column: str | None) -> Steps:
    if attribution is Attribution.ONE_TO_ONE:
        return _one_to_one(part)
    if attribution is Attribution.MASK:
        return _mask(part)
    if attribution is Attribution.SINK:
        return _sink(part)
    if attribution is Attribution.BY_SOURCE:
        return _one_source(part)
    if attribution is Attribution.FLATTENED:
        return _with_origins(part, part.rows, lambda output: output)
    if attribution is Attribution.BY_COLUMN:
        return _by_column(part)
    assert column is not None
    return _origin_column(part, column)


def _one_source(part: _CallInput) -> Steps:
    def attribute(output: Any) -> RowsWithOrigins:
        return RowsWithOrigins(output, np.zeros(blocks.num_rows(output), dtype=np.int64))

    def failed(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        return np.array([mask.all()])

    origins = _Origins(part.sources[:1], failed, exact=False)
    yield from _with_origins(part, part.rows, attribute, origins)


def _by_column(part: _CallInput) -> Steps:
    index = part.index
    assert index is not None

    def attribute(output: Any) -> RowsWithOrigins:
        return RowsWithOrigins(output, numbers_in(output, index))

    origins = _Origins(index.sources, index.with_all_rows_in)
    yield from _with_origins(part, part.rows, attribute, origins)


def _origin_column(whole: _CallInput, name: str) -> Steps:
    n = len(whole.sources)
    if name in blocks.names(whole.rows):
        raise ValueError(
            f"The batch has a column {name!r} already. Give @resumable(origin=...) a name that no "
            "column has."
        )

    def attribute(output: Any) -> RowsWithOrigins:
        origins = origins_in(output, name, n)
        given = (name,) if name in blocks.names(output) else ()
        return RowsWithOrigins(blocks.without_columns(output, given), origins)

    numbered = blocks.with_column(whole.rows, name, np.arange(n, dtype=np.int64))
    yield from _with_origins(whole, numbered, attribute)


class _Origins(NamedTuple):
    """The origins of output rows: input rows, values, or the source of a call. Each has a number.

    Attributes:
        sources: by number, the source.
        failed: says of each, given the input rows that have failed, whether it has failed whole.
        exact: it is an error to mark one as failed whose output has left. Otherwise, the output
            may come from rows that have not failed.
    """

    sources: SourceArray
    failed: Callable[[npt.NDArray[np.bool_]], npt.NDArray[np.bool_]] = lambda mask: mask
    exact: bool = True


def _with_origins(
    whole: _CallInput, given: Any, attribute: Any, known: _Origins | None = None
) -> Steps:
    """Account for a call of whose output rows is known where they come from: by default, a row."""
    known = known or _Origins(whole.sources)
    call = CallAccount(whole.sources, whole.tokens)
    failures = Failures(len(whole.sources))
    yield Step(StepKind.CALL, given, failures)
    # The last output with rows is held back, since it takes what remains, and only the end tells
    # which one it is.
    held: tuple[Any, SourceArray] | None = None
    left = np.zeros(len(known.sources), dtype=bool)
    while (output := (yield Step(StepKind.NEXT, None, failures))) is not END:
        if failures:
            _check_not_late(failures, left, known)
        if isinstance(output, Raised):
            failures.mark(output.error)
            yield from _failed(whole, failures, call.fail_rest())
            return
        rows, origins = attribute(output)
        if failures and (failed := known.failed(failures.mask)).any():
            alive = np.flatnonzero(~failed[origins])
            rows, origins = blocks.take(rows, alive), origins[alive]
        left[origins] = True
        sources = known.sources[origins]
        if len(sources) == 0:
            yield Step(StepKind.EMIT, blocks.with_tracking_columns(rows, sources, _NO_TOKENS))
            continue
        if held is not None:
            yield Step(StepKind.EMIT, blocks.with_tracking_columns(*held, call.emit(held[1])))
        held = rows, sources
    if failures:
        _check_not_late(failures, left, known)
        yield from _failed_rows(whole, failures, call)
    tokens, deltas = call.finish(_NO_SOURCES if held is None else held[1])
    if deltas:
        yield Step(StepKind.DRAIN, _drains(deltas))
    if held is not None:
        yield Step(StepKind.EMIT, blocks.with_tracking_columns(*held, tokens))


def _mask(whole: _CallInput) -> Steps:
    call = CallAccount(whole.sources, whole.tokens)
    failures = Failures(len(whole.sources))
    yield Step(StepKind.CALL, whole.rows, failures)
    reply = yield Step(StepKind.NEXT, None, failures)
    if isinstance(reply, Raised):
        failures.mark(reply.error)
        reply = Kept(blocks.take(whole.rows, ~failures.mask), ~failures.mask)
    rows, kept = reply
    if failures:
        yield from _failed_rows(whole, failures, call)
    tokens, deltas = call.keep(whole.sources, whole.tokens, kept)
    if deltas:
        yield Step(StepKind.DRAIN, _drains(deltas))
    yield Step(StepKind.EMIT, blocks.with_tracking_columns(rows, whole.sources[kept], tokens))


def _sink(whole: _CallInput) -> Steps:
    call = CallAccount(whole.sources, whole.tokens)
    failures = Failures(len(whole.sources))
    yield Step(StepKind.CALL, whole.rows, failures)
    while (output := (yield Step(StepKind.NEXT, None, failures))) is not END:
        if isinstance(output, Raised):
            failures.mark(output.error)
            break
    if failures:
        yield from _failed_rows(whole, failures, call)
    _, deltas = call.finish(_NO_SOURCES)
    rows = Counter(whole.sources[~failures.mask].tolist())
    drains = tuple(Drain(source, delta, rows[source]) for source, delta in deltas.items())
    if drains:
        yield Step(StepKind.DRAIN, drains)


def _drains(deltas: dict[int, int]) -> tuple[Drain, ...]:
    return tuple(Drain(source, delta) for source, delta in deltas.items())


def _one_to_one(whole: _CallInput) -> Steps:
    n = len(whole.sources)
    call = CallAccount(whole.sources, whole.tokens)
    failures = Failures(n)
    yield Step(StepKind.CALL, whole.rows, failures)
    start = 0
    # From the first failed row on, only the number of all that follow tells which they are.
    waiting: list[Any] = []
    while (output := (yield Step(StepKind.NEXT, None, failures))) is not END:
        if isinstance(output, Raised):
            waiting = []
            failures.mark(output.error, np.arange(start, n))
            break
        if failures:
            waiting.append(output)
            continue
        stop = start + blocks.num_rows(output)
        if stop > n:
            raise _wrong_number(stop, n)
        here = slice(start, stop)
        yield Step(
            StepKind.EMIT,
            blocks.with_tracking_columns(output, whole.sources[here], whole.tokens[here]),
        )
        start = stop
    _check_not_late(failures, np.arange(n) < start, _Origins(whole.sources))
    alive = start + np.flatnonzero(~failures.mask[start:])
    count = sum(map(blocks.num_rows, waiting))
    if count == n - start:
        left = np.arange(start, n)
    elif count == len(alive):
        left = alive
    else:
        raise _wrong_number(start + count, n)
    for output in waiting:
        positions, left = np.split(left, [blocks.num_rows(output)])
        fine = ~failures.mask[positions]
        rows = output if fine.all() else blocks.take(output, np.flatnonzero(fine))
        positions = positions[fine]
        yield Step(
            StepKind.EMIT,
            blocks.with_tracking_columns(rows, whole.sources[positions], whole.tokens[positions]),
        )
    if failures:
        yield from _failed_rows(whole, failures, call)


def _check_not_late(failures: Failures, left: npt.NDArray[np.bool_], known: _Origins) -> None:
    """Refuse a mark on what has ``left`` the UDF already, as output.

    Its source could complete with the row both in the output and among the dead letters.
    """
    if known.exact and (known.failed(failures.mask) & left).any():
        raise ValueError(
            "A UDF with @resumable(one_to_one=True), by= or origin= marked rows as failed that it "
            "had returned before. Mark them first."
        )


def _wrong_number(returned: int, given: int) -> ValueError:
    return ValueError(
        f"A UDF with @resumable(one_to_one=True) returned {returned} rows for {given} rows. If it "
        "drops or adds rows, decorate it without one_to_one."
    )


def _failed_rows(whole: _CallInput, failures: Failures, call: CallAccount) -> Steps:
    failed = failures.mask
    yield from _failed(whole, failures, call.fail(whole.sources[failed], whole.tokens[failed]))


def _failed(whole: _CallInput, failures: Failures, missing: Mapping[int, int]) -> Steps:
    """Report the failed rows of each source, and what is ``missing`` of it."""
    failed = np.flatnonzero(failures.mask)
    sources = whole.sources[failed]
    yield Step(
        StepKind.FAIL,
        [
            FailedRows(
                source,
                total,
                None if whole.original is None else blocks.take(whole.original, here),
                failures.texts(here),
            )
            for source, total in missing.items()
            for here in [failed[sources == source]]
        ],
    )


_NO_SOURCES: SourceArray = np.empty(0, dtype=np.int32)
_NO_TOKENS: TokenArray = np.empty(0, dtype=np.uint64)
