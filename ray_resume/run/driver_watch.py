"""Ends a ledger's process when its driver is dead.

Ray ends the actors of a driver once the driver's connections are closed. A child that the driver
has forked (by ``multiprocessing``, say) keeps them open for as long as it lives: the ledger would
live on, keep the lease of the run, and keep the next run out.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from ray_resume.checkpoint.local.process import is_dead

__all__ = ["end_with_driver"]

_INTERVAL_S = 1.0


def end_with_driver(driver: str, close: Callable[[], object]) -> None:
    """End this process soon after the ``driver`` is dead for certain.

    Args:
        driver: the identity of its process.
        close: called before this process ends: what is complete stays so.
    """

    def watch() -> None:
        while not is_dead(driver):
            time.sleep(_INTERVAL_S)
        try:
            close()
        finally:
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
