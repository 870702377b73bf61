"""A local cluster without what no test looks at: a third of the processor time of a start.

    python small_cluster.py CPUS

starts one, prints its address, and keeps it until it is killed.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any
from unittest import mock

import ray
from ray._private.node import Node

# They collect logs for a driver that shows them, scale clusters up and down, and answer the
# dashboard. Ray has no option to leave them out, but for a node that joins a cluster.
_NOT_NEEDED = ("start_log_monitor", "start_monitor", "start_api_server")


def start_cluster(num_cpus: int, **options: Any) -> str:
    """Start a local cluster, connect this process to it, and return its address.

    Args:
        options: others of `ray.init`.
    """
    given = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    with mock.patch.multiple(Node, **dict.fromkeys(_NOT_NEEDED, mock.DEFAULT)):
        context: Any = ray.init("local", num_cpus=num_cpus, **{**given, **options})
    return str(context.address_info["address"])


if __name__ == "__main__":
    print(start_cluster(int(sys.argv[1])), flush=True)
    time.sleep(10**6)
