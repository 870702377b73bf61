"""Time, memory and processes, measured."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def peak_mb() -> float:
    """Return the most memory that this process has had resident, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mb() -> float:
    """Return the memory that this process has resident now, in megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class Clock:
    """Times steps one after another, and says how much memory each left resident.

    Processor time, of this process and of children that it has waited for, says more than wall
    time where others are at work on the machine.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.resident_mb: dict[str, int] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time one step."""
        began, cpu = time.perf_counter(), os.times()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 3)
        now = os.times()
        self.cpu_seconds[name] = round(sum(now[:4]) - sum(cpu[:4]), 2)
        self.resident_mb[name] = round(resident_mb())

    def told(self) -> dict[str, Any]:
        """Return what was measured, with the sums."""
        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "resident_mb": self.resident_mb,
            "total_s": round(sum(self.seconds.values()), 2),
            "total_cpu_s": round(sum(self.cpu_seconds.values()), 2),
        }


class Watcher:
    """Samples the memory that this process's children have to themselves, by their names."""

    def __init__(self) -> None:
        self.peak_mb: dict[str, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        while not self._over.wait(0.3):
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    name, memory = " ".join(child.cmdline()[:1]), child.memory_info()
                    name = name.partition(".")[0]
                    own = round((memory.rss - memory.shared) / 2**20)
                    self.peak_mb[name] = max(self.peak_mb.get(name, 0), own)
