"""What large numbers of sources cost: planning, looking, the ledger, the store, the actor.

    python tests/benchmarks/scale.py plan [--sources 1000000]
    python tests/benchmarks/scale.py ledger [--sources 10000000] [--events 10]
    python tests/benchmarks/scale.py memory [--sources 1000000] [--events 10]
    python tests/benchmarks/scale.py actor [--senders 4] [--seconds 5]
    python tests/benchmarks/scale.py run [--sources 1000000] [--plain]

`plan` makes a checkpoint of a finished job, and does what a run that finds nothing to do does, but
for listing files; then what `status` does. `ledger` sends a message for every few sources, which
share a file, through the ledger's host into the store, without Ray. `memory` weighs what the host
keeps of sources that are pending or complete. `actor` has processes send messages to a real actor
until it is saturated. `run` is a whole job over tiny files, which share output files, and the same
job run again; with `--plain`, plain Ray Data does it too, beside it.
Each prints figures, as JSON. Timings of a shared machine drift by a factor of two.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray_resume.core.digests import source_digest
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Fingerprint, Record, State, pipeline_hash

RUN = "0123456789ab"
SIGNATURE = "ReadParquet -> MapBatches(clean) -> write_parquet"
SIZE, MTIME_NS = 1_000_000, 1_700_000_000_000_000_000


def path_of(number: int) -> str:
    """Return the path of a source: 56 characters."""
    return f"bucket/dataset/year=2024/part-{number:09d}.snappy.parquet"


def file_of(checkpoint: str, number: int, key: bytes) -> str:
    """Return the name of its output file."""
    return f"{checkpoint}-{RUN}-{key[:8].hex()}-{number:016x}.parquet"


def peak_mb() -> float:
    """Return the most memory that this process has had resident, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mb() -> float:
    """Return the memory that this process has resident now, in megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class Clock:
    """Times steps one after another, and says how much memory each left resident.

    Processor time, of this process and of children that it has waited for, says more than wall
    time where others are at work on the machine.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.resident_mb: dict[str, int] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time one step."""
        began, cpu = time.perf_counter(), os.times()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 3)
        now = os.times()
        self.cpu_seconds[name] = round(sum(now[:4]) - sum(cpu[:4]), 2)
        self.resident_mb[name] = round(resident_mb())

    def told(self) -> dict[str, Any]:
        """Return what was measured, with the sums."""
        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "resident_mb": self.resident_mb,
            "total_s": round(sum(self.seconds.values()), 2),
            "total_cpu_s": round(sum(self.cpu_seconds.values()), 2),
        }


# Planning -----------------------------------------------------------------------------------------


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


def in_child(name: str, *arguments: object) -> Any:
    """Run a part in a process of its own, whose memory says something."""
    command = [sys.executable, __file__, "part", name, *map(str, arguments)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def run_part(arguments: argparse.Namespace) -> dict[str, Any]:
    """Be such a process."""
    name, path, *more, count = arguments.rest
    if name == "plan":
        checkpoint, names = more
        return plan(Path(path), checkpoint, Path(names), int(count))
    if name == "status":
        return status(Path(path), int(count))
    return job(name, Path(path), int(count))


# The ledger and the store -------------------------------------------------------------------------


@contextmanager
def host_of(count: int, *, commit_interval_s: float) -> Iterator[Any]:
    """Yield a ledger's host of a run of ``count`` sources, in this process."""
    from ray_resume.checkpoint.claims import Claim, Owner
    from ray_resume.checkpoint.local.backend import LocalBackend, LocalLedgerBinding
    from ray_resume.checkpoint.local.lease import Lease
    from ray_resume.run.ledger_host import LedgerHost
    from ray_resume.run.run_spec import RunSpec

    work = Path(tempfile.mkdtemp(prefix="ray-resume-scale-"))
    LocalBackend(work).ensure()
    lease = Lease.acquire(work, Owner.here(RUN), Claim(None), wait_s=0)
    try:
        spec = RunSpec(
            run_id=RUN,
            binding=LocalLedgerBinding(str(work), str(lease.path), RUN, commit_interval_s),
            sources=sources_of(count),
            records={},
            max_failed_runs=3,
            first_sequence=0,
            signature=SIGNATURE,
            header={"sources_total": count},
        )
        host = LedgerHost(spec)
        del spec
        host.begin_pass(1)
        yield host
    finally:
        lease.end(wait_s=0)
        shutil.rmtree(work)


def sources_of(count: int) -> Any:
    """Return a table of ``count`` files."""
    from ray_resume.core.sources import SourceTable

    paths = [path_of(number) for number in range(count)]
    return SourceTable.of_files(paths, [SIZE] * count, [MTIME_NS] * count)


def parts_of(numbers: range, digests: bytes, each: int) -> list[FilePart]:
    """Say where the rows of some sources are, ten each: ``each`` of them share a file."""
    from ray_resume.core.filenames import stem_of

    prefix = f"aaaaaaaa-{RUN}"
    parts = []
    for start in range(0, len(numbers), each):
        some = numbers[start : start + each]
        digest = digests[16 * some[0] : 16 * some[0] + 8] if len(some) == 1 else None
        name = f"{stem_of(prefix, digest)}.parquet"
        parts += [FilePart(name, 10 * place, 10, 10 * len(some)) for place in range(len(some))]
    return parts


def run_ledger(arguments: argparse.Namespace) -> dict[str, Any]:
    """Complete every source: a seal and a drain each, some sources in a message and in a file."""
    from ray_resume.checkpoint.local.backend import COMMIT_INTERVAL_S
    from ray_resume.core.messages import Drain, Message, Seal
    from ray_resume.core.tokens import MODULUS
    from ray_resume.run.ledger_actor import tune_garbage_collector

    count, each = arguments.sources, arguments.events
    digests = sources_of(count).digests.to_bytes()
    sending_s, longest_s = 0.0, 0.0
    with host_of(count, commit_interval_s=COMMIT_INTERVAL_S) as host:
        tune_garbage_collector()
        began = time.perf_counter()
        made_s = 0.0
        for start in range(0, count, 100_000):
            part = range(start, min(start + 100_000, count))
            making = time.perf_counter()
            # What workers do: it is not the ledger's work.
            parts = parts_of(part, digests, each)
            messages = []
            for first in range(0, len(part), each):
                some = part[first : first + each]
                seals = tuple(Seal(number, number + 1, 10) for number in some)
                drains = tuple(
                    Drain(number, MODULUS - number - 1, 10, (parts[number - start],))
                    for number in some
                )
                messages += [Message(RUN, 1, seals), Message(RUN, 1, drains)]
            made_s += time.perf_counter() - making
            for message in messages:
                before = time.perf_counter()
                host.apply(message)
                longest_s = max(longest_s, time.perf_counter() - before)
        applied_s = time.perf_counter() - began - made_s
        progress = host.close()
        durable_s = time.perf_counter() - began - made_s
        sending_s = applied_s
        assert progress.committed == count
    return {
        "sources": count,
        "sources_per_message": each,
        "messages_per_s": round(2 * count / each / sending_s),
        "deltas_per_s": round(2 * count / sending_s),
        "durable_completions_per_s": round(count / durable_s),
        "longest_answer_s": round(longest_s, 3),
        "peak_mb": round(peak_mb()),
    }


def run_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Weigh the host: with all sources pending, then heard of, then complete."""
    from ray_resume.core.messages import Drain, Message, Seal
    from ray_resume.core.tokens import MODULUS

    count, each = arguments.sources, arguments.events
    digests = sources_of(count).digests.to_bytes()
    # What is loaded once, with the first message, is not a source's.
    with host_of(2, commit_interval_s=3600) as host:
        parts = parts_of(range(2), digests, 1)
        host.apply(Message(RUN, 1, (Seal(0, 1, 10), Drain(1, 1, 10, (parts[1],)))))
        host.apply(Message(RUN, 1, (Drain(0, MODULUS - 1, 10, (parts[0],)),)))
        host.flush()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    weights: dict[str, float] = {}

    def weigh(what: str) -> None:
        gc.collect()
        weights[what] = round((tracemalloc.get_traced_memory()[0] - before) / count, 1)

    with host_of(count, commit_interval_s=3600) as host:
        weigh("pending")
        for start in range(0, count, 10_000):
            part = range(start, min(start + 10_000, count))
            parts = parts_of(part, digests, each)
            for first in range(0, len(part), each):
                drains = tuple(
                    Drain(number, MODULUS - number - 1, 10, (parts[number - start],))
                    for number in part[first : first + each]
                )
                host.apply(Message(RUN, 1, drains))
        parts.clear()
        weigh("pending, with rows in a file")
        # As bad as in any order: every second one first.
        for what, rest in (("half of them complete", 0), ("complete", 1)):
            for source in range(rest, count, 2):
                host.apply(Message(RUN, 1, (Seal(source, source + 1, 10),)))
                if source % 10_000 == rest:
                    host.flush()
            host.flush()
            weigh(what)
    return {"sources": count, "bytes_per_source": weights}


# A real actor -------------------------------------------------------------------------------------


def run_actor(arguments: argparse.Namespace) -> dict[str, Any]:
    """Have senders send messages of 1, 10 and 100 sources to one actor until it is saturated."""
    import psutil
    import ray

    from ray_resume.checkpoint.claims import Claim, Owner
    from ray_resume.checkpoint.local.backend import LocalBackend, LocalLedgerBinding
    from ray_resume.checkpoint.local.lease import Lease
    from ray_resume.run.ledger_actor import LedgerStart
    from ray_resume.run.run_spec import RunSpec

    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    work = Path(tempfile.mkdtemp(prefix="ray-resume-scale-"))
    found = []
    try:
        for each in (1, 10, 100, 1000):
            path = work / f"of-{each}"
            LocalBackend(path).ensure()
            lease = Lease.acquire(path, Owner.here(RUN), Claim(None), wait_s=0)
            count = min(arguments.most, each * 400_000)
            start = LedgerStart(
                RunSpec(
                    run_id=RUN,
                    binding=LocalLedgerBinding(str(path), str(lease.path), RUN),
                    sources=sources_of(count),
                    records={},
                    max_failed_runs=3,
                    first_sequence=0,
                    signature=SIGNATURE,
                    header={},
                ),
                lease,
            )
            start.wait()
            handle = start.handle
            sender = ray.remote(num_cpus=0)(send)
            process = psutil.Process(ray.get(handle.__ray_call__.remote(lambda _: os.getpid())))
            cpu_s = cpu_of(process)
            share = count // arguments.senders
            began = time.perf_counter()
            sent = ray.get(
                [
                    sender.remote(handle, share * i, share, each, arguments.open, arguments.seconds)
                    for i in range(arguments.senders)
                ]
            )
            sent_s = time.perf_counter() - began
            progress = ray.get(handle.close.remote())
            durable_s = time.perf_counter() - began
            assert progress.committed == sum(one["sources"] for one in sent)
            cpu_s = cpu_of(process) - cpu_s
            messages = sum(one["messages"] for one in sent)
            found.append(
                {
                    "sources_per_message": each,
                    "messages_per_s": round(messages / sent_s),
                    "completions_per_s": round(progress.committed / durable_s),
                    # What a machine would do that had a core for it, and one for Ray's threads.
                    "messages_per_cpu_s": round(messages / cpu_s),
                    "completions_per_cpu_s": round(progress.committed / cpu_s),
                    "cores_used": round(cpu_s / durable_s, 2),
                    "answer_ms": round(1000 * max(one["answer_s"] for one in sent), 1),
                }
            )
            print(found[-1], flush=True)
            ray.kill(handle)
            lease.end(wait_s=5)
        return {"senders": arguments.senders, "in_flight": arguments.open, "found": found}
    finally:
        ray.shutdown()
        shutil.rmtree(work)


def cpu_of(process: Any) -> float:
    """Return the processor time, in seconds, that a process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def send(
    handle: Any, first: int, count: int, each: int, in_flight: int, seconds: float
) -> dict[str, Any]:
    """Imitate many workers: complete sources, with up to ``in_flight`` messages on their way."""
    import ray

    from ray_resume.core.messages import Drain, Message, Seal
    from ray_resume.core.tokens import MODULUS

    began, messages, sources = time.perf_counter(), 0, 0
    waiting: list[Any] = []
    answer_s = 0.0
    for start in range(first, first + count - each + 1, each):
        numbers = range(start, start + each)
        # As a sink does, which drains the sources of a file in one message.
        file = file_of("aaaaaaaa", start, source_digest(path_of(start)) if each == 1 else bytes(8))
        seals = tuple(Seal(n, n + 1, 10) for n in numbers)
        drains = tuple(
            Drain(n, MODULUS - n - 1, 10, (FilePart(file, 10 * (n - start), 10, 10 * each),))
            for n in numbers
        )
        events = seals + drains
        waiting.append(handle.apply.remote(Message(RUN, 1, events)))
        messages, sources = messages + 1, sources + each
        if len(waiting) >= in_flight:
            asked = time.perf_counter()
            ray.get(waiting.pop(0))
            answer_s = max(answer_s, time.perf_counter() - asked)
            if time.perf_counter() - began > seconds:
                break
    ray.get(waiting)
    return {"messages": messages, "sources": sources, "answer_s": answer_s}


# A whole job -----------------------------------------------------------------------------------


def run_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make tiny files, then process them and run again, in processes of their own."""
    work = Path(tempfile.mkdtemp(prefix="ray-resume-scale-"))
    clock = Clock()
    try:
        with clock.step("make"):
            for number in range(arguments.sources):
                folder = work / "in" / f"{number // 1000:04d}"
                if number % 1000 == 0:
                    folder.mkdir(parents=True)
                (folder / f"{number:09d}.txt").write_text(f"{number}\n")
        kinds = ["plain"] * arguments.plain + ["job", "again"]
        done = {kind: in_child(kind, work, arguments.sources) for kind in kinds}
        return {"sources": arguments.sources, "make_s": clock.seconds["make"], **done}
    finally:
        shutil.rmtree(work)


def job(kind: str, work: Path, count: int) -> dict[str, Any]:
    """Run the job, by Ray Data alone if it is "plain"; watch what its processes take."""
    import pyarrow.dataset as pads
    import ray

    from ray_resume import resumable, resumable_read, resumable_write

    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=1 << 30,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    out, clock, before_mb = work / ("plain" if kind == "plain" else "out"), Clock(), peak_mb()
    with Watcher() as watcher:
        if kind == "plain":
            with clock.step("list"):
                ds = ray.data.read_text(str(work / "in"))
            with clock.step("run"):
                ds.map_batches(lambda batch: batch).write_parquet(str(out))
            found: dict[str, Any] = {}
        else:
            with clock.step("list"):
                ds = resumable_read(ray.data.read_text, str(work / "in"), checkpoint=work / "ckpt")
            same = resumable(lambda batch: batch, one_to_one=True)
            with clock.step("run"):
                summary = resumable_write(ds.map_batches(same), out)
            assert (summary.sources_completed, summary.sources_skipped) == (
                (count, 0) if kind == "job" else (0, count)
            )
            found = {"files": sum(1 for _ in out.iterdir())}
    rows = pads.dataset(out, format="parquet").to_table().column("text").to_pylist()
    assert sorted(map(int, rows)) == list(range(count))
    ray.shutdown()
    return {
        **clock.told(),
        **found,
        "driver_mb": round(peak_mb()),
        "before_mb": round(before_mb),
        "ledger_mb": watcher.peak_mb.get("ray::_LedgerActor"),
    }


class Watcher:
    """Samples the memory that this process's children have to themselves, by their names."""

    def __init__(self) -> None:
        self.peak_mb: dict[str, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        while not self._over.wait(0.3):
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    name, memory = " ".join(child.cmdline()[:1]), child.memory_info()
                    name = name.partition(".")[0]
                    own = round((memory.rss - memory.shared) / 2**20)
                    self.peak_mb[name] = max(self.peak_mb.get(name, 0), own)


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, run, sources in (
        ("plan", run_plan, 1_000_000),
        ("ledger", run_ledger, 1_000_000),
        ("memory", run_memory, 200_000),
        ("actor", run_actor, 0),
        ("run", run_run, 1_000_000),
        ("part", run_part, 0),
    ):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--sources", type=int, default=sources)
        if name in ("ledger", "memory"):
            command.add_argument("--events", type=int, default=10)
        if name == "actor":
            command.add_argument("--senders", type=int, default=3)
            command.add_argument("--open", type=int, default=64)
            command.add_argument("--seconds", type=float, default=5)
            command.add_argument("--most", type=int, default=3_000_000)
        if name == "run":
            command.add_argument("--plain", action="store_true")
        if name == "part":
            command.add_argument("rest", nargs="*")
    arguments = parser.parse_args()
    print(json.dumps(arguments.run(arguments)))


if __name__ == "__main__":
    main()
