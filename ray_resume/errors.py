"""Every public exception: one root, and a message that says what to do next."""

from __future__ import annotations

from typing import Any

__all__ = [
    "CheckpointError",
    "IncompleteError",
    "NonResumableError",
    "PipelineChangedError",
    "ResumeError",
    "SourceChangedError",
]


class ResumeError(Exception):
    """The root of every error that ray_resume raises itself.

    A missing input is a ``FileNotFoundError`` instead, as with plain Ray Data.
    """


class NonResumableError(ResumeError):
    """The pipeline has an operator or a read that cannot be resumed.

    Raised before any task starts. The message names the operator and the way out.
    """


class PipelineChangedError(ResumeError):
    """The operators differ from those that made a committed source."""


class SourceChangedError(ResumeError):
    """A committed source is no longer the file that was read."""


class CheckpointError(ResumeError):
    """The checkpoint cannot be used as it is: unreadable, in use, or bound elsewhere."""


class IncompleteError(ResumeError):
    """A run has ended by itself and left sources failed, pending or quarantined.

    Everything that is complete is committed. ``summary`` is the run's ``RunSummary``.
    """

    def __init__(self, message: str, summary: Any = None) -> None:
        super().__init__(message)
        self.summary = summary
