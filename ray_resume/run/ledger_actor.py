"""The ledger's actor: starts the process that owns a run's ledger and its writer file.

:func:`start` puts a `LedgerHost` into an actor on the driver's node.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from ray_resume.core.messages import DeadLetter, Message
from ray_resume.core.stages import StageCount
from ray_resume.errors import ResumeError
from ray_resume.run.driver_watch import end_with_driver
from ray_resume.run.ledger_host import LedgerHost
from ray_resume.run.metrics import export_regularly
from ray_resume.run.progress import Counts, Progress
from ray_resume.run.run_spec import RunSpec
from ray_resume.run.sign_of_life import SignOfLife

__all__ = ["start", "tune_garbage_collector"]

# The garbage collector runs after so many new objects.
_FEW_COLLECTIONS = 200_000


def start(spec: RunSpec) -> Any:
    """Start the host as an actor on this node, owned by this driver; return its handle.

    Raises:
        CheckpointError: the host's construction raised it.
        ResumeError: its process died.
    """
    import ray
    from ray.exceptions import RayActorError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote_class: Any = ray.remote(_LedgerActor)
    handle = remote_class.options(
        num_cpus=0, max_restarts=0, max_task_retries=0, scheduling_strategy=here
    ).remote()
    try:
        ray.get(handle.open.remote(spec))
    except BaseException as error:
        ray.kill(handle)
        cause = getattr(error, "cause", None)
        if isinstance(cause, ResumeError):
            raise cause from None
        if isinstance(error, RayActorError):
            raise ResumeError(
                f"The ledger of run {spec.run_id} died as it started ({error}). Nothing was done, "
                "and what earlier runs had committed is safe. Run the same script again."
            ) from None
        raise
    return handle


def tune_garbage_collector() -> None:
    """Run the garbage collector of the ledger's process less often.

    The objects that come and go in it, some tuples for each source, have no cycles. By default the
    process would spend a third of its time in the collector.
    """
    gc.freeze()
    gc.set_threshold(_FEW_COLLECTIONS)


class _LedgerActor:
    """The actor that Ray runs. A call opens its host, so that the errors keep their type."""

    def __init__(self) -> None:
        self._host: LedgerHost | None = None
        self._life: SignOfLife | None = None

    def open(self, spec: RunSpec) -> None:
        host = self._host = LedgerHost(spec)
        life = self._life = SignOfLife(spec.binding.history(), spec.run_id, host.facts)
        tune_garbage_collector()
        life.start()
        export_regularly(host.counts, host.take_latencies, spec.checkpoint, spec.run_id)

        def end() -> None:
            host.close()
            life.end(last=True)

        end_with_driver(spec.driver, end)

    def begin_pass(self, pass_number: int) -> None:
        self._opened().begin_pass(pass_number)

    def apply(self, message: Message) -> None:
        # Workers need no outcomes; they only need to know that the message took effect.
        self._opened().apply(message)

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

    def _opened(self) -> LedgerHost:
        if self._host is None:
            raise ResumeError("The ledger was not opened.")
        return self._host
