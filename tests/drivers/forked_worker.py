"""A worker of the tests' clusters: a fork of a process that has imported what Ray imports.

Each worker of Ray is a new Python, which imports pyarrow, pandas, pydantic and others for half a
second of processor time before Ray itself; and each run has a worker of its own for its ledger.

    python forked_worker.py --serve SOCKET     imports them, and forks for each worker that asks
    python forked_worker.py ARGUMENT...        a raylet starts this as a worker, and it asks

The fork has the arguments, environment, folder and files of the process that asks, and is a process
of its own like every worker. Ray itself is imported by each: it reads its configuration, and seeds
what it draws its ids from, when it is imported. The server ends with the process that started it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import sys
from pathlib import Path
from typing import TypeAlias

SOCKET = "RAY_RESUME_TEST_FORKS"
"""The variable of the environment with the path of the server's socket."""

# What `import ray.data` takes its time for, beside Ray's own modules.
MODULES = (
    "numpy",
    "pandas",
    "pyarrow.compute",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "pydantic",
    "aiohttp",
    "google.protobuf.json_format",
    "jsonschema",
    "requests",
    "yaml",
    "click",
    "fsspec",
    "asyncio",
    "multiprocessing.pool",
    "concurrent.futures.thread",
    "packaging.version",
)

# Arguments, environment, working directory, and three files.
Worker: TypeAlias = tuple[list[str], dict[str, str], str, list[int]]


def main() -> None:
    if sys.argv[1] == "--serve":
        sys.argv[1:] = become(served(sys.argv[2]))
    elif ask(sys.argv[1:]):
        return
    sys.argv[0] = default_worker()
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def default_worker() -> str:
    """Return the path of the program that a worker of Ray is, without importing Ray."""
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    return str(Path(ray.origin).parent / "_private" / "workers" / "default_worker.py")


def ask(arguments: list[str]) -> bool:
    """Ask the server for a fork with these arguments; return whether there is one."""
    request = json.dumps([arguments, dict(os.environ), os.getcwd(), sys.path[1:]]).encode()
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(os.environ[SOCKET])
            socket.send_fds(server, [request], [0, 1, 2])
            server.shutdown(socket.SHUT_WR)
            return server.recv(1) == b"y"
        except OSError:
            return False


def served(path: str) -> Worker:
    """Fork for each worker that asks, until the input ends; return in each fork."""
    # With more threads than one, numpy would have some of its own, and a fork would not.
    os.environ["OMP_NUM_THREADS"] = "1"
    for module in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(64)
        # A test may signal a job and all its processes. The server does not wait for its forks.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN)
        while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
            with server.accept()[0] as asking:
                arguments, environment, folder, search, files = received(asking)
                alike = search == sys.path[1:]
                if alike and os.fork() == 0:
                    return arguments, environment, folder, files
                asking.sendall(b"y" if alike else b"n")
                for file in files:
                    os.close(file)
    sys.exit()


def received(asking: socket.socket) -> tuple[list[str], dict[str, str], str, list[str], list[int]]:
    data, files, _, _ = socket.recv_fds(asking, 1 << 16, 3)
    while some := asking.recv(1 << 16):
        data += some
    arguments, environment, folder, search = json.loads(data)
    return arguments, environment, folder, search, files


def become(worker: Worker) -> list[str]:
    """Give this process what the worker has, and return its arguments."""
    import numpy as np

    arguments, environment, folder, files = worker
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    np.random.seed()
    return arguments


if __name__ == "__main__":
    main()
