"""Rows that fail: in every kind of call, by an exception or by mark_failed; and on a cluster."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import ids_in, write_source
from direct_client import DirectClient
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.data import ActorPoolStrategy, DataContext, Dataset

from ray_resume import (
    Checkpoint,
    ResumeError,
    RunSummary,
    mark_failed,
    resumable,
    resumable_read,
    resumable_write,
)
from ray_resume.checkpoint.dead_letters import DeadLetterStore
from ray_resume.checkpoint.local.objects import LocalObjects
from ray_resume.core.error_text import MAX_ERROR_CHARS, text_of
from ray_resume.core.ledger import Ledger
from ray_resume.core.messages import DeadLetter, Drain, Event, Message, Seal
from ray_resume.core.tokens import MODULUS, token_sum, tokens
from ray_resume.raydata import blocks
from ray_resume.udf.failures import Failures, Scope
from ray_resume.udf.stage import instrument

# Ray Data starts Ray to estimate the size of a block of rows.
pytestmark = pytest.mark.usefixtures("cluster")


class Desk(DirectClient):
    """Stands in for the connection to a ledger: applies what it is sent to a real one."""

    def __init__(self, sources: int) -> None:
        self.ledger = Ledger("run", sources)
        self.ledger.begin_pass(1)
        self.completed: set[int] = set()
        self.letters: list[DeadLetter] = []

    def send(self, *events: Event) -> None:
        applied = self.ledger.apply(Message("run", 1, events))
        self.completed |= {completion.source for completion in applied.completions}

    def submit_dead_letters(self, letters: Sequence[DeadLetter]) -> Any:
        self.letters += letters
        return self.submit(*(Drain(one.source, -one.total % MODULUS) for one in letters))

    def buried(self) -> Counter[int]:
        """Count the rows in the dead letters by their ``x``."""
        tables = [pa.ipc.open_stream(letter.table).read_all() for letter in self.letters]
        return Counter(x for table in tables for x in table["x"].to_pylist())


def batch_of(sources: list[int], desk: Desk, form: str) -> Any:
    numbers = np.array(sources, dtype=np.int32)
    values = tokens(11, 0, len(sources))
    for source in range(max(sources) + 1):
        desk.send(Seal(source, token_sum(values[numbers == source])))
    rows: Any = {"x": np.arange(len(sources)), "deep": np.empty(len(sources), dtype=object)}
    rows["deep"][:] = [[x] for x in rows["x"]]
    if form == "pandas":
        rows = pd.DataFrame(rows)
    elif form == "pyarrow":
        rows = pa.table(rows)
    return blocks.with_tracking_columns(rows, numbers, values)


def x_of(batch: Any) -> list[int]:
    values: list[int] = np.asarray(blocks.column(batch, "x")).tolist()
    return values


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


def consume(result: Any, desk: Desk) -> Counter[int]:
    """Drain what a stage put out, as a sink does; count its rows by ``x``."""
    seen: Counter[int] = Counter()
    for output in list(result) if isinstance(result, Iterator) else [result]:
        rows, sources, values = blocks.split_tracking_columns(output)
        for source in np.unique(sources).tolist():
            desk.send(Drain(source, -token_sum(values[sources == source]) % MODULUS, 1))
        if len(sources):
            seen.update(x_of(rows))
    return seen


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


# Retries that the user has asked Ray Data for. ----------------------------------------------------


class BusyError(Exception):
    pass


class Flaky:
    """A UDF that spoils what it gets and raises an error the first times that it sees row 1."""

    def __init__(self, kind: str, times: int) -> None:
        self.kind, self.times, self.calls = kind, times, 0
        self.sizes: set[int] = set()

    def check(self, given: Any) -> None:
        of_row = self.kind in ("map", "filter", "flat_map")
        deep = given["deep"] if of_row else given["deep"][0]
        assert "spoilt" not in deep
        deep.append("spoilt")
        xs = [given["x"]] if of_row else x_of(given)
        if 1 in xs:
            self.calls += 1
            self.sizes.add(len(xs))
            if self.calls <= self.times:
                raise BusyError("come back later")

    def __call__(self, given: Any) -> Any:
        self.check(given)
        return {"filter": True, "flat_map": [given]}.get(self.kind, given)

    def generate(self, given: Any) -> Iterator[Any]:
        yield {name: values[:1] for name, values in given.items()}
        self.check(given)
        yield {name: values[1:] for name, values in given.items()}

    async def wait(self, given: Any) -> Any:
        await asyncio.sleep(0)
        return self(given)


def with_retries(patterns: Any, count: int) -> Any:
    context = DataContext.get_current().copy()
    context.retried_map_errors, context.max_map_retries = patterns, count
    return DataContext.current(context)


@pytest.mark.parametrize("on_error", ["mark_failed", "dead_letter"])
@pytest.mark.parametrize("isolate", [False, True], ids=["whole", "isolate"])
@pytest.mark.parametrize("kind", ["map_batches", "generator", "map", "filter", "flat_map"])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_an_error_is_retried_as_often_as_tasks_are(
    on_error: Any, isolate: bool, kind: str, is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_resume.raydata.retries._MAX_BACKOFF_S", 0)
    if is_async and kind == "generator":
        pytest.skip("it is as the others")

    def run(times: int, patterns: Any, count: int) -> tuple[Flaky, Counter[int], Desk]:
        flaky, desk = Flaky(kind, times), Desk(2)
        of_rows = kind in ("map", "filter", "flat_map")
        batch = batch_of([0, 0, 0, 1], desk, "pyarrow" if of_rows else "numpy")
        method = "map_batches" if kind == "generator" else kind

        class Async:
            async def __call__(self, given: Any) -> Any:
                return await flaky.wait(given)

        udf: Any = Async if is_async else flaky.generate if kind == "generator" else flaky.__call__
        decorated = resumable(udf, on_error=on_error, isolate=isolate)
        ready = instrument(decorated, desk, method)  # type: ignore[arg-type]

        async def consume_async() -> Counter[int]:
            return sum([consume(one, desk) async for one in ready()(batch)], Counter[int]())

        with with_retries(patterns, count):
            return (
                flaky,
                asyncio.run(consume_async()) if is_async else consume(ready(batch), desk),
                desk,
            )

    everything = Counter(range(4))
    for patterns in (True, ["later"], ["BusyError", "other"], ["come .* later"]):
        flaky, seen, desk = run(2, patterns, 2)
        assert (seen, desk.completed, flaky.calls) == (everything, {0, 1}, 3)
        # A search for the bad row would also have called it three times, with fewer rows each time.
        assert len(flaky.sizes) == 1
        assert not desk.letters
    for patterns, count, calls in ((True, 2, 3), (["earlier"], 2, 1), (True, 0, 1)):
        flaky, seen, desk = run(10**9, patterns, count)
        exact = isolate or kind in ("map", "filter", "flat_map")
        assert seen == (everything - Counter([1]) if exact else Counter([3]))
        if not isolate or kind in ("map", "filter", "flat_map"):
            assert flaky.calls == calls
        assert desk.completed == ({1} if on_error == "mark_failed" else {0, 1})


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


# Dead letters -------------------------------------------------------------------------------------


def letter_of(table: pa.Table, errors: Sequence[str]) -> DeadLetter:
    return DeadLetter.of(0, 1, "map(f)", table, errors)


def test_a_letter_of_what_parquet_cannot_hold(tmp_path: Path) -> None:
    union = pa.UnionArray.from_dense(
        pa.array([0, 1], pa.int8()), pa.array([0, 0], pa.int32()), [pa.array([1]), pa.array(["a"])]
    )
    table = pa.table({"u": union, "ray_resume_error": ["mine", "mine"], "n": [1, None]})
    folder = DeadLetterStore(LocalObjects(str(tmp_path)))
    name = folder.write("a" * 12, "s\udcff", letter_of(table, ["e1", "e2"]))
    read = pq.read_table(tmp_path / "dead-letters" / name)
    assert read["u"].to_pylist() == ["1", "'a'"]
    assert read["ray_resume_error"].to_pylist() == ["mine", "mine"]
    assert read["_ray_resume_error"].to_pylist() == ["e1", "e2"]
    assert read["ray_resume_source"].to_pylist() == ["s\\udcff"] * 2
    assert read["n"].to_pylist() == [1, None]


def test_left_over_letters_are_removed_and_others_stay(tmp_path: Path) -> None:
    folder = DeadLetterStore(LocalObjects(str(tmp_path)))
    folder.remove_leftovers({"a" * 12}, ())
    table = pa.table({"x": [1]})
    names = [folder.write(run * 12, "s", letter_of(table, ["e"])) for run in "aabc"]
    inside = tmp_path / "dead-letters"
    (inside / f".{'a' * 12}-{'0' * 16}-{'0' * 16}.parquet").touch()
    (inside / "mine.parquet").touch()
    folder.remove_leftovers({"a" * 12, "c" * 12}, {names[0]})
    assert {path.name for path in inside.iterdir()} == {names[0], names[2], "mine.parquet"}


# On a cluster -------------------------------------------------------------------------------------

FILES, ROWS = 6, 20


@pytest.fixture
def source(tmp_path: Path) -> None:
    write_source(tmp_path / "in", files=FILES, rows=ROWS)


def run(folder: Path, chain: Callable[[Dataset], Dataset], **options: Any) -> RunSummary:
    ds = resumable_read(
        ray.data.read_parquet,
        str(folder / "in"),
        checkpoint=folder / "ckpt",
        on_pipeline_change="continue",
        **options,
    )
    return resumable_write(chain(ds), folder / "out")


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


@pytest.mark.extended
@pytest.mark.usefixtures("source")
def test_dead_letters_are_there_once_for_each_completed_source(tmp_path: Path) -> None:
    @resumable(on_error="dead_letter")
    def odd(row: Any) -> Any:
        if row["id"] % 10 == 3:
            raise ValueError(f"bad row {row['id']}")
        return row

    @resumable(on_error="mark_failed")
    def later(batch: Any) -> Any:
        if 0 in batch["id"]:
            raise ValueError("this source fails after all")
        return batch

    summary = run(tmp_path, lambda ds: ds.map(odd).map_batches(later))
    assert (summary.sources_completed, summary.sources_failed) == (FILES - 1, 1)
    assert summary.rows_dead_lettered == 2 * (FILES - 1)

    def check(expected: list[int]) -> None:
        letters = Checkpoint(tmp_path / "ckpt").dead_letters()
        assert sorted(map(str, (tmp_path / "ckpt" / "dead-letters").iterdir())) == letters
        rows = [row for path in letters for row in pq.read_table(path).to_pylist()]
        assert sorted(row["id"] for row in rows) == expected
        for row in rows:
            assert f"bad row {row['id']}" in row["ray_resume_error"]
            assert row["ray_resume_stage"] == "map(odd)"
            assert f"{row['id'] // ROWS:04d}" in row["ray_resume_source"]

    bad = [i for i in range(FILES * ROWS) if i % 10 == 3]
    check([i for i in bad if i >= ROWS])
    assert run(tmp_path, lambda ds: ds.map(odd)).rows_dead_lettered == 2
    check(bad)
    good = sorted(set(range(FILES * ROWS)) - set(bad))
    assert ids_in(tmp_path / "out") == good
    # Processed anew, without errors: the letters go with the output that they belonged to.
    Checkpoint(tmp_path / "ckpt").reset(state="completed")
    check(bad)
    run(tmp_path, lambda ds: ds)
    check([])
    assert ids_in(tmp_path / "out") == list(range(FILES * ROWS))


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize(
    "how",
    [
        "a task",
        pytest.param("an actor", marks=pytest.mark.slow),
        # Ray takes these for the actor's wish, and starts no other.
        pytest.param("sys.exit", marks=[pytest.mark.extended, pytest.mark.long]),
        pytest.param("exit_actor in async", marks=[pytest.mark.extended, pytest.mark.long]),
    ],
)
def test_a_row_that_kills_its_worker_fails_alone(tmp_path: Path, how: str) -> None:
    @resumable(one_to_one=True)
    class Deadly:
        def __call__(self, batch: Any) -> Any:
            if 55 in batch["id"]:
                if how == "sys.exit":
                    sys.exit(0)
                os.kill(os.getpid(), signal.SIGSEGV)
            return batch

    # Such an exit is no failure of a row.
    @resumable(one_to_one=True, on_error="mark_failed")
    class AsyncDeadly:
        async def __call__(self, batch: Any) -> Any:
            if 55 in batch["id"]:
                ray.actor.exit_actor()  # type: ignore[no-untyped-call]
            yield batch

    def chain(ds: Dataset) -> Dataset:
        if how == "a task":
            return ds.map_batches(resumable(Deadly().__call__, one_to_one=True))
        udf: Any = AsyncDeadly if how == "exit_actor in async" else Deadly
        return ds.map_batches(udf, compute=ActorPoolStrategy(size=1), num_cpus=0.5)

    summary = run(tmp_path, chain, max_failed_runs=1)
    assert (summary.sources_completed, summary.sources_quarantined) == (FILES - 1, 1)
    assert "1 source is quarantined" in str(summary)
    (record,) = Checkpoint(tmp_path / "ckpt").sources("quarantined")
    assert record.source_id.endswith("00002.parquet")
    assert "a worker died whenever it was executed" in str(record.error)
    assert ids_in(tmp_path / "out") == [i for i in range(FILES * ROWS) if i // ROWS != 2]


@pytest.mark.extended
@pytest.mark.skipif(
    not hasattr(DataContext, "max_map_retries"), reason="this version of Ray retries no UDF"
)
@pytest.mark.parametrize("times", [2, pytest.param(3, marks=pytest.mark.long)])
def test_a_udf_is_retried_as_in_plain_ray_data(tmp_path: Path, times: int, source: None) -> None:
    def flaky(folder: Path) -> Any:
        def run(batch: Any) -> Any:
            if 55 in batch["id"]:
                with (folder / "calls").open("a+") as calls:
                    calls.write(".")
                    calls.seek(0)
                    if len(calls.read()) <= times:
                        raise BusyError("come back later")
            return batch

        return run

    (tmp_path / "beside").mkdir()
    with with_retries(["BusyError"], 2):
        plain = ray.data.read_parquet(str(tmp_path / "in")).map_batches(flaky(tmp_path / "beside"))
        if times == 2:
            plain.materialize()
        else:
            with pytest.raises(Exception, match="come back later"):
                plain.materialize()
        udf = resumable(flaky(tmp_path), on_error="mark_failed")
        summary = run(tmp_path, lambda ds: ds.map_batches(udf))
    assert summary.sources_failed == (times == 3)
    assert (tmp_path / "calls").read_text() == (tmp_path / "beside" / "calls").read_text() == "..."


@pytest.mark.slow
def test_half_of_all_sources_kill_their_worker_and_the_job_ends(tmp_path: Path) -> None:
    write_source(tmp_path / "in", files=40, rows=2)

    @resumable
    def deadly(batch: Any) -> Any:
        if (batch["id"] // 2 % 2).any():
            os.kill(os.getpid(), signal.SIGKILL)
        return batch

    first, second = (
        run(tmp_path, lambda ds: ds.map_batches(deadly), max_failed_runs=1) for _ in range(2)
    )
    assert (first.sources_completed, first.sources_quarantined) == (20, 20)
    assert "20 sources got lost although each was executed alone. The first is" in str(first)
    assert len(first.lost_alone) == 20
    assert all("a worker died whenever" in how for how in first.lost_alone.values())
    # Nothing is left to do.
    assert (second.sources_skipped, second.sources_quarantined) == (20, 20)
    assert ids_in(tmp_path / "out") == [i for i in range(80) if i // 2 % 2 == 0]


@pytest.mark.slow
@pytest.mark.usefixtures("source")
def test_after_a_crash_an_error_of_the_user_is_raised_all_the_same(tmp_path: Path) -> None:
    @resumable
    def deadly(batch: Any) -> Any:
        if 15 in batch["id"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if 115 in batch["id"]:
            # Not before the crash has ended the first pass.
            time.sleep(20)
            raise ValueError("bad row 115")
        return batch

    with pytest.raises(Exception, match="bad row 115"):
        run(tmp_path, lambda ds: ds.map_batches(deadly, num_cpus=2))
    assert Checkpoint(tmp_path / "ckpt").status().completed == FILES - 2
