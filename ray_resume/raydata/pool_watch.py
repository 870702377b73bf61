"""Ends an execution whose actors do not come back, with an error that says so.

Ray Data waits without end for the actors of a pool in two cases. An actor with a bounded number of
restarts (``max_restarts=0``, say) is gone for good at some time; the pool goes on counting it and
starts no other. An actor whose constructor kills its process (``os._exit``, an abort, a lack of
memory) is started again and again. :func:`watch_pools` ends both.

An execution that is over drops its actors, and Ray ends an actor once no object refers to it. But
an error, also one that the execution tolerated, refers to them for as long as it is in a reference
cycle or in a log's records. Meanwhile Ray starts the actor again that has died, and it keeps its
CPUs. A next pass that needs these would wait without end. So :func:`watch_pools` has actors killed
after a crash, and before the next execution those that something still refers to.

Internals of Ray's that are used:

* ``DataContext.custom_execution_callback_classes``: an instance of each lives for one execution on
  the driver. An error that ``on_execution_step`` raises ends the execution.
* The actors of ``ActorPoolMapOperator._actor_pool``, and what Ray knows of their state. The pool
  forgets them in ``_release_running_actor`` and ``_release_pending_actors``.
* ``ray._private.state.actors``: how often Ray has started an actor again. The public state API
  needs a dashboard. It is asked only while no actor of a pool is alive.
* ``_ActorPool.pending_to_running`` raises what an actor died of before it was ready. Ray marks such
  an error only if the constructor raised (``RayActorError._actor_init_failed``).
"""

from __future__ import annotations

import contextlib
import time
import traceback
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import ray
import ray._private.state
from ray.data import Dataset
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError
from typing_extensions import override

from ray_resume.raydata.internals import check_used, unknown_ray

try:
    from ray.actor import ActorHandle
    from ray.data._internal.execution.execution_callback import ExecutionCallback
    from ray.data._internal.execution.operators.actor_pool_map_operator import (
        _ACTOR_STATE_ALIVE,
        ActorPoolMapOperator,
        _ActorPool,
    )
    from ray.data._internal.execution.streaming_executor import StreamingExecutor
except ImportError as error:
    raise unknown_ray(error) from error

__all__ = ["PoolDiedError", "watch_pools"]

check_used(
    {
        ActorPoolMapOperator: "_actor_pool has_execution_finished",
        _ActorPool: "_running_actors _pending_actors pending_to_running _release_running_actor "
        "_release_pending_actors",
        StreamingExecutor: "_topology",
        ExecutionCallback: "before_execution_starts on_execution_step after_execution_succeeds "
        "after_execution_fails",
        ActorHandle: "_get_local_state",
        RayActorError: "_actor_init_failed",
    }
)

_INTERVAL_S = 1.0

# Tasks of an actor that is gone end with an error, which says more. This is time enough for them.
_GONE_FOR_S = 5.0

# A node that goes away costs one start. So many in a row, without any actor that becomes ready, are
# the constructor's fault.
_MAX_STARTS = 5

# All actors of a pool have the same constructor, so a few of them say enough about it.
_MAX_ASKED = 16


# Actors of executions that are over, as long as something else refers to them.
_over: weakref.WeakSet[Any] = weakref.WeakSet()


class PoolDiedError(ActorDiedError):
    """No actor of a pool is alive, and waiting for one is in vain.

    ``actor_init_failed`` says that none has become ready, so that no row is at fault.
    """

    def __init__(self, message: str, *, actor_init_failed: bool) -> None:
        RayActorError.__init__(self, "", message, actor_init_failed)


def watch_pools(dataset: Dataset) -> None:
    """End each execution of ``dataset`` that waits in vain for actors, by a `PoolDiedError`.

    Actors of earlier executions keep no CPUs from it.

    Args:
        dataset: it has a context of its own.
    """
    context = dataset.context
    # The list itself may be that of other contexts, too.
    context.custom_execution_callback_classes = [
        *context.custom_execution_callback_classes,
        _WatchPools,
    ]


class _WatchPools(ExecutionCallback):
    """Watches the pools of one execution."""

    def __init__(self) -> None:
        self._silent: dict[Any, _SilentPool] = {}
        self._due = 0.0
        self._dropped: list[Any] = []

    @override
    def before_execution_starts(self, executor: Any) -> None:
        _kill(list(_over))
        _over.clear()
        for operator in executor._topology:
            if isinstance(operator, ActorPoolMapOperator):
                pool: Any = operator._actor_pool
                pool._release_running_actor = partial(
                    self._release_running, pool._release_running_actor
                )
                pool._release_pending_actors = partial(
                    self._release_pending, pool, pool._release_pending_actors
                )

    def _release_running(self, release: Callable[[Any], None], actor: Any) -> None:
        self._dropped.append(actor)
        release(actor)

    def _release_pending(self, pool: Any, release: Callable[..., None], force: bool) -> None:
        self._dropped += pool._pending_actors.values()
        release(force=force)

    @override
    def on_execution_step(self, executor: Any) -> None:
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + _INTERVAL_S
        for operator in executor._topology:
            if not isinstance(operator, ActorPoolMapOperator):
                continue
            pool: Any = operator._actor_pool
            actors = [*pool._running_actors, *pool._pending_actors.values()]
            if not actors or _is_any_alive(actors) or operator.has_execution_finished():
                self._silent.pop(operator, None)
            else:
                self._silent.setdefault(operator, _SilentPool(operator.name)).check(actors, now)

    @override
    def after_execution_succeeds(self, executor: Any) -> None:
        self._end()

    @override
    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        if isinstance(error, RayActorError) and _is_of_start(error):
            # Ray says so itself of a constructor that raised.
            error._actor_init_failed = True
        # Ray itself says that a process or a node died; a task's error is the user's.
        if isinstance(error, RayError) and not isinstance(error, RayTaskError):
            _kill(self._dropped)
        self._end()

    def _end(self) -> None:
        _over.update(self._dropped)
        self._dropped.clear()


def _kill(actors: Iterable[Any]) -> None:
    for actor in actors:
        # The cluster that it was in may be gone.
        with contextlib.suppress(Exception):
            ray.kill(actor)


def _is_of_start(error: RayActorError) -> bool:
    """Say whether a pool raised ``error`` while it waited for an actor to become ready."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code is _ActorPool.pending_to_running.__code__ for frame, _ in frames)


class _SilentPool:
    """A pool since the time when none of its actors was alive."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._gone_since: float | None = None
        self._starts: dict[str, int] = {}

    def check(self, actors: Iterable[Any], now: float) -> None:
        """Raise an error if none of ``actors`` will be alive."""
        gone = True
        for number, actor in enumerate(actors):
            if number >= _MAX_ASKED and not gone:
                break
            actor_id = actor._actor_id.hex()
            known: Any = ray._private.state.actors(actor_id)
            gone = gone and known.get("State") == "DEAD"
            starts = known.get("NumRestarts", 0)
            if starts - self._starts.setdefault(actor_id, starts) >= _MAX_STARTS:
                raise PoolDiedError(
                    f"No actor of {self._name} becomes ready: Ray has started one "
                    f"{_MAX_STARTS} times in a row, and its process died in the constructor each "
                    "time (by os._exit, a crash of native code, or for want of memory, say). The "
                    "logs of the workers say more. Mend the constructor and run the same script "
                    "again: what is complete is committed.",
                    actor_init_failed=True,
                )
        if not gone:
            self._gone_since = None
            return
        self._gone_since = self._gone_since or now
        if now - self._gone_since >= _GONE_FOR_S:
            raise PoolDiedError(
                f"All actors of {self._name} have died, and Ray starts none of them again, as "
                "max_restarts asks. Rows that wait for one would wait without end.",
                actor_init_failed=False,
            )


def _is_any_alive(actors: Iterable[Any]) -> bool:
    return any(actor._get_local_state() == _ACTOR_STATE_ALIVE for actor in actors)
