"""A simulator of runs over files of row ranges: it drives the shipped planning, reading and ledger.

A history is made from a seed: runs, some of them of a shard, whose passes execute the reads of
files, each several times, up to a crash at any step. Any of the rows that left a read may come to
the sink, messages come in any order, repeatedly or never, and a run dies with any part of what is
complete committed. Between runs files change and sources are reset. Nothing is modelled of
`row_ranges`, `row_reading`, `planning`, `passes` and `ledger`: they are called.

The truth: the rows of a range, and how many ranges a file has. When a range completes, its parts
must be its rows, each once. When a run finds nothing left to do, the rows on record must be those
of the files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ray_resume.core.ledger import Ledger, LedgerError
from ray_resume.core.messages import Completion, Drain, Event, Failure, Message
from ray_resume.core.parts import FilePart
from ray_resume.core.passes import PassSchedule
from ray_resume.core.planning import Listing, Policies, what_to_do
from ray_resume.core.range_items import END, RangeItems
from ray_resume.core.record_log import RecordLog
from ray_resume.core.records import Fingerprint, Record, State, dropped_record, encode
from ray_resume.core.resume_plan import ResumePlan
from ray_resume.core.row_ranges import file_ends
from ray_resume.core.row_reading import RowFile, RowReading
from ray_resume.core.run_sources import FoundRange, RunSources, with_found
from ray_resume.core.shards import Shard
from ray_resume.core.snapshot import Snapshot
from ray_resume.core.sources import Source, SourceTable
from ray_resume.core.tokens import MODULUS, sums_by_source

IDS = "rows of some rows"

RegisterOne = Callable[[FoundRange], "int | None"]


class Protocol:
    """The protocol as it is; others take its place to show that the simulator finds their fault."""

    def reading(self, *args: Any) -> RowReading:
        return RowReading(*args)

    def listing(self, listing: Listing, snapshot: Snapshot) -> Listing:
        return listing.with_known_ranges(snapshot, ignore_changes=False)

    def file(self, file: RowFile) -> RowFile:
        return file

    def register(self, found: FoundRange, sources: RunSources, register: RegisterOne) -> int | None:
        return register(found)

    def have_left(self, register: RegisterOne) -> None:
        """Do what comes after rows have left a read."""

    def on_crash(self, reading: RowReading) -> Sequence[Event]:
        return ()


@dataclass
class History:
    """What came of one history; ``wrong`` must stay empty. The rest counts what there was in it."""

    wrong: list[str] = field(default_factory=list)
    runs: int = 0
    crashes: int = 0
    completed: int = 0
    found: int = 0
    dropped_blocks: int = 0
    ends: int = 0
    changes: int = 0
    refused: int = 0

    def add(self, other: History) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class DeathError(Exception):
    """A process died here."""


class World:
    """Files, what the checkpoint has of them, and the output."""

    def __init__(self, seed: int, protocol: Protocol) -> None:
        self.rng = random.Random(seed)
        self.protocol = protocol
        self.history = History()
        self.split_rows = self.rng.randint(1, 5)
        self.rows = [self.rng.choice((0, 1, 3, 5, 8, 13)) for _ in range(self.rng.randint(1, 3))]
        self.version = [0] * len(self.rows)
        self.logs: dict[str, RecordLog] = {}
        self.output: dict[str, list[tuple[int, int, int]]] = {}
        self.numbers = 0

    def snapshot(self) -> Snapshot:
        return Snapshot(self.logs)

    def listing(self, share: Shard | None) -> Listing:
        files = SourceTable.of(
            Source(f"/f{n}", f"/f{n}", Fingerprint(rows, version))
            for n, (rows, version) in enumerate(zip(self.rows, self.version, strict=True))
        )
        ends = file_ends(files, self.split_rows)
        return Listing(ends, ends, IDS, list(files.ids()), share, self.split_rows)

    def commit(self, run_id: str, records: list[Record]) -> None:
        log = self.logs.setdefault(run_id, RecordLog())
        for block in encode(records):
            log.append(block)

    def disturb(self) -> None:
        """Change a file, reset a source, or have another length of ranges, which replaces all."""
        if self.rng.random() < 0.1:
            self.split_rows = self.rng.randint(1, 5)
        if self.rng.random() < 0.25:
            file = self.rng.randrange(len(self.rows))
            self.rows[file] = self.rng.choice((0, 1, 3, 5, 8, 13))
            self.version[file] += 1
            self.history.changes += 1
        if self.rng.random() < 0.25 and len(snapshot := self.snapshot()):
            record = snapshot.record(self.rng.randrange(len(snapshot)))
            reset = replace(
                record,
                state=State.RESET,
                sequence=snapshot.highest_sequence() + 1,
                run_id=f"reset{len(self.logs)}",
                end=None,
            )
            self.commit(reset.run_id, [reset])

    def check_done(self) -> None:
        """Check the output of a checkpoint that has nothing left to do."""
        records = [r for r in self.snapshot() if r.state is State.COMPLETED]
        live = sorted(row for r in records for part in r.parts for row in self.output[part.file])
        truth = sorted(
            (file, version, row)
            for file, (rows, version) in enumerate(zip(self.rows, self.version, strict=True))
            for row in range(rows)
        )
        if live != truth:
            self.history.wrong.append(f"done, but {live} is not {truth}")


class Run:
    """One run, until it ends or dies."""

    def __init__(self, world: World, run_id: str, share: Shard | None, *, calm: bool) -> None:
        self.world, self.rng, self.history = world, world.rng, world.history
        self.run_id, self.calm = run_id, calm
        snapshot = world.snapshot()
        listing = world.protocol.listing(world.listing(share), snapshot)
        policies = Policies(on_source_gone="keep", max_failed_runs=1000)
        self.share = share
        self.plan: ResumePlan = what_to_do(
            listing, policies, snapshot, {}, signature="", code="", checkpoint=""
        )[0]
        self.sequence = snapshot.highest_sequence()
        self.completed_before = {r.source_id for r in self.plan.skipped}
        self.commit([dropped_record(r.source_id, self.next(), run_id) for r in self.plan.removed])
        self.sources = RunSources(self.plan.pending)
        self.ledger = Ledger(run_id, len(self.plan.pending))
        self.queue: list[Completion] = []

    def next(self) -> int:
        self.sequence += 1
        return self.sequence

    def commit(self, records: list[Record]) -> None:
        self.world.commit(self.run_id, records)

    def chance(self, probability: float) -> bool:
        return not self.calm and self.rng.random() < probability

    def execute(self) -> None:
        """Run passes; a `DeathError` ends the run."""
        schedule = PassSchedule(len(self.plan.pending))
        number = 0
        while (plan := schedule.next()) is not None:
            number += 1
            self.ledger.begin_pass(number)
            self.run_pass(number, list(plan.sources))
            schedule.record_result(
                self.ledger.pending(), known=len(self.sources), failed=self.ledger.failed()
            )
        self.flush()
        pending = self.ledger.pending()
        if self.calm and pending:
            self.history.wrong.append(f"stuck: {[self.sources.id(n) for n in pending]}")
        self.commit(
            [
                Record(
                    self.sources.id(n),
                    State.FAILED,
                    self.next(),
                    self.run_id,
                    error="it failed",
                    failed_runs=1,
                    fingerprint=self.sources.fingerprint(n),
                )
                for n in pending
            ]
        )

    def run_pass(self, number: int, wanted: list[int]) -> None:
        table = self.plan.pending
        known = self.plan.known
        assert known is not None
        if self.sources.found:
            before = len(table)
            table = with_found(table, self.sources.found)
            found = table[before:].ranges
            assert found is not None
            known = known.joined(found)
        messages: list[Message] = []
        files = list(self.files(table, known, np.array(wanted, np.int64)))
        for _ in range(1 if self.calm else self.rng.randint(1, 3)):
            # The reads of two files take turns.
            reads = [self.read(file, number, messages) for file in files]
            while reads:
                read = self.rng.choice(reads)
                if next(read, None) is None:
                    reads.remove(read)
        self.deliver(number, messages)

    def files(
        self, table: SourceTable, known: RangeItems, wanted: np.ndarray[Any, Any]
    ) -> Iterator[RowFile]:
        items = table.ranges
        assert items is not None
        for file in np.unique(items.files[wanted]).tolist():
            here = wanted[items.files[wanted] == file]
            here = here[np.argsort(items.ranges[here])]
            ends, ranges = here[items.ranges[here] == END], here[items.ranges[here] != END]
            all_known = np.sort(known.ranges[known.files == file])
            source = table[int(here[0])]
            name = source.source_id.rpartition("#rows=")[0]
            yield self.world.protocol.file(
                RowFile(
                    Source(name, source.item[0], source.fingerprint),
                    self.world.split_rows,
                    all_known[all_known != END],
                    items.ranges[ranges],
                    ranges,
                    int(ends[0]) if len(ends) else None,
                    self.share,
                )
            )

    def read(self, file: RowFile, number: int, messages: list[Message]) -> Iterator[bool]:
        """Execute a read of a file, a step at a time, perhaps up to a crash."""
        which = int(file.source.source_id[2:])
        rows, version = self.world.rows[which], self.world.version[which]

        def register(found: FoundRange) -> int | None:
            if self.chance(0.03):
                raise DeathError
            known = self.sources.number_of(found)
            if known is None:
                known = self.ledger.add_source(self.run_id, number)
                self.sources.add(found)
                self.history.found += 1
            if self.chance(0.03):
                raise DeathError
            return known if self.ledger.is_pending(known) else None

        def send(*events: Event) -> None:
            if events:
                messages.append(Message(self.run_id, number, tuple(events)))

        protocol = self.world.protocol
        reading = protocol.reading(
            file,
            self.run_id,
            number,
            lambda found: [protocol.register(one, self.sources, register) for one in found],
        )
        first = 0
        try:
            while first < rows:
                count = self.rng.randint(1, min(6, rows - first))
                emission = reading.number(count)
                if emission is None:
                    self.history.dropped_blocks += 1
                else:
                    if self.chance(0.05):
                        raise DeathError
                    at = range(count) if emission.positions is None else emission.positions
                    self.sink([(which, version, first + int(p)) for p in at], emission, send)
                    yield True
                protocol.have_left(register)
                first += count
                if self.chance(0.05):
                    raise DeathError
                send(*reading.taken())
                yield True
                if reading.is_over:
                    return
                if self.chance(0.02):
                    send(*reading.fail("the reader raised"))
                    return
            if self.chance(0.05):
                raise DeathError
            send(*reading.end())
        except DeathError:
            self.history.crashes += 1
            send(*protocol.on_crash(reading))

    def sink(
        self, rows: list[tuple[int, int, int]], emission: Any, send: Callable[..., None]
    ) -> None:
        """Write rows, unless they get lost on the way."""
        if self.chance(0.1):
            return
        for source, total in sums_by_source(emission.sources, emission.tokens).items():
            here = [row for row, of in zip(rows, emission.sources, strict=True) if of == source]
            if self.chance(0.03):
                send(Failure(source, total, len(here), "a row failed"))
                continue
            name = f"file{len(self.world.output)}"
            self.world.output[name] = here
            part = FilePart(name, 0, len(here), len(here))
            send(Drain(source, -total % MODULUS, len(here), (part,)))

    def deliver(self, number: int, messages: list[Message]) -> None:
        arriving = [m for m in messages if not self.chance(0.05)]
        arriving += [m for m in arriving if self.chance(0.1)]
        self.rng.shuffle(arriving)
        for message in arriving:
            try:
                applied = self.ledger.apply(message)
            except LedgerError:
                self.history.refused += 1
                self.history.wrong.append("a message of a source that has no number")
                continue
            for done in applied.completions:
                self.check(done)
                self.queue.append(done)
            if self.chance(0.02):
                raise DeathError

    def check(self, done: Completion) -> None:
        source_id = self.sources.id(done.source)
        name, _, rest = source_id.rpartition("#rows=")
        file = int(name[2:])
        rows, version, size = self.world.rows[file], self.world.version[file], self.world.split_rows
        wrong = self.history.wrong
        if source_id in self.completed_before:
            wrong.append(f"{source_id} was completed by an earlier run")
        if rest.startswith("end"):
            self.history.ends += 1
            if done.end != max(1, -(-rows // size)):
                wrong.append(f"{source_id} says {done.end} ranges, of {rows} rows")
            return
        self.history.completed += 1
        first, stop = map(int, rest.split("-"))
        truth = [(file, version, row) for row in range(first, min(stop, rows))]
        found = sorted(row for part in done.parts for row in self.world.output[part.file])
        if found != truth:
            wrong.append(f"{source_id} is complete with {found}")

    def flush(self, most: int | None = None) -> None:
        """Commit what is complete, or the first of it."""
        self.commit(
            [
                Record(
                    self.sources.id(done.source),
                    State.COMPLETED,
                    self.next(),
                    self.run_id,
                    rows=done.rows_written,
                    parts=done.parts,
                    completed_at=1.0,
                    fingerprint=self.sources.fingerprint(done.source),
                    end=done.end,
                )
                for done in self.queue[:most]
            ]
        )
        self.queue = []


def simulate(seed: int, protocol: Protocol | None = None) -> History:
    """Make and run the history of ``seed``: runs with faults, and a last one without."""
    world = World(seed, protocol or Protocol())
    rng, history = world.rng, world.history
    for number in range(rng.randint(1, 4) + 1):
        share = Shard(rng.randrange(2), 2) if rng.random() < 0.3 else None
        run = Run(world, f"run{number}", share, calm=False)
        history.runs += 1
        try:
            run.execute()
        except DeathError:
            history.crashes += 1
            run.flush(rng.randint(0, len(run.queue)))
        world.disturb()
    last = Run(world, "run9", None, calm=True)
    last.execute()
    if not history.wrong:
        again = Run(world, "runA", None, calm=True)
        if again.plan.pending:
            history.wrong.append(f"left: {list(again.plan.pending.ids())}")
        world.check_done()
    return history


def first_wrong(histories: int, protocol: Protocol) -> int | None:
    """Return the first seed whose history shows a fault."""
    return next((seed for seed in range(histories) if simulate(seed, protocol).wrong), None)
