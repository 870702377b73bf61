"""What runs publish in a shared checkpoint, and what compaction, reset and clean-up make of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from buckets import S3
from pyarrow.fs import LocalFileSystem
from shared_checkpoint import (
    TTL_S,
    Unanswered,
    claim,
    commit,
    completed,
    objects_of,
    opened,
    place_of,
    records,
    run,
    script,
)

from ray_resume import CheckpointError
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.location import Location
from ray_resume.checkpoint.shared import writer as shared_writer
from ray_resume.checkpoint.shared.backend import SharedBackend
from ray_resume.checkpoint.shared.segments import encode as encode_segment
from ray_resume.checkpoint.shared.segments import fence_name
from ray_resume.core.identity import ids_of
from ray_resume.core.planning import Listing, Policies
from ray_resume.core.records import encode
from ray_resume.core.sources import Source, SourceTable
from ray_resume.run.run import MOST_WRITER_FILES, Run
from ray_resume.run.run_plan import RunPlan
from ray_resume.write.folder import Folder
from ray_resume.write.output import FolderOutput

pytestmark = [pytest.mark.extended, pytest.mark.long]


def test_what_is_committed_is_there_for_everybody_and_ends_up_in_one_object(
    place: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_writer, "_FEW_SEGMENTS", 4)
    storage = opened(place)
    lease = storage.acquire(Owner.here(run(1)), Claim(None), wait_s=0)
    ledger, writer = storage.bind_ledger(run(1), lease).open({"sources_total": 20})
    looking = place_of(place)
    for number in range(10):
        writer.commit(records(1, f"s{number}", sequence=number))
        assert looking.status().completed == number + 1
        assert looking.status().live == 1
    names = sorted(objects_of(storage).list(f"runs/{run(1)}"))
    assert len(names) <= 5
    assert any(name.endswith(".whole") for name in names)
    writer.close()
    ledger.release()
    lease.end(wait_s=5)
    # All in one, and up to where it counts.
    assert len(objects_of(storage).list(f"runs/{run(1)}")) == 2
    assert completed(storage) == {f"s{number}" for number in range(10)}
    status = looking.status()
    assert (status.total, status.completed, status.live, status.writers) == (20, 10, 0, 1)


@pytest.mark.parametrize("tidy", [True, False])
def test_what_lands_when_its_own_run_has_ended_counts_for_nobody(
    tmp_path: Path, tidy: bool
) -> None:
    """Its ledger got no answer, or was killed, and its driver has removed the files already."""
    storage = opened(Location(str(tmp_path), shared=True, lease_ttl_s=TTL_S))
    lease = storage.acquire(Owner.here(run(1)), Claim(None), wait_s=0)
    slow = Unanswered(objects_of(storage), "3.part")
    binding = replace(storage.bind_ledger(run(1), lease), objects=slow)
    ledger, writer = binding.open({})
    writer.commit(records(1, "a"))
    with pytest.raises(CheckpointError, match="cannot write"):
        writer.commit(records(1, "b", sequence=1))
    # As if it were killed now.
    writer._local.close()
    ledger.release()
    if tidy:
        assert completed(storage, own=1) == {"a"}
    lease.end(wait_s=5)
    slow.land()
    assert completed(storage) == {"a"}


def test_who_does_not_know_what_became_of_a_commit_commits_nothing_more(tmp_path: Path) -> None:
    """The next one would be there without the one before, and nobody could read either."""
    storage = opened(Location(str(tmp_path), shared=True, lease_ttl_s=TTL_S))
    lease = storage.acquire(Owner.here(run(1)), Claim(None), wait_s=0)
    slow = Unanswered(objects_of(storage), "2.part")
    binding = replace(storage.bind_ledger(run(1), lease), objects=slow)
    ledger, writer = binding.open({})
    with pytest.raises(CheckpointError, match="cannot write"):
        writer.commit(records(1, "a"))
    with pytest.raises(CheckpointError, match="does not know whether"):
        writer.commit(records(1, "b", sequence=1))
    writer._local.close()
    ledger.release()
    lease.end(wait_s=5)
    assert completed(storage) == set()


def test_parts_stay_when_somebody_has_put_up_a_fence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of a virtual machine that was paused does not know of it."""
    monkeypatch.setattr(shared_writer, "_FEW_SEGMENTS", 3)
    storage = opened(Location(str(tmp_path), shared=True, lease_ttl_s=TTL_S))
    lease = storage.acquire(Owner.here(run(1)), Claim(None), wait_s=0)
    ledger, writer = storage.bind_ledger(run(1), lease).open({})
    writer.commit(records(1, "a"))
    objects_of(storage).put(f"runs/{run(1)}/{fence_name(run(2), 2)}", b"")
    with pytest.raises(CheckpointError, match=r"another run .* declared it dead"):
        writer.commit(records(1, "b", sequence=1))
    writer._local.close()
    ledger.release()
    lease.end(wait_s=5)
    assert completed(storage) == {"a"}


def test_only_dead_runs_are_relied_on(place: Location) -> None:
    storage = opened(place)
    commit(storage, 1, "a")
    lease = storage.acquire(Owner.here(run(2)), claim("b"), wait_s=0)
    ledger, writer = storage.bind_ledger(run(2), lease).open({})
    writer.commit(records(2, "b"))
    assert completed(opened(place)) == {"a"}
    assert {r.source_id for r in opened(place).snapshot().snapshot} == {"a", "b"}
    writer.close()
    ledger.release()
    lease.end(wait_s=5)
    assert completed(opened(place)) == {"a", "b"}


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "replace"])
def test_damage_is_told_and_nothing_is_skipped(place: Location, damage: str) -> None:
    storage = opened(place)
    commit(storage, 1, "a")
    commit(storage, 2, "b")
    objects = objects_of(storage)
    (name,) = [name for name in objects.list(f"runs/{run(1)}") if "fence" not in name]
    data = objects.get(name)
    objects.delete([name])
    if damage == "remove":
        # A part that others build on.
        objects.put(f"runs/{run(1)}/000000003.part", data)
    elif damage == "replace":
        objects.put(name, b"something else")
    else:
        flipped = bytes([data[0], data[1] ^ 1]) + data[2:]
        objects.put(name, data[:-1] if damage == "cut" else flipped)
    with pytest.raises(CheckpointError, match=rf"runs/{run(1)}.* cannot be read"):
        storage.committed_by_dead_runs(run(9))
    report = place_of(place).check()
    assert not report.ok
    assert any(f"runs/{run(1)}" in problem for problem in report.problems)
    assert report.records == 1


def test_reset_compact_and_check(place: Location) -> None:
    storage = opened(place)
    for number in range(1, 6):
        commit(storage, number, f"s{number}", "again", sequence=2 * number)
    checkpoint = place_of(place)
    assert checkpoint.reset("s1") == 1
    assert {source.source_id for source in checkpoint.sources()} == {
        "again",
        *(f"s{number}" for number in range(2, 6)),
    }
    assert checkpoint.compact() == 6
    assert checkpoint.status().writers == 1
    assert checkpoint.compact() == 0
    assert len(list(checkpoint.sources("completed"))) == 5
    report = checkpoint.check()
    assert report.ok, report
    # What a run that was merged still publishes counts for nobody: the merged one stands for it.
    commit_late(storage, 1)
    assert len(list(checkpoint.sources("completed"))) == 5
    assert storage.committed_by_dead_runs(run(9)).headers.keys() >= {
        run(number) for number in range(1, 6)
    }


def commit_late(storage: SharedBackend, number: int) -> None:
    late = encode_segment({}, encode(records(1, "late")[:1]))
    objects_of(storage).put(f"runs/{run(number)}/000000009.part", late)


MAINTAIN = """
from ray_resume import Checkpoint
from ray_resume.testing import kill_at
checkpoint = Checkpoint(sys.argv[1], lease_ttl_s=3.0)
with kill_at(sys.argv[2], sys.argv[3], after=int(sys.argv[2] == "compact.removing")):
    checkpoint.compact()
"""


@pytest.mark.parametrize("point", ["compact.merged", "compact.removing"])
def test_compaction_dies(
    place: Location, tmp_path: Path, point: str, started: Callable[..., subprocess.Popen[str]]
) -> None:
    storage = opened(place)
    for number in range(1, 4):
        commit(storage, number, f"s{number}")
    folder = str(tmp_path / "faults")
    assert started([*script(place, MAINTAIN, other_host=False), point, folder]).wait() == -9
    checkpoint = place_of(place)
    assert checkpoint.check(), checkpoint.check()
    assert completed(storage) == {"s1", "s2", "s3"}
    assert checkpoint.compact() >= 1
    assert checkpoint.status().writers == 1
    assert completed(storage) == {"s1", "s2", "s3"}


def test_the_command_line(s3: S3, tmp_path: Path) -> None:
    place = Location(s3.uri(tmp_path.name), lease_ttl_s=TTL_S)
    storage = opened(place)
    storage.bind("s3://bucket/out", run(1))
    commit(storage, 1, "a", "b")

    def command(*arguments: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "ray_resume", *arguments], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert "secret" not in result.stdout
        return result.stdout

    assert json.loads(command("status", place.path, "--json"))["completed"] == 2
    assert "2 of 7 sources completed" in command("status", place.path)
    assert len(command("sources", place.path).splitlines()) == 2
    assert "1 source forgotten" in command("reset", place.path, "--source", "a")
    assert "Merged 2 files of runs into one" in command("compact", place.path)
    assert "is sound" in command("check", place.path)
    assert len(json.loads(command("sources", place.path, "--json"))) == 1


def test_what_runs_leave_does_not_pile_up(place: Location, tmp_path: Path) -> None:
    storage = opened(place)
    out = Folder(LocalFileSystem(), str(tmp_path / "out"), str(tmp_path / "out"))
    commit(storage, 1, "a")
    for number in range(2, MOST_WRITER_FILES + 2):
        storage.write_whole(run(number), {"purpose": "reset"}, ())
    sources = SourceTable.of([Source("a", "a")])
    plan = RunPlan(
        storage=place.open(),
        listing=Listing(sources, sources, ids_of("file")),
        policies=Policies("ignore", "continue"),
        output=FolderOutput(out, append=False),
        table=None,
        signature="",
    )
    summary = Run(plan).execute(lambda _: None)
    assert (summary.sources_total, summary.sources_skipped) == (1, 1)
    assert len(storage.writers()) == 1
    assert completed(storage) == {"a"}
    assert place_of(place).check(), place_of(place).check()
