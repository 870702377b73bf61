"""Counts what a decorated UDF does, in its worker, and reports the sums at the end of a task.

A worker sends at most one message for a stage and a task, and waits for no answer.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from ray_resume.core.stages import StageCount, added
from ray_resume.raydata import blocks
from ray_resume.run.client import LedgerClient
from ray_resume.udf.steps import Step, StepKind, Steps

__all__ = ["Meter"]

_lock = threading.Lock()
# Sums of the calls in this process since the last report of their stage.
_unreported: dict[Meter, StageCount] = {}


@dataclass(frozen=True)
class Meter:
    """Counts for one stage of a run. Every copy in a process counts towards the same sums.

    Attributes:
        run_id: of the run that the sums belong to.
        stage: the position of the stage in the pipeline.
        per_row: the UDF is called once for each row.
        to_letters: failed rows go to the dead letters.
    """

    run_id: str
    stage: int
    per_row: bool
    to_letters: bool

    def metered(self, steps: Steps, rows: int) -> Steps:
        """Carry out ``steps`` of a call with a batch of ``rows`` rows, and count them.

        A batch counts once its last step is done; one that raises does not.
        """
        calls = out = failed = 0
        seconds = 0.0
        reply = None
        try:
            while True:
                step: Step = steps.send(reply)
                if step.kind is StepKind.CALL or step.kind is StepKind.NEXT:
                    if step.kind is StepKind.CALL:
                        calls += blocks.num_rows(step.value) if self.per_row else 1
                    began = time.perf_counter()
                    reply = yield step
                    seconds += time.perf_counter() - began
                    continue
                if step.kind is StepKind.EMIT:
                    out += blocks.num_rows(step.value)
                elif step.kind is StepKind.FAIL:
                    failed += sum(len(its.errors) for its in step.value)
                reply = yield step
        except StopIteration:
            lost, dead = (0, failed) if self.to_letters else (failed, 0)
            self._add(StageCount(1, calls, rows, out, lost, dead, seconds))

    def report(self, client: LedgerClient) -> None:
        """Send the ledger what this process has counted since the last report, if anything."""
        with _lock:
            count = _unreported.pop(self, None)
        if count is not None:
            client.count_stage(self.stage, count)

    def _add(self, count: StageCount) -> None:
        with _lock:
            _unreported[self] = added(_unreported.get(self, StageCount()), count)
