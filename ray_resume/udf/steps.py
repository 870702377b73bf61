"""The steps of a UDF call, and the ways to know which input row an output row comes from."""

from __future__ import annotations

import enum
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ray_resume.udf.failures import Failures

__all__ = [
    "END",
    "Attribution",
    "FailedRows",
    "Kept",
    "RowsWithOrigins",
    "Step",
    "StepKind",
    "Steps",
]


class Attribution(enum.Enum):
    """How the input row that an output row comes from is known."""

    BY_SOURCE = "each call gets the rows of one source"
    ONE_TO_ONE = "output row i comes from input row i"
    ORIGIN_COLUMN = "the UDF returns a column with the positions of the input rows"
    BY_COLUMN = "the UDF returns a column of its input, whose values say which source a row is of"
    MASK = "the UDF returns the rows that stay, and a boolean for each input row (`Kept`)"
    SINK = "no output rows: the UDF has made its input durable when it has returned"
    FLATTENED = "the UDF returns its rows and the positions of the input rows (`RowsWithOrigins`)"


class RowsWithOrigins(NamedTuple):
    """Output rows, and for each what it comes from: an input row, by position.

    With ``BY_COLUMN`` it comes from a value, by number; with ``BY_SOURCE`` from number 0.
    """

    rows: Any
    origins: npt.NDArray[np.integer[Any]]


class Kept(NamedTuple):
    """The rows that a filter keeps, as it leaves them, and for each input row whether it stays."""

    rows: Any
    mask: npt.NDArray[np.bool_]


class StepKind(enum.Enum):
    """The requests that a step may make of the runner."""

    CALL = "call the UDF with the value"
    NEXT = "send the call's next output, settled for good, or END"
    PAUSE = "wait for so many seconds before the UDF is called again"
    DRAIN = "report the drains in the value, and wait until they are applied"
    FAIL = "report the failed rows in the value, and wait until that is known"
    EMIT = "give the value to Ray"


class Step(NamedTuple):
    """One request to the runner. The user's code of a call runs in the scope of its failures."""

    kind: StepKind
    value: Any
    failures: Failures | None = None


@dataclass(frozen=True)
class FailedRows:
    """Rows of one source that failed in a call, with the error of each.

    ``total`` is what is missing of the source now: the sum of the tokens that did not leave.
    ``rows`` are as they came in; None if they were not kept.
    """

    source: int
    total: int
    rows: Any
    errors: list[str]


END = object()
"""The runner sends this when a call has no more outputs. If the call raised, it sends `Raised`."""

Steps = Generator[Step, Any, None]
