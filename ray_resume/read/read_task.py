"""A read task's work: read one source after another, add the two columns, seal each source.

Runs on workers: knows neither checkpoints nor lmdb.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from ray.data.block import BlockAccessor

from ray_resume.core.messages import Failure, ReadFailure, Seal
from ray_resume.core.sources import Source, SourceTable
from ray_resume.core.tokens import MODULUS, fresh_nonce, read_nonce, token_sum, tokens
from ray_resume.errors import NonResumableError, SourceChangedError
from ray_resume.failpoints import failpoint
from ray_resume.raydata import blocks
from ray_resume.raydata.filereads import ReadTaskFactory, Selection
from ray_resume.raydata.retries import backoff_s, retries_of
from ray_resume.read.inputs import ChangeCheck
from ray_resume.read.read_errors import (
    RowsMovedError,
    is_rays_own,
    is_transient,
    read_failure,
)
from ray_resume.run.client import LedgerClient, Reply

__all__ = [
    "CHANGED",
    "Attempts",
    "PlainReadTask",
    "ResumableReadTask",
    "SealReport",
    "reads_of",
]

logger = logging.getLogger("ray_resume")

# Seals of small sources travel together, but none waits for more than a block after this.
_SEAL_INTERVAL_S = 0.1

CHANGED = "the read: the source changed after it was listed. The next run reads it as it is then"


@dataclass(frozen=True)
class PlainReadTask:
    """Reads sources one after another, as plain Ray Data does."""

    # Ray names a read function by this where it warns of a task that is large.
    __name__ = "ray_resume read"

    sources: SourceTable
    tasks: ReadTaskFactory
    left: Selection

    def __call__(self) -> Iterator[Any]:
        for task in self.tasks(self.sources):
            if task is not None:
                yield from _selected(task(), self.left)


@dataclass(frozen=True)
class ResumableReadTask:
    """Reads sources one after another, gives each row its token, seals each source.

    ``numbers`` are the sources' in the run's table.
    Rows that ``left`` leaves out are no rows of their source.

    Guarantees: a source is sealed only if its reader is exhausted, Ray has taken each of its rows,
    and it has not changed since it was listed. If its reader raises, the read reports a failure in
    place of the seal, and reads the other sources. An iteration that ends early seals nothing, and
    the source stays pending. So does one whose rows have moved to other files meanwhile.

    Raises:
        Exception: a reader's, if it is transient (see `read_errors`): then the other sources would
            fail as well.
    """

    __name__ = "ray_resume read"

    sources: SourceTable
    numbers: Sequence[int]
    tasks: ReadTaskFactory
    left: Selection
    repeatable: bool
    has_changed: ChangeCheck
    client: LedgerClient

    def __call__(self) -> Iterator[Any]:
        report = SealReport(self.client)
        reads = reads_of(self.tasks, self.sources, self.left)
        for number, source, read in zip(self.numbers, self.sources, reads, strict=True):
            nonce = self._nonce(source.source_id)
            total = start = 0
            began_at = time.time()
            attempts = Attempts(read, repeatable=self.repeatable)
            for block in attempts:
                count = blocks.num_rows(block)
                values = tokens(nonce, start, count)
                total = (total + token_sum(values)) % MODULUS
                start += count
                report.send_if_due()
                yield blocks.with_tracking_columns(
                    block, np.full(count, number, dtype=np.int32), values
                )
                failpoint("read.between_blocks")
            if isinstance(attempts.error, RowsMovedError):
                # The source stays unsealed: the next pass reads it from where its rows are then.
                continue
            outcome = self._outcome(number, source, total, start, attempts.error)
            if isinstance(outcome, Seal):
                outcome = outcome._replace(began_at=began_at)
            report.add(outcome)
            if attempts.error is not None and is_transient(attempts.error):
                report.end()
                raise attempts.error
        report.end()

    def _outcome(
        self, number: int, source: Source, total: int, rows: int, error: Exception | None
    ) -> Seal | Failure | ReadFailure:
        """Return the event of a source of which ``rows`` rows were read, up to its end or error."""
        try:
            # The check comes last: a change after it has no effect on the rows that were read.
            changed = self.has_changed(source)
        except Exception as unknown:
            error, changed = error or unknown, False
        if changed:
            return Failure(number, total, rows, CHANGED)
        if error is None:
            return Seal(number, total, rows)
        if isinstance(error, SourceChangedError):
            # The input itself reports a source that it no longer has.
            return Failure(number, total, rows, f"the read: {error}")
        failure = read_failure(number, total, rows, error)
        logger.warning(
            "The source %s could not be read: %s. It fails in this run, which goes on with the "
            "other sources.",
            source.source_id,
            failure.error,
        )
        return failure

    def _nonce(self, source_id: str) -> int:
        if not self.repeatable:
            return fresh_nonce()
        return read_nonce(self.client.run_id, self.client.pass_number, source_id)


def reads_of(
    tasks: ReadTaskFactory, sources: SourceTable, left: Selection
) -> Iterator[Callable[[], Iterable[Any]]]:
    """Return a read of each source; that of a source that cannot be opened raises."""
    try:
        every = tasks(sources)
    except NonResumableError:
        raise
    except Exception:
        # One source has failed for all: open each by itself to find it.
        for position in range(len(sources)):
            yield partial(_read_alone, tasks, sources[position : position + 1].packed(), left)
        return
    for task in every:
        yield partial(_read, task, left)


def _read(task: Any, left: Selection) -> Iterable[Any]:
    return _selected(task(), left) if task is not None else ()


def _read_alone(tasks: ReadTaskFactory, source: SourceTable, left: Selection) -> Iterable[Any]:
    (task,) = tasks(source)
    return _read(task, left)


class Attempts:
    """Iterates once over the blocks of ``read()``; an exception ends it, and stays in ``error``.

    A read is retried as often as the user asks Ray Data to retry a task
    (``DataContext.retried_map_errors``). A reader that is not ``repeatable`` is not retried once
    some of its rows have left.
    """

    def __init__(self, read: Callable[[], Iterable[Any]], *, repeatable: bool) -> None:
        self.error: Exception | None = None
        self._read = read
        self._repeatable = repeatable
        self._rows = 0

    def __iter__(self) -> Iterator[Any]:
        attempt = 0
        while True:
            yield from self._remaining()
            error, self.error = self.error, None
            if error is None:
                return
            if attempt >= retries_of(error) or (self._rows and not self._repeatable):
                self.error = error
                return
            time.sleep(backoff_s(attempt))
            attempt += 1

    def _remaining(self) -> Iterator[Any]:
        """Read from the start, and give the rows that have not left yet."""
        skip = self._rows
        # No `try` is around the yield: an exception raised there is not the reader's.
        try:
            left = iter(self._read())
        except Exception as error:
            self._keep(error)
            return
        while True:
            try:
                block = next(left)
                count = blocks.num_rows(block)
                if skip:
                    block = blocks.take(block, np.arange(min(skip, count), count))
            except StopIteration:
                return
            except Exception as error:
                self._keep(error)
                return
            skip, seen = max(0, skip - count), min(skip, count)
            self._rows += count - seen
            yield block

    def _keep(self, error: Exception) -> None:
        if is_rays_own(error):
            raise error
        self.error = error


class SealReport:
    """Collects the events of sources, and sends them in few messages.

    The read goes on while a message is on its way. The task waits for each reply before it ends.
    """

    def __init__(self, client: LedgerClient) -> None:
        self._client = client
        self._events: list[Seal | Failure | ReadFailure] = []
        self._sent_at = time.monotonic()
        self._reply: Reply | None = None

    def add(self, *events: Seal | Failure | ReadFailure) -> None:
        """Send these with the next message."""
        self._events += events

    def is_due(self) -> bool:
        """Say whether it is time to send, and the message before has its reply."""
        if time.monotonic() - self._sent_at < _SEAL_INTERVAL_S:
            return False
        return self._reply is None or self._reply.is_there()

    def send_if_due(self) -> None:
        """Send what has gathered, unless the message before it has no reply yet."""
        if self.is_due():
            self._wait()
            self._send()

    def end(self) -> None:
        """Send the rest; return once all has taken effect."""
        self._send()
        self._wait()

    def _send(self) -> None:
        self._sent_at = time.monotonic()
        if self._events:
            failpoint("read.before_seal")
            # One message at a time is on its way: `end` sends the last one in any case.
            self._wait()
            self._reply = self._client.submit(*self._events)
            self._events = []

    def _wait(self) -> None:
        if self._reply is not None:
            self._reply.wait()
            self._reply = None
            failpoint("read.after_seal")


def _selected(read: Iterable[Any], left: Selection) -> Iterator[Any]:
    for block in read:
        selected = block
        for predicate in left.predicates:
            selected = blocks.take(selected, blocks.mask_of(predicate, selected))
        if left.columns is not None:
            selected = BlockAccessor.for_block(selected).select(list(left.columns))
        blocks.refuse_repeated_names(selected)
        yield selected
