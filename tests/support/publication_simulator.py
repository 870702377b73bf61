"""A simulator of a table over many runs: publications, crashes between their steps, resets.

A history is made from a seed: processes (runs of all sources or of a shard, resets) that share a
checkpoint and a table. Between any two of their steps another process may go on, one may be killed,
or a run may be interrupted and go on. The rules about publications are not modelled:
`core.publications` and `core.snapshot` are called. The leases, the table, and the order of a
process's steps are modelled, as `run.publisher`, `run.committer` and `run.settling` keep it.

After each step, the rows of each completed source must be in the table, and no row may be there
twice. When all processes are over and a run has ended, all rows are there.

A `Rules` object can break a rule, to show that the simulator finds it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from processes import Process, SharedCheckpoint, Step

from ray_resume.checkpoint.resets import reset_records
from ray_resume.core.messages import Completion
from ray_resume.core.publications import Mark, Publication, PublicationQueue, Taken, unsettled
from ray_resume.core.records import Fingerprint, Record, State, encode
from ray_resume.core.snapshot import Snapshot

Row = tuple[str, int, int]
"""A source's id, the version of its content, and how often it was reset before it was read."""

SHARDS = 2


@dataclass(frozen=True)
class Rules:
    """The rules of a publication, each of which can be broken.

    Args:
        records: the publication is on record before it is published.
        looks: what is on record is committed only if the table has the mark.
        settles: what is on record and marked is committed; else it is forgotten.
        spares_live: only dead runs' publications are settled.
        commits_first: a publication is forgotten after the commit, not before.
        keeps_numbers: what is settled is committed with the numbers that are on record.
        asks_again: an interrupted run looks for the mark before it publishes again.
    """

    records: bool = True
    looks: bool = True
    settles: bool = True
    spares_live: bool = True
    commits_first: bool = True
    keeps_numbers: bool = True
    asks_again: bool = True


SHIPPED = Rules()


class World(SharedCheckpoint):
    """A table, a checkpoint, and the processes at work on them."""

    def __init__(self, rng: random.Random, rules: Rules) -> None:
        super().__init__(rng)
        self.rules = rules
        self.versions = {f"s{number}": 0 for number in range(rng.randint(1, 5))}
        self.resets = dict.fromkeys(self.versions, 0)
        self.table: list[tuple[Mark, list[Row]]] = []
        self.publications: dict[tuple[str, int], bytes] = {}

    # The checkpoint and the table.

    def holds(self, mark: Mark) -> bool:
        return any(mark == one for one, _ in self.table)

    # Processes.

    def run(self, process: Process) -> Step:
        """Settle, plan, complete sources one by one, publish at any moment and at the end."""
        index = self.rng.randint(0, SHARDS)
        every = sorted(self.versions)
        share = every if index == SHARDS else every[index::SHARDS]
        if not self.acquire(process, frozenset(share)):
            return
        yield
        yield from self.settle(process)
        snapshot = self.snapshot(process.run_id)
        run = _Run(self, process.run_id, snapshot.highest_sequence())
        pending = []
        for source in share:
            record, version = snapshot.get(source), self.versions[source]
            if record is None or record.state is not State.COMPLETED or _version(record) != version:
                pending.append((source, version, self.resets[source]))
        yield
        self.records[process.run_id] = []
        self.rng.shuffle(pending)
        for row in pending:
            if self.rng.random() < 0.1:
                continue  # It fails, and stays pending.
            run.complete(row)
            if self.rng.random() < 0.4:
                yield from run.publish_interrupted()
            yield
        yield from run.publish()

    def settle(self, process: Process) -> Step:
        """Do what `run.settling` does, step by step."""
        listed = list(self.publications)
        yield
        live = self.live() if self.rules.spares_live else set()
        snapshot = self.snapshot(process.run_id)
        yield
        found = [name for name in listed if name[0] not in live]
        published: list[tuple[Mark, Snapshot]] = []
        for name in found:
            if name not in self.publications:
                continue  # It was forgotten since.
            publication = Publication.from_bytes(self.publications[name])
            left = unsettled(publication, snapshot)
            mark = Mark("c", publication.run_id, publication.number)
            if len(left) and self.rules.settles and (self.holds(mark) or not self.rules.looks):
                published.append((mark, left))
            yield
        if not self.rules.commits_first:
            for name in found:
                self.publications.pop(name, None)
            yield
        for _, left in published:
            records = list(left)
            if not self.rules.keeps_numbers:
                first = self.snapshot(process.run_id).highest_sequence() + 1
                records = [replace(one, sequence=first + i) for i, one in enumerate(records)]
            self.records[self.new_run_id()] = records
            self.seen["settled"] += 1
            yield
        for name in found:
            if self.publications.pop(name, None) is not None:
                self.seen["forgotten"] += 1

    def reset(self, process: Process) -> Step:
        """Reset some sources, or all, which forgets publications as well."""
        if not self.acquire(process, frozenset(self.versions)):
            return
        yield
        snapshot = self.snapshot(process.run_id)
        everything = self.rng.random() < 0.3
        chosen = [record for record in snapshot if everything or self.rng.random() < 0.4]
        numbers = [
            int(Publication.from_bytes(data).log.column("sequence").max())
            for data in self.publications.values()
        ]
        yield
        highest = max([snapshot.highest_sequence(), *numbers])
        self.records[process.run_id] = reset_records(chosen, process.run_id, highest)
        for record in chosen:
            self.resets[record.source_id] += 1
            self.seen["reset"] += 1
        if everything:
            # The command has not ended if it is killed before this: the user gives it again.
            self.publications.clear()
            for source in self.versions.keys() - {record.source_id for record in chosen}:
                self.resets[source] += 1
        yield

    # Claims.

    def faults(self) -> Iterator[str]:
        """Say what is wrong, at any moment."""
        rows = Counter(row for _, published in self.table for row in published)
        for row, count in rows.items():
            if count > 1:
                yield f"{row} is in the table {count} times"
        there = {row[:2] for row in rows}
        every = [record for records in self.records.values() for record in records]
        newest: dict[str, Record] = {}
        for record in sorted(every, key=lambda one: one.sequence):
            newest[record.source_id] = record
        for record in newest.values():
            is_there = (record.source_id, _version(record)) in there
            if record.state is State.COMPLETED and not is_there:
                yield f"{record.source_id} is completed, and not in the table"

    def faults_at_rest(self) -> Iterator[str]:
        """Say what is wrong when no process is at work, and a run of all sources has ended."""
        there = {row for _, published in self.table for row in published}
        for source, version in self.versions.items():
            if (source, version, self.resets[source]) not in there:
                yield f"{source} is not in the table"
        if self.publications:
            yield f"{list(self.publications)} are on record"


class _Run:
    """The ledger and the publisher of a run."""

    def __init__(self, world: World, run_id: str, sequence: int) -> None:
        self._world, self._run_id, self._sequence = world, run_id, sequence
        self._queue = PublicationQueue()
        self._rows: list[Row] = []
        self._records: list[Record] = []

    def complete(self, row: Row) -> None:
        self._rows.append(row)
        number = len(self._rows) - 1
        assert self._queue.add([Completion(number, 1, 1, (), (b"result",))]) == []

    def publish(self) -> Step:
        """Do what `Publisher.publish_now` does, step by step."""
        world = self._world
        yield
        taken = self._queue.take()
        if taken is None:
            return
        mark = Mark("c", self._run_id, taken.number)
        if not taken.again:
            self._records = self._new_records(taken)
            publication = Publication(
                self._run_id, taken.number, "table", None, list(encode(self._records))
            )
            if world.rules.records:
                world.publications[self._run_id, taken.number] = publication.to_bytes()
        yield
        if not (taken.again and world.rules.asks_again and world.holds(mark)):
            world.table.append((mark, [self._rows[done.source] for done in taken.completions]))
            world.seen["published"] += 1
        yield
        self._queue.confirm(taken.number)
        world.records[self._run_id] += self._records
        yield
        world.publications.pop((self._run_id, taken.number), None)

    def publish_interrupted(self) -> Step:
        """Publish; the user may interrupt that after any step, and it is tried again later."""
        for number, _ in enumerate(self.publish()):
            if number and self._world.rng.random() < 0.1:
                self._world.seen["interrupted"] += 1
                return
            yield

    def _new_records(self, taken: Taken) -> list[Record]:
        records = []
        for done in taken.completions:
            self._sequence += 1
            source, version, _ = self._rows[done.source]
            records.append(
                Record(
                    source,
                    State.COMPLETED,
                    self._sequence,
                    self._run_id,
                    rows=1,
                    fingerprint=Fingerprint(size=version),
                )
            )
        return records


def _version(record: Record) -> int:
    return record.fingerprint.size or 0


def simulate_publications(seed: int, rules: Rules = SHIPPED) -> tuple[list[str], Counter[str]]:
    """Run the history of ``seed``; return what was wrong, and what there was in it."""
    rng = random.Random(seed)
    world = World(rng, rules)
    for _ in range(rng.randint(20, 150)):
        if len(world.processes) < 3 and rng.random() < 0.3:
            world.spawn(rng.choice((world.run,) * 5 + (world.reset,)))
        elif rng.random() < 0.05:
            world.versions[rng.choice(sorted(world.versions))] += 1
        elif world.processes and rng.random() < 0.1:
            world.kill_one()
        elif world.processes:
            world.step(rng.choice(world.processes))
        if wrong := [*world.faults()]:
            return wrong, world.seen
    while world.processes:
        world.step(rng.choice(world.processes))
        if wrong := [*world.faults()]:
            return wrong, world.seen
    while [*world.faults_at_rest()] and world.seen["last runs"] < 40:
        world.seen["last runs"] += 1
        last = world.spawn(world.run)
        while last in world.processes:
            world.step(last)
        if wrong := [*world.faults()]:
            return wrong, world.seen
    return [*world.faults_at_rest()], world.seen
