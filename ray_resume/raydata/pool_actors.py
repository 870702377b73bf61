"""Ends an actor of one of Ray Data's pools such that Ray knows what to do next.

An actor that exits by itself (``sys.exit``, ``ray.actor.exit_actor``, a library that calls either)
is gone for good: Ray does not restart it. Ray Data's pool goes on counting it and starts no other.
If errors are tolerated, the rows that wait for it wait for ever. A process that is killed is
started again, a bounded number of times, and what it did is executed again.

An actor that exits in its constructor would do so again. There, the request is an error of the
constructor, which ends the run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

import ray
from ray.exceptions import AsyncioActorExit

from ray_resume.errors import ResumeError

__all__ = ["EXITS", "die_as_if_killed", "no_exit"]

EXITS = (SystemExit, AsyncioActorExit)
"""Raised by ``sys.exit`` and ``ray.actor.exit_actor``."""


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


@contextlib.contextmanager
def no_exit(name: str) -> Iterator[None]:
    """Turn a request to exit, made by the constructor of the UDF ``name``, into an error.

    Raises:
        ResumeError: the constructor asked for it.
    """
    try:
        yield
    except EXITS as error:
        raise ResumeError(
            f"The constructor of {name} asked its process to exit ({type(error).__name__}: "
            f"{error}), and would do so in any other process. Mend it, and run the same script "
            "again: what is complete is committed."
        ) from error
