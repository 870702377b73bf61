"""`RunSpec`: all that the ledger's process must know of a run; the driver sends it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_resume.checkpoint.backend import LedgerBinding
from ray_resume.checkpoint.local.process import this_process
from ray_resume.core.records import Record
from ray_resume.core.sources import SourceTable
from ray_resume.failpoints import Fault

__all__ = ["RunSpec"]


@dataclass(frozen=True)
class RunSpec:
    """All that the ledger's process must know of a run.

    Attributes:
        sources: the pending sources; ``sources[i]`` is source number i of every message.
        records: the newest record of a source, by its number.
        max_failed_runs: a source is quarantined once it has failed in so many runs.
        first_sequence: the highest sequence number that is on record; the run's own begin after it.
        header: what the run's file says about the run.
        table: the name of a sink that publishes; what is complete is committed after that.
        schema_afresh: no output of earlier runs is to stay, so its types do not bind this run.
        schema_gone: the ids of sources whose output is not to stay, if they have given types.
        checkpoint: its path or URI, for metrics.
        code: the digest of the code that the pipeline runs.
        driver: the identity of the driver's process, with which the ledger's ends.
        faults: the faults that a test has armed; the ledger's process arms them on arrival.
    """

    run_id: str
    binding: LedgerBinding
    sources: SourceTable
    records: Mapping[int, Record]
    max_failed_runs: int
    first_sequence: int
    signature: str
    header: Mapping[str, Any]
    table: str | None = None
    schema_afresh: bool = False
    schema_gone: frozenset[str] = frozenset()
    code: str = ""
    checkpoint: str = ""
    driver: str = field(default_factory=this_process)
    faults: tuple[Fault, ...] = ()
