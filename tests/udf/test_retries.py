"""Retries of UDFs that the user has asked Ray Data for."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import write_source
from ledger_desk import Desk, batch_of, consume, x_of
from ray.data import DataContext
from udf_job import FILES, ROWS, run

from ray_resume import resumable
from ray_resume.udf.stage import instrument

# Ray Data starts Ray to estimate the size of a block of rows.
pytestmark = pytest.mark.usefixtures("cluster")


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


@pytest.fixture
def source(tmp_path: Path) -> None:
    write_source(tmp_path / "in", files=FILES, rows=ROWS)


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
