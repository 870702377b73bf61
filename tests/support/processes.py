"""The processes of a simulated history, and the checkpoint that they share.

Simulators of one subject each build on this: outputs, publications.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ray_resume.core.record_log import RecordLog
from ray_resume.core.records import Record, encode
from ray_resume.core.snapshot import Snapshot
from ray_resume.errors import CheckpointError

Step = Iterator[None]


@dataclass(eq=False)
class Process:
    """A process, and the lease that it holds: on the sources in ``claim``, or on all."""

    run_id: str
    steps: Step = field(default_factory=lambda: iter(()))
    claim: frozenset[Any] | None = None
    holds_lease: bool = False


class SharedCheckpoint:
    """The records of all runs, and the processes at work."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.records: dict[str, list[Record]] = {}
        self.processes: list[Process] = []
        self.seen: Counter[str] = Counter()
        self._logs: dict[str, tuple[int, RecordLog]] = {}
        self._started = 0

    def live(self) -> set[str]:
        return {process.run_id for process in self.processes if process.holds_lease}

    def snapshot(self, own: str | None = None) -> Snapshot:
        """Read what dead runs and run ``own`` committed; what all runs did if there is none."""
        others = set() if own is None else self.live() - {own}
        return Snapshot({run: self._log(run) for run in self.records if run not in others})

    def _log(self, run: str) -> RecordLog:
        count, log = self._logs.get(run, (-1, RecordLog()))
        if count != len(self.records[run]):
            log = RecordLog(encode(self.records[run]))
            self._logs[run] = len(self.records[run]), log
        return log

    def acquire(self, process: Process, claim: frozenset[Any] | None) -> bool:
        """Take a lease; not if another process has one on a source of it."""
        for other in self.processes:
            if other.holds_lease and (
                other.claim is None or claim is None or not other.claim.isdisjoint(claim)
            ):
                return False
        process.claim, process.holds_lease = claim, True
        return True

    def spawn(self, kind: Callable[[Process], Step]) -> Process:
        process = Process(self.new_run_id())
        process.steps = kind(process)
        self.processes.append(process)
        return process

    def new_run_id(self) -> str:
        self._started += 1
        return f"{self._started:012x}"

    def kill_one(self) -> None:
        self.processes.remove(self.rng.choice(self.processes))
        self.seen["killed"] += 1

    def step(self, process: Process) -> None:
        """Have ``process`` do its next step. It is gone after its last one."""
        try:
            next(process.steps)
        except StopIteration:
            self.processes.remove(process)
        except CheckpointError:
            self.seen["refused"] += 1
            self.processes.remove(process)
