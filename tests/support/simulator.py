"""A simulator of whole pipelines that drives the shipped token and ledger code.

A history is made from a seed: a chain of operators (read, stages, write), cut into tasks, each task
executed once or several times, and the messages that the executions send. Nothing is modelled of
`tokens` and `ledger`, they are called; what is modelled is Ray (which executions' blocks are
consumed downstream), the network (which messages arrive, and in which order) and the UDFs.

The truth is kept apart from the tokens: :class:`Truth` knows of each row which call made it from
which rows. When the ledger says that a source is complete, the files that it lists must hold what
one whole execution of each call made of one whole read, each row once.

Other protocols can take the place of the shipped one, to show that the simulator finds what is
wrong with them.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ray_resume.core import tokens as lineage
from ray_resume.core.ledger import Ledger, LedgerError
from ray_resume.core.messages import (
    Applied,
    Completion,
    Drain,
    Message,
    Outcome,
    ReadFailure,
    Seal,
)
from ray_resume.core.parts import FilePart
from ray_resume.core.tokens import MODULUS, SourceArray, TokenArray

RUN = "run"
MAX_EXECUTIONS = 3

Deltas = dict[int, int]


# Protocols: what a read, a call and the ledger do. ------------------------------------------------


class Accounts(Protocol):
    """What `tokens.CallAccount` offers."""

    def emit(self, sources: SourceArray) -> TokenArray: ...
    def finish(self, sources: SourceArray) -> tuple[TokenArray, Deltas]: ...
    def keep(
        self, sources: SourceArray, values: TokenArray, kept: npt.NDArray[np.bool_]
    ) -> tuple[TokenArray, Deltas]: ...


class Counters(Protocol):
    """What `ledger.Ledger` offers."""

    def begin_pass(self, pass_number: int) -> None: ...
    def apply(self, message: Message) -> Applied: ...
    def pending(self) -> list[int]: ...
    def explain(self, source: int) -> str: ...


class Shipped:
    """The protocol as it is."""

    delta_is_identity = True
    seals_what_it_could_not_read = False

    def tokens(self, nonce: int, start: int, count: int) -> TokenArray:
        return lineage.tokens(nonce, start, count)

    def call(self, sources: SourceArray, values: TokenArray) -> Accounts:
        return lineage.CallAccount(sources, values)

    def ledger(self, source_count: int) -> Counters:
        return Ledger(RUN, source_count)


class Positional(Shipped):
    """As shipped, but output j of a call has a token made from its input and j alone."""

    def call(self, sources: SourceArray, values: TokenArray) -> Accounts:
        return _PositionalAccount(sources, values)


class Plain(Shipped):
    """Rows are counted: +1 for each that is made, -1 for each that is gone.

    Kinder than most: completion needs a seal, and a message that comes twice counts once.
    """

    delta_is_identity = False

    def tokens(self, nonce: int, start: int, count: int) -> TokenArray:
        return np.ones(count, dtype=np.uint64)

    def call(self, sources: SourceArray, values: TokenArray) -> Accounts:
        return _PlainCall(sources)

    def ledger(self, source_count: int) -> Counters:
        return PlainLedger(source_count)


class Careless(Shipped):
    """As shipped, but a reader that raises ends its source, as if that had been its last row."""

    seals_what_it_could_not_read = True


class Overlapping(Shipped):
    """As shipped, but a part whose drain is a repeat takes the place of the first one's."""

    def ledger(self, source_count: int) -> Counters:
        return _OverlappingLedger(RUN, source_count)


class _OverlappingLedger(Ledger):
    """Lists the parts that came last, whether they counted or not."""

    def __init__(self, run_id: str, source_count: int) -> None:
        super().__init__(run_id, source_count)
        self._latest: dict[int, tuple[FilePart, ...]] = {}

    def begin_pass(self, pass_number: int) -> None:
        super().begin_pass(pass_number)
        self._latest = {}

    def apply(self, message: Message) -> Applied:
        for event in message.events if message.pass_number == self._pass_number else ():
            if isinstance(event, Drain) and event.parts:
                self._latest[event.source] = self._latest.get(event.source, ()) + event.parts
        applied = super().apply(message)
        completions = tuple(
            done._replace(parts=self._latest.get(done.source, ())) for done in applied.completions
        )
        return applied._replace(completions=completions)


class _PositionalAccount(lineage.CallAccount):
    __slots__ = ("_emitted", "_nonce")

    def __init__(self, sources: SourceArray, values: TokenArray) -> None:
        super().__init__(sources, values)
        self._nonce = lineage.token_sum(values)
        self._emitted = 0

    def emit(self, sources: SourceArray) -> TokenArray:
        out = lineage.tokens(self._nonce, self._emitted, len(sources))
        self._emitted += len(sources)
        for source, total in lineage.sums_by_source(sources, out).items():
            self._remaining[source] = (self._remaining[source] - total) % MODULUS
        return out


class _PlainCall:
    def __init__(self, sources: SourceArray) -> None:
        self._change = Counter({source: -n for source, n in Counter(sources.tolist()).items()})

    def emit(self, sources: SourceArray) -> TokenArray:
        self._change.update(sources.tolist())
        return np.ones(len(sources), dtype=np.uint64)

    def finish(self, sources: SourceArray) -> tuple[TokenArray, Deltas]:
        out = self.emit(sources)
        return out, {source: n % MODULUS for source, n in self._change.items() if n}

    def keep(
        self, sources: SourceArray, values: TokenArray, kept: npt.NDArray[np.bool_]
    ) -> tuple[TokenArray, Deltas]:
        return self.finish(sources[kept])


class PlainLedger:
    """Completes a source when it is sealed and as many rows are gone as were made."""

    def __init__(self, source_count: int) -> None:
        self._complete = [False] * source_count
        self._pass_number = 0
        self._start()

    def begin_pass(self, pass_number: int) -> None:
        self._pass_number = pass_number
        self._start()

    def apply(self, message: Message) -> Applied:
        if message.pass_number != self._pass_number:
            raise LedgerError("another pass")
        if id(message) in self._seen:
            return Applied((Outcome.REPEATED,) * len(message.events), ())
        self._seen[id(message)] = message
        completions = []
        for event in _parts(message):
            source = event.source
            if isinstance(event, Seal):
                self._sealed.add(source)
                self._value[source] += event.total
            else:
                self._value[source] += event.delta
                self._parts[source] += event.parts
            zero = self._value[source] % MODULUS == 0
            if zero and source in self._sealed and not self._complete[source]:
                self._complete[source] = True
                completions.append(Completion(source, 0, 0, self._parts[source]))
        return Applied((Outcome.APPLIED,) * len(message.events), tuple(completions))

    def pending(self) -> list[int]:
        return [source for source, complete in enumerate(self._complete) if not complete]

    def explain(self, source: int) -> str:
        return ""

    def _start(self) -> None:
        self._value: Counter[int] = Counter()
        self._sealed: set[int] = set()
        self._parts: defaultdict[int, tuple[FilePart, ...]] = defaultdict(tuple)
        # Messages are kept, so that no other gets the same id.
        self._seen: dict[int, Message] = {}


# The truth ---------------------------------------------------------------------------------------


class Row(NamedTuple):
    """``unit`` is the row's identity: rows of two executions have the same only where it is the
    same row of the source, with its own token. ``content`` is what a UDF sees of it.
    """

    source: int
    token: int
    unit: int
    content: int


class Made:
    """What one execution of a call made of one source's rows: units in, units out."""

    __slots__ = ("inputs", "outputs")

    def __init__(self, inputs: list[int]) -> None:
        self.inputs = inputs
        self.outputs: list[int] = []


class Truth:
    """Where every row of a pass came from, and where it went."""

    def __init__(self) -> None:
        self._next_unit = 0
        self._steady: dict[tuple[int, int], int] = {}
        self._reads: defaultdict[int, list[list[int]]] = defaultdict(list)
        self._made: defaultdict[int, list[Made]] = defaultdict(list)
        self._files: dict[str, list[int]] = {}

    def unit(self) -> int:
        self._next_unit += 1
        return self._next_unit

    def read(self, source: int, count: int, *, steady: bool) -> list[int]:
        """Return the units of an execution of a read; a steady one's row i is always the same."""
        if steady:
            units = [self._steady.setdefault((source, i), self.unit()) for i in range(count)]
        else:
            units = [self.unit() for _ in range(count)]
        self._reads[source].append(units)
        return units

    def made(self, source: int, inputs: list[int]) -> Made:
        made = Made(inputs)
        self._made[source].append(made)
        return made

    def write(self, units: list[int]) -> str:
        name = f"file-{len(self._files)}"
        self._files[name] = units
        return name

    def rows_in(self, part: FilePart) -> list[int]:
        units = self._files[part.file]
        assert len(units) == part.file_rows
        return units[part.first_row : part.first_row + part.rows]

    def fault(self, source: int, parts: Sequence[FilePart], dropped: Sequence[Made]) -> str | None:
        """Say what is wrong if ``parts`` are taken for the whole output of ``source``.

        Args:
            dropped: executions that made nothing, whose report of it was counted.
        """
        count: Counter[int] = Counter()
        for part in parts:
            count.update(self.rows_in(part))
        gone = {id(made) for made in dropped}
        # A call comes after the calls that made its inputs, so backwards all outputs are counted.
        for made in reversed(self._made[source]):
            if made.outputs:
                times = count[made.outputs[0]]
                if any(count[unit] != times for unit in made.outputs):
                    return "a call's output is there in part"
            else:
                times = int(id(made) in gone)
            if times:
                for unit in made.inputs:
                    count[unit] += times
        units = {unit for read in self._reads[source] for unit in read}
        counted = {unit: count[unit] for unit in units if count[unit]}
        if any(counted == dict.fromkeys(read, 1) for read in self._reads[source]):
            return None
        if any(n > 1 for n in counted.values()):
            return "rows are there twice"
        return "rows are missing"


# Pipelines ---------------------------------------------------------------------------------------


class Kind(Enum):
    """What a UDF does. The first two keep each row's own token."""

    ONE_TO_ONE = 1
    KEEP = 2
    FILTER = 3
    FAN_OUT = 4
    SHUFFLE = 5
    GENERATOR = 6
    DROP_ALL = 7


@dataclass(frozen=True)
class Stage:
    """A stage: ``whole`` batches of several sources go into one call (``origin=``), ``steady``
    UDFs return the same for the same rows.
    """

    kind: Kind
    batch_rows: int = 4
    whole: bool = False
    steady: bool = True


@dataclass(frozen=True)
class Operator:
    """Stages that one task runs; the first operator also reads, one that ``writes`` is last."""

    stages: tuple[Stage, ...] = ()
    writes: bool = False


@dataclass(frozen=True)
class Pipeline:
    """``rows[s]`` is the number of rows of source s; ``unsteady`` are the sources whose reader
    gives them in another order each time, so that each execution has its own nonce.
    """

    rows: tuple[int, ...]
    operators: tuple[Operator, ...]
    unsteady: frozenset[int] = frozenset()
    sources_per_read: int = 2
    blocks_per_task: int = 2
    block_rows: int = 4
    flush_rows: int = 8
    file_per_source: bool = False


@dataclass(frozen=True)
class Faults:
    """How often things go wrong: probabilities.

    Args:
        again: a task is executed once more.
        harsh: blocks of several executions are mixed in any way, not only as Ray does, blocks are
            lost, and reads give another number of rows.
        lost: a message never arrives, or only in the next pass.
        repeated: a message arrives once more.
        unreadable: a reader raises, after any of a source's rows.
    """

    again: float = 0.0
    harsh: bool = False
    lost: float = 0.0
    repeated: float = 0.2
    unreadable: float = 0.0


CALM = Faults()
RETRIES = Faults(again=0.25)
LOSSES = Faults(again=0.1, lost=0.05)
HARSH = Faults(again=0.35, harsh=True, lost=0.02)
DAMAGED = Faults(again=0.2, unreadable=0.25)


def random_pipeline(rng: random.Random) -> Pipeline:
    rows = tuple(rng.choice((0, 1, 2, 3, 5, 8, 13)) for _ in range(rng.randint(1, 4)))
    stages = [
        Stage(
            rng.choice(list(Kind)),
            batch_rows=rng.randint(1, 8),
            whole=rng.random() < 0.5,
            steady=rng.random() < 0.4,
        )
        for _ in range(rng.randint(0, 4))
    ]
    if rng.random() < 0.7:  # most should write something
        stages = [stage for stage in stages if stage.kind is not Kind.DROP_ALL]
    operators: list[Operator] = []
    fused: list[Stage] = []
    for stage in stages:
        fused.append(stage)
        if rng.random() < 0.5:
            operators.append(Operator(tuple(fused)))
            fused = []
    if rng.random() < 0.7:  # else the write is fused with what is before it, perhaps the read
        operators.append(Operator(tuple(fused)))
        fused = []
    operators.append(Operator(tuple(fused), writes=True))
    return Pipeline(
        rows,
        tuple(operators),
        unsteady=frozenset(s for s in range(len(rows)) if rng.random() < 0.15),
        sources_per_read=rng.randint(1, 3),
        blocks_per_task=rng.randint(1, 3),
        block_rows=rng.randint(1, 6),
        flush_rows=rng.choice((1, 3, 8, 100)),
        file_per_source=rng.random() < 0.2,
    )


# Executing a pass --------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Block:
    """Rows on their way, and what other executions gave in the same position."""

    rows: list[Row]
    twins: list[Block] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """A message, and the executions whose making nothing it reports, by source."""

    message: Message
    dropped: dict[int, Made] = field(default_factory=dict)

    def sources(self) -> set[int]:
        return {part.source for part in _parts(self.message)}


def _parts(message: Message) -> list[Seal | Drain]:
    return [event for event in message.events if isinstance(event, (Seal, Drain))]


class PassRun:
    """Executes a pipeline once on the given sources; then ``sent`` is what may arrive.

    ``disturbed`` are the sources of which not everything, or more than one execution's work, was
    consumed or reported. The others must complete if all that was sent arrives.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        sources: Sequence[int],
        pass_number: int,
        protocol: Shipped,
        faults: Faults,
        rng: random.Random,
    ) -> None:
        self.truth = Truth()
        self.sent: list[Sent] = []
        self.disturbed: set[int] = set()
        self.mixed_tasks = 0
        self._pipeline = pipeline
        self._pass_number = pass_number
        self._protocol = protocol
        self._faults = faults
        self._rng = rng
        self._run(sources)

    def _run(self, sources: Sequence[int]) -> None:
        blocks: list[Block] = []
        for number, operator in enumerate(self._pipeline.operators):
            if number == 0:
                size = self._pipeline.sources_per_read
                tasks = [sources[i : i + size] for i in range(0, len(sources), size)]
                blocks = [block for task in tasks for block in self._task(operator, task, ())]
            else:
                # Blocks arrive in the order in which tasks finish, which is any.
                self._rng.shuffle(blocks)
                size = self._pipeline.blocks_per_task
                groups = [blocks[i : i + size] for i in range(0, len(blocks), size)]
                blocks = [block for group in groups for block in self._task(operator, (), group)]

    def _task(
        self, operator: Operator, sources: Sequence[int], inputs: Sequence[Block]
    ) -> list[Block]:
        """Execute a task, perhaps again; return what is consumed downstream."""
        rng, faults = self._rng, self._faults
        executions: list[list[Block]] = []
        consumed: list[Block] = []
        while len(executions) < MAX_EXECUTIONS - 1 and rng.random() < faults.again:
            # This one dies after any of its outputs and messages. Ray does not ask its successor
            # for what was consumed.
            events = self._execute(operator, sources, self._lost_and_made_again(inputs))
            events = events[: rng.randint(0, len(events))]
            blocks = [event for event in events if isinstance(event, Block)]
            executions.append(blocks)
            consumed += blocks[len(consumed) : rng.randint(0, len(blocks))]
            for event in events:
                if isinstance(event, Sent) and rng.random() < 0.6:
                    self.sent.append(event)
                    # A write that divides the same rows into the same flushes drains the same
                    # sums: repeats, which are harmless. It may divide them otherwise.
                    self.disturbed |= event.sources()
        events = self._execute(operator, sources, self._lost_and_made_again(inputs))
        blocks = [event for event in events if isinstance(event, Block)]
        self.sent += [event for event in events if isinstance(event, Sent)]
        executions.append(blocks)
        torn = bool(consumed)
        consumed += blocks[len(consumed) :]
        if faults.harsh and len(executions) > 1:
            torn = True
            consumed = self._any_mixture(executions)
        if torn:
            self.mixed_tasks += 1
            for block in [block for blocks in executions for block in blocks]:
                self.disturbed |= {row.source for row in block.rows}
        if len(executions) > 1:
            for position in range(max(map(len, executions))):
                twins = [blocks[position] for blocks in executions if position < len(blocks)]
                for block in twins:
                    block.twins = twins
        if faults.harsh:
            lost = [block for block in consumed if rng.random() < 0.01]
            self.disturbed |= {row.source for block in lost for row in block.rows}
            consumed = [block for block in consumed if block not in lost]
        return consumed

    def _lost_and_made_again(self, inputs: Sequence[Block]) -> Sequence[Block]:
        # An input whose node is lost is made again by another execution of the task before.
        if not self._faults.harsh:
            return inputs
        return [self._rng.choice(block.twins) if block.twins else block for block in inputs]

    def _any_mixture(self, executions: list[list[Block]]) -> list[Block]:
        rng = self._rng
        mixture: list[Block] = []
        for position in range(max(map(len, executions))):
            there = [blocks[position] for blocks in executions if position < len(blocks)]
            mixture += rng.sample(there, min(len(there), rng.choice((1,) * 18 + (0, 2))))
        return mixture

    def _execute(
        self, operator: Operator, sources: Sequence[int], inputs: Sequence[Block]
    ) -> list[Block | Sent]:
        """Run a task to its end; return the blocks and messages in the order they leave it."""
        events: list[Block | Sent] = []
        batches = self._read(sources, events) if sources else (block.rows for block in inputs)
        for stage in operator.stages:
            batches = self._stage(stage, batches, events)
        if operator.writes:
            self._write(batches, events)
        else:
            # Messages join the list between the blocks, so it cannot be extended at once.
            for rows in self._cut(batches, self._pipeline.block_rows):
                events.append(Block(rows))  # noqa: PERF401
        return events

    def _cut(self, batches: Iterable[list[Row]], size: int) -> Iterator[list[Row]]:
        """Put rows together to ``size``; when a task is executed again, perhaps to another."""
        if self._faults.again and self._rng.random() < 0.3:
            size = self._rng.randint(1, 2 * size)
        held: list[Row] = []
        for batch in batches:
            held += batch
            while len(held) >= size:
                yield held[:size]
                held = held[size:]
        if held:
            yield held

    def _read(self, sources: Sequence[int], events: list[Block | Sent]) -> Iterator[list[Row]]:
        rng = self._rng
        seals: list[Seal | ReadFailure] = []
        seal_at_once = rng.random() < 0.5
        for source in sources:
            count = self._pipeline.rows[source]
            if self._faults.harsh and rng.random() < 0.03:
                count = max(0, count + rng.choice((-1, 1)))
                self.disturbed.add(source)
            steady = source not in self._pipeline.unsteady
            units = self.truth.read(source, count, steady=steady)
            order = list(range(count))
            if steady:
                nonce = lineage.read_nonce(RUN, self._pass_number, f"source {source}")
            else:
                nonce = lineage.fresh_nonce()
                rng.shuffle(order)
            total = start = 0
            unreadable = rng.random() < self._faults.unreadable if self._faults.unreadable else 0
            end = rng.randint(0, count) if unreadable else count
            while start < end:
                stop = min(end, start + rng.randint(1, 4))
                values = self._protocol.tokens(nonce, start, stop - start)
                total = (total + lineage.token_sum(values)) % MODULUS
                yield [
                    Row(source, token, units[i], hash((source, order[i])))
                    for i, token in zip(range(start, stop), values.tolist(), strict=True)
                ]
                start = stop
            if unreadable:
                self.disturbed.add(source)
            if unreadable and not self._protocol.seals_what_it_could_not_read:
                seals.append(ReadFailure(source, total, end, "damaged"))
            else:
                seals.append(Seal(source, total, end))
            if seal_at_once:
                events.append(self._sent(seals))
                seals = []
        if seals:
            events.append(self._sent(seals))

    def _write(self, batches: Iterator[list[Row]], events: list[Block | Sent]) -> None:
        # A flush may come at any moment: another execution divides the rows otherwise.
        for rows in self._cut(batches, self._pipeline.flush_rows):
            together = _by_source(rows)
            drains: list[Drain] = []
            if self._pipeline.file_per_source:
                files = [{source: part} for source, part in together.items()]
            else:
                files = [together]
            for of_file in files:
                units = [row.unit for part in of_file.values() for row in part]
                file, first = self.truth.write(units), 0
                for source, part in of_file.items():
                    delta = -sum(row.token for row in part) % MODULUS
                    place = FilePart(file, first, len(part), len(units))
                    drains.append(Drain(source, delta, len(part), (place,)))
                    first += len(part)
            events.append(self._sent(drains))

    def _stage(
        self, stage: Stage, batches: Iterator[list[Row]], events: list[Block | Sent]
    ) -> Iterator[list[Row]]:
        for batch in self._cut(batches, stage.batch_rows):
            if stage.kind is Kind.ONE_TO_ONE:
                yield batch
            else:
                for rows in [batch] if stage.whole else _by_source(batch).values():
                    yield from self._call(stage, rows, events)

    def _call(
        self, stage: Stage, rows: list[Row], events: list[Block | Sent]
    ) -> Iterator[list[Row]]:
        rng = self._rng
        if stage.steady:
            rng = random.Random(hash((stage.kind.value, *(row.content for row in rows))))
        sources = np.array([row.source for row in rows], dtype=np.int32)
        values = np.array([row.token for row in rows], dtype=np.uint64)
        call = self._protocol.call(sources, values)
        if stage.kind is Kind.KEEP:
            yield self._keep(call, rows, sources, values, rng, events)
            return
        made = {
            source: self.truth.made(source, [row.unit for row in part])
            for source, part in _by_source(rows).items()
        }
        copies: Counter[int] = Counter()
        # As in `stage`: the last output with rows takes what remains.
        outputs = [output for output in _udf(stage.kind, len(rows), rng) if output]
        if not outputs:
            self._finish(call.finish(sources[:0])[1], made, events)
        for number, output in enumerate(outputs, start=1):
            origins = sources[output]
            units = [self.truth.unit() for _ in output]
            for i, unit in zip(output, units, strict=True):
                made[rows[i].source].outputs.append(unit)
            if number < len(outputs):
                tokens = call.emit(origins)
            else:
                tokens, deltas = call.finish(origins)
                self._finish(deltas, made, events)
            batch = []
            for i, token, unit in zip(output, tokens.tolist(), units, strict=True):
                copies[i] += 1
                batch.append(Row(rows[i].source, token, unit, hash((rows[i].content, copies[i]))))
            yield batch

    def _keep(
        self,
        call: Accounts,
        rows: list[Row],
        sources: SourceArray,
        values: TokenArray,
        rng: random.Random,
        events: list[Block | Sent],
    ) -> list[Row]:
        kept = [rng.random() < 0.6 for _ in rows]
        tokens, deltas = call.keep(sources, values, np.array(kept))
        survivors = [row for row, keep in zip(rows, kept, strict=True) if keep]
        dropped = [row for row, keep in zip(rows, kept, strict=True) if not keep]
        out = [
            row._replace(token=token) for row, token in zip(survivors, tokens.tolist(), strict=True)
        ]
        last = {row.source: position for position, row in enumerate(out)}
        made: dict[int, Made] = {}
        for source, part in _by_source(dropped).items():
            made[source] = self.truth.made(source, [row.unit for row in part])
            if source in last:
                # It stands for the dropped rows too; the other survivors stand for themselves.
                survivor = out[last[source]]
                out[last[source]] = survivor._replace(unit=self.truth.unit())
                made[source].inputs.append(survivor.unit)
                made[source].outputs.append(out[last[source]].unit)
        self._finish(deltas, made, events)
        return out

    def _finish(self, deltas: Deltas, made: dict[int, Made], events: list[Block | Sent]) -> None:
        if deltas:
            drains = [Drain(source, delta) for source, delta in deltas.items()]
            nothing = {source: it for source, it in made.items() if not it.outputs}
            events.append(self._sent(drains, nothing))

    def _sent(
        self,
        events: Sequence[Seal | Drain | ReadFailure],
        dropped: dict[int, Made] | None = None,
    ) -> Sent:
        return Sent(Message(RUN, self._pass_number, tuple(events)), dropped or {})


def _by_source(rows: list[Row]) -> dict[int, list[Row]]:
    parts: dict[int, list[Row]] = {}
    for row in rows:
        parts.setdefault(row.source, []).append(row)
    return parts


def _udf(kind: Kind, count: int, rng: random.Random) -> list[list[int]]:
    """Return the outputs of a call: of each row, the position of the row that it comes from."""
    rows = list(range(count))
    if kind is Kind.DROP_ALL:
        return []
    if kind is Kind.FILTER:
        return [[i for i in rows if rng.random() < 0.6]]
    if kind is Kind.SHUFFLE:
        rng.shuffle(rows)
        return [rows]
    rows = [i for i in rows for _ in range(rng.choice((0, 1, 1, 2, 3)))]
    if kind is Kind.FAN_OUT:
        return [rows]
    rng.shuffle(rows)
    cuts = sorted(rng.randint(0, len(rows)) for _ in range(rng.randint(0, 3)))
    return [rows[i:j] for i, j in zip([0, *cuts], [*cuts, len(rows)], strict=True)]


# Delivering messages -----------------------------------------------------------------------------


class Delivery:
    """Gives the messages of a pass to a ledger, and checks what it says of them.

    ``wrong`` says what was wrong with the sources that became complete.
    """

    def __init__(self, truth: Truth, ledger: Counters, protocol: Shipped) -> None:
        self.wrong: list[str] = []
        self.completed: set[int] = set()
        self._truth = truth
        self._ledger = ledger
        self._protocol = protocol
        self._counted: defaultdict[int, dict[int, Made | None]] = defaultdict(dict)

    def give(self, sent: Sent) -> None:
        for event in _parts(sent.message):
            if isinstance(event, Drain):
                identity = event.delta if self._protocol.delta_is_identity else id(sent)
                made = sent.dropped.get(event.source)
                self._counted[event.source].setdefault(identity, made)
        for completion in self._ledger.apply(sent.message).completions:
            self._check(completion)

    def _check(self, completion: Completion) -> None:
        source = completion.source
        if source in self.completed:
            self.wrong.append(f"source {source} completed twice")
        self.completed.add(source)
        if len(set(completion.parts)) < len(completion.parts):
            self.wrong.append(f"source {source} lists a part twice: {completion.parts}")
        dropped = [made for made in self._counted[source].values() if made is not None]
        fault = self._truth.fault(source, completion.parts, dropped)
        if fault is not None:
            self.wrong.append(f"source {source} is complete, but {fault}")


@dataclass
class History:
    """What came of one history.

    ``wrong`` completions are what must never be; ``stuck`` sources stayed pending though nothing
    happened to them. The rest counts what there was in it.
    """

    wrong: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    sources: int = 0
    unread: int = 0
    undisturbed: int = 0
    completed_although_disturbed: int = 0
    pending: int = 0
    mixed_tasks: int = 0
    messages: int = 0
    refused: int = 0

    def add(self, other: History) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def simulate(seed: int, faults: Faults, protocol: Shipped | None = None) -> History:
    """Make and run the history of ``seed``: a pass or two with faults, then one without.

    The same seed gives the same history; only the drawn tokens differ.
    """
    rng = random.Random(seed)
    protocol = protocol or Shipped()
    pipeline = random_pipeline(rng)
    ledger = protocol.ledger(len(pipeline.rows))
    history = History()
    stragglers: list[Sent] = []
    passes = [faults] * rng.randint(1, 2) + [CALM]
    for pass_number, these in enumerate(passes, start=1):
        ledger.begin_pass(pass_number)
        run = PassRun(pipeline, ledger.pending(), pass_number, protocol, these, rng)
        stragglers += _run_pass(run, ledger, protocol, these, stragglers, rng, history)
    if ledger.pending():
        history.stuck.append(f"after a pass without faults: {ledger.pending()}")
    return history


def _run_pass(
    run: PassRun,
    ledger: Counters,
    protocol: Shipped,
    faults: Faults,
    stragglers: Sequence[Sent],
    rng: random.Random,
    history: History,
) -> list[Sent]:
    """Deliver what the pass sent, in any order; return what comes too late for it."""
    sources = set(ledger.pending())
    arriving = []
    late = []
    for sent in run.sent:
        if rng.random() < faults.lost:
            late.append(sent)
            run.disturbed |= sent.sources()
        else:
            arriving += [sent] * (1 if rng.random() >= faults.repeated else rng.randint(2, 3))
    arriving += stragglers
    rng.shuffle(arriving)
    delivery = Delivery(run.truth, ledger, protocol)
    for sent in arriving:
        try:
            delivery.give(sent)
        except LedgerError:
            history.refused += 1
            if sent in run.sent:
                raise
    pending = set(ledger.pending())
    for source in pending:
        ledger.explain(source)
    disturbed = run.disturbed
    history.wrong += delivery.wrong
    history.stuck += [f"source {source}: nothing happened to it" for source in pending - disturbed]
    history.sources += len(sources)
    history.undisturbed += len(sources - disturbed)
    history.completed_although_disturbed += len((sources - pending) & disturbed)
    if isinstance(ledger, Ledger):
        # What could not be read has failed, until an execution that could read it completes it.
        unread = set(ledger.failed())
        if not unread <= pending or unread != set(ledger.read_errors().sources()):
            history.wrong.append(f"{unread} are failed, {pending} pending")
        history.unread += len(unread)
    history.pending += len(pending)
    history.mixed_tasks += run.mixed_tasks
    history.messages += len(arriving)
    return late


def first_wrong(
    histories: int, faults: Faults, protocol: Callable[[], Shipped] = Shipped
) -> int | None:
    """Return the first seed whose history has a wrong completion."""
    for seed in range(histories):
        if simulate(seed, faults, protocol()).wrong:
            return seed
    return None
