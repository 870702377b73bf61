"""Put new output files in the place of old ones, under a lease on the sources in them.

Tidies (`write.tidying`) and changes of the output's schema (`write.retyping`) are such rewrites. A
rewrite is a small run: it has a run id, a lease on all sources in the old files, and a writer. So
no other run commits these sources meanwhile, and none removes the new files.

Rewrites are done in steps of a bounded size, so the storage needs room for the new files of one
step beside the old ones. The order within a step keeps rows safe. The new files are written and
durable; *then* one transaction supersedes the records that list the old files; *then* the old files
are removed, if the lease still holds.

Invariant: killed at any moment, either the old files of a step count or the new ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from ray_resume.checkpoint.backend import CheckpointBackend, RunLease
from ray_resume.checkpoint.contents import SUPERSEDES
from ray_resume.core.filenames import stem_of
from ray_resume.core.rewrites import Copy, Rewrite, Supersession, moves_of, records_in
from ray_resume.core.snapshot import Snapshot
from ray_resume.failpoints import failpoint
from ray_resume.write.folder import Folder

__all__ = ["Outcome", "Rewriter"]

# A step reads so many bytes of old files, if it has more than one rewrite.
_STEP_BYTES = 16 << 30


@dataclass(frozen=True)
class Outcome:
    """The result of rewrites.

    Attributes:
        moved: the new file of each one that was replaced.
        faults: why other files could not be rewritten.
    """

    moved: Mapping[str, str] = field(default_factory=dict)
    faults: tuple[str, ...] = ()


class Rewriter:
    """Rewrites output files.

    Args:
        run_id: of the rewrites' own.
        lease: on all sources that have live rows in the files.
        purpose: why, for the header of the records.
        step_bytes: how many bytes of old files a step reads, about.
    """

    def __init__(
        self,
        storage: CheckpointBackend,
        folder: Folder,
        run_id: str,
        lease: RunLease,
        *,
        purpose: str,
        step_bytes: int = _STEP_BYTES,
    ) -> None:
        self._storage, self._folder, self._lease = storage, folder, lease
        self._run_id, self._purpose, self._step_bytes = run_id, purpose, step_bytes
        self._prefix = f"{storage.identity()}-{run_id}"

    def execute(self, snapshot: Snapshot, plan: Sequence[Rewrite], copy: Copy) -> Outcome:
        """Execute the rewrites of ``plan``; those whose old files are at fault change nothing.

        Args:
            snapshot: the records that dead runs have committed, read under the lease.
            plan: rewrites that are due by ``snapshot``.

        Raises:
            CheckpointError: the checkpoint cannot be written, or the lease was lost.
            OSError: the output cannot be written. Committed output is as it was, likewise.
        """
        if not plan:
            return Outcome()
        runs = snapshot.runs(records_in(snapshot, plan))
        header = {"purpose": self._purpose, SUPERSEDES: sorted(runs)}
        steps = list(_steps(plan, dict(self._folder.sizes()), self._step_bytes))
        supersession = Supersession(snapshot, steps)
        moved: dict[str, str] = {}
        faults: list[str] = []
        with ExitStack() as stack:
            ledger_lease, writer = self._storage.bind_ledger(self._run_id, self._lease).open(header)
            stack.callback(ledger_lease.release)
            stack.callback(writer.close)
            failpoint("rewrite.registered")
            for step in steps:
                done = self._copied(step, copy, faults)
                if not done:
                    continue
                self._folder.sync(name for _, name in done)
                failpoint("rewrite.written")
                moves = {old: new for one, name in done for old, new in moves_of(one, name).items()}
                old_files = [file for rewrite, _ in done for file in rewrite.files]
                records = list(supersession.records(old_files, moves))
                ledger_lease.check()
                writer.commit(records)
                failpoint("rewrite.committed")
                self._lease.check()
                for file in old_files:
                    self._folder.remove(file)
                    failpoint("rewrite.removed")
                moved |= {old: name for rewrite, name in done for old in rewrite.files}
        return Outcome(moved, tuple(faults))

    def _copied(
        self, plan: Sequence[Rewrite], copy: Copy, faults: list[str]
    ) -> list[tuple[Rewrite, str]]:
        """Write the new files; return the rewrites that succeeded, with the new file's name.

        Files that cannot become one are tried in halves: one bad file keeps no other from it.
        """
        done = []
        while plan:
            named = [(rewrite, self._name_for(rewrite)) for rewrite in plan]
            plan = []
            for (rewrite, name), fault in zip(named, copy(named), strict=True):
                if fault is None:
                    done.append((rewrite, name))
                    continue
                if len(rewrite.files) <= 2:
                    faults.append(fault)
                plan += [half for half in rewrite.halves() if len(half.files) > 1 or half.is_needed]
        return done

    def _name_for(self, rewrite: Rewrite) -> str:
        subfolder, slash, bare = rewrite.files[0].rpartition("/")
        filled_bytes = rewrite.filled_bytes
        stem = stem_of(self._prefix, None, subfolder + slash, filled_bytes=filled_bytes)
        return f"{subfolder}{slash}{stem}.{bare.partition('.')[2]}"


def _steps(
    plan: Iterable[Rewrite], sizes: Mapping[str, int], most_bytes: int
) -> Iterator[list[Rewrite]]:
    """Cut a plan into steps of about so many bytes; each has a rewrite at least."""
    step: list[Rewrite] = []
    size = 0
    for rewrite in plan:
        more = sum(sizes.get(file, 0) for file in rewrite.files)
        if step and size + more > most_bytes:
            yield step
            step, size = [], 0
        step.append(rewrite)
        size += more
    if step:
        yield step
