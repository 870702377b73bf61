"""Plans a run, given the sources that it lists and the records. Pure.

`identity`, `gone` and `resume_plan` have the rules; this module applies them in order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from ray_resume.core.gone import gone_from, judge_gone
from ray_resume.core.identity import part_file, refuse_other_ids
from ray_resume.core.range_items import END
from ray_resume.core.resume_plan import ResumePlan, plan_resume
from ray_resume.core.row_ranges import known_ranges
from ray_resume.core.shards import Shard
from ray_resume.core.snapshot import Snapshot
from ray_resume.core.sources import SourceTable

__all__ = ["Listing", "Policies", "what_to_do"]


@dataclass(frozen=True)
class Listing:
    """The sources that a run has listed.

    ``sources`` are its own, in ``shard`` if it has one; ``listed`` are all. ``ids`` says how their
    ids were made (see `identity`); ``files`` are the ids of their files, if they are parts of
    files. ``split_rows`` is how many rows a range of them has, where sources are row ranges: then
    the ends of files are listed, in each share, and :meth:`with_known_ranges` adds the ranges.
    """

    sources: SourceTable
    listed: SourceTable
    ids: str
    files: Collection[str] = ()
    shard: Shard | None = None
    split_rows: int | None = None

    def with_known_ranges(self, snapshot: Snapshot, *, ignore_changes: bool) -> Listing:
        """Return a listing that has the row ranges, too, that the records tell of."""
        if self.split_rows is None:
            return self
        items = self.listed.ranges
        assert items is not None
        ends = self.listed.take(np.flatnonzero(items.ranges == END))
        known = known_ranges(ends, snapshot, self.split_rows, ignore_changes=ignore_changes)
        own = known
        if self.shard is not None:
            own = known.take(np.flatnonzero(self.shard.of(known.digests)))
        return replace(self, sources=self.sources.joined(own), listed=self.listed.joined(known))


@dataclass(frozen=True)
class Policies:
    """The user's choices about changes since earlier runs, as given to ``resumable_read``."""

    on_source_change: str = "reprocess"
    on_pipeline_change: str = "error"
    on_source_gone: str | None = None
    on_code_change: str = "warn"
    max_failed_runs: int = field(default=3, kw_only=True)
    # Whether the input is what another pipeline has completed, or the rows of a table: what is gone
    # there goes here, too.
    follows_upstream: bool = field(default=False, kw_only=True)
    follows_table: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.max_failed_runs < 1:
            raise ValueError(f"max_failed_runs must be at least 1, not {self.max_failed_runs}")
        for name, known in (
            ("on_source_change", ("reprocess", "error", "ignore")),
            ("on_pipeline_change", ("error", "continue", "restart")),
            ("on_code_change", ("warn", "reprocess", "ignore")),
            ("on_source_gone", (None, "keep", "remove", "error")),
        ):
            value = getattr(self, name)
            if value not in known:
                words = ", ".join(word for word in known if word is not None)
                raise ValueError(f"{name} must be one of {words}, not {value!r}")

    @property
    def removes(self) -> bool:
        """Whether a run removes the output of sources that it does not list."""
        by_default = self.follows_upstream or self.follows_table
        return (self.on_source_gone or (by_default and "remove")) == "remove"

    @property
    def gone(self) -> str | None:
        """What `judge_gone` goes by: all of a table's files may be new, and it is that table."""
        return "remove" if self.follows_table and self.removes else self.on_source_gone


def what_to_do(
    listing: Listing,
    policies: Policies,
    snapshot: Snapshot,
    headers: Mapping[str, Mapping[str, Any]],
    *,
    signature: str,
    alike: Collection[str] = (),
    code: str,
    checkpoint: str,
) -> tuple[ResumePlan, list[str]]:
    """Sort the sources of a run by their records.

    Args:
        snapshot: the records, read under the run's lease; ``headers`` are those of the runs.
        signature: of the pipeline; ``code`` stands for the code that it runs. ``alike`` are those
            that it has had when its input had fewer columns.
        checkpoint: how to name the checkpoint in messages.

    Returns:
        The plan, and the warnings for the user.

    Raises:
        CheckpointError, SourceChangedError, PipelineChangedError: the run must not go on.
    """
    if policies.on_source_gone != "remove":
        refuse_other_ids(snapshot, headers, listing.ids, checkpoint)
    file_of = partial(part_file, listing.ids)
    gone = gone_from(
        snapshot,
        listing.listed,
        files=listing.files,
        file_of=file_of,
        share=listing.shard,
        remove=policies.removes,
    )
    warning = judge_gone(snapshot, gone, listing.listed, policies.gone, checkpoint)
    texts = (header.get("signature") for header in headers.values())
    resume_plan = plan_resume(
        listing.sources,
        snapshot,
        on_source_change=policies.on_source_change,
        signature=signature,
        on_pipeline_change=policies.on_pipeline_change,
        code=code,
        on_code_change=policies.on_code_change,
        signatures=[text for text in texts if isinstance(text, str)],
        alike=alike,
        gone=gone,
        file_of=file_of,
    )
    return resume_plan, [warning] if warning else []
