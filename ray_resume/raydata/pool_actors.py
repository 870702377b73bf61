"""Ends an actor of one of Ray Data's pools such that Ray starts another one.

An actor that exits by itself (``sys.exit``, ``ray.actor.exit_actor``, a library that calls either)
is gone for good: Ray does not restart it. Ray Data's pool goes on counting it and starts no other.
If errors are tolerated, the rows that wait for it wait for ever. A process that is killed is
started again, a bounded number of times, and what it did is executed again.
"""

from __future__ import annotations

import os
import signal
import sys

import ray

__all__ = ["die_as_if_killed"]


def die_as_if_killed(error: BaseException) -> None:
    """End this process by SIGKILL if it is an actor's; otherwise do nothing.

    Args:
        error: what asked the process to exit; the process says so on its standard error.
    """
    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return
    sys.stderr.write(
        f"A UDF asked its actor to exit ({type(error).__name__}: {error}). The process ends as if "
        "it was killed, so that Ray starts another one.\n"
    )
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)
