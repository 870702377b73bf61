"""One local Ray cluster for the whole session, and input that is known row by row."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from buckets import S3
from driver import FILES, ROWS
from hypothesis import settings
from job import FEWER_PROCESSES, WITHOUT_TOKENS, Job, kill_with_descendants
from model_server import Model
from places import PATHS, SCRIPTS

# How long an example takes says nothing on a machine that others use, too.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# What a shell starts in the background ignores Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.update(FEWER_PROCESSES)

# Tests wait for processes to start and to end: two at a time leave CPUs idle.
PROCESSES = 3


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in three processes, each with a cluster.

    `-n 0` keeps it in one, as do names of tests, and slow tests, which measure.
    """
    if (
        config.pluginmanager.hasplugin("xdist")
        and not hasattr(config, "workerinput")
        and config.args_source is config.ArgsSource.TESTPATHS
        and config.option.numprocesses is None
        and config.option.markexpr != "slow"
        and config.option.capture != "no"
        and not (config.option.collectonly or config.option.usepdb)
    ):
        config.option.numprocesses = PROCESSES
        config.option.dist = "worksteal"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let slow tests take as long as they need."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(0))


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """A local cluster; its address.

    Its workers find the tests' modules by an environment that they inherit. A runtime_env would
    take each new worker, and each run has one for its ledger, 0.7 s of CPU time more to start.
    """
    import ray
    from small_cluster import start_cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(PATHS))
        address = start_cluster(num_cpus=4, forking=True)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield address
    ray.shutdown()


@pytest.fixture(scope="session")
def another_cluster() -> Iterator[str]:
    """A cluster whose drivers are killed; its address.

    Ray gives the workers that it was just starting for them up to a minute to register, and what
    comes next on that cluster waits.
    """
    command = [sys.executable, str(SCRIPTS / "small_cluster.py"), "4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=WITHOUT_TOKENS)
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    kill_with_descendants(process.pid)
    process.communicate()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """A real S3 server on loopback, with a bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
        server_of_s3 = S3(port, f"bucket-{secrets.token_hex(4)}")
        server_of_s3.filesystem.create_dir(server_of_s3.bucket)
        yield server_of_s3
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def model() -> Iterator[Model]:
    """A server that stands for one with a model, on loopback."""
    model = Model()
    yield model
    model.server.shutdown()
    model.server.server_close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six Parquet files of 100 rows and an empty one: ``id`` 0..599, ``name``, ``weight``."""
    folder = tmp_path / "in"
    write_source(folder, files=6, rows=100)
    write_file(folder / "empty.parquet", 0, 0)
    return folder


def write_source(folder: Path, *, files: int, rows: int) -> None:
    """Write ``files`` Parquet files with ids that go on from file to file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        write_file(folder / f"{number:05d}.parquet", number * rows, (number + 1) * rows)


def write_file(path: Path, start: int, stop: int) -> None:
    """Write the rows with the ids ``start .. stop - 1``."""
    ids = np.arange(start, stop, dtype=np.int64)
    table = pa.table(
        {
            "id": ids,
            "name": pa.array([f"row {i}" for i in ids], pa.string()),
            "weight": ids.astype(np.float64) / 7,
        }
    )
    pq.write_table(table, path)


def ids_in(folder: Path, column: str = "id") -> list[Any]:
    """Return every value of ``column`` in the Parquet files of ``folder``, sorted."""
    values: list[Any] = []
    for path in folder.glob("*.parquet"):
        values.extend(pq.ParquetFile(path).read([column]).column(column).to_pylist())
    return sorted(values)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and modification time of everything under ``folder``."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def holders(path: Path) -> Iterator[psutil.Process]:
    """Yield the processes that have ``path`` open."""
    for process in psutil.process_iter():
        try:
            if any(file.path == str(path) for file in process.open_files()):
                yield process
        except psutil.Error:
            continue


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """A job with its own cluster; what is left of it is killed."""
    write_source(tmp_path / "in", files=FILES, rows=ROWS)
    job = Job(tmp_path)
    yield job
    job.kill(with_descendants=True)


@pytest.fixture
def job_on_cluster(job: Job, another_cluster: str) -> Job:
    """A job on a cluster that outlives it."""
    job.address = another_cluster
    return job
