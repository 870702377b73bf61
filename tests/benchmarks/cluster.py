"""What a cluster of any size would need, by the costs that `scale.py` has measured on a small one.

    python tests/benchmarks/cluster.py [--workers 10000] [--sources 1000000000]
        [--source-s 5] [--sources-per-task 100] [--shards 1]

A model in two parts. What is used up in proportion is multiplied out: memory, disk, processor time.
What may queue up is simulated in steps of a tenth of a second: workers finish tasks at random
moments, each sends two messages (what it has read, what it has written) and goes on when they are
answered; a ledger answers one message after another and shares its process's time between messages
and commits. Prints, for each limit, how near the cluster comes to it; and what breaks first.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, dataclass

__all__ = ["Cluster", "Costs", "Need", "needs", "simulate"]


@dataclass(frozen=True)
class Costs:
    """What was measured, in seconds of one core and in bytes."""

    message_s: float = 450e-6
    """A call of the actor, whatever is in it: Ray's share."""
    event_s: float = 3.4e-6
    """A seal or a drain, unpickled and applied."""
    commit_s: float = 4.4e-6
    """A source, encoded and durable."""
    plan_s: float = 3.0e-6
    """A source that is done: listed already, found on record, its file found."""
    listing_s: float = 10e-6
    """A file, listed on a local disk or 1000 at a time on an object store."""
    plan_bytes: float = 420.0
    """The driver's memory while it plans, the listing's own apart."""
    driver_bytes: float = 100.0
    """The driver's memory for a source while the run goes on."""
    pending_bytes: float = 84.0
    heard_bytes: float = 161.0
    complete_bytes: float = 19.0
    """The ledger's memory for a source."""
    record_bytes: float = 139.0
    """Its record on disk."""


@dataclass(frozen=True)
class Cluster:
    """A job: ``shards`` runs share the sources and the workers, each with a ledger of its own."""

    workers: int = 10_000
    sources: int = 1_000_000_000
    source_s: float = 5.0
    sources_per_task: int = 100
    shards: int = 1
    driver_gb: float = 64.0
    disk_gb: float = 1000.0
    patience_s: float = 60.0
    """How long a resume may plan."""


@dataclass(frozen=True)
class Need:
    """How much of something is needed, and how much there is; at 1 or more it breaks."""

    what: str
    needed: float
    there_is: float
    unit: str

    @property
    def load(self) -> float:
        """The share that is used."""
        return self.needed / self.there_is


def needs(cluster: Cluster, costs: Costs) -> list[Need]:
    """Multiply out what one of the shards needs, the most strained first."""
    sources, workers = cluster.sources / cluster.shards, cluster.workers / cluster.shards
    rate = workers / cluster.source_s
    messages = 2 * rate / cluster.sources_per_task
    busy = messages * costs.message_s + rate * (2 * costs.event_s + costs.commit_s)
    flying = min(sources, workers * cluster.sources_per_task)
    memory = (sources - flying) * costs.pending_bytes + flying * costs.heard_bytes
    found = [
        Need("ledger: a core", busy, 1.0, "cores"),
        Need("ledger: memory", memory / 1e9, cluster.driver_gb, "GB"),
        Need("driver: memory, planning", sources * costs.plan_bytes / 1e9, cluster.driver_gb, "GB"),
        Need("driver: planning a resume", sources * costs.plan_s, cluster.patience_s, "s"),
        # Every shard's driver lists everything, whatever its share.
        Need("driver: listing", cluster.sources * costs.listing_s, cluster.patience_s, "s"),
        Need("disk: records", sources * costs.record_bytes / 1e9, cluster.disk_gb, "GB"),
    ]
    return sorted(found, key=lambda need: -need.load)


@dataclass(frozen=True)
class Traffic:
    """What became of the messages to one ledger in some time of full work."""

    messages_per_s: float
    completions_per_s: float
    busy: float
    longest_answer_s: float
    workers_waiting: float
    slowdown: float


def simulate(
    cluster: Cluster, costs: Costs, *, seconds: float | None = None, seed: int = 1
) -> Traffic:
    """Simulate one ledger and its workers, all of whom begin a task at once."""
    step_s, rng = 0.1, random.Random(seed)
    workers, task_s = cluster.workers // cluster.shards, cluster.source_s * cluster.sources_per_task
    until = seconds if seconds is not None else max(60.0, 5 * task_s)
    message_s = costs.message_s + cluster.sources_per_task * costs.event_s
    commit_s = cluster.sources_per_task * costs.commit_s
    # Tasks differ in length by half; who is done waits in the queue, by the time of arrival.
    ends: dict[int, int] = {}
    for _ in range(workers):
        end = int(task_s * rng.uniform(0.5, 1.5) / step_s)
        ends[end] = ends.get(end, 0) + 1
    queue: list[list[float]] = []
    backlog_s = answered = busy_s = longest = waited = overdrawn = 0.0
    steps = int(until / step_s)
    for step in range(steps):
        now = step * step_s
        if done := ends.pop(step, 0):
            queue.append([now, done])
        left = step_s - overdrawn
        # Commits take their share first: the ledger's lock is free meanwhile, the core is not.
        paid = min(backlog_s, max(left, 0.0) / 2)
        backlog_s, left = backlog_s - paid, left - paid
        while queue and left > 0:
            came, count = queue[0]
            served = min(count, int(left / (2 * message_s)) or 1)
            left -= served * 2 * message_s
            backlog_s += served * commit_s
            answered += served
            longest = max(longest, now + step_s - left - came)
            for _ in range(int(served)):
                end = step + 1 + int(task_s * rng.uniform(0.5, 1.5) / step_s)
                ends[end] = ends.get(end, 0) + 1
            queue[0][1] -= served
            if queue[0][1] <= 0:
                queue.pop(0)
        busy_s += step_s - overdrawn - left
        overdrawn = max(-left, 0.0)
        waited += sum(count for _, count in queue)
    possible = workers * until / task_s
    return Traffic(
        round(2 * answered / until, 1),
        round(answered * cluster.sources_per_task / until, 1),
        round(busy_s / until, 3),
        round(longest, 2),
        round(waited / steps / workers, 3),
        round(possible / answered, 2) if answered else float("inf"),
    )


def main() -> None:
    """Print what a cluster needs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=10_000)
    parser.add_argument("--sources", type=int, default=1_000_000_000)
    parser.add_argument("--source-s", type=float, default=5.0)
    parser.add_argument("--sources-per-task", type=int, default=100)
    parser.add_argument("--shards", type=int, default=1)
    cluster = Cluster(**vars(parser.parse_args()))
    costs = Costs()
    days = cluster.sources * cluster.source_s / cluster.workers / 86_400
    print(f"{cluster}\nThe job takes {days:.1f} days.")
    for need in needs(cluster, costs):
        mark = "BREAKS" if need.load >= 1 else ""
        print(f"{need.what:28} {need.needed:12,.1f} of {need.there_is:8,.0f} {need.unit:6} {mark}")
    print(json.dumps(asdict(simulate(cluster, costs))))


if __name__ == "__main__":
    main()
