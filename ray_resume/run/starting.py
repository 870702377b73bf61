"""Makes the `RunSpec` with which the ledger's process starts, from the plan of the run."""

from __future__ import annotations

from typing import Any

from ray_resume.checkpoint.contents import Contents
from ray_resume.core.binding import binding_sources, gone_sources
from ray_resume.core.resume_plan import ResumePlan
from ray_resume.failpoints import armed
from ray_resume.run.run_plan import RunPlan
from ray_resume.run.run_spec import RunSpec

__all__ = ["is_afresh", "spec_of"]


def spec_of(
    plan: RunPlan, run_id: str, lease: Any, resume_plan: ResumePlan, contents: Contents
) -> RunSpec:
    """Return what the ledger of run ``run_id`` needs, which holds ``lease``."""
    return RunSpec(
        run_id=run_id,
        checkpoint=plan.storage.uri,
        binding=plan.storage.bind_ledger(run_id, lease),
        sources=resume_plan.pending.trimmed(),
        records=resume_plan.records,
        first_sequence=contents.snapshot.highest_sequence(),
        max_failed_runs=plan.policies.max_failed_runs,
        signature=plan.signature,
        code=plan.code.digest(),
        table=None if plan.table is None else plan.output.uri,
        schema_afresh=is_afresh(resume_plan, contents),
        schema_gone=_gone_sources(plan, resume_plan, contents),
        faults=armed(),
        header=plan.header(),
    )


def is_afresh(resume_plan: ResumePlan, contents: Contents) -> bool:
    """Say whether no output is to stay, of any shard, and no other run is at work."""
    return not contents.live and not binding_sources(contents.snapshot, resume_plan).any()


def _gone_sources(plan: RunPlan, resume_plan: ResumePlan, contents: Contents) -> frozenset[str]:
    """Return the sources that gave the output types, and have no output that is to stay."""
    if contents.live:
        return frozenset()
    known = plan.storage.schemas().sources()
    stays = binding_sources(contents.snapshot, resume_plan)
    return gone_sources(known, contents.snapshot, stays)
