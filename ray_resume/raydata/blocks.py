"""Batches of Ray Data's three formats, and blocks: count, cut, join, carry the two columns.

A batch is a ``dict`` of arrays, a ``pandas.DataFrame`` or a ``pyarrow.Table``. Nothing here copies
a user's column unless rows are taken out of order, or a copy is asked for.

Internals of Ray's that are used, to make and evaluate blocks exactly as Ray Data does:

* ``DelegatingBlockBuilder`` and ``concat``: to make blocks of rows, and to join blocks.
* ``eval_expr``: to evaluate expressions.
* ``_validate_batch_output``: to refuse what Ray Data refuses as the output of a UDF.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from ray.data.block import BlockAccessor
from ray.data.extensions import PythonObjectArray, PythonObjectDtype

from ray_resume.core.tokens import (
    SOURCE_COLUMN,
    SOURCE_TYPE,
    TOKEN_COLUMN,
    TOKEN_TYPE,
    SourceArray,
    TokenArray,
)
from ray_resume.raydata.internals import unknown_ray

try:
    from ray.data._internal.arrow_ops.transform_pyarrow import concat
    from ray.data._internal.delegating_block_builder import DelegatingBlockBuilder
    from ray.data._internal.planner.plan_expression.expression_evaluator import eval_expr
    from ray.data._internal.planner.plan_udf_map_op import _validate_batch_output
    from ray.data.expressions import Expr
except ImportError as error:
    raise unknown_ray(error) from error

__all__ = [
    "arrow_column",
    "block_of",
    "check_output",
    "column",
    "concat_tables",
    "mask_of",
    "names",
    "num_rows",
    "refuse_repeated_names",
    "rows_of",
    "sliced",
    "split",
    "split_tracking_columns",
    "table_of",
    "take",
    "with_column",
    "with_tracking_columns",
    "without_columns",
]

_OURS = (SOURCE_COLUMN, TOKEN_COLUMN)


def split_tracking_columns(batch: Any) -> tuple[Any, SourceArray, TokenArray]:
    """Take the two columns off: ``(batch without them, int32 sources, uint64 tokens)``.

    Ray makes up empty blocks without any columns; they have no rows to account for.

    Raises:
        RuntimeError: they are not there, so that these rows could not be accounted for.
    """
    if num_rows(batch) == 0:
        present = tuple(name for name in _OURS if name in names(batch))
        return without_columns(batch, present), np.empty(0, np.int32), np.empty(0, np.uint64)
    present = names(batch)
    if SOURCE_COLUMN not in present or TOKEN_COLUMN not in present:
        raise RuntimeError(
            f"A batch with the columns {list(present)} has lost ray_resume's own, so its rows "
            "cannot be accounted for. This is a bug in ray_resume, or an operator that it does "
            "not know; the sources concerned stay pending."
        )
    sources = np.asarray(column(batch, SOURCE_COLUMN), dtype=np.int32)
    tokens = np.asarray(column(batch, TOKEN_COLUMN), dtype=np.uint64)
    return without_columns(batch, _OURS), sources, tokens


def refuse_repeated_names(block: Any) -> None:
    """Make sure that no two columns of ``block`` have one name: a later stage would lose one.

    Raises:
        KeyError: some have, as plain Ray Data raises it when such a block leaves its task.
    """
    present = list(names(block))
    if len(set(present)) < len(present):
        name, count = Counter(present).most_common(1)[0]
        raise KeyError(
            f'Field "{name}" exists {count} times in schema. Give each column another name '
            "(read_csv: read_options=pyarrow.csv.ReadOptions(column_names=[...], skip_rows=1)), "
            "or select columns whose names are there once."
        )


def with_tracking_columns(batch: Any, sources: SourceArray, tokens: TokenArray) -> Any:
    """Put the two columns on: undo :func:`split_tracking_columns`. The batch itself stays as it is.

    Raises:
        ValueError: the batch has a column of that name.
    """
    for name in _OURS:
        if name in names(batch):
            raise ValueError(
                f"The column name {name!r} is ray_resume's own. Give the column another name."
            )
    if isinstance(batch, pa.Table):
        return batch.append_column(
            pa.field(SOURCE_COLUMN, SOURCE_TYPE), pa.array(sources, SOURCE_TYPE)
        ).append_column(pa.field(TOKEN_COLUMN, TOKEN_TYPE), pa.array(tokens, TOKEN_TYPE))
    return with_column(with_column(batch, SOURCE_COLUMN, sources), TOKEN_COLUMN, tokens)


def num_rows(batch: Any) -> int:
    """Count the rows of a batch.

    Raises:
        TypeError: it is not one of the three formats.
        ValueError: its columns have different lengths.
    """
    if isinstance(batch, pa.Table):
        return int(batch.num_rows)
    if isinstance(batch, pd.DataFrame):
        return len(batch)
    if isinstance(batch, Mapping):
        lengths = {name: len(values) for name, values in batch.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"The columns of a batch have different lengths: {lengths}")
        return next(iter(lengths.values()), 0)
    raise TypeError(
        f"A @resumable UDF for map_batches returned a {type(batch).__name__}; it must return a "
        "dict of arrays, a pandas.DataFrame, a pyarrow.Table, a generator of these, or None."
    )


def split(batch: Any, sources: SourceArray) -> Iterator[tuple[int, Any, npt.NDArray[np.intp]]]:
    """Cut a batch by source: ``(source, its rows in order, their positions)`` for each source.

    Rows that stand together are cut out without a copy.
    """
    n = len(sources)
    if n == 0:
        return
    order = np.argsort(sources, kind="stable")
    ordered = sources[order]
    bounds = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1], True])
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        positions = order[start:stop]
        first, last = int(positions[0]), int(positions[-1])
        if last - first + 1 == stop - start:
            part = _slice(batch, first, last + 1)
        else:
            part = take(batch, positions)
        yield int(ordered[start]), part, positions


def take(batch: Any, rows: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> Any:
    """Return the rows at ``rows`` (positions, or a boolean mask), copied where that can be."""
    if isinstance(batch, pa.Table):
        positions = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        if not len(positions):
            return batch.slice(0, 0)
        # pyarrow cannot take from every type, nor more than 2 GiB of strings at once.
        with contextlib.suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
            # Ray's own, since pyarrow cannot take from every extension type.
            return BlockAccessor.for_block(batch).take(positions)  # type: ignore[arg-type]
        return sliced(batch, positions.astype(np.intp))
    if isinstance(batch, pd.DataFrame):
        # With an index of its own, as Ray gives it: a UDF may align by it.
        return _changed(batch, lambda frame: frame.iloc[rows].reset_index(drop=True))
    return {name: np.asarray(values)[rows] for name, values in batch.items()}


def sliced(table: pa.Table, rows: npt.NDArray[np.intp]) -> pa.Table:
    """Return ``rows``, by position, without a copy of those that stand together."""
    if not len(rows):
        return table.slice(0, 0)
    starts = np.flatnonzero(np.append(True, np.diff(rows) != 1))
    counts = np.diff(np.append(starts, len(rows)))
    runs = zip(rows[starts].tolist(), counts.tolist(), strict=True)
    return pa.concat_tables([table.slice(start, count) for start, count in runs])


def table_of(batch: Any) -> pa.Table:
    """Return a batch as the Arrow table that Ray Data makes of it."""
    block = BlockAccessor.batch_to_block(dict(batch) if isinstance(batch, Mapping) else batch)
    return BlockAccessor.for_block(block).to_arrow()


def column(batch: Any, name: str) -> Any:
    """Return a column as something that numpy reads without a loop in Python."""
    if isinstance(batch, pa.Table):
        return batch.column(name).to_numpy()
    if isinstance(batch, pd.DataFrame):
        return batch[name].to_numpy()
    return batch[name]


def arrow_column(batch: Any, name: str) -> pa.Array | pa.ChunkedArray:
    """Return a column as Arrow has it; what pandas takes for missing is null.

    Raises:
        ValueError: Arrow has no type for its values.
    """
    if isinstance(batch, pa.Table):
        return batch.column(name)
    values = batch[name]
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        return values
    if not isinstance(values, (np.ndarray, pd.Series, list)):
        values = np.asarray(values)
    if isinstance(values, np.ndarray) and not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    try:
        return _arrow_array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"The values of the column {name!r} have no type in common: {error}"
        ) from error


def _arrow_array(values: Any) -> pa.Array:
    try:
        return pa.array(values, from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        if not isinstance(values, list):
            raise
        with contextlib.suppress(pa.ArrowException, TypeError, ValueError, OverflowError):
            return pa.array(values, pa.uint64())
        # Arrow does not know numpy's NaT.
        times = np.asarray(values)
        if times.ndim != 1 or times.dtype.kind not in "mM":
            raise
        return pa.array(times, from_pandas=True)


def with_column(batch: Any, name: str, values: npt.NDArray[Any]) -> Any:
    """Return the batch with one more column."""
    if isinstance(batch, pa.Table):
        return batch.append_column(name, pa.array(values))
    if isinstance(batch, pd.DataFrame):
        if isinstance(batch.columns, pd.MultiIndex):
            # Under the names that Arrow gives them.
            batch = batch.set_axis([str(label) for label in batch.columns], axis="columns")
        return _changed(batch, lambda frame: frame.assign(**{name: values}))
    return {**batch, name: values}


def without_columns(batch: Any, dropped: tuple[str, ...]) -> Any:
    """Return the batch without the columns ``dropped``."""
    if isinstance(batch, pa.Table):
        return batch.drop_columns(list(dropped))
    if isinstance(batch, pd.DataFrame):
        return _changed(batch, lambda frame: frame.drop(columns=list(dropped)))
    return {name: values for name, values in batch.items() if name not in dropped}


def names(batch: Any) -> Any:
    """Return the column names of a batch."""
    if isinstance(batch, pa.Table):
        return batch.column_names
    if isinstance(batch, pd.DataFrame):
        return batch.columns
    return batch.keys()


def _slice(batch: Any, start: int, stop: int) -> Any:
    if isinstance(batch, pa.Table):
        return batch.slice(start, stop - start)
    if isinstance(batch, pd.DataFrame):
        return _changed(batch, lambda frame: frame.iloc[start:stop].reset_index(drop=True))
    return {name: values[start:stop] for name, values in batch.items()}


def _changed(frame: pd.DataFrame, change: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
    """Return ``change(frame)``.

    Ray's columns of Python objects do not survive a change that pandas makes to a frame: a slice
    of their array is no such array. So they go through it as columns of type object.
    """
    special = [i for i, kind in enumerate(frame.dtypes) if isinstance(kind, PythonObjectDtype)]
    if not special:
        return change(frame)
    columns = {i: frame.iloc[:, i] for i in range(frame.shape[1])}
    for i in special:
        columns[i] = pd.Series(columns[i].to_numpy(), frame.index, dtype=object)
    changed = change(pd.DataFrame(columns, frame.index).set_axis(frame.columns, axis="columns"))
    for i in special:
        for position, label in enumerate(changed.columns):
            if label == frame.columns[i]:
                changed.isetitem(position, PythonObjectArray(changed.iloc[:, position]))
    return changed


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
    """Say for each row of a block whether it satisfies ``expression``; null is no.

    Raises:
        pa.ArrowNotImplementedError: it gives no booleans; plain Ray Data raises the same.
    """
    mask = eval_expr(expression, block)
    if isinstance(mask, (pa.Array, pa.ChunkedArray)):
        if not pa.types.is_boolean(mask.type):
            raise pa.ArrowNotImplementedError(
                f"Filter argument must be boolean type, not {mask.type}. Compare it with "
                "something: filter(expr=col(...) > 0)."
            )
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
