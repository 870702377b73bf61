"""A driver's share of a run, with the ledger's host in this process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from children import DEADLINE_S
from store_files import records_in

from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local.backend import LocalBackend, LocalLedgerBinding
from ray_resume.checkpoint.local.lease import Lease
from ray_resume.core.messages import Event, Message
from ray_resume.core.records import Fingerprint, Record
from ray_resume.core.sources import Source, SourceTable
from ray_resume.errors import ResumeError
from ray_resume.run.ledger_host import LedgerHost
from ray_resume.run.run_spec import RunSpec


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def table(fingerprints: Iterable[Fingerprint]) -> SourceTable:
    return SourceTable.of(Source(f"s{i}", None, known) for i, known in enumerate(fingerprints))


class Run:
    """A driver's share of a run: its lease, and its host in this process."""

    def __init__(
        self,
        path: Path,
        run_id: str = "run",
        *,
        sources: int = 4,
        commit_interval_s: float = 3600.0,
        **spec: Any,
    ) -> None:
        self.directory = LocalBackend(path)
        self.directory.ensure()
        owner = Owner.here(run_id)
        self.lease = Lease.acquire(self.directory.path, owner, Claim(None), wait_s=0)
        values: dict[str, Any] = {
            "run_id": run_id,
            "binding": LocalLedgerBinding(
                str(path), str(self.lease.path), run_id, commit_interval_s=commit_interval_s
            ),
            "sources": table(Fingerprint(i, 10 * i) for i in range(sources)),
            "records": {},
            "max_failed_runs": 3,
            "first_sequence": 0,
            "signature": "read>f",
            "header": {"sources_total": sources},
        }
        self.spec = RunSpec(**{**values, **spec})
        self.file = path / f"{run_id}.mdb"
        self.host = LedgerHost(self.spec)
        self.host.begin_pass(1)

    def apply(self, *events: Event) -> Any:
        return self.host.apply(Message(self.spec.run_id, 1, events))

    def committed(self) -> dict[str, Record]:
        return records_in(self.file, live=True)

    def end(self) -> None:
        with contextlib.suppress(ResumeError):
            self.host.close()
        self.lease.end(wait_s=0)
