"""The ledger's actor: starts the process that owns a run's ledger and its writer file.

:class:`LedgerStart` puts a `LedgerHost` into an actor on the driver's node. Such a process
takes a second to start, and the run goes on meanwhile: messages to the actor wait for it.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from ray_resume.checkpoint.backend import RunLease
from ray_resume.checkpoint.local.lmdb_file import WriterContents
from ray_resume.core.messages import DeadLetter, Message
from ray_resume.core.run_sources import FoundRange
from ray_resume.core.stages import StageCount
from ray_resume.errors import ResumeError
from ray_resume.run.driver_watch import end_with_driver
from ray_resume.run.ledger_host import LedgerHost
from ray_resume.run.metrics import export_regularly
from ray_resume.run.progress import Counts, Progress
from ray_resume.run.run_spec import RunSpec
from ray_resume.run.sign_of_life import SignOfLife

__all__ = ["LedgerStart", "tune_garbage_collector"]

# The garbage collector runs after so many new objects.
_FEW_COLLECTIONS = 200_000


class LedgerStart:
    """The start of a run's ledger, as an actor on this node that this driver owns.

    A thread waits until the actor has joined the run's lease. It then makes sure that the driver
    still has it, and confirms that to the ledger, which commits nothing before. If either fails,
    the thread kills the actor, so that workers cannot go on in vain.

    Attributes:
        handle: the actor's, in its pass 1. It may be used at once.
    """

    def __init__(self, spec: RunSpec, lease: RunLease) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        remote_class: Any = ray.remote(_LedgerActor)
        self.handle = remote_class.options(
            num_cpus=0, max_restarts=0, max_task_retries=0, scheduling_strategy=here
        ).remote(spec)
        self._run_id, self._lease = spec.run_id, lease
        self._error: BaseException | None = None
        self._over = threading.Event()
        threading.Thread(target=self._confirm, daemon=True).start()

    def _confirm(self) -> None:
        import ray

        try:
            ray.get(self.handle.joined.remote())
            self._lease.check()
            ray.get(self.handle.confirm_lease.remote())
        except BaseException as error:
            self._error = error
            # A pass would go on to its end otherwise, and the ledger commit nothing of it.
            with contextlib.suppress(Exception):
                ray.kill(self.handle)
        finally:
            self._over.set()

    def wait(self) -> None:
        """Wait until the ledger may commit.

        Raises:
            CheckpointError: the ledger's construction raised it, or the lease is lost.
            ResumeError: its process died.
        """
        error = self.error()
        if error is not None:
            raise error from None

    def error(self) -> BaseException | None:
        """Wait until the ledger may commit; return the error that keeps it from that, if any."""
        from ray.exceptions import RayActorError

        self._over.wait()
        cause = getattr(self._error, "cause", None)
        if isinstance(cause, ResumeError):
            return cause
        if isinstance(self._error, RayActorError):
            return ResumeError(
                f"The ledger of run {self._run_id} died as it started ({self._error}). Nothing was "
                "committed, and what earlier runs had committed is safe. Run the same script again."
            )
        return self._error

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Wait at the end of the block. An error of the start comes before one of the block."""
        try:
            yield
        except Exception:
            self.wait()
            raise
        self.wait()


def tune_garbage_collector() -> None:
    """Run the garbage collector of the ledger's process less often.

    The objects that come and go in it, some tuples for each source, have no cycles. By default the
    process would spend a third of its time in the collector.
    """
    gc.freeze()
    gc.set_threshold(_FEW_COLLECTIONS)


class _LedgerActor:
    """The actor that Ray runs.

    If its construction fails, each of its methods raises the error: Ray would lose the type of an
    error that leaves the constructor.
    """

    def __init__(self, spec: RunSpec) -> None:
        self._life: SignOfLife | None = None
        self._error: Exception | None = None
        try:
            self._host = self._open(spec)
        except Exception as error:
            self._error = error

    def _open(self, spec: RunSpec) -> LedgerHost:
        host = LedgerHost(spec)
        host.hold_commits()
        # Messages of workers may overtake those of the driver.
        host.begin_pass(1)
        life = self._life = SignOfLife(spec.binding.history(), spec.run_id, host.facts)
        tune_garbage_collector()
        life.start()
        export_regularly(host.counts, host.take_latencies, spec.checkpoint, spec.run_id)

        def end() -> None:
            host.close()
            life.end(last=True)

        end_with_driver(spec.driver, end)
        return host

    def joined(self) -> None:
        """Raise the error of the construction, if it failed: then the lease was not joined."""
        self._opened()

    def confirm_lease(self) -> None:
        self._opened().confirm_lease()

    def begin_pass(self, pass_number: int) -> None:
        self._opened().begin_pass(pass_number)

    def apply(self, message: Message) -> None:
        # Workers need no outcomes; they only need to know that the message took effect.
        self._opened().apply(message)

    def register(
        self, run_id: str, pass_number: int, found: Sequence[tuple[Any, ...]]
    ) -> list[int | None]:
        ranges = [FoundRange(*one) for one in found]
        return self._opened().register(run_id, pass_number, ranges)

    def found(self, first: int) -> list[FoundRange]:
        return self._opened().found(first)

    def agree(self, asked: Sequence[tuple[bytes, int]], given: bool) -> tuple[bytes, str | None]:
        return self._opened().agree(asked, given)

    def name_of(self, source: int) -> str:
        return self._opened().name_of(source)

    def flush(self) -> Progress:
        return self._opened().flush()

    def count_stage(self, stage: int, count: tuple[Any, ...]) -> None:
        self._opened().count_stage(stage, StageCount(*count))

    def counts(self) -> Counts:
        return self._opened().counts()

    def take_unpublished(self, position: str | None) -> tuple[int, list[bytes], int, bool] | None:
        taken = self._opened().take_unpublished(position)
        if taken is None:
            return None
        return taken.number, taken.results, taken.rows, taken.again

    def confirm_published(self, number: int) -> None:
        self._opened().confirm_published(number)

    def drop(self, source_ids: Sequence[str]) -> None:
        self._opened().drop(source_ids)

    def write_dead_letters(
        self, run_id: str, pass_number: int, letters: Sequence[DeadLetter]
    ) -> None:
        self._opened().write_dead_letters(run_id, pass_number, letters)

    def mark_lost(self, source: int, crash: str | None) -> str | None:
        return self._opened().mark_lost(source, crash)

    def mark_rest_failed(self, unread_counts: bool) -> tuple[int, int]:
        return self._opened().mark_rest_failed(unread_counts=unread_counts)

    def close(self) -> Progress:
        if self._life is not None:
            self._life.end()
        return self._opened().close()

    def contents(self) -> WriterContents | None:
        return self._opened().contents()

    def _opened(self) -> LedgerHost:
        if self._error is not None:
            raise self._error
        return self._host
