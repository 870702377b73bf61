"""How the driver shows a run's progress: lines in the log, or whatever a `Display` makes of it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from typing_extensions import override

from ray_resume.run.status import Status

__all__ = ["BarDisplay", "Display", "LogDisplay", "show_log"]

logger = logging.getLogger("ray_resume")


class Display:
    """Shows how far a run is; by default in no way.

    Attributes:
        interval_s: the seconds between two calls of :meth:`show`, at least.
        shows_end: it shows the end of the last pass, too. The log has a line of its own for it.
    """

    interval_s = 10.0
    shows_end = False

    def begin(self, run_id: str) -> None:
        """Begin to show run ``run_id``."""

    def show(self, status: Status) -> None:
        """Show how far the run is now."""

    def end(self) -> None:
        """Show nothing more of the run. It may be called without :meth:`begin`, and twice."""


class LogDisplay(Display):
    """A line in the log, of level INFO."""

    _run_id = ""

    @override
    def begin(self, run_id: str) -> None:
        self._run_id = run_id

    @override
    def show(self, status: Status) -> None:
        logger.info("Run %s: %s.", self._run_id, status)


class BarDisplay(Display):
    """A bar on a terminal.

    Args:
        make: makes one of a title and the number of sources, with ``show`` and ``close``.
    """

    interval_s = 1.0
    shows_end = True

    def __init__(self, make: Callable[[str, int], Any]) -> None:
        self._make = make
        self._title = ""
        self._bar: Any = None

    @override
    def begin(self, run_id: str) -> None:
        self._title = f"Run {run_id}"

    @override
    def show(self, status: Status) -> None:
        if self._bar is None:
            self._bar = self._make(self._title, status.sources_total)
        self._bar.show(status.sources_done, status.details.removeprefix(", "))

    @override
    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Console(logging.StreamHandler[Any]):
    """Writes to standard error, like the log of Ray Data, until the root logger has a handler."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(
            logging.Formatter("%(asctime)s\t%(levelname)s %(filename)s:%(lineno)s -- %(message)s")
        )

    @override
    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            # A notebook and a test exchange it.
            self.stream = sys.stderr
            super().emit(record)


def show_log(*, always: bool = False) -> None:
    """Show INFO lines of the logger ``ray_resume`` on the console, unless logging is configured.

    Ray Data shows its own without any configuration. A handler of the logger or of the root logger
    says where lines go, and levels say which; then this does nothing.

    Args:
        always: show them even if only the root logger's level is too high for them.
    """
    is_unknown = not logger.hasHandlers()
    if is_unknown:
        logger.addHandler(_Console())
    if (is_unknown or always) and logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
