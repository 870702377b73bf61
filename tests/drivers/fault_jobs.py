"""Small real pipelines that get to every point at which a process can be made to die.

    python fault_jobs.py ADDRESS

runs one for each line `["JOB", "FOLDER", "POINT", ...]` that it reads: in a process of its own,
which dies as the driver at one of the points. `POINT:2` lets processes pass it twice before. It
prints each one's exit code.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import traceback
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data.datasource import Datasink

from ray_resume import (
    Checkpoint,
    RunSummary,
    mark_failed,
    resumable,
    resumable_read,
    resumable_write,
)
from ray_resume.testing import check_exactly_once, kill_at, rows_of

FILES, ROWS = 4, 60

# Ray types a UDF's argument as the union of all batch formats.
Batch: TypeAlias = Any


def copies(row: int) -> int:
    """Say how often a row is in the output: not at all in the whole of the first file."""
    return 0 if row < ROWS or is_refused(row) else row % 3


def is_refused(row: int) -> bool:
    return row % 25 == 7


def fan_out(batch: Batch) -> Iterator[Batch]:
    rows = np.repeat(batch["id"], [1 if is_refused(i) else i % 3 for i in batch["id"]])
    for part in np.array_split(rows, 2):
        yield {"id": part}


def refuse(batch: Batch) -> Batch:
    refused = np.array([is_refused(i) for i in batch["id"]], dtype=bool)
    if refused.any():
        mark_failed("refused", refused)
    return {"id": batch["id"][(batch["id"] >= ROWS) & ~refused]}


class RefuseAsync:
    async def __call__(self, batch: Batch) -> Any:
        yield refuse(batch)


def write_input(folder: Path) -> None:
    (folder / "in").mkdir(parents=True, exist_ok=True)
    for number in range(FILES):
        ids = np.arange(number * ROWS, (number + 1) * ROWS)
        # Two row groups, so that a file is more than one block.
        pq.write_table(pa.table({"id": ids}), folder / f"in/{number}.parquet", row_group_size=30)


class Job:
    """A pipeline in ``folder``: how to run it, and what must hold in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = folder / "ckpt"

    def run(self) -> RunSummary:
        raise NotImplementedError

    def check(self) -> None:
        check_exactly_once(
            self.checkpoint, ({"id": i} for i in range(FILES * ROWS) for _ in range(copies(i)))
        )
        dead = [i for path in self.letters() for i in pq.read_table(path)["id"].to_pylist()]
        assert sorted(dead) == [i for i in range(FILES * ROWS) if is_refused(i)]
        assert not set(self.folder.glob("ckpt/dead-letters/*")) - set(self.letters())

    def letters(self) -> list[Path]:
        return [Path(path) for path in Checkpoint(self.checkpoint).dead_letters()]

    def check_truth(self) -> None:
        """What is committed by now, if anything is, has each of its rows once."""
        if not (self.checkpoint / "checkpoint.json").exists():
            return
        report = Checkpoint(self.checkpoint).check()
        assert report.ok, report
        done = {
            row
            for source in Checkpoint(self.checkpoint).sources("completed")
            for row in self.input_rows(source.source_id)
        }
        rows = sorted(row["id"] for row in rows_of(self.checkpoint))
        assert rows == [i for i in sorted(done) for _ in range(copies(i))]

    def input_rows(self, source_id: str) -> range:
        """Return the rows of a source."""
        file = int(Path(source_id).stem)
        return range(file * ROWS, (file + 1) * ROWS)

    def _read(self) -> Any:
        return resumable_read(
            ray.data.read_parquet,
            str(self.folder / "in"),
            checkpoint=self.checkpoint,
            override_num_blocks=FILES,
        )


class Files(Job):
    """Reads, fans out, drops, sends dead letters, writes files."""

    last: Any = staticmethod(refuse)
    options: ClassVar[dict[str, Any]] = {}

    def run(self) -> RunSummary:
        ds = self._read().map_batches(resumable(fan_out), batch_size=None, num_cpus=0.5)
        ds = ds.map_batches(
            resumable(self.last, on_error="dead_letter"), num_cpus=0.6, **self.options
        )
        return resumable_write(ds, self.folder / "out")


class Ranges(Files):
    """The same, with ranges of rows that end within blocks."""

    def _read(self) -> Any:
        return resumable_read(
            ray.data.read_parquet,
            str(self.folder / "in"),
            checkpoint=self.checkpoint,
            granularity="rows",
            split_rows=25,
            override_num_blocks=FILES,
        )

    def input_rows(self, source_id: str) -> range:
        file, _, bounds = source_id.partition("#rows=")
        first, stop = map(int, bounds.split("-"))
        whole = super().input_rows(file)
        return whole[first : min(stop, ROWS)]


class SharedFiles(Files):
    """The same, with a checkpoint that hosts may share."""

    def _read(self) -> Any:
        return resumable_read(
            ray.data.read_parquet,
            str(self.folder / "in"),
            checkpoint=Checkpoint(
                self.checkpoint, shared=True, lease_ttl_s=12, publish_interval_s=0.05
            ),
            override_num_blocks=FILES,
        )


class AsyncFiles(Files):
    """The same with coroutines, in a pool of actors."""

    last = RefuseAsync
    options: ClassVar[dict[str, Any]] = {"concurrency": 1}


def with_types(batch: Batch) -> Batch:
    """Add two columns, of which each is null in every other file."""
    number = int(batch["id"][0].as_py()) // ROWS
    nothing, text = pa.nulls(len(batch)), pa.array(["x"] * len(batch))
    a, b = (nothing, text) if number % 2 else (text, nothing)
    return batch.append_column("a", a).append_column("b", b)


class Types(Job):
    """Every source comes with types of its own, so files are written again."""

    def run(self) -> RunSummary:
        ds = self._read().map_batches(resumable(with_types), batch_format="pyarrow", num_cpus=0.5)
        return resumable_write(ds, self.folder / "out")

    def check(self) -> None:
        rows = [
            {"id": i, "a": None if i // ROWS % 2 else "x", "b": "x" if i // ROWS % 2 else None}
            for i in range(FILES * ROWS)
        ]
        check_exactly_once(self.checkpoint, rows)
        schemas = {
            pq.read_schema(file).remove_metadata().to_string()
            for file in Checkpoint(self.checkpoint).files()
        }
        assert len(schemas) == 1

    def check_truth(self) -> None:
        assert Checkpoint(self.checkpoint).check().ok
        done = {
            int(Path(source.source_id).stem)
            for source in Checkpoint(self.checkpoint).sources("completed")
        }
        ids = sorted(row["id"] for row in rows_of(self.checkpoint))
        assert ids == [i for i in range(FILES * ROWS) if i // ROWS in done]


class Failing(Job):
    """Some rows fail until somebody mends that."""

    def run(self) -> RunSummary:
        mended = self.folder / "mended"

        @resumable(on_error="mark_failed")
        def doubt(batch: Batch) -> Batch:
            if not mended.exists() and batch["id"][0] < 2 * ROWS:
                raise ValueError("not mended yet")
            return {"id": batch["id"]}

        try:
            return resumable_write(self._read().map_batches(doubt), self.folder / "out")
        finally:
            mended.touch()

    def check(self) -> None:
        check_exactly_once(self.checkpoint, ({"id": i} for i in range(FILES * ROWS)))

    def check_truth(self) -> None:
        assert Checkpoint(self.checkpoint).check().ok


class Untidy(Job):
    """All sources share a file. One of them fails at first, so the file has rows of it as well."""

    def run(self) -> RunSummary:
        self._run_once(refused=2 * ROWS + 5)
        return self._run_once(refused=None)

    def _run_once(self, refused: int | None) -> RunSummary:
        @resumable(on_error="mark_failed")
        def doubt(batch: Batch) -> Batch:
            failed = batch["id"] == (-1 if refused is None else refused)
            if failed.any():
                mark_failed("not mended yet", failed)
            return {"id": batch["id"][~failed]}

        ds = resumable_read(
            ray.data.read_parquet,
            str(self.folder / "in"),
            checkpoint=self.checkpoint,
            override_num_blocks=1,
            on_code_change="ignore",
        )
        return resumable_write(ds.map_batches(doubt), self.folder / "out")

    def check(self) -> None:
        check_exactly_once(self.checkpoint, ({"id": i} for i in range(FILES * ROWS)))
        there = set(map(str, (self.folder / "out").iterdir()))
        assert set(Checkpoint(self.checkpoint).files()) == there

    def check_truth(self) -> None:
        assert Checkpoint(self.checkpoint).check().ok
        done = {
            int(Path(source.source_id).stem)
            for source in Checkpoint(self.checkpoint).sources("completed")
        }
        ids = sorted(row["id"] for row in rows_of(self.checkpoint))
        assert ids == [i for i in range(FILES * ROWS) if i // ROWS in done]


class Table(Datasink[str]):
    """Files that somebody else's table lists: one line of JSON for what is published at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def write(self, blocks: Any, ctx: Any) -> str:
        path = self.folder / f"{os.urandom(8).hex()}.parquet"
        pq.write_table(pa.concat_tables(blocks), path)
        return str(path)

    def on_write_complete(self, write_result: Any) -> None:
        with open(self.folder / "published", "a") as file:
            file.write(json.dumps(write_result.write_returns) + "\n")

    def rows(self) -> list[int]:
        lines = (self.folder / "published").read_text().splitlines()
        paths = [path for line in lines for path in json.loads(line)]
        return sorted(row for path in paths for row in pq.read_table(path)["id"].to_pylist())


class Published(Job):
    """Writes into a `Table`."""

    def run(self) -> RunSummary:
        return resumable_write(self._read(), Table(self.folder / "table"))

    def check(self) -> None:
        assert Table(self.folder / "table").rows() == list(range(FILES * ROWS))
        assert Checkpoint(self.checkpoint).check().ok

    def check_truth(self) -> None:
        return


class Marked(Job):
    """Writes into a Delta table, which takes marks."""

    def run(self) -> RunSummary:
        return resumable_write(self._read(), self.sink())

    def sink(self) -> Any:
        from ray.data._internal.datasource.delta_datasink import DeltaDatasink

        return DeltaDatasink(str(self.folder / "table"))

    def check(self) -> None:
        assert self.rows() == list(range(FILES * ROWS))
        assert Checkpoint(self.checkpoint).check().ok
        assert not list((self.checkpoint / "publications").iterdir())

    def check_truth(self) -> None:
        rows = self.rows()
        assert len(rows) == len(set(rows))

    def rows(self) -> list[int]:
        from deltalake import DeltaTable

        table = str(self.folder / "table")
        if not DeltaTable.is_deltatable(table):
            return []
        return sorted(DeltaTable(table).to_pyarrow_table()["id"].to_pylist())


class Unanswered(Marked):
    """The first run publishes, and then hears of an error: the next one has to settle that."""

    def run(self) -> RunSummary:
        if not (self.folder / "table").exists():
            with contextlib.suppress(ConnectionError):
                resumable_write(self._read(), unanswered(self.sink()))
        return resumable_write(self._read(), self.sink())


def unanswered(inner: Any) -> Any:
    class Unanswering(type(inner)):  # type: ignore[misc]
        def on_write_complete(self, write_result: Any) -> None:
            super().on_write_complete(write_result)
            raise ConnectionError("the answer got lost")

    # By its class's name a checkpoint knows it again.
    Unanswering.__name__ = type(inner).__name__
    inner.__class__ = Unanswering
    return inner


class LongNames(Job):
    """Ids of sources so long that the map of the run's file has to grow."""

    def run(self) -> RunSummary:
        noise = random.Random(0)
        keys = [f"{n}{urlsafe_b64encode(noise.randbytes(2_400_000)).decode()}" for n in range(8)]

        def load(key: str) -> Batch:
            return {"id": np.arange(3) + 3 * int(key[0])}

        ds = resumable_read(load, keys=keys, checkpoint=self.checkpoint, override_num_blocks=2)
        return resumable_write(ds, self.folder / "out")

    def check(self) -> None:
        check_exactly_once(self.checkpoint, ({"id": i} for i in range(24)))

    def check_truth(self) -> None:
        assert Checkpoint(self.checkpoint).check().ok


JOBS: dict[str, type[Job]] = {
    job.__name__: job
    for job in (
        Files,
        SharedFiles,
        Ranges,
        AsyncFiles,
        Types,
        Failing,
        Untidy,
        Published,
        Marked,
        Unanswered,
        LongNames,
    )
}


def drive(address: str, job: str, folder: str, *points: str) -> None:
    import logging

    with open(Path(folder, "driver.log"), "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # Each driver starts its own workers: few are enough.
    context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=1.2)
    with contextlib.ExitStack() as stack:
        for point in points:
            name, _, after = point.partition(":")
            stack.enter_context(kill_at(name, Path(folder, "faults"), after=int(after or 0)))
        JOBS[job](Path(folder)).run()


def main() -> None:
    for line in sys.stdin:
        # The child has all modules already.
        driver = os.fork()
        if not driver:
            code = 1
            try:
                drive(sys.argv[1], *json.loads(line))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(driver, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
