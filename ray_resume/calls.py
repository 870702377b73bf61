"""How the rows of a UDF call are accounted for, apart from who makes the call.

:func:`account` is a generator of steps for whoever runs the UDF (`stage`, in threads or on an event
loop): it asks for calls and for their outputs, and says what to drain and what to emit. So the
rules are here once, and know neither Ray, nor ledgers, nor async.

Invariant (see `lineage.Call`): of each source, what comes into a call leaves it, in the tokens of
its output rows or as a delta.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ray_resume import batches
from ray_resume.ledger import Drain
from ray_resume.lineage import Call, SourceArray, TokenArray

__all__ = ["END", "Attribution", "Flattened", "Step", "StepKind", "Steps", "account"]


class Attribution(enum.Enum):
    """How the input row that an output row comes from is known."""

    BY_SOURCE = "each call gets the rows of one source"
    ONE_TO_ONE = "output row i comes from input row i"
    ORIGIN_COLUMN = "the UDF returns a column with the positions of the input rows"
    MASK = "the UDF returns a boolean for each input row: whether it stays"
    SINK = "no output rows: the UDF has made its input durable when it has returned"
    FLATTENED = "the UDF returns its rows and the positions of the input rows (`Flattened`)"


class Flattened(NamedTuple):
    """Output rows, and for each the position of the input row that it comes from."""

    rows: Any
    origins: npt.NDArray[np.int64]


class StepKind(enum.Enum):
    """What a step asks of the runner."""

    CALL = "call the UDF with the value"
    NEXT = "send the call's next output, settled for good, or END"
    DRAIN = "report the drains in the value, and wait until they are applied"
    EMIT = "give the value to Ray"


class Step(NamedTuple):
    """One request to the runner."""

    kind: StepKind
    value: Any


END = object()
"""What the runner sends when a call has no more outputs."""

Steps = Generator[Step, Any, None]


@dataclass(frozen=True)
class _Rows:
    """A batch without the two columns, and the two columns."""

    rows: Any
    sources: SourceArray
    tokens: TokenArray


def account(batch: Any, attribution: Attribution, origin: str | None = None) -> Steps:
    """Account for ``batch``, which has the two columns, going through a UDF.

    Args:
        origin: the column's name, for ``ORIGIN_COLUMN``.

    Raises:
        ValueError, TypeError: what the UDF returned cannot be attributed.
        RuntimeError: the batch has rows and not the two columns.
    """
    whole = _Rows(*batches.detach(batch))
    if len(whole.sources) == 0:
        yield Step(StepKind.EMIT, batch)
    elif attribution is Attribution.ONE_TO_ONE:
        yield from _one_to_one(whole)
    elif attribution is Attribution.MASK:
        yield from _mask(whole)
    elif attribution is Attribution.SINK:
        yield from _sink(whole)
    elif attribution is Attribution.BY_SOURCE:
        yield from _by_source(whole)
    elif attribution is Attribution.FLATTENED:
        yield from _with_origins(whole, whole.rows, lambda output: output)
    else:
        assert origin is not None
        yield from _origin_column(whole, origin)


def _by_source(whole: _Rows) -> Steps:
    if (whole.sources == whole.sources[0]).all():
        yield from _one_source(whole)
        return
    for _, part, positions in batches.split(whole.rows, whole.sources):
        yield from _one_source(_Rows(part, whole.sources[positions], whole.tokens[positions]))


def _one_source(part: _Rows) -> Steps:
    def attribute(output: Any) -> Flattened:
        return Flattened(output, np.zeros(batches.num_rows(output), dtype=np.int64))

    yield from _with_origins(part, part.rows, attribute)


def _origin_column(whole: _Rows, name: str) -> Steps:
    n = len(whole.sources)
    if name in batches.names(whole.rows):
        raise ValueError(
            f"The batch has a column {name!r} already. Give @resumable(origin=...) a name that no "
            "column has."
        )

    def attribute(output: Any) -> Flattened:
        origins = _origins(output, name, n)
        given = (name,) if name in batches.names(output) else ()
        return Flattened(batches.without_columns(output, given), origins)

    numbered = batches.with_column(whole.rows, name, np.arange(n, dtype=np.int64))
    yield from _with_origins(whole, numbered, attribute)


def _with_origins(whole: _Rows, given: Any, attribute: Any) -> Steps:
    call = Call(whole.sources, whole.tokens)
    yield Step(StepKind.CALL, given)
    # The last output with rows is held back, since it takes what remains, and only the end tells
    # which one it is.
    held: tuple[Any, SourceArray] | None = None
    while (output := (yield Step(StepKind.NEXT, None))) is not END:
        rows, origins = attribute(output)
        sources = whole.sources[origins]
        if len(sources) == 0:
            yield Step(StepKind.EMIT, batches.attach(rows, sources, _NO_TOKENS))
            continue
        if held is not None:
            yield Step(StepKind.EMIT, batches.attach(*held, call.emit(held[1])))
        held = rows, sources
    tokens, deltas = call.finish(_NO_SOURCES if held is None else held[1])
    if deltas:
        yield Step(StepKind.DRAIN, _drains(deltas))
    if held is not None:
        yield Step(StepKind.EMIT, batches.attach(*held, tokens))


def _mask(whole: _Rows) -> Steps:
    yield Step(StepKind.CALL, whole.rows)
    kept = yield Step(StepKind.NEXT, None)
    tokens, deltas = Call(whole.sources, whole.tokens).keep(whole.sources, whole.tokens, kept)
    if deltas:
        yield Step(StepKind.DRAIN, _drains(deltas))
    rows = whole.rows if kept.all() else batches.pick(whole.rows, kept)
    yield Step(StepKind.EMIT, batches.attach(rows, whole.sources[kept], tokens))


def _sink(whole: _Rows) -> Steps:
    yield Step(StepKind.CALL, whole.rows)
    while (yield Step(StepKind.NEXT, None)) is not END:
        pass
    _, deltas = Call(whole.sources, whole.tokens).finish(_NO_SOURCES)
    rows = Counter(whole.sources.tolist())
    drains = tuple(Drain(source, delta, rows[source]) for source, delta in deltas.items())
    yield Step(StepKind.DRAIN, drains)


def _drains(deltas: dict[int, int]) -> tuple[Drain, ...]:
    return tuple(Drain(source, delta) for source, delta in deltas.items())


def _one_to_one(whole: _Rows) -> Steps:
    n = len(whole.sources)
    yield Step(StepKind.CALL, whole.rows)
    start = 0
    while (output := (yield Step(StepKind.NEXT, None))) is not END:
        stop = start + batches.num_rows(output)
        if stop > n:
            break
        here = slice(start, stop)
        yield Step(StepKind.EMIT, batches.attach(output, whole.sources[here], whole.tokens[here]))
        start = stop
    else:
        stop = start
    if stop != n:
        raise ValueError(
            f"A UDF with @resumable(one_to_one=True) returned {stop} rows for {n} rows. If it "
            "drops or adds rows, decorate it without one_to_one."
        )


_NO_SOURCES: SourceArray = np.empty(0, dtype=np.int32)
_NO_TOKENS: TokenArray = np.empty(0, dtype=np.uint64)


def _origins(output: Any, name: str, rows_in: int) -> npt.NDArray[np.int64]:
    if batches.num_rows(output) == 0:
        return np.empty(0, dtype=np.int64)
    if name not in batches.names(output):
        raise ValueError(
            f"A UDF with @resumable(origin={name!r}) returned rows without the column {name!r}. "
            "Return it with each row: the position of the input row that it comes from."
        )
    origins = np.asarray(batches.column(output, name))
    if not np.issubdtype(origins.dtype, np.integer):
        raise ValueError(f"The column {name!r} came back as {origins.dtype}, not as integers.")
    if origins.min() < 0 or origins.max() >= rows_in:
        raise ValueError(
            f"The column {name!r} came back with values from {origins.min()} to {origins.max()}, "
            f"outside 0 .. {rows_in - 1}."
        )
    return origins.astype(np.int64, copy=False)
