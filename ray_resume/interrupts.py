"""Ctrl-C and SIGTERM while a run is at work.

The first one ends the run in order: it is raised where nothing is half done (`KeyboardInterrupt`,
or `SystemExit` with code 143), and waits where something is. Another one ends it at once.

Only the defaults are replaced, Python's and Ray's, in the main thread alone: whoever has installed
a handler of his own, or ignores a signal, keeps it. Afterwards all is as it was.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["Interrupts"]

_DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}

# `timeout`, and wrappers that pass on what the terminal has sent already, send everything twice.
_ECHO_S = 0.5

_EXIT_CODE_OF_SIGNALS = 128


class Interrupts:
    """What has come in since :meth:`caught`. ``first`` is the signal that ends the run, or None."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.at_once = False
        self._first_at = 0.0
        self._raised = False
        self._holding = 0

    @classmethod
    @contextlib.contextmanager
    def caught(cls) -> Iterator[Interrupts]:
        """Catch both signals for the length of the block."""
        interrupts = cls()
        if threading.current_thread() is not threading.main_thread():
            yield interrupts  # Signals are not this thread's.
            return
        replaced: dict[signal.Signals, Any] = {}
        try:
            for number, default in _DEFAULTS.items():
                handler = signal.getsignal(number)
                if handler == default or _is_rays(handler):
                    replaced[number] = handler
                    signal.signal(number, interrupts._handle)
            yield interrupts
        finally:
            for number, handler in replaced.items():
                # Not if it was replaced meanwhile.
                if signal.getsignal(number) == interrupts._handle:
                    signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let the first signal wait until the block ends well; if it raises, that comes first."""
        self._holding += 1
        try:
            yield
        finally:
            self._holding -= 1
        if self.first is not None and not self._raised and not self._holding:
            self._raise(self.first)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self._first_at = signal.Signals(number), now
            if not self._holding:
                self._raise(self.first)
        elif now - self._first_at >= _ECHO_S:
            self.at_once = True
            self._raise(signal.Signals(number))

    def _raise(self, number: signal.Signals) -> None:
        self._raised = True
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(_EXIT_CODE_OF_SIGNALS + number)


def _is_rays(handler: Any) -> bool:
    """Say whether Ray installed it, in every driver: it ends the process with exit code 15."""
    return str(getattr(handler, "__module__", "")).partition(".")[0] == "ray"
