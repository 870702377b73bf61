"""Numbers of what decorated UDFs did in a run: one stage for each. Pure.

Workers count, the ledger's process adds up, and the driver puts names to the sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import add
from typing import Any, NamedTuple

__all__ = ["Stage", "StageCount", "StageNumbers", "added", "by_name", "cut_batches", "numbers_of"]

# Whole blocks that are cut into calls of so few rows are worth a warning, too.
_FEW_ROWS = 16


class StageCount(NamedTuple):
    """Sums of one stage; `StageNumbers` says what they mean."""

    batches: int = 0
    calls: int = 0
    rows_in: int = 0
    rows_out: int = 0
    rows_failed: int = 0
    rows_dead_lettered: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Stage:
    """A decorated UDF in a pipeline.

    Attributes:
        name: the method and the UDF, as ``map_batches(clean)``.
        batch_size: the rows of a batch, as asked for; None for whole blocks.
        by_source: the UDF is called once for each source in a batch.
        by_column: rows are matched to sources by this column; sources that share a value get a
            call each.
    """

    name: str
    batch_size: int | None = None
    by_source: bool = False
    by_column: str | None = None


@dataclass(frozen=True)
class StageNumbers:
    """Numbers of what one decorated UDF did in a run.

    If no task is executed again and no source fails, all numbers are exact. Work that is done again
    counts again: after a lost block, after an error that Ray retries, in a further pass. The work
    of a task whose worker died does not count. A call that raised counts if the pipeline went on.
    So rows of sources that are not completed have a part in these numbers, unlike in the
    ``rows_`` counts of `RunSummary`.

    Attributes:
        name: the method and the UDF, as ``map_batches(clean)``.
        rows_in: rows that came to it, ``rows_out``: rows that it passed on.
        rows_failed: rows that failed, and did not go to the dead letters.
        rows_dead_lettered: rows that failed, and went there.
        calls: of the user's function: one for each row with ``map``, ``filter`` and ``flat_map``.
        batches: as Ray Data made them; without ``one_to_one=True``, ``by=`` or ``origin=``, a batch
            is cut into a call for each of its sources.
        udf_s: seconds in the UDF, summed over all workers. A call of an async UDF takes until it
            is done, so calls that overlap count each.
    """

    name: str
    rows_in: int = 0
    rows_out: int = 0
    rows_failed: int = 0
    rows_dead_lettered: int = 0
    calls: int = 0
    batches: int = 0
    udf_s: float = 0.0


def added(one: StageCount, other: StageCount) -> StageCount:
    """Return the sums of two counts."""
    return StageCount._make(map(add, one, other))


def numbers_of(
    stages: Sequence[Stage], counts: Mapping[int, StageCount]
) -> tuple[StageNumbers, ...]:
    """Return the numbers of each stage, in the order of the pipeline; counts are by position."""
    return tuple(
        StageNumbers(
            stage.name,
            count.rows_in,
            count.rows_out,
            count.rows_failed,
            count.rows_dead_lettered,
            count.calls,
            count.batches,
            round(count.seconds, 6),
        )
        for position, stage in enumerate(stages)
        for count in [counts.get(position, StageCount())]
    )


def by_name(numbers: Iterable[StageNumbers]) -> dict[str, Any]:
    """Return the numbers as plain values, by the stages' names; a name used twice gets a number."""
    found: dict[str, Any] = {}
    for one in numbers:
        values = asdict(one)
        name, known = values.pop("name"), 1
        while (key := name if known == 1 else f"{name} #{known}") in found:
            known += 1
        found[key] = values
    return found


def cut_batches(stage: Stage, count: StageCount) -> str | None:
    """Return a warning if a UDF is called for far fewer rows than its batches have; else None."""
    is_cut = stage.by_source or stage.by_column is not None
    if not is_cut or not count.batches or count.calls < 2 * count.batches:
        return None
    rows = count.rows_in / count.calls
    if rows >= (_FEW_ROWS if stage.batch_size is None else stage.batch_size / 2):
        return None
    sources = round(count.calls / count.batches)
    cause, remedy = (
        (
            f"a batch has rows of about {sources} sources",
            "@resumable(by=...), one_to_one=True or origin= keeps batches whole.",
        )
        if stage.by_column is None
        else (
            f"about {sources} sources in a batch share values of {stage.by_column!r}",
            "A column whose values are each of one source keeps batches whole, and so does "
            "@resumable(one_to_one=True) or origin=.",
        )
    )
    return (
        f"{stage.name} gets {rows:.3g} {'row' if rows == 1 else 'rows'} a call, "
        f"batch_size={stage.batch_size}: {cause}, and the UDF is called for each of them "
        f"({count.calls:,} calls for {count.batches:,} batches). {remedy}"
    )
