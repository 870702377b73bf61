"""`scale.py actor`: an actor that senders saturate."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from scale_sources import RUN, SIGNATURE, file_of, path_of, sources_of

from ray_resume.core.digests import source_digest
from ray_resume.core.parts import FilePart


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
