"""`RunPlan`: the work of a run, before it takes its lease."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.core.code import Code
from ray_resume.core.identity import HEADER_KEY
from ray_resume.core.planning import Listing, Policies
from ray_resume.core.read_schema import ReadSchema
from ray_resume.core.stages import Stage
from ray_resume.core.versions import HEADER_KEY as VERSIONS_KEY
from ray_resume.run.display import Display
from ray_resume.run.output import Output
from ray_resume.run.table import Table

__all__ = ["RunPlan"]


@dataclass(frozen=True)
class RunPlan:
    """The work of a run, all of it checked."""

    storage: CheckpointBackend
    listing: Listing
    policies: Policies
    output: Output
    # The sink, if it shows rows only once they are published.
    table: Table | None
    signature: str
    # The signatures that it has had when its input had fewer columns.
    alike: Collection[str] = field(default=(), kw_only=True)
    # The reader may raise for so many sources, without limit if negative, as in Ray Data.
    max_errored_blocks: int = 0
    publish_interval_s: float = math.inf
    code: Code = field(default_factory=Code)
    # Those that the user gave to UDFs.
    versions: Sequence[str] = ()
    read_schema: ReadSchema | None = None
    # Returns some of the sources of these ids whose files have one of these columns.
    having: Callable[[Collection[str], Iterable[str]], list[str]] | None = None
    # The decorated UDFs, in their order.
    stages: Sequence[Stage] = ()
    # Shows how far the run is, until it ends.
    display: Display = field(default_factory=Display)
    # Lines in the log say what the run is to do, and what it did.
    announces: bool = True

    def owner(self, run_id: str) -> Owner:
        """Return the owner of the lease of run ``run_id``: this process."""
        share = self.listing.shard
        return Owner.here(run_id, None if share is None else str(share))

    def claim(self) -> Claim:
        """Return the claim of the run on its sources."""
        share = self.listing.shard
        # A run that removes output of unlisted sources claims those, too: all of its share. So does
        # one that does not know yet which ranges of rows its files have.
        everything = self.policies.removes or self.listing.split_rows is not None
        return Claim(
            None if everything else self.listing.sources.digests.to_bytes(),
            None if share is None else (share.index, share.count),
        )

    def header(self) -> dict[str, Any]:
        """Return the header of the run's file."""
        shard = self.listing.shard
        return {
            "sources_total": len(self.listing.listed),
            "signature": self.signature,
            "code": self.code.header(),
            VERSIONS_KEY: list(self.versions),
            "shard": None if shard is None else str(shard),
            HEADER_KEY: self.listing.ids,
        }
