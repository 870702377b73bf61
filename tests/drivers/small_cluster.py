"""A local cluster without what no test looks at: a third of the processor time of a start.

    python small_cluster.py CPUS

starts one, prints its address, and keeps it until it is killed.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import subprocess
import sys
import tempfile
import time
from typing import Any
from unittest import mock

import forked_worker
import ray
import ray._private.parameter
from ray._private.node import Node
from ray._private.parameter import RayParams

# They collect logs for a driver that shows them, scale clusters up and down, and answer the
# dashboard. Ray has no option to leave them out, but for a node that joins a cluster.
_NOT_NEEDED = ("start_log_monitor", "start_monitor", "start_api_server")

# The servers of `forked_worker`, and the folders of their sockets. Both end with this process.
_FORKING: list[tuple[subprocess.Popen[bytes], tempfile.TemporaryDirectory[str]]] = []


def start_cluster(num_cpus: int, *, forking: bool = False, **options: Any) -> str:
    """Start a local cluster, connect this process to it, and return its address.

    Args:
        forking: fork its workers from a process that has imported what they need.
        options: others of `ray.init`.
    """
    given = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(Node, **dict.fromkeys(_NOT_NEEDED, mock.DEFAULT)))
        if forking:
            forked = functools.partial(RayParams, worker_path=forked_worker.__file__)
            stack.enter_context(mock.patch.object(ray._private.parameter, "RayParams", forked))
            socket = {forked_worker.SOCKET: _start_forking()}
            stack.enter_context(mock.patch.dict(os.environ, socket))
        context: Any = ray.init("local", num_cpus=num_cpus, **{**given, **options})
    return str(context.address_info["address"])


def _start_forking() -> str:
    """Start the process that is forked for each worker; return the path of its socket."""
    folder = tempfile.TemporaryDirectory()
    path = f"{folder.name}/forks"
    command = [sys.executable, forked_worker.__file__, "--serve", path]
    # The server ends when its input does.
    _FORKING.append((subprocess.Popen(command, stdin=subprocess.PIPE), folder))
    return path


if __name__ == "__main__":
    print(start_cluster(int(sys.argv[1])), flush=True)
    time.sleep(10**6)
