"""Messages: from workers to the ledger's process, and the answers of the ledger. Pure.

An event is one fact about one source. A message holds the events that one task reports at once.
`core.ledger` has the table that says what each event does.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from typing_extensions import override

from ray_resume.core.parts import FilePart

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "Applied",
    "Completion",
    "DeadLetter",
    "Drain",
    "Event",
    "Failure",
    "Message",
    "Outcome",
    "ReadFailure",
    "Seal",
]


# Events and completions are tuples, because there are some for each source. Python makes a tuple in
# a third of the time that a frozen dataclass takes.
class Seal(NamedTuple):
    """A read has emitted the last row of ``source``.

    ``total`` is the sum of the tokens of its ``rows`` rows, modulo 2**64. The read began at
    ``began_at``, in seconds since 1970 by the clock of its host; 0 if that is unknown. ``end`` is
    how many ranges of rows a file has, if ``source`` is its end (see `row_ranges`).
    """

    source: int
    total: int
    rows: int = 0
    began_at: float = 0.0
    end: int | None = None


class Drain(NamedTuple):
    """Tokens of ``source`` have left the pipeline; ``delta`` is minus their sum, modulo 2**64.

    A sink sends it after ``rows`` rows are durable: they are the ``parts`` of output files. Or they
    are in ``results``, which are still to be published. A stage sends it without any of them; if
    ``dead_rows`` rows failed there, these rows are durable in ``dead_letters``.
    """

    source: int
    delta: int
    rows: int = 0
    parts: tuple[FilePart, ...] = ()
    results: tuple[bytes, ...] = ()
    dead_rows: int = 0
    dead_letters: tuple[str, ...] = ()


class Failure(NamedTuple):
    """``rows`` rows of ``source`` have failed; ``total`` is the sum of their tokens.

    A failure explains why the source will not become complete. It changes no counter.
    """

    source: int
    total: int
    rows: int
    error: str


class ReadFailure(NamedTuple):
    """The reader of ``source`` raised after ``rows`` rows; ``total`` is the sum of their tokens.

    It takes the place of the seal and changes no counter, so the rows that have left already cannot
    complete the source. ``cause`` is the pickled exception, empty if it cannot be pickled. A
    ``transient`` error is one of the storage, not of the source.
    """

    source: int
    total: int
    rows: int
    error: str
    cause: bytes = b""
    transient: bool = False


Event: TypeAlias = Seal | Drain | Failure | ReadFailure
"""One fact about a source."""


@dataclass(frozen=True, slots=True)
class Message:
    """The events that one task reports at once, from one pass of one run.

    Guarantees: the ledger applies all of them or, if any is illegal, none.
    """

    run_id: str
    pass_number: int
    events: tuple[Event, ...]

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        # Events travel as plain tuples. Pickle's own form of a named tuple takes the ledger's
        # process longer to read than to apply.
        return _message, (self.run_id, self.pass_number, tuple(map(_plain, self.events)))


def _plain(event: Event) -> tuple[Any, ...]:
    """Serialize an event as (kind, *fields), without trailing defaults."""
    if isinstance(event, Seal):
        return "S", *event
    if isinstance(event, Failure):
        return "F", event.source, event.total, event.rows, event.error
    if isinstance(event, ReadFailure):
        return "R", *event
    # The name of a file that many sources share travels once: pickle knows the object again.
    parts = tuple(map(tuple, event.parts))
    head = ("D", event.source, event.delta, event.rows, parts)
    if not event.results and not event.dead_rows and not event.dead_letters:
        return head
    return (*head, event.results, event.dead_rows, event.dead_letters)


def _drain(source: int, delta: int, rows: int, parts: Any, *rest: Any) -> Drain:
    return Drain(source, delta, rows, tuple([FilePart(*part) for part in parts]), *rest)


def _message(run_id: str, pass_number: int, events: tuple[tuple[Any, ...], ...]) -> Message:
    return Message(run_id, pass_number, tuple([_KINDS[kind](*fields) for kind, *fields in events]))


_KINDS: dict[str, Callable[..., Event]] = {
    "S": Seal,
    "D": _drain,
    "F": Failure,
    "R": ReadFailure,
}


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Rows of one source that failed in one call.

    Args:
        total: the sum of the tokens that the call did not pass on.
        stage: the stage, as messages name it.
        table: an Arrow IPC stream of the rows as they came into the stage.
        errors: the error of each row.
    """

    source: int
    total: int
    stage: str
    table: bytes
    errors: tuple[str, ...]

    @classmethod
    def of(
        cls, source: int, total: int, stage: str, table: pa.Table, errors: Sequence[str]
    ) -> DeadLetter:
        """Make a dead letter of a table."""
        # The command line imports this module, and does not wait for pyarrow.
        import pyarrow as pa

        buffer = pa.BufferOutputStream()
        with pa.ipc.new_stream(buffer, table.schema) as stream:
            stream.write_table(table)
        return cls(source, total, stage, buffer.getvalue().to_pybytes(), tuple(errors))


class Outcome(enum.Enum):
    """The ledger's answer to one event."""

    APPLIED = "applied"
    REPEATED = "repeated"
    POISONED = "poisoned"
    ALREADY_COMPLETE = "already complete"


class Completion(NamedTuple):
    """A source that has become complete: what is to be committed of it."""

    source: int
    rows_read: int
    rows_written: int
    parts: tuple[FilePart, ...] = ()
    results: tuple[bytes, ...] = ()
    dead_rows: int = 0
    dead_letters: tuple[str, ...] = ()
    began_at: float = 0.0
    end: int | None = None


class Applied(NamedTuple):
    """The answer to a message: an outcome for each event, and the sources that it completed."""

    outcomes: tuple[Outcome, ...]
    completions: tuple[Completion, ...]
