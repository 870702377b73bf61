"""Named points at which a test may kill a process of a run by SIGKILL.

A point is a call of :func:`failpoint` in the code under test. Unless a fault is armed, the call
only looks into an empty dictionary. A run sends its armed faults to its workers and its ledger, and
a fault arms each process that it arrives in. Files hold the kills that are still to come. One
process alone removes each file, so each fault fires once.

Imports nothing of the project.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

__all__ = ["POINTS", "Fault", "Point", "armed", "failpoint"]


@dataclass(frozen=True)
class Point:
    """A point at which a process can be killed.

    Attributes:
        dies: ``"worker"``, ``"ledger"`` or ``"driver"``: the process of a run that gets there.
        when: what has happened by then, and what has not.
    """

    dies: str
    when: str


def _points(dies: str, **when: str) -> dict[str, Point]:
    return {name.replace("__", "."): Point(dies, text) for name, text in when.items()}


POINTS: dict[str, Point] = {
    **_points(
        "worker",
        read__between_blocks="a block of a source was taken; more, or its seal, is to come",
        read__before_register="ranges of rows are about to begin, and are not registered",
        read__registered="they are registered, none of their rows was taken",
        read__before_end="all rows of a file were taken; its last range and its end are not sealed",
        read__after_end="both are sealed",
        read__before_seal="a source's last row was taken, its seal was not sent",
        read__after_seal="seals have arrived",
        stage__called="a UDF has returned or yielded; nothing of it has left",
        stage__between_outputs="an output of a generator has left, more are to come",
        stage__before_drain="nothing is left of a source's rows, and the delta was not sent",
        stage__after_drain="that delta has arrived",
        stage__before_failures="failed rows were neither reported nor sent as dead letters",
        stage__after_failures="failed rows were reported, or are dead letters",
        sink__before_write="rows have come to the sink, no file was written",
        sink__writing="a file has its bytes, but a hidden name, and was not synced",
        sink__written="a file has its name; that was not synced",
        sink__before_drain="all files of a write are durable, their delta was not sent",
        sink__after_drain="that delta has arrived; perhaps it was not committed yet",
        rewrite__copied="a file of live rows is whole; no record lists it",
        datasink__before_write="rows have come to a user's datasink, and were not written",
        datasink__before_drain="a user's datasink has written, the delta was not sent",
        datasink__after_drain="that delta has arrived",
    ),
    **_points(
        "ledger",
        store__making="the run's LMDB file is whole, but has a hidden name",
        store__made="the run's LMDB file has its name; that was not synced",
        ledger__registering="a range of rows is about to be registered",
        ledger__registered="it has its number, and no reply was sent",
        ledger__before_apply="a message has come, and was not applied",
        ledger__applied="a message was applied, not answered, and what it completes not committed",
        ledger__before_commit="completed sources are about to be committed",
        store__in_commit="records are in a transaction that was not committed",
        store__before_growth="the map is full, and did not grow",
        store__after_growth="the map has grown, and the transaction was not tried again",
        ledger__committed="a transaction was committed, and no other process knows",
        shared__before_publish="records are in this host's LMDB file, and were not published",
        shared__published="a segment is published, and it is not known yet whether it counts",
        shared__whole="all records are published in one segment, beside those it stands for",
        ledger__recording="a publication is about to be put on record",
        ledger__recorded="a publication is on record, and the driver does not know",
        ledger__failing="failed sources are about to be committed",
        letters__writing="a dead letter is about to be written",
        letters__written="a dead letter is durable, and its rows were not drained",
        ledger__closing="all is committed, the file was not closed",
        ledger__closed="the file is closed, the lease released, and no reply was sent",
    ),
    **_points(
        "driver",
        checkpoint__writing="the checkpoint's identity or sink is about to be written",
        lease__created="the lease's file is there, locked and empty",
        run__leased="the lease is held, nothing was read",
        run__bound="the checkpoint is bound to its output, no ledger was started",
        run__before_pass="a pass was begun, nothing was executed",
        run__after_pass="a pass was executed, the ledger does not know that it ended",
        run__before_publish="a publication is on record, and was not published",
        run__published="it was published, and not committed",
        run__settling="the table was asked for a dead run's mark, nothing was done about it",
        run__settled="what that run had published is committed; it is still on record",
        run__before_close="all passes are over, the ledger was not closed",
        run__closed="the ledger was closed, and lives",
        history__ended="the run's end is in the history, and its lease is held",
        cleanup__before="dead runs and listed files are known; nothing was removed",
        cleanup__removing="a leftover is about to be removed",
        cleanup__removed="a leftover was removed",
        cleanup__removing_letter="dead letters that no record lists are about to be removed",
        shared__fenced="dead runs are fenced, and have their leases still",
        shared__ending="a lease in a shared storage is about to be removed",
        lease__ending="the lease is about to be removed",
        rewrite__registered="a rewrite has its lease and a file for its records; no row was copied",
        rewrite__written="files of live rows are durable, no record lists them",
        rewrite__committed="records list them; the files that they replace are there, too",
        rewrite__removed="one of the files that were replaced is gone, others are there",
        reset__committed="Checkpoint.reset has committed, and holds its lease",
        compact__merged="the merged file is there, and so are those that it stands for",
        compact__removing="one of those is about to be removed",
    ),
}
"""Every point; a test compares this with the calls of `failpoint`, and with what is tested."""

_armed: dict[str, Fault] = {}


@dataclass(frozen=True)
class Fault:
    """A SIGKILL at ``point`` for the next process that gets there, once ``after`` have passed it.

    ``folder`` is its own. Pickled, it arms the process that it is unpickled in.
    """

    point: str
    folder: str
    after: int = 0

    def arm(self) -> None:
        """Arm the fault in this process."""
        for turn in range(self.after + 1):
            self._ticket(turn).touch(exist_ok=False)
        _armed[self.point] = self

    def disarm(self) -> None:
        """Call the fault off, in every process."""
        _armed.pop(self.point, None)
        for turn in range(self.after + 1):
            self._ticket(turn).unlink(missing_ok=True)

    @property
    def victim(self) -> int | None:
        """The process id of the process that it killed; None before that."""
        # The file is missing before that, and empty for a moment.
        with contextlib.suppress(FileNotFoundError, ValueError):
            return int(self._victim_file.read_text())
        return None

    def reach(self) -> None:
        """Pass the point, or kill this process."""
        for turn in range(self.after + 1):
            # The process that removes a file takes its turn; the last turn is the kill.
            with contextlib.suppress(FileNotFoundError):
                self._ticket(turn).unlink()
                if turn < self.after:
                    return
                self._victim_file.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
        # The fault has fired, or was called off.
        _armed.pop(self.point, None)

    @override
    def __reduce__(self) -> tuple[Callable[[str, str, int], Fault], tuple[str, str, int]]:
        return _arrived, (self.point, self.folder, self.after)

    @property
    def _victim_file(self) -> Path:
        return Path(self.folder, f"{self.point}.victim")

    def _ticket(self, turn: int) -> Path:
        return Path(self.folder, f"{self.point}.{turn}")


def failpoint(point: str) -> None:
    """Kill this process if a fault is armed for ``point`` and is due."""
    if _armed and point in _armed:
        _armed[point].reach()


def armed() -> tuple[Fault, ...]:
    """Return the faults that are armed in this process, to send them to others."""
    return tuple(_armed.values())


def _arrived(point: str, folder: str, after: int) -> Fault:
    fault = _armed[point] = Fault(point, folder, after)
    return fault
