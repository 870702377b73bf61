"""Rows that fail: in every kind of call, by an exception or by mark_failed."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import ids_in, write_source
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_desk import Desk, batch_of, consume, x_of
from ray.data import ActorPoolStrategy, Dataset
from udf_job import FILES, ROWS, run

from ray_resume import Checkpoint, ResumeError, mark_failed, resumable
from ray_resume.core.error_text import MAX_ERROR_CHARS, text_of
from ray_resume.raydata import blocks
from ray_resume.udf.failures import Failures, Scope
from ray_resume.udf.stage import instrument

# Ray Data starts Ray to estimate the size of a block of rows.
pytestmark = pytest.mark.usefixtures("cluster")


# UDFs that cannot do with some rows: each says so by raising, or by marking them. -----------------


def batch_udf(bad: set[int], marks: bool, generator: bool, one_by_one: bool) -> Any:
    def run(batch: Any) -> Any:
        poison = np.isin(x_of(batch), list(bad))
        # What comes in must be reported as it came, whatever is done to it.
        if isinstance(batch, dict):
            batch["deep"][0].append("spoilt")
        if poison.any():
            if not marks:
                raise ValueError(f"bad rows in {x_of(batch)}")
            mark_failed("bad row", poison if len(poison) % 2 else np.flatnonzero(poison))
        good = blocks.take(batch, ~poison)
        return batch if marks and one_by_one and sum(poison) % 2 else good

    def generate(batch: Any) -> Iterator[Any]:
        yield blocks.take(batch, np.zeros(len(x_of(batch)), dtype=bool))
        half = len(x_of(batch)) // 2
        out = run(batch)
        yield blocks.take(out, np.arange(len(x_of(out))) < half)
        yield blocks.take(out, np.arange(len(x_of(out))) >= half)

    return generate if generator else run


def row_udf(kind: str, bad: set[int], marks: bool) -> Any:
    def run(row: dict[str, Any]) -> Any:
        if row["x"] in bad:
            if not marks:
                raise ValueError(f"bad row {row['x']}")
            mark_failed("bad row")
        return {"map": row, "filter": True, "flat_map": [row]}[kind]

    return run


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_what_is_known_of_failed_rows(data: st.DataObject) -> None:
    sources = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
    bad = data.draw(st.sets(st.integers(0, len(sources) - 1)))
    kind = data.draw(st.sampled_from(["map_batches"] * 3 + ["map", "filter", "flat_map"]))
    on_error = data.draw(st.sampled_from(["mark_failed", "dead_letter"]))
    marks, isolate = data.draw(st.booleans()), data.draw(st.booleans())
    desk = Desk(max(sources) + 1)
    options: dict[str, Any] = {}
    if kind == "map_batches":
        form = data.draw(st.sampled_from(["numpy", "pandas", "pyarrow"]))
        options = data.draw(
            st.sampled_from([{}, {"one_to_one": True}, {"origin": "from"}, {"by": "x"}])
        )
        generator = data.draw(st.booleans())
        udf = batch_udf(bad, marks, generator, options == {"one_to_one": True})
        exact = marks or isolate
    else:
        form, exact = "pyarrow", True
        udf = row_udf(kind, bad, marks)
    batch = batch_of(sources, desk, form)
    ready = instrument(resumable(udf, on_error=on_error, isolate=isolate, **options), desk, kind)  # type: ignore[arg-type]
    seen = consume(ready(batch), desk)

    rows = set(range(len(sources)))
    bad_sources = {sources[x] for x in bad}
    good_rows = {x for x in rows if sources[x] not in bad_sources}
    assert set(seen.values()) <= {1}
    assert good_rows <= set(seen) or (options and not exact)
    if exact:
        assert set(seen) == rows - bad
    if on_error == "dead_letter":
        assert desk.completed == set(sources) | set(range(max(sources) + 1))
        assert not desk.ledger.failed()
        assert rows - set(seen) <= set(desk.buried())
        if exact:
            assert desk.buried() == Counter(bad)
        for letter in desk.letters:
            table = pa.ipc.open_stream(letter.table).read_all()
            assert table["deep"].to_pylist() == [[x] for x in table["x"].to_pylist()]
            assert len(letter.errors) == len(table)
            assert all("bad row" in error for error in letter.errors)
    else:
        failed = desk.ledger.failed()
        assert desk.completed.isdisjoint(bad_sources)
        assert set(failed) == set(desk.ledger.pending()) >= bad_sources
        if exact:
            assert set(failed) == bad_sources
        assert all("bad row" in (desk.ledger.failure(source) or "") for source in failed)


def test_of_a_generator_that_raised_only_what_had_left_stays() -> None:
    def udf(batch: Any) -> Iterator[Any]:
        for i, x in enumerate(x_of(batch)):
            if x == 3:
                raise ValueError("bad row 3")
            yield {name: values[i : i + 1] for name, values in batch.items()}

    cases: list[tuple[str, dict[str, Any]]] = [
        ("mark_failed", {}),
        ("dead_letter", {"one_to_one": True}),
    ]
    for on_error, options in cases:
        desk = Desk(2)
        batch = batch_of([0, 0, 0, 0, 0, 1], desk, "numpy")
        decorated: Any = resumable(**options, on_error=on_error)(udf)
        ready = instrument(decorated, desk)  # type: ignore[arg-type]
        seen = consume(ready(batch), desk)
        if on_error == "mark_failed":
            # The second to last block was held back when the third one came.
            assert (seen, desk.completed) == (Counter([0, 1, 5]), {1})
        else:
            assert (seen, desk.completed) == (Counter([0, 1, 2]), {0, 1})
            assert desk.buried() == Counter([3, 4, 5])


@pytest.mark.filterwarnings("ignore:The inplace keyword")
@pytest.mark.parametrize("form", ["numpy", "pandas", "pyarrow"])
@pytest.mark.parametrize("raises", [False, True], ids=["marks", "raises"])
@pytest.mark.parametrize("isolate", [False, True], ids=["whole", "isolate"])
@pytest.mark.parametrize("on_error", ["mark_failed", "dead_letter"])
def test_a_udf_may_change_its_batch_in_place_before_it_fails(
    form: str, raises: bool, isolate: bool, on_error: Any
) -> None:
    def shrink(batch: Any) -> Any:
        bad = np.isin(x_of(batch), [1, 6])
        if form == "numpy":
            for name in list(batch):
                batch[name] = batch[name][~bad]
        elif form == "pandas":
            batch.drop(index=batch.index[bad], inplace=True)
        else:
            batch = batch.filter(pa.array(~bad))
        if raises and bad.any():
            raise ValueError("bad rows")
        mark_failed("bad row", bad)
        return batch

    desk = Desk(3)
    ready = instrument(resumable(on_error=on_error, isolate=isolate)(shrink), desk)  # type: ignore[arg-type]
    seen = consume(ready(batch_of([0, 0, 0, 1, 1, 2, 2], desk, form)), desk)
    bad = {1, 6} if isolate or not raises else {0, 1, 2, 5, 6}
    assert seen == Counter(set(range(7)) - bad)
    if on_error == "dead_letter":
        assert (desk.buried(), desk.completed) == (Counter(bad), {0, 1, 2})
    else:
        assert desk.completed == {1}


@pytest.mark.parametrize("options", [{"one_to_one": True}, {"origin": "o"}, {"by": "x"}])
@pytest.mark.parametrize("ends", ["returns", "yields", "raises"])
def test_a_row_is_not_marked_after_it_was_yielded(options: dict[str, Any], ends: str) -> None:
    """Its source would complete with the row in the output and among the dead letters."""

    def late(batch: Any) -> Iterator[Any]:
        yield {name: values[:2] for name, values in batch.items()}
        mark_failed("too late", [1])
        if ends == "yields":
            yield {name: values[2:] for name, values in batch.items()}
        if ends == "raises":
            raise ValueError("as well")

    desk = Desk(2)
    ready = instrument(resumable(**options, on_error="dead_letter")(late), desk)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="had returned before"):
        consume(ready(batch_of([0, 0, 1, 1], desk, "numpy")), desk)
    assert desk.completed == set()


def test_bisection_asks_for_no_more_calls_than_it_needs() -> None:
    calls = []

    def udf(batch: Any) -> Any:
        calls.append(len(x_of(batch)))
        if 77 in x_of(batch):
            raise ValueError("bad row")
        return batch

    desk = Desk(1)
    ready = instrument(resumable(udf, on_error="mark_failed", isolate=True), desk)  # type: ignore[arg-type]
    seen = consume(ready(batch_of([0] * 256, desk, "numpy")), desk)
    assert (len(calls), sum(seen.values())) == (17, 255)


@pytest.mark.parametrize("on_error", ["mark_failed", "dead_letter"])
def test_async_udfs(on_error: str) -> None:
    class Batches:
        async def __call__(self, batch: Any) -> Any:
            await asyncio.sleep(0)
            if 1 in x_of(batch):
                raise ValueError("bad row")
            mark_failed("bad row", [0])
            return blocks.take(batch, np.arange(len(x_of(batch))) > 0)

    class Rows:
        async def __call__(self, row: Any) -> Any:
            await asyncio.sleep(0.001 * (5 - row["x"]))
            if row["x"] == 1:
                raise ValueError("bad row")
            if row["x"] == 3:
                mark_failed("bad row")
            return row

    async def run(udf: type, kind: str) -> tuple[set[int], Desk]:
        desk = Desk(3)
        batch = batch_of([0, 0, 1, 1, 1, 2], desk, "pyarrow")
        ready = instrument(resumable(udf, on_error=on_error), desk, kind)()  # type: ignore[arg-type]
        seen = Counter[int]()
        async for output in ready(batch):
            seen += consume(output, desk)
        return set(seen), desk

    seen, desk = asyncio.run(run(Batches, "map_batches"))
    assert seen == {3, 4}
    assert desk.completed == ({0, 1, 2} if on_error == "dead_letter" else set())
    seen, desk = asyncio.run(run(Rows, "map"))
    assert seen == {0, 2, 4, 5}
    assert desk.completed == ({0, 1, 2} if on_error == "dead_letter" else {2})


# mark_failed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (None, [True, True, True]),
        ([0, 2], [True, False, True]),
        (1, [False, True, False]),
        ([], [False, False, False]),
        (np.array([False, True, False]), [False, True, False]),
        (pd.Series([True, False, False], index=[7, 8, 9]), [True, False, False]),
        (pa.array([False, False, True]), [False, False, True]),
    ],
)
def test_rows_that_can_be_marked(rows: Any, expected: list[bool]) -> None:
    failures = Failures(3)
    with Scope(failures):
        mark_failed("bad", rows)
    assert failures.mask.tolist() == expected
    assert bool(failures) == any(expected)


@pytest.mark.parametrize("rows", [[3], [-1], [True, False], ["a"], [[0]], 1.5])
def test_rows_that_are_not_rows_of_the_call(rows: Any) -> None:
    failures = Failures(3)
    with Scope(failures), pytest.raises(ValueError, match="mark_failed got"):
        mark_failed("bad", rows)
    assert not failures


def test_the_first_error_of_a_row_stays() -> None:
    failures = Failures(3)
    failures.mark("first", [0])
    failures.mark("second")
    assert failures.texts(np.arange(3)) == ["first", "second", "second"]


def test_it_does_nothing_outside_a_run() -> None:
    @resumable
    def udf(row: Any) -> Any:
        mark_failed("nobody asks")
        return row

    assert udf({"a": 1}) == {"a": 1}


def test_another_thread_is_told_that_it_cannot_mark() -> None:
    caught: list[BaseException] = []

    def elsewhere() -> None:
        try:
            mark_failed("bad")
        except ResumeError as error:
            caught.append(error)

    with Scope(Failures(1)):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert "thread" in str(caught[0])


def test_error_texts_are_bounded_and_can_be_stored() -> None:
    text = text_of(ValueError("x" * 10_000))
    assert len(text) == MAX_ERROR_CHARS
    assert text.startswith("ValueError: xxx")
    with pytest.raises(KeyError) as caught:
        raise KeyError("\udcff")
    text = text_of(caught.value)
    assert text.encode("utf-8")
    assert "test_failures.py" in text


@pytest.fixture
def source(tmp_path: Path) -> None:
    write_source(tmp_path / "in", files=FILES, rows=ROWS)


@pytest.mark.extended
@pytest.mark.long
@pytest.mark.usefixtures("source")
def test_poison_in_every_kind_of_stage(tmp_path: Path) -> None:
    """One row of source 0 in a mixed batch of a pool, of 1 in a generator, of 2 in flat_map."""

    @resumable(on_error="mark_failed", one_to_one=True, isolate=True)
    class Pool:
        def __call__(self, batch: Any) -> Any:
            if 5 in batch["id"]:
                raise ValueError("bad row 5")
            return batch

    @resumable(on_error="mark_failed")
    def second_yield(batch: Any) -> Iterator[Any]:
        half = len(batch["id"]) // 2
        for here in (slice(None, half), slice(half, None)):
            if 35 in batch["id"][here]:
                raise ValueError("bad row 35")
            yield {name: values[here] for name, values in batch.items()}

    @resumable(on_error="mark_failed")
    def twice(row: Any) -> Any:
        if row["id"] == 41:
            mark_failed(ValueError("bad row 41"))
        return [row]

    def chain(ds: Dataset) -> Dataset:
        pool = ActorPoolStrategy(size=1)
        ds = ds.map_batches(Pool, batch_size=50, compute=pool, num_cpus=0.5)
        return ds.map_batches(second_yield, num_cpus=0.5).flat_map(twice, num_cpus=0.5)

    for turn in (1, 2):
        summary = run(tmp_path, chain, max_failed_runs=2)
        assert summary.sources_completed == (3 if turn == 1 else 0)
        assert summary.sources_failed == (3 if turn == 1 else 0)
        assert summary.sources_quarantined == (3 if turn == 2 else 0)
        assert ids_in(tmp_path / "out") == list(range(3 * ROWS, FILES * ROWS))
        state = "failed" if turn == 1 else "quarantined"
        failed = sorted(Checkpoint(tmp_path / "ckpt").sources(state), key=lambda s: s.source_id)
        for record, (stage, row) in zip(
            failed, [("Pool", 5), ("second_yield", 35), ("twice", 41)], strict=True
        ):
            assert record.failed_runs == turn
            assert record.failed_at is not None
            assert stage in str(record.error)
            assert f"bad row {row}" in str(record.error)
    assert run(tmp_path, chain).sources_quarantined == 3
    # Mended, and asked for: they are read again.
    Checkpoint(tmp_path / "ckpt").reset(state="quarantined")
    assert run(tmp_path, lambda ds: ds).sources_completed == 3
    assert ids_in(tmp_path / "out") == list(range(FILES * ROWS))
