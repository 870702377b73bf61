"""A simulator of an output folder over many runs: flushes, crashes, replacements, tidies.

A history is made from a seed: processes (runs, tidies, resets) that share a checkpoint and a
folder. Between any two of their steps another process may go on, or one may be killed. The rules
about records, parts and rewrites are not modelled: `core.snapshot` and `core.rewrites` are called.
The leases, the folder, and the order of a process's steps are modelled, as `run.run` and
`write.tidying` keep it.

After each step, the live parts must hold each completed source once: all rows of the content that
its record is about, in order. When all processes are over and a tidy has ended, the clean files are
all that there is in the folder, and hold exactly these rows.

A `Rules` object can break a rule, to show that the simulator finds it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from processes import Process, SharedCheckpoint, Step

from ray_resume.core.digests import source_digest
from ray_resume.core.file_uses import clean_files, overlapping_files
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Fingerprint, Record, State, dropped_record
from ray_resume.core.rewrites import (
    Rewrite,
    Supersession,
    moves_of,
    plan_rewrites,
    records_in,
    still_due,
)
from ray_resume.core.snapshot import Snapshot

Row = tuple[str, int, int]
"""A source's id, the version of its content, and the row's index in it."""


@dataclass(frozen=True)
class Rules:
    """The rules of a tidy, each of which can be broken.

    Args:
        compares: under its lease, it reads the records again and leaves out what has changed.
        takes_lease: its lease is on the sources in the files.
        commits_first: old files are removed after the commit.
        counts_rows: a file is clean if all of its rows are live, whatever its parts.
        remembers: a step knows what earlier steps have moved.
    """

    compares: bool = True
    takes_lease: bool = True
    commits_first: bool = True
    counts_rows: bool = True
    remembers: bool = True


SHIPPED = Rules()


class World(SharedCheckpoint):
    """A folder, a checkpoint, and the processes at work on them."""

    def __init__(self, rng: random.Random, rules: Rules) -> None:
        super().__init__(rng)
        self.rules = rules
        self.versions = {f"s{number}": 0 for number in range(rng.randint(1, 6))}
        self.row_counts = {source: rng.choice((0, 1, 2, 3, 5)) for source in self.versions}
        self.folder: dict[str, list[Row]] = {}
        self._written = 0

    # The checkpoint and the folder.

    def write(self, run_id: str, rows: Sequence[Row]) -> str:
        self._written += 1
        name = f"{run_id}-{self._written}.parquet"
        self.folder[name] = list(rows)
        return name

    def remove_leftovers(self, own: str) -> Step:
        """Note the dead runs, then read the records, then remove files, one by one."""
        live = {process.run_id for process in self.processes if process.holds_lease}
        dead = (self.records.keys() - live) | {own}
        yield
        listed = {part.file for record in self.snapshot(own) for part in record.parts}
        for name in list(self.folder):
            if name.partition("-")[0] in dead and name not in listed:
                yield
                self.folder.pop(name, None)
                self.seen["files removed"] += 1

    # Processes.

    def run(self, process: Process) -> Step:
        """Read pending sources, flush their rows at any moment, commit each that is complete."""
        rng, run_id = self.rng, process.run_id
        share = [source for source in sorted(self.versions) if rng.random() < 0.7]
        if not self.acquire(process, frozenset(map(source_digest, share))):
            return
        yield
        snapshot = self.snapshot(run_id)
        sequence = snapshot.highest_sequence()
        mine = self.records.setdefault(run_id, [])
        pending: dict[str, tuple[Record | None, int]] = {}
        for source in share:
            record, version = snapshot.get(source), self.versions[source]
            if record is None or record.state is not State.COMPLETED or _version(record) != version:
                pending[source] = record, version
        left = {
            source: [(source, version, i) for i in range(self.row_counts[source])]
            for source, (_, version) in pending.items()
        }
        parts: dict[str, list[FilePart]] = {source: [] for source in pending}
        while any(left.values()):
            yield
            chosen = [source for source in left if left[source] and rng.random() < 0.6]
            counts = [rng.randint(1, len(left[source])) for source in chosen]
            rows = [r for s, n in zip(chosen, counts, strict=True) for r in left[s][:n]]
            if not rows:
                continue
            name = self.write(run_id, rows)
            if rng.random() < 0.1:
                # The task dies before its drain. Another execution writes the rows again.
                name = self.write(run_id, rows)
            yield
            first = 0
            for source, count in zip(chosen, counts, strict=True):
                parts[source].append(FilePart(name, first, count, len(rows)))
                left[source] = left[source][count:]
                first += count
        for source, (earlier, version) in pending.items():
            yield
            sequence += 1
            record = Record(
                source,
                State.COMPLETED,
                sequence,
                run_id,
                rows=self.row_counts[source],
                parts=tuple(parts[source]),
                fingerprint=Fingerprint(size=version),
            )
            if rng.random() < 0.25:
                # Its earlier output stays until it completes.
                kept = replace(record, rows=0, parts=()) if earlier is None else earlier
                record = replace(kept, state=State.FAILED, sequence=sequence, run_id=run_id)
            mine.append(record)
            self.seen[record.state.name] += 1
        yield
        yield from self.remove_leftovers(run_id)

    def reset(self, process: Process) -> Step:
        """Forget some sources, or drop them with their output."""
        if not self.acquire(process, None):
            return
        yield
        snapshot = self.snapshot(process.run_id)
        made: list[Record] = []
        for record in snapshot:
            sequence = snapshot.highest_sequence() + 1 + len(made)
            if self.rng.random() < 0.2:
                made.append(dropped_record(record.source_id, sequence, process.run_id))
            elif self.rng.random() < 0.2:
                made.append(
                    replace(record, state=State.RESET, sequence=sequence, run_id=process.run_id)
                )
        self.records[process.run_id] = made
        yield

    def tidy(self, process: Process) -> Step:
        """Do what `write.tidying` does, step by step."""
        rng, rules, run_id = self.rng, self.rules, process.run_id
        snapshot = self.snapshot()
        plan = self.plan(snapshot, merge=rng.random() < 0.5)
        yield
        digests = snapshot.digests.take(records_in(snapshot, plan))
        claim = [digests[number] for number in range(len(digests))]
        if not self.acquire(process, frozenset(claim if rules.takes_lease else ())):
            return
        yield
        if rules.compares:
            snapshot = self.snapshot(run_id)
            plan = still_due(plan, snapshot)
        # Registered first: what it writes is a leftover of a run that is known.
        self.records.setdefault(run_id, [])
        steps: list[list[Rewrite]] = []
        for rewrite in plan:
            if not steps or rng.random() < 0.5:
                steps.append([])
            steps[-1].append(rewrite)
        supersession = Supersession(snapshot, steps)
        for step in steps:
            yield from self.rewrite(run_id, supersession, step)
            if not rules.remembers:
                supersession = Supersession(snapshot, steps)
        yield
        yield from self.remove_leftovers(run_id)

    def rewrite(self, run_id: str, supersession: Supersession, rewrites: Sequence[Rewrite]) -> Step:
        """Do a step of a rewrite, as `write.rewriter` does."""
        moves: dict[FilePart, FilePart] = {}
        for rewrite in rewrites:
            yield
            moves |= moves_of(rewrite, self.write(run_id, self.rows_of(rewrite.parts)))
        old = [file for rewrite in rewrites for file in rewrite.files]
        if not self.rules.commits_first:
            yield from self.remove(old)
        yield
        # In one transaction: all, or nothing.
        self.records[run_id] += list(supersession.records(old, moves))
        self.seen["files rewritten"] += len(old)
        yield
        if self.rules.commits_first:
            yield from self.remove(old)

    def remove(self, files: Iterable[str]) -> Step:
        for file in files:
            self.folder.pop(file, None)
            yield

    def plan(self, snapshot: Snapshot, *, merge: bool) -> list[Rewrite]:
        sizes = {name: float(len(rows)) for name, rows in self.folder.items()}
        plan = plan_rewrites(snapshot, sizes=sizes if merge else None, target_bytes=6)
        if self.rules.counts_rows:
            return plan
        # A file with two parts is called clean, whatever else was in it.
        return [one for one in plan if len(one.files) > 1 or len(one.parts) < 2]

    def rows_of(self, parts: Iterable[FilePart]) -> list[Row]:
        """Read parts of files; an empty file takes the place of one that is gone."""
        rows: list[Row] = []
        for part in parts:
            there = self.folder.get(part.file, [])
            rows += there[part.first_row : part.first_row + part.rows]
        return rows

    # Claims.

    def faults(self) -> Iterator[str]:
        """Say what is wrong with the live parts, at any moment."""
        every = [record for records in self.records.values() for record in records]
        newest: dict[str, Record] = {}
        for record in sorted(every, key=lambda record: record.sequence):
            newest[record.source_id] = record
        taken: set[tuple[str, int]] = set()
        for record in newest.values():
            counts = record.state is State.COMPLETED or record.parts
            rows = self.row_counts[record.source_id] if counts else 0
            wanted = [(record.source_id, _version(record), i) for i in range(rows)]
            if self.rows_of(record.parts) != wanted:
                yield f"{record.source_id} has {self.rows_of(record.parts)}, not {wanted}"
            for part in record.parts:
                if len(self.folder.get(part.file, ())) != part.file_rows:
                    yield f"{part} is not in its file"
                places = {(part.file, part.first_row + i) for i in range(part.rows)}
                if taken & places:
                    yield f"{part} has rows that are on record twice"
                taken |= places

    def faults_at_rest(self) -> Iterator[str]:
        """Say what is wrong with the folder when no process is at work, and a tidy has ended."""
        snapshot = self.snapshot()
        live = Counter(row for record in snapshot for row in self.rows_of(record.parts))
        for file in overlapping_files(snapshot):
            yield f"{file} has rows that are on record twice"
        clean = set(clean_files(snapshot))
        listed = Counter(row for file in clean for row in self.folder.get(file, ()))
        if live != listed:
            yield f"the clean files have {listed}, and {live} are live"
        if clean != self.folder.keys():
            yield f"{clean ^ self.folder.keys()} are not clean files, or not there"


def _version(record: Record) -> int:
    return record.fingerprint.size or 0


def simulate_output(seed: int, rules: Rules = SHIPPED) -> tuple[list[str], Counter[str]]:
    """Run the history of ``seed``; return what was wrong, and what there was in it."""
    rng = random.Random(seed)
    world = World(rng, rules)
    for _ in range(rng.randint(20, 120)):
        if len(world.processes) < 3 and rng.random() < 0.3:
            world.spawn(rng.choice((world.run, world.run, world.tidy, world.reset)))
        elif rng.random() < 0.1:
            world.versions[rng.choice(sorted(world.versions))] += 1
        elif world.processes and rng.random() < 0.05:
            world.kill_one()
        elif world.processes:
            world.step(rng.choice(world.processes))
        if wrong := [*world.faults()]:
            return wrong, world.seen
    while world.processes:
        world.step(rng.choice(world.processes))
        if wrong := [*world.faults()]:
            return wrong, world.seen
    last = world.spawn(world.tidy)
    while last in world.processes:
        world.step(last)
    return [*world.faults(), *world.faults_at_rest()], world.seen
