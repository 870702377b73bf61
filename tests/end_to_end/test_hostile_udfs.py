"""UDFs that misbehave: no row is lost silently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_desk import Desk, batch_of, x_of

from ray_resume import resumable
from ray_resume.core.tokens import SOURCE_COLUMN, TOKEN_COLUMN
from ray_resume.raydata import blocks, user_batches
from ray_resume.udf.stage import instrument

pytestmark = pytest.mark.long

# Ray types a UDF's argument as the union of all batch formats.
Batch: TypeAlias = Any


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("form", ["numpy", "pandas"])
def test_a_udf_may_fill_anew_what_it_returned_of_another_source(form: str) -> None:
    """In plain Ray Data there would be one call for all of them."""
    numbers = [0, 0, 1, 1, 2, 2]
    buffer, texts = np.empty(2, dtype=np.int64), np.empty(2, dtype=object)
    frame = pd.DataFrame({"x": np.empty(2, dtype=np.int64)})

    @resumable
    def refill(batch: Batch) -> Batch:
        if form == "numpy":
            buffer[:], texts[:] = x_of(batch), list(map(str, x_of(batch)))
            return {"x": buffer, "text": texts}
        frame["x"] = x_of(batch)
        frame["text"] = list(map(str, x_of(batch)))
        return frame

    desk = Desk(3)
    output = instrument(refill, desk)(batch_of(numbers, desk, form))  # type: ignore[arg-type]
    assert list(x_of(output)) == list(range(6))
    assert list(blocks.column(output, "text")) == list("012345")


def _mutate(batch: Any) -> Any:
    if isinstance(batch, dict):
        batch["x"] = np.full(len(batch["x"]), -1)
        batch["deep"][:] = [[-1]] * len(batch["deep"])
    elif isinstance(batch, pd.DataFrame):
        batch["x"] = -1
    return batch


MISDEEDS: dict[str, Callable[[Any], Any]] = {
    "as it should": lambda batch: batch,
    "none": lambda _: None,
    "nothing": lambda batch: blocks.take(batch, np.zeros(len(x_of(batch)), dtype=bool)),
    "twice": lambda batch: blocks.take(batch, np.repeat(np.arange(len(x_of(batch))), 2)),
    "raises": lambda _: 1 / 0,
    "garbage": lambda _: object(),
    "text": lambda _: "rows",
    "number": lambda _: 7,
    "ragged": lambda _: {"x": np.arange(2), "y": np.arange(3)},
    "scalar column": lambda _: {"x": 3},
    "our column": lambda batch: {"x": x_of(batch), TOKEN_COLUMN: x_of(batch)},
    "our other column": lambda batch: {"x": x_of(batch), SOURCE_COLUMN: x_of(batch)},
    "floats": lambda batch: {"x": np.array(x_of(batch), dtype=np.float64)},
    "texts": lambda batch: {"x": np.array(list(map(str, x_of(batch))))},
    "objects": lambda batch: {"x": np.array([None, *x_of(batch)], dtype=object)},
    "other columns": lambda batch: {"z": np.array(x_of(batch))},
    "no columns": lambda _: {},
    "mutated": _mutate,
    "a frame": lambda batch: pd.DataFrame({"x": x_of(batch)}, index=[7] * len(x_of(batch))),
    "a table": lambda batch: pa.table({"x": x_of(batch)}),
}


@pytest.mark.usefixtures("cluster")
@settings(max_examples=300, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    form=st.sampled_from(["numpy", "pandas", "pyarrow"]),
    misdeeds=st.lists(st.sampled_from(sorted(MISDEEDS)), min_size=1, max_size=4),
    on_error=st.sampled_from(["raise", "mark_failed", "dead_letter"]),
    generator=st.booleans(),
)
def test_whatever_a_udf_does_no_row_is_lost_silently(
    numbers: list[int], form: str, misdeeds: list[str], on_error: Any, generator: bool
) -> None:
    """A source completes if all its rows went through a call that ended well, or to the letters."""
    present = sorted(set(numbers))
    numbers = [present.index(number) for number in numbers]
    # What happens to the rows of a source depends on nothing but the source.
    fate = {source: misdeeds[source % len(misdeeds)] for source in range(len(present))}

    def misbehave(batch: Any) -> Any:
        return MISDEEDS[fate[numbers[x_of(batch)[0]]]](batch)

    def misbehave_in_pieces(batch: Any) -> Any:
        yield misbehave(batch)

    desk = Desk(len(present))
    udf = resumable(misbehave_in_pieces if generator else misbehave, on_error=on_error)
    batch = batch_of(numbers, desk, form)
    outputs: list[Any] = []
    raised = False
    try:
        result = instrument(udf, desk)(batch)  # type: ignore[arg-type]
        for output in result if hasattr(result, "__next__") else [result]:
            outputs.append(user_batches.materialized(output))  # noqa: PERF401
    except Exception:
        raised = True
    rows: dict[int, int] = dict.fromkeys(range(len(present)), 0)
    for output in outputs:
        _, sources, tokens = blocks.split_tracking_columns(blocks.table_of(output))
        for source in sources.tolist():
            rows[source] += 1
        desk.drain(sources, tokens)
    assert raised <= (on_error == "raise" or bool(set(fate.values()) & NEVER_A_BATCH))
    for source in desk.completed:
        count = numbers.count(source)
        deed = fate[source]
        if deed in ("raises", *NEVER_A_BATCH):
            assert on_error == "dead_letter", deed
            continue
        expected = {"none": 0, "nothing": 0, "no columns": 0, "twice": 2 * count}.get(deed, count)
        assert rows[source] == expected + (deed == "objects")
    if not raised and not set(fate.values()) & {"raises", *NEVER_A_BATCH}:
        assert desk.completed == set(range(len(present)))


NEVER_A_BATCH = {
    "garbage",
    "text",
    "number",
    "ragged",
    "scalar column",
    "our column",
    "our other column",
}
