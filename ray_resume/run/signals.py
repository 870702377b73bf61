"""SIGTERM, which SLURM and Kubernetes send before SIGKILL, ends a run as Ctrl-C does.

Uncaught, both end the process with the exit code that a shell reports for them, 143 and 130.
(Without these classes, Ray's own exit handlers would make it 1.)
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

__all__ = ["Interrupted", "Terminated", "raise_on_sigterm"]


class Terminated(SystemExit):
    """SIGTERM arrived. Uncaught, it ends the process with the exit code 143."""


class Interrupted(SystemExit, KeyboardInterrupt):
    """Ctrl-C was pressed. Uncaught, it ends the process with the exit code 130."""


@contextlib.contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Raise :class:`Terminated` in the main thread when SIGTERM arrives; see the module.

    A handler that the user has set, or SIG_IGN, stays as it is. (Ray's own handler exits with
    another code.) In another thread this changes nothing: Python handles all signals in the main
    one.

    """
    before = signal.getsignal(signal.SIGTERM)
    ours = threading.current_thread() is threading.main_thread() and _may_be_replaced(before)
    if ours:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise Interrupted(128 + signal.SIGINT) from interrupt
    finally:
        if ours and signal.getsignal(signal.SIGTERM) is _terminate:
            signal.signal(signal.SIGTERM, before)


def _may_be_replaced(handler: Any) -> bool:
    module = str(getattr(handler, "__module__", ""))
    return handler is signal.SIG_DFL or module.partition(".")[0] == "ray"


def _terminate(signum: int, _: FrameType | None) -> NoReturn:
    raise Terminated(128 + signum)
