"""`scale.py plan`: what it takes to find a finished job done, and to look at it."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measures import Clock, peak_mb
from scale_parts import in_child
from scale_sources import MTIME_NS, RUN, SIGNATURE, SIZE, file_of, path_of

from ray_resume.core.digests import source_digest
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Fingerprint, Record, State, pipeline_hash


def make_finished(path: Path, count: int) -> str:
    """Make the checkpoint of a job that completed ``count`` sources; return its id."""
    from ray_resume.checkpoint.local.backend import LocalBackend
    from ray_resume.checkpoint.local.lmdb_file import WriterFile

    checkpoint = LocalBackend(path).ensure()
    writer = WriterFile.create(path, RUN, {"sources_total": count, "signature": SIGNATURE})
    pipeline = pipeline_hash(SIGNATURE)
    for start in range(0, count, 50_000):
        records = []
        for number in range(start, min(start + 50_000, count)):
            name = path_of(number)
            record = Record(
                name,
                State.COMPLETED,
                number + 1,
                RUN,
                rows=100,
                parts=(FilePart(file_of(checkpoint, number, source_digest(name)), 0, 100, 100),),
                completed_at=1.7e9 + number / 1000,
                fingerprint=Fingerprint(SIZE, MTIME_NS),
                pipeline=pipeline,
            )
            records.append(record)
        writer.commit(records)
    writer.close()
    return checkpoint


def output_names(checkpoint: str, count: int) -> Path:
    """Write down the names of all output files, as a listing would give them."""
    path = Path(tempfile.mkdtemp(prefix="ray-resume-names-")) / "names"
    with path.open("w") as file:
        for number in range(count):
            file.write(file_of(checkpoint, number, source_digest(path_of(number))) + "\n")
    return path


def plan(path: Path, checkpoint: str, names: Path, count: int) -> dict[str, Any]:
    """Do what a run on a finished job does; the listings are made up, and not timed."""
    from ray_resume.checkpoint.claims import Claim, Owner
    from ray_resume.checkpoint.local.backend import LocalBackend
    from ray_resume.checkpoint.local.lease import Lease
    from ray_resume.core.resume_plan import plan_resume
    from ray_resume.core.sources import SourceTable, refuse_repeated
    from ray_resume.write.output import FolderOutput

    class ListedFolder:
        uri = path = "/out"

        def list_files(self) -> Iterator[str]:
            with names.open() as file:
                for line in file:
                    yield line.rstrip("\n")

    folder: Any = ListedFolder()
    output = FolderOutput(folder, append=False)
    before_mb = peak_mb()
    paths = [path_of(number) for number in range(count)]
    clock = Clock()
    with clock.step("table"):
        sources = SourceTable.of_files(paths, [SIZE] * count, [MTIME_NS] * count)
    del paths
    with clock.step("digests"):
        refuse_repeated(sources)
    directory = LocalBackend(path)
    with clock.step("lease"):
        claim = Claim(sources.digests.to_bytes())
        lease = Lease.acquire(path, Owner.here("f" * 12), claim, wait_s=0)
    listing = Clock()
    with listing.step("output"):
        for _ in folder.list_files():
            pass
    with clock.step("names"):
        present = output.list_files()
    with clock.step("read"):
        contents = directory.committed_by_dead_runs("f" * 12)
    with clock.step("resume_plan"):
        resume_plan = plan_resume(
            sources,
            contents.snapshot,
            on_source_change="reprocess",
            signature=SIGNATURE,
            on_pipeline_change="error",
        )
    with clock.step("gone"):
        assert contents.snapshot.completed_outside(sources.digests) == (0, None)
    with clock.step("check"):
        output.verify(checkpoint, directory, present, contents, resume_plan.skipped)
    with clock.step("left-overs"):
        lease.end(wait_s=0)
        output.remove_leftovers(checkpoint, contents.dead_runs, contents, present)
    assert (len(resume_plan.skipped), len(resume_plan.pending)) == (count, 0)
    # What it takes to make the listing up is no planning.
    clock.seconds["names"] -= listing.seconds["output"]
    clock.cpu_seconds["names"] -= listing.cpu_seconds["output"]
    return {
        "sources": count,
        **clock.told(),
        "peak_mb": round(peak_mb()),
        "before_mb": round(before_mb),
    }


def status(path: Path, count: int) -> dict[str, Any]:
    """Do what ``ray-resume status`` and ``sources`` do."""
    from ray_resume.checkpoint.checkpoint import Checkpoint

    clock = Clock()
    with clock.step("status"):
        assert Checkpoint(path).status().completed == count
    status_mb = round(peak_mb())
    with clock.step("sources"):
        assert sum(1 for _ in Checkpoint(path).sources()) == count
    return {**clock.told(), "status_mb": status_mb, "peak_mb": round(peak_mb())}


def run_plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make a finished job, then plan and look in processes of their own."""
    work = Path(tempfile.mkdtemp(prefix="ray-resume-scale-"))
    count = arguments.sources
    clock = Clock()
    try:
        with clock.step("make"):
            checkpoint = make_finished(work / "ckpt", count)
        names = output_names(checkpoint, count)
        done = {
            "plan": in_child("plan", work / "ckpt", checkpoint, names, count),
            "status": in_child("status", work / "ckpt", count),
        }
        shutil.rmtree(names.parent)
        file_bytes = (work / "ckpt" / f"{RUN}.mdb").stat().st_size
        return {
            **done,
            "bytes_per_source": round(file_bytes / count),
            "make_s": clock.seconds["make"],
        }
    finally:
        shutil.rmtree(work)
