"""`scale.py ledger` and `memory`: the host of a ledger in this process, without Ray."""

from __future__ import annotations

import argparse
import gc
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measures import peak_mb
from scale_sources import RUN, SIGNATURE, parts_of, sources_of


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
