"""The column in which a UDF returns the position of the input row that each row comes from."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ray_resume.raydata import blocks

__all__ = ["origins_in"]


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
