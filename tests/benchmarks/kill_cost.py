"""What a kill costs: jobs of many shapes, killed with all their processes, then run to their end.

    python tests/benchmarks/kill_cost.py [SHAPE ...] [--interval SECONDS] [--at 0.6]

Each job passes rows through a UDF that takes 10 ms a row. When the given part of the rows has been
through it, the driver and all processes of its cluster get SIGKILL. Prints for each shape how many
rows had been worked, how many of them were committed, and the difference in seconds of work per
worker. "At worst" is the largest difference at any look before, twice a second: the moment of the
kill is one of many. Then the job runs again, to its end, and each row must be in the output once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROW_S = 0.01
LOOK_S = 0.5


@dataclass(frozen=True)
class Shape:
    """A pipeline: its input, its cluster, and what stands between read and write."""

    transform: Callable[[Any, Slow], Any]
    files: int = 200
    rows_per_file: int = 20
    cpus: int = 2
    # How many workers are inside of the slow UDF at once.
    workers: int = 2
    read: tuple[tuple[str, Any], ...] = ()
    write: tuple[tuple[str, Any], ...] = ()
    row_s: float = ROW_S
    fan_out: int = 1
    payload_bytes: int = 0
    lines: bool = False
    shared: bool = False
    table: str = ""

    @property
    def rows(self) -> int:
        return self.files * self.rows_per_file


class Slow:
    """The UDF: 10 ms a row, and a byte in a file for each."""

    def __init__(self, work: str) -> None:
        # Not an argument: this would make another pipeline of the job that is run again.
        self.work, self.row_s = work, float(Path(work, "row_s").read_text())

    def __call__(self, batch: Any) -> Any:
        for _ in range(batch.num_rows):
            time.sleep(self.row_s)
            with open(f"{self.work}/worked", "ab", buffering=0) as worked:
                worked.write(b".")
        return batch


def in_tasks(ds: Any, slow: Slow) -> Any:
    from ray_resume import resumable

    return ds.map_batches(resumable(slow.__call__), batch_size=None, batch_format="pyarrow")


def in_pools(
    *sizes: int, batch_size: int | None = None, one_to_one: bool = False
) -> Callable[[Any, Slow], Any]:
    def transform(ds: Any, slow: Slow) -> Any:
        import ray

        from ray_resume import resumable

        class Pass(Slow):
            def __call__(self, batch: Any) -> Any:
                return batch

        for number, size in enumerate(sizes):
            kind = Pass if number else Slow
            ds = ds.map_batches(
                resumable(one_to_one=one_to_one)(kind),
                fn_constructor_args=(slow.work,),
                batch_size=batch_size,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=size),
            )
        return ds

    return transform


def fanned_out(ds: Any, slow: Slow) -> Any:
    from ray_resume import resumable

    ds = in_tasks(ds, slow)
    return ds.flat_map(resumable(lambda row: [row] * 10))


SHAPES = {
    "tasks": Shape(in_tasks),
    "row groups": Shape(in_tasks, read=(("granularity", "row_group"),)),
    # A line has 8 bytes, and a split 20 lines.
    "splits": Shape(in_tasks, read=(("granularity", "split"), ("split_bytes", 160)), lines=True),
    # A range has 20 lines. One task reads the file.
    "row ranges": Shape(
        in_tasks, read=(("granularity", "rows"), ("split_rows", 20)), lines=True, workers=1
    ),
    "pool of one": Shape(in_pools(1), workers=1),
    "pool, mixed batches": Shape(in_pools(1, batch_size=64, one_to_one=True), workers=1),
    "pool, whole blocks": Shape(in_pools(1, one_to_one=True), workers=1),
    "two pools": Shape(in_pools(1, 1), cpus=3, workers=1),
    "few read tasks": Shape(in_tasks, read=(("override_num_blocks", 2),)),
    "large sources": Shape(in_tasks, files=8, rows_per_file=500),
    "fan-out": Shape(fanned_out, fan_out=10),
    "shared checkpoint": Shape(in_tasks, shared=True),
    "merged files": Shape(in_tasks, write=(("target_file_bytes", 64 << 20),)),
    "table": Shape(in_tasks, table="renaming"),
    "Iceberg": Shape(in_tasks, table="iceberg"),
    "a file per source": Shape(in_tasks, write=(("file_per_source", True),)),
    "tiny files": Shape(in_tasks, files=100_000, rows_per_file=1, row_s=0.001, lines=True),
    "one file of 4 GB": Shape(
        in_tasks, read=(("granularity", "row_group"),), payload_bytes=1_000_000
    ),
}


def make_input(shape: Shape, folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    ids = list(range(shape.rows))
    if ("granularity", "row_group") in shape.read:
        some = [
            ids[first:][: shape.rows_per_file] for first in range(0, len(ids), shape.rows_per_file)
        ]
        schema = pa.schema({"id": pa.int64(), "payload": pa.binary()})
        with pq.ParquetWriter(folder / "all.parquet", schema, use_dictionary=False) as writer:
            for group in some:
                payload = [os.urandom(shape.payload_bytes) for _ in group]
                writer.write_table(pa.table([group, payload], schema=schema))
        return
    if shape.lines and dict(shape.read).get("granularity") in ("split", "rows"):
        (folder / "all.txt").write_text("".join(f"{number:07d}\n" for number in ids))
        return
    if shape.lines:
        for number in ids:
            (folder / f"{number:07d}.txt").write_text(f"{number}\n")
        return
    for number in range(shape.files):
        first = number * shape.rows_per_file
        table = pa.table({"id": ids[first : first + shape.rows_per_file]})
        pq.write_table(table, folder / f"{number:06d}.parquet")


def checkpoint_of(shape: Shape, work: str) -> Any:
    from ray_resume import Checkpoint

    if shape.shared:
        return Checkpoint(f"{work}/checkpoint", shared=True, publish_interval_s=1, lease_ttl_s=5)
    return Checkpoint(f"{work}/checkpoint")


def table_in(work: str) -> Any:
    """Return a datasink whose files count once their names are published."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from ray.data.datasource import Datasink

    class Table(Datasink[str]):
        def write(self, blocks: Any, ctx: Any) -> str:
            os.makedirs(f"{work}/files", exist_ok=True)
            name = f"{os.urandom(8).hex()}.parquet"
            pq.write_table(pa.concat_tables(blocks), f"{work}/files/{name}")
            return name

        def on_write_complete(self, write_result: Any) -> None:
            os.makedirs(f"{work}/out", exist_ok=True)
            for name in write_result.write_returns:
                os.rename(f"{work}/files/{name}", f"{work}/out/{name}")

    return Table()


def iceberg_in(work: str) -> Any:
    """Return a datasink of an Iceberg table with a catalog in a file."""
    from ray.data._internal.datasource.iceberg_datasink import IcebergDatasink

    return IcebergDatasink("db.ids", catalog_kwargs=catalog_kwargs(work))


def catalog_kwargs(work: str) -> dict[str, str]:
    return {
        "name": "catalog",
        "type": "sql",
        "uri": f"sqlite:///{work}/catalog.db",
        "warehouse": f"file://{work}/warehouse",
    }


def make_iceberg_table(work: str) -> None:
    import pyarrow as pa
    from pyiceberg.catalog import load_catalog

    catalog = load_catalog(**catalog_kwargs(work))
    catalog.create_namespace("db")
    catalog.create_table("db.ids", pa.schema({"id": pa.int64()}))


def sink_of(shape: Shape, work: str) -> Any:
    if shape.table == "iceberg":
        return iceberg_in(work)
    return table_in(work) if shape.table else f"{work}/out"


def ids_in(shape: Shape, work: str) -> list[int]:
    """Return the ids in the output."""
    import pyarrow.dataset

    if shape.table == "iceberg":
        from pyiceberg.catalog import load_catalog

        rows = load_catalog(**catalog_kwargs(work)).load_table("db.ids").scan().to_arrow()
        return [int(value) for value in rows["id"].to_pylist()]
    column = "text" if shape.lines else "id"
    rows = pyarrow.dataset.dataset(f"{work}/out", format="parquet").to_table([column])
    return [int(value) for value in rows[column].to_pylist()]


def job(name: str, work: str, interval_s: float) -> None:
    """Run the job of a shape in this process."""
    import ray

    from ray_resume import resumable_read, resumable_write

    shape = SHAPES[name]
    ray.init("local", num_cpus=shape.cpus, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    ds = resumable_read(
        ray.data.read_text if shape.lines else ray.data.read_parquet,
        f"{work}/in",
        checkpoint=checkpoint_of(shape, work),
        **dict(shape.read),
    )
    ds = shape.transform(ds, Slow(work))
    begun = time.perf_counter()
    summary = resumable_write(
        ds,
        sink_of(shape, work),
        commit_interval_s=interval_s,
        publish_interval_s=interval_s,
        **dict(shape.write),
    )
    print(f"{time.perf_counter() - begun:.1f} s: {summary}", flush=True)


def start(name: str, work: str, row_s: float, interval_s: float) -> subprocess.Popen[bytes]:
    Path(work, "row_s").write_text(str(row_s))
    command = [sys.executable, __file__, "--job", name, "--work", work]
    options = ["--interval", str(interval_s)]
    with open(f"{work}/log", "ab") as log:
        return subprocess.Popen([*command, *options], stdout=log, stderr=log)


def descendants(pid: int) -> list[int]:
    """Return the processes below one."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found[1:]


def kill_all(driver: subprocess.Popen[bytes]) -> None:
    victims = [*descendants(driver.pid), driver.pid]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    driver.wait()


def worked_rows(work: str) -> int:
    try:
        return os.path.getsize(f"{work}/worked")
    except FileNotFoundError:
        return 0


def measure(name: str, interval_s: float, at: float) -> None:
    shape = SHAPES[name]
    work = tempfile.mkdtemp(prefix="ray-resume-kill-cost-")
    try:
        make_input(shape, Path(work, "in"))
        if shape.table == "iceberg":
            make_iceberg_table(work)
        driver = start(name, work, shape.row_s, interval_s)
        took_s, worst = watch(name, work, driver, at)
        worked = worked_rows(work)
        committed = committed_rows(shape, work)
        lost = worked - committed
        per_worker_s = shape.row_s / shape.workers
        print(
            f"{name:27} worked {worked:6,} of {shape.rows:6,} in {took_s:5.1f} s   committed "
            f"{committed:6,}   lost {lost:5,} rows, {lost * per_worker_s:5.1f} s per worker; "
            f"at worst {worst * per_worker_s:5.1f} s",
            end="",
            flush=True,
        )
        if start(name, work, 0, interval_s).wait():
            sys.exit(f"\n{name}: the resume failed:\n{Path(work, 'log').read_text()[-3000:]}")
        counts = Counter(ids_in(shape, work))
        right = len(counts) == shape.rows and set(counts.values()) == {shape.fan_out}
        files = sum(1 for _ in Path(work).glob("[ow][ua]*/**/*.parquet"))
        print(f"   {files:4} files   {'each row once' if right else 'WRONG ROWS'}", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def watch(name: str, work: str, driver: subprocess.Popen[bytes], at: float) -> tuple[float, int]:
    """Kill a job when the given part of its rows was worked.

    Returns:
        Seconds from the first row, and the most rows at any look that were worked, not committed.
    """
    shape, begun, worst, looked_at = SHAPES[name], None, 0, 0.0
    while (worked := worked_rows(work)) < at * shape.rows:
        if driver.poll() is not None:
            sys.exit(f"{name}: the job ended by itself:\n{Path(work, 'log').read_text()[-3000:]}")
        begun = begun or (time.perf_counter() if worked else None)
        if worked and time.perf_counter() > looked_at + LOOK_S:
            # Rows that become committed during the look count as committed: it is the worked ones
            # that must not be newer.
            worst = max(worst, worked - committed_rows(shape, work))
            looked_at = time.perf_counter()
        time.sleep(0.01)
    kill_all(driver)
    return time.perf_counter() - (begun or 0), worst


def committed_rows(shape: Shape, work: str) -> int:
    return int(checkpoint_of(shape, work).status().completed) * shape.rows_per_file


def main() -> None:
    """Measure each shape that is named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", help=", ".join(SHAPES))
    parser.add_argument("--interval", type=float, default=5)
    parser.add_argument("--at", type=float, default=0.6)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        job(given.job, given.work, given.interval)
        return
    for name in given.shapes or SHAPES:
        measure(name, given.interval, given.at)


if __name__ == "__main__":
    main()
