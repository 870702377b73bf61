"""Which output is to stay, so that its types bind a run."""

from __future__ import annotations

from snapshots import snapshot_of, whole_files

from ray_resume.core.binding import binding_sources, gone_sources
from ray_resume.core.records import Record, State
from ray_resume.core.resume_plan import plan_resume
from ray_resume.core.sources import Source


def test_output_binds_unless_its_source_is_read_again() -> None:
    def record(name: str, state: State, *files: str) -> Record:
        return Record(name, state, 1, "r", parts=whole_files(*files))

    snapshot = snapshot_of(
        {
            "r": [
                record("done", State.COMPLETED, "f"),
                record("empty", State.COMPLETED),
                record("failed", State.FAILED, "old"),
                record("reset", State.RESET, "old"),
                record("not listed", State.RESET, "kept"),
                record("dropped", State.RESET),
                record("quarantined", State.QUARANTINED, "before"),
            ]
        }
    )
    listed = ["done", "empty", "failed", "reset", "quarantined", "new"]
    resume_plan = plan_resume(
        [Source(name, name) for name in listed],
        snapshot,
        on_source_change="reprocess",
        signature="",
        on_pipeline_change="continue",
    )
    stays = binding_sources(snapshot, resume_plan)
    names = [one.source_id for one in snapshot]
    found = {name for name, bound in zip(names, stays.tolist(), strict=True) if bound}
    assert found == {"done", "empty", "not listed", "quarantined"}
    every = {*names, "new", "unknown"}
    assert gone_sources(every, snapshot, stays) == every - found
    assert gone_sources([], snapshot, stays) == frozenset()
