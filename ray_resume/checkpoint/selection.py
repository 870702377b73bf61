"""Sources chosen by their ids, or by patterns for them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence

from ray_resume.checkpoint.checkpoint import Checkpoint
from ray_resume.errors import ResumeError

__all__ = ["chooser", "matching_ids"]


def chooser(ids: Sequence[str], patterns: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that says whether an id is one of ``ids`` or matches; no options: all."""
    if not ids and not patterns:
        return lambda source_id: True
    named = frozenset(ids)
    matches = [re.compile(fnmatch.translate(pattern)).match for pattern in patterns]
    return lambda source_id: source_id in named or any(m(source_id) for m in matches)


def matching_ids(checkpoint: Checkpoint, patterns: Sequence[str]) -> Iterator[str]:
    """Yield the ids on record that match.

    Raises:
        ResumeError: a pattern matches none.
    """
    ids = [record.source_id for record in checkpoint.sources()] if patterns else []
    for pattern in patterns:
        found = list(filter(chooser((), [pattern]), ids))
        if not found:
            raise ResumeError(
                f"No source on record has an id like {pattern!r}. Nothing was changed. "
                f"`ray-resume sources {checkpoint.path}` lists the ids."
            )
        yield from found
