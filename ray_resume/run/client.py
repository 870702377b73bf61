"""The workers' end of the wire to a run's ledger. Never imports lmdb.

A message has taken effect once its :class:`Reply` is there. If waiting for the reply raises, the
worker cannot know whether the message took effect, so the task must fail. Its source then stays
pending, or completes by the message that did arrive.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

from ray_resume.core.messages import DeadLetter, Event, Message
from ray_resume.core.run_sources import FoundRange
from ray_resume.core.stages import StageCount
from ray_resume.errors import ResumeError
from ray_resume.failpoints import Fault, failpoint

__all__ = ["LedgerClient", "Reply"]


@dataclass(frozen=True)
class Reply:
    """The ledger's reply to one message, which has taken effect once the reply is there.

    A thread calls :meth:`wait`. A coroutine, which must not block its event loop, awaits the reply.
    Both raise a `ResumeError` if the ledger is gone or refuses; then the run cannot go on.
    """

    answer: Any
    run_id: str

    def is_there(self) -> bool:
        """Return whether :meth:`wait` would return or raise at once."""
        return bool(ray.wait([self.answer], timeout=0)[0])

    def wait(self) -> Any:
        """Wait for the reply and return it."""
        try:
            return ray.get(self.answer)
        except RayActorError as error:
            raise self._gone(error) from None

    def __await__(self) -> Generator[Any, Any, Any]:
        try:
            return (yield from self.answer.__await__())
        except RayActorError as error:
            raise self._gone(error) from None

    def _gone(self, error: RayActorError) -> ResumeError:
        return ResumeError(
            f"The ledger of run {self.run_id} is gone ({error}). Its commits are safe. Run the "
            "same script again to go on from there."
        )


@dataclass(frozen=True)
class LedgerClient:
    """The ledger of one pass of one run; picklable, found by its actor's handle."""

    handle: Any
    run_id: str
    pass_number: int
    # The faults that a test has armed; a worker arms them on arrival.

    faults: tuple[Fault, ...] = ()

    def submit(self, *events: Event) -> Reply:
        """Send ``events`` in one message, which the ledger applies whole or not at all."""
        return self._reply(self.handle.apply.remote(Message(self.run_id, self.pass_number, events)))

    def submit_dead_letters(self, letters: Sequence[DeadLetter]) -> Reply:
        """Send dead letters, which the ledger's process writes before it drains their rows."""
        answer = self.handle.write_dead_letters.remote(self.run_id, self.pass_number, letters)
        return self._reply(answer)

    def send(self, *events: Event) -> None:
        """Send ``events`` as :meth:`submit` does, and wait until the ledger has applied them.

        Raises:
            ResumeError: the ledger is gone or refuses; the run cannot go on.
        """
        self.submit(*events).wait()

    def register(self, found: Sequence[FoundRange]) -> list[int | None]:
        """Return the numbers of row ranges, before any of their rows is emitted; None: drop them.

        Raises:
            ResumeError: as :meth:`send`.
        """
        failpoint("read.before_register")
        # Tuples are half as long on the wire.
        ranges = [tuple(one) for one in found]
        answer = self.handle.register.remote(self.run_id, self.pass_number, ranges)
        numbers: list[int | None] = self._reply(answer).wait()
        failpoint("read.registered")
        return numbers

    def agree(self, asked: Sequence[tuple[bytes, int]], *, given: bool = False) -> bytes:
        """Agree on the output's schema: include ``asked`` ones, each with a source that has it.

        Returns:
            The schema as Arrow encodes it.

        Raises:
            ResumeError: no schema includes them all; the message names the sources. Or as
                :meth:`send`.
        """
        schema, problem = self._reply(self.handle.agree.remote(asked, given)).wait()
        if problem is not None:
            raise ResumeError(f"The output's types cannot be unified: {problem}")
        return bytes(schema)

    def count_stage(self, stage: int, count: StageCount) -> None:
        """Report what a stage did, for the numbers of the run. This does not wait, nor fail."""
        self.handle.count_stage.remote(stage, tuple(count))

    def name_of(self, source: int) -> str:
        """Return the id of a source, for messages."""
        return str(self._reply(self.handle.name_of.remote(source)).wait())

    def _reply(self, answer: Any) -> Reply:
        return Reply(answer, self.run_id)
