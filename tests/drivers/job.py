"""The driver of `driver.py` as a process of its own, to be killed, signalled and resumed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from driver import FILES, ROWS, rows_of
from places import SCRIPTS

from ray_resume import Checkpoint, CheckpointError
from ray_resume.checkpoint.local.lmdb_file import read_writer
from ray_resume.core.records import Record

DRIVER = SCRIPTS / "driver.py"

# Plain Ray Data starts 32 actors to read the footers of Parquet files, for each read; one is enough
# here. An idle worker serves the next pipeline, however late that starts. Metrics have tests of
# their own.
FEWER_PROCESSES = {
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    "RAY_enable_metrics_collection": "0",
}

# Each run starts processes that import this repository. If Python may not keep its bytecode, each
# of them compiles the modules again: tests take up to a seventh more processor time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A driver in a process of its own does not have the token of a cluster that another one started.
WITHOUT_TOKENS = {**os.environ, **FEWER_PROCESSES, "RAY_AUTH_MODE": "disabled"}


class Job:
    """The driver as a process of its own."""

    def __init__(self, folder: Path, address: str | None = None) -> None:
        self.source, self.checkpoint, self.out = folder / "in", folder / "ckpt", folder / "out"
        self.address = address

    def start(self, command: Sequence[str] = (sys.executable, str(DRIVER))) -> None:
        self._run([*command, str(self.source), str(self.checkpoint), str(self.out)])

    def _run(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [*command, *filter(None, [self.address])],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=WITHOUT_TOKENS,
        )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)  # A look takes CPU time, too.

    def committed(self) -> int:
        try:
            return Checkpoint(self.checkpoint).status().completed
        except CheckpointError:
            return 0

    def records_of(self, run_id: str) -> list[Record]:
        """Return what a run has committed up to now."""
        return list(read_writer(self.checkpoint / f"{run_id}.mdb", live=True)[1])

    def wait_for_run(self, known: set[str], *, commits: int) -> str:
        """Wait for a run that is not in ``known`` to commit so much; add it, return its id."""
        found: list[str] = []

        def look() -> bool:
            runs = {store.stem for store in self.checkpoint.glob("*.mdb")} - known
            found.extend(run for run in runs if len(self.records_of(run)) >= commits)
            return bool(found)

        self.wait_for(look)
        known.add(found[0])
        return found[0]

    def files(self) -> int:
        return len(list(self.out.glob("*.parquet")))

    def kill(self, *, with_descendants: bool) -> None:
        if self.process.poll() is not None:
            return
        if with_descendants:
            kill_with_descendants(self.process.pid)
        else:
            self.process.kill()
        self.process.communicate()

    def signal_all(self, number: int) -> None:
        """Send a signal to the driver and all that it has started."""
        signal_each(with_descendants_of(self.process.pid), number)

    def finish(self) -> str:
        output, _ = self.process.communicate(timeout=180)
        assert self.process.returncode == 0, output
        return output

    def check(self) -> None:
        """Every row is there once, and the folder holds what the checkpoint lists, no more."""
        rows: list[tuple[int, int]] = []
        for path in self.out.iterdir():
            table = pq.ParquetFile(path).read()
            rows += zip(*(table.column(name).to_pylist() for name in ("id", "score")), strict=True)
        assert sorted(rows) == rows_of(FILES * ROWS)
        assert Checkpoint(self.checkpoint).files() == sorted(map(str, self.out.iterdir()))
        status = Checkpoint(self.checkpoint).status()
        assert (status.completed, status.pending, status.live) == (FILES, 0, 0)
        report = Checkpoint(self.checkpoint).check()
        assert report.ok, report


def kill_with_descendants(pid: int) -> None:
    """Kill a process and all that it has started."""
    victims = with_descendants_of(pid)
    signal_each(victims, signal.SIGKILL)
    psutil.wait_procs(victims, timeout=30)


def with_descendants_of(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def signal_each(processes: list[psutil.Process], number: int) -> None:
    """Signal processes that may be gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
