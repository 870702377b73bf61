"""Ray Data pipelines that survive: finished sources are skipped, each is in the output once.

The names are loaded when they are first used, so that looking at a checkpoint needs no Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "CheckReport",
    "Checkpoint",
    "CheckpointError",
    "CheckpointStatus",
    "IncompleteError",
    "NonResumableError",
    "Part",
    "PipelineChangedError",
    "ResumeError",
    "RunRecord",
    "RunSummary",
    "SourceChangedError",
    "SourceRecord",
    "StageNumbers",
    "__version__",
    "mark_failed",
    "resumable",
    "resumable_read",
    "resumable_write",
]

if TYPE_CHECKING:
    from ray_resume.checkpoint.check_report import CheckReport
    from ray_resume.checkpoint.checkpoint import Checkpoint
    from ray_resume.checkpoint.history import RunRecord
    from ray_resume.checkpoint.status import CheckpointStatus
    from ray_resume.core.stages import StageNumbers
    from ray_resume.errors import (
        CheckpointError,
        IncompleteError,
        NonResumableError,
        PipelineChangedError,
        ResumeError,
        SourceChangedError,
    )
    from ray_resume.read.resumable_read import resumable_read
    from ray_resume.run.summary import RunSummary
    from ray_resume.udf.decorator import resumable
    from ray_resume.udf.failures import mark_failed
    from ray_resume.write.resumable_write import resumable_write

_HOMES = {
    "CheckReport": "checkpoint.check_report",
    "Checkpoint": "checkpoint.checkpoint",
    "CheckpointError": "errors",
    "CheckpointStatus": "checkpoint.status",
    "IncompleteError": "errors",
    "NonResumableError": "errors",
    "Part": "checkpoint.view",
    "PipelineChangedError": "errors",
    "ResumeError": "errors",
    "RunRecord": "checkpoint.history",
    "RunSummary": "run.summary",
    "SourceChangedError": "errors",
    "SourceRecord": "checkpoint.view",
    "StageNumbers": "core.stages",
    "mark_failed": "udf.failures",
    "resumable": "udf.decorator",
    "resumable_read": "read.resumable_read",
    "resumable_write": "write.resumable_write",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
