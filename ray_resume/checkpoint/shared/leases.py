"""A run's lease in a storage that hosts share, as its driver and its ledger hold it.

How it is taken, and when it is lost, is in `backend`.
"""

from __future__ import annotations

import contextlib

from ray_resume.checkpoint.local.lease import Lease
from ray_resume.checkpoint.shared.heartbeat import Heartbeat
from ray_resume.checkpoint.shared.objects import Objects
from ray_resume.checkpoint.shared.segments import fence_name, is_fence, last_number
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint

__all__ = ["SharedLease", "fence_own"]


class SharedLease:
    """A held lease: in the driver's process, or in the ledger's that has joined it."""

    def __init__(self, objects: Objects, run_id: str, heart: Heartbeat, lock: Lease) -> None:
        self.lock = lock
        self._objects = objects
        self._run_id = run_id
        self._heart = heart

    @classmethod
    def join(cls, objects: Objects, run_id: str, heart: Heartbeat, lock: Lease) -> SharedLease:
        """Hold a run's lease in this process too, whose ``heart`` has beaten once.

        Who took the lease must :meth:`check` it after that, and before anything is committed: from
        the first beat on, this process keeps the run alive, and until then the other one must have.

        Raises:
            CheckpointError: it is gone: the run that took it has ended, or was called dead.
        """
        lease = cls(objects, run_id, heart, lock)
        lease.check()
        heart.start()
        return lease

    def check(self) -> None:
        """Make sure that the lease is held, and that nobody has called this run dead."""
        self._heart.check()
        fenced = any(
            is_fence(name.rpartition("/")[2]) for name in self._objects.list(f"runs/{self._run_id}")
        )
        if fenced or self._objects.get(f"leases/{self._run_id}.json") is None:
            raise CheckpointError(
                f"The lease of run {self._run_id} is lost: another run has called it dead, since "
                "it saw no sign of life of it. This run commits nothing more; run again to go on."
            )
        self._heart.check()

    def confirm(self) -> None:
        """Make sure that what was published up to now is seen by whoever calls this run dead.

        Raises:
            CheckpointError: somebody may have called it dead before.
        """
        self._heart.check()

    def alone(self, *, wait_s: float) -> bool:
        return self.lock.alone(wait_s=wait_s)

    def end(self, *, wait_s: float) -> None:
        with contextlib.suppress(CheckpointError):
            if self.alone(wait_s=wait_s) and self._heart.is_alive():
                # Who has no lease is not fenced any more; as a rule, its clean-up has done it.
                fence_own(self._objects, self._run_id)
                failpoint("shared.ending")
                self._objects.delete([f"leases/{self._run_id}.json"])
                self._objects.delete(
                    f"leases/{self._run_id}.{kind}" for kind in ("claim", "ledger")
                )
        with contextlib.suppress(CheckpointError):
            self._heart.end()
        self.lock.end(wait_s=0)

    def release(self) -> None:
        with contextlib.suppress(CheckpointError):
            self._heart.end()
        self.lock.release()


def fence_own(objects: Objects, run_id: str) -> None:
    """Have what this run has under way count for nobody, now that its ledger is closed."""
    names = [name.rpartition("/")[2] for name in objects.list(f"runs/{run_id}")]
    last = last_number(names)
    if last and not any(map(is_fence, names)):
        objects.put(f"runs/{run_id}/{fence_name(run_id, last)}", b"")
