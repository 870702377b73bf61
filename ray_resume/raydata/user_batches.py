"""Batches that user code gave: it may change them in its next step, and several may be one.

User code fills its arrays, lists and frames again. So a batch that is kept while user code goes on
is materialized (:func:`materialized`) or copied (:func:`deep_copied`) first.
"""

from __future__ import annotations

import datetime as dt
import pickle
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
from ray.data.block import BlockAccessor

from ray_resume.raydata import blocks

__all__ = ["Outputs", "deep_copied", "materialized"]


def materialized(batch: Any) -> Any:
    """Return what user code has yielded such that its next step can no longer change it.

    A dict becomes a block at once, as in plain Ray Data: user code may go on to fill its arrays
    and lists again. Ray's conversion shares arrays of numbers, so they are copied.
    """
    if isinstance(batch, pd.DataFrame):
        return batch.copy()
    if isinstance(batch, Mapping):
        blocks.num_rows(batch)
        return BlockAccessor.batch_to_block({name: _unshared(batch[name]) for name in batch})
    return batch


def _unshared(values: Any) -> Any:
    """Return a column that shares no memory of numbers with ``values``."""
    if isinstance(values, list):
        # Ray copies what is in a list, but for an array that is the only item.
        return deepcopy(values) if len(values) == 1 else values
    if hasattr(values, "copy"):
        return values.copy()
    return np.array(values) if hasattr(values, "__array__") else values


def deep_copied(batch: Any) -> Any:
    """Return a copy that stays as it is, whatever user code does to ``batch`` or what is in it."""
    if isinstance(batch, pd.DataFrame):
        copy = batch.copy()
        for position, dtype in enumerate(batch.dtypes):
            if dtype == np.dtype(object):
                values = _copied_column(batch.iloc[:, position].to_numpy())
                copy.isetitem(position, pd.Series(values, copy.index, dtype=object))
        return copy
    if isinstance(batch, Mapping):
        return {name: _copied_column(batch[name]) for name in batch}
    return batch


def _copied_column(values: Any) -> Any:
    objects = (
        values
        if isinstance(values, list)
        else values.flat
        if isinstance(values, np.ndarray) and values.dtype.hasobject
        else ()
    )
    if all(kind in _FIXED or issubclass(kind, np.generic) for kind in set(map(type, objects))):
        return list(values) if isinstance(values, list) else _unshared(values)
    try:
        # Ten times as fast as a deep copy.
        return pickle.loads(pickle.dumps(values, pickle.HIGHEST_PROTOCOL))
    except Exception:  # whatever the user's classes raise
        return deepcopy(values)


# Types of values that nothing can change.
_FIXED = frozenset(
    {str, bytes, int, float, complex, bool, type(None), Decimal, type(pd.NaT), type(pd.NA)}
    | {dt.date, dt.datetime, dt.time, dt.timedelta, pd.Timestamp, pd.Timedelta}
)


class Outputs:
    """The outputs of the calls for one batch, on their way to Ray Data.

    Where the batch was cut by source, neighbours are joined if that keeps every value and type.
    Ray Data infers the types of each output by itself. It may make other types of two outputs than
    of their rows together: a null among lists is an example.
    """

    def __init__(self, batch: Any) -> None:
        self._rows_in = blocks.num_rows(batch)
        self._cut = False
        self._held: list[Any] = []
        self._bytes = 0

    def called_with(self, part: Any) -> None:
        """Note that the next outputs are those of a call with ``part``, all of the batch or not."""
        self._cut = blocks.num_rows(part) < self._rows_in

    def kept(self, output: Any) -> Any:
        """Return what was yielded such that the next step of user code cannot change it."""
        return deep_copied(output) if self._cut else materialized(output)

    def ready(self, output: Any) -> list[Any]:
        """Take an output; return those that may leave."""
        if not self._cut:
            return [*self.rest(), output]
        ready = []
        if self._held and (self._bytes >= _BLOCK_BYTES or not _alike(self._held[-1], output)):
            ready = self.rest()
        self._held.append(output)
        self._bytes += _bytes_of(output)
        return ready

    def rest(self) -> list[Any]:
        """Return what is left, joined: at most one output."""
        held, self._held, self._bytes = self._held, [], 0
        return [_together(held)] if len(held) > 1 else held


# Ray's own target for a block: what is larger becomes several blocks anyway.
_BLOCK_BYTES = 128 << 20


def _bytes_of(output: Any) -> int:
    if isinstance(output, pd.DataFrame):
        return int(output.memory_usage(index=False, deep=True).sum())
    if not isinstance(output, dict):
        return 0
    return sum(map(_bytes_of_column, output.values()))


def _bytes_of_column(values: Any) -> int:
    if isinstance(values, list) or (isinstance(values, np.ndarray) and values.dtype.hasobject):
        return sum(map(sys.getsizeof, values))
    return int(getattr(values, "nbytes", 0))


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, pd.DataFrame) and isinstance(other, pd.DataFrame):
        return one.columns.equals(other.columns) and bool((one.dtypes == other.dtypes).all())
    if not isinstance(one, dict) or not isinstance(other, dict) or one.keys() != other.keys():
        return False
    return all(_alike_columns(one[name], other[name]) for name in one)


def _alike_columns(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return True
    return (
        isinstance(one, np.ndarray)
        and isinstance(other, np.ndarray)
        and (one.dtype == other.dtype or one.dtype.kind == other.dtype.kind in "US")
        and one.dtype.isnative
        and one.shape[1:] == other.shape[1:]
    )


def _together(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], pd.DataFrame):
        return pd.concat(parts, ignore_index=True)
    return {
        name: [value for part in parts for value in part[name]]
        if isinstance(parts[0][name], list)
        else np.concatenate([part[name] for part in parts])
        for name in parts[0]
    }
