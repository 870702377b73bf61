"""What workers hold: a way to send messages to a run's ledger. Never imports lmdb.

A message has taken effect when :meth:`LedgerClient.send` returns. If it raises, whether it took
effect is unknown, and the task must fail: its source then stays pending, or completes by the
message that did arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

from ray_resume.core.messages import DeadLetter, Event, Message
from ray_resume.errors import ResumeError
from ray_resume.failpoints import Fault

__all__ = ["LedgerClient"]


@dataclass(frozen=True)
class LedgerClient:
    """The ledger of one pass of one run; picklable, found by its actor's handle."""

    handle: Any
    run_id: str
    pass_number: int
    # What a test has armed: it arms the worker that this arrives at.
    faults: tuple[Fault, ...] = ()

    def send(self, *events: Event) -> None:
        """Apply ``events`` at the ledger, in one message, and wait until they are.

        Raises:
            ResumeError: the ledger is gone or refuses; the run cannot go on.
        """
        try:
            ray.get(self._submit(events))
        except RayActorError as error:
            raise self._gone(error) from None

    async def send_async(self, *events: Event) -> None:
        """As :meth:`send`, on an event loop that must not be blocked."""
        try:
            await self._submit(events)
        except RayActorError as error:
            raise self._gone(error) from None

    def agree(self, asked: Sequence[tuple[bytes, int]], *, given: bool = False) -> bytes:
        """Agree on the output's schema: include ``asked`` ones, each with a source that has it.

        Returns:
            The schema as Arrow encodes it.

        Raises:
            ResumeError: no schema holds them all, which names the sources; or as :meth:`send`.
        """
        try:
            schema, problem = ray.get(self.handle.agree.remote(asked, given))
        except RayActorError as error:
            raise self._gone(error) from None
        if problem is not None:
            raise ResumeError(f"The output's types cannot be unified: {problem}")
        return bytes(schema)

    def name_of(self, source: int) -> str:
        """Return the id of a source, for messages."""
        return str(ray.get(self.handle.name_of.remote(source)))

    def write_dead_letters(self, letters: Sequence[DeadLetter]) -> None:
        """Have the ledger write dead letters and drain their rows, and wait until that is done.

        Raises:
            ResumeError: as :meth:`send`.
        """
        try:
            ray.get(self._submit_letters(letters))
        except RayActorError as error:
            raise self._gone(error) from None

    async def write_dead_letters_async(self, letters: Sequence[DeadLetter]) -> None:
        """As :meth:`write_dead_letters`, on an event loop that must not be blocked."""
        try:
            await self._submit_letters(letters)
        except RayActorError as error:
            raise self._gone(error) from None

    def _submit_letters(self, letters: Sequence[DeadLetter]) -> Any:
        return self.handle.write_dead_letters.remote(self.run_id, self.pass_number, letters)

    def _submit(self, events: tuple[Event, ...]) -> Any:
        return self.handle.apply.remote(Message(self.run_id, self.pass_number, events))

    def _gone(self, error: RayActorError) -> ResumeError:
        return ResumeError(
            f"The ledger of run {self.run_id} is gone ({error}). What it had committed is safe. "
            "Run the same script again to go on from there."
        )
