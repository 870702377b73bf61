"""The column in which a UDF returns what a row comes from: a position, or a value of its input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_resume.core.tokens import SourceArray
from ray_resume.core.value_index import ValueIndex
from ray_resume.raydata import blocks

__all__ = ["index_of", "numbers_in", "origins_in"]


def origins_in(output: Any, name: str, rows_in: int) -> npt.NDArray[np.int64]:
    """Return the positions in the column ``name`` of an output.

    Args:
        rows_in: how many rows the call got.

    Raises:
        ValueError: the column is missing, is not of integers, or has other positions.
    """
    if blocks.num_rows(output) == 0:
        return np.empty(0, dtype=np.int64)
    if name not in blocks.names(output):
        raise ValueError(
            f"A UDF with @resumable(origin={name!r}) returned rows without the column {name!r}. "
            "Return it with each row: the position of the input row that it comes from."
        )
    origins = np.asarray(blocks.column(output, name))
    if not np.issubdtype(origins.dtype, np.integer):
        raise ValueError(f"The column {name!r} came back as {origins.dtype}, not as integers.")
    if origins.min() < 0 or origins.max() >= rows_in:
        raise ValueError(
            f"The column {name!r} came back with values from {origins.min()} to {origins.max()}, "
            f"outside 0 .. {rows_in - 1}."
        )
    return origins.astype(np.int64, copy=False)


def index_of(rows: Any, name: str, sources: SourceArray) -> ValueIndex:
    """Return the values of the column ``name`` of a batch with rows, and their sources.

    Raises:
        ValueError: the column is missing, or its values cannot be compared.
    """
    if name not in blocks.names(rows):
        raise ValueError(
            f"A UDF with @resumable(by={name!r}) got a batch without the column {name!r}. It has "
            f"the columns {_listed(rows)}. Name one of these."
        )
    return ValueIndex(name, blocks.arrow_column(rows, name), sources)


def numbers_in(output: Any, index: ValueIndex) -> npt.NDArray[np.int32]:
    """Return, for each row of an output, the number that ``index`` has for its value.

    Raises:
        ValueError: the column is missing, or a value is in no row of the call.
    """
    if blocks.num_rows(output) == 0:
        return np.empty(0, dtype=np.int32)
    name = index.name
    if name not in blocks.names(output):
        raise ValueError(
            f"A UDF with @resumable(by={name!r}) returned rows without the column {name!r}. It "
            f"returned the columns {_listed(output)}. Return {name!r} with each row, as it came."
        )
    if _cuts_off_nul(output, name) and index.has_trailing_nul():
        raise ValueError(
            f"The column {name!r} came back as a NumPy array of fixed-width texts or bytes, which "
            "lose a NUL at their end, and values that came in have one. Return dtype=object."
        )
    return index.find(blocks.arrow_column(output, name))


def _cuts_off_nul(output: Any, name: str) -> bool:
    return (
        isinstance(output, Mapping) and getattr(output[name], "dtype", np.dtype(int)).kind in "SU"
    )


def _listed(batch: Any) -> str:
    return ", ".join(map(repr, blocks.names(batch)))
