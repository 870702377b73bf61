"""Drivers that run jobs one after another, each in a process of its own: see `fault_jobs`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from job import WITHOUT_TOKENS
from places import PATHS

__all__ = ["Drive", "job_drivers"]

Drive: TypeAlias = Callable[..., int]


@contextlib.contextmanager
def job_drivers(script: Path, address: str) -> Iterator[Drive]:
    """Yield a function that runs a job in a driver of its own and returns its exit code.

    It takes the job's name, its folder, and the points at which processes die.
    """
    drivers = subprocess.Popen(
        [sys.executable, str(script), address],
        env={**WITHOUT_TOKENS, "PYTHONPATH": os.pathsep.join(PATHS)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    asked, ended = drivers.stdin, drivers.stdout
    assert asked is not None
    assert ended is not None

    def run(job_name: str, folder: Path, *points: str) -> int:
        asked.write(json.dumps([job_name, str(folder), *points]) + "\n")
        asked.flush()
        return int(ended.readline())

    yield run
    drivers.communicate()
