"""Publications of complete sources to a table, and what becomes of one that a crash interrupted.

Pure. A table shows rows from its own commit on, and a checkpoint counts a source as completed from
another commit on. No transaction spans the two. So a run takes four steps, each of which is durable
before the next one begins:

==  ===============================================================  ===========================
..  step                                                             killed after it
==  ===============================================================  ===========================
1   record the publication: its number, and the record of each       not in the table: the
    source that it would complete                                    sources are pending
2   publish, with a `Mark` in the table's own transaction            in the table: the next run
                                                                     commits the records of 1
3   commit the records of 1, in one transaction                      committed
4   forget the publication                                           nothing is left to do
==  ===============================================================  ===========================

The next run settles each publication that is still on record (:func:`unsettled`). It looks for the
mark after it has made sure that the run is dead. The mark is there if and only if the rows are.

Why settling needs no lock: the records of step 1 have their sequence numbers already, so that to
commit them is the same whichever process does it, and however often. A record of the source that is
newer, of a reset say, has a higher number and still counts. For the same reason a publication that
was committed and not forgotten does no harm: none of its records is :func:`unsettled`.

A run has at most one publication that is taken and not confirmed (`PublicationQueue`). A later one
would make the answer ambiguous for tables that keep the highest number of a run only.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from typing_extensions import override

from ray_resume.core.messages import Completion
from ray_resume.core.record_log import RecordLog
from ray_resume.core.records import encode_batches
from ray_resume.core.snapshot import Snapshot

__all__ = [
    "Mark",
    "Publication",
    "PublicationQueue",
    "Taken",
    "unsettled",
]


class Mark(NamedTuple):
    """Stands for one publication in a table's own transaction."""

    checkpoint_id: str
    run_id: str
    number: int

    @override
    def __str__(self) -> str:
        return f"{self.checkpoint_id}-{self.run_id}-{self.number}"


@dataclass(frozen=True)
class Publication:
    """A publication, as it is on record.

    Attributes:
        run_id: the run that is about to publish, or has; ``number`` counts its publications.
        sink: what the checkpoint calls the table.
        position: where the table stood before, as its library calls that; None if there was none.
        blocks: the records that count once it is published (see `records.encode`).
    """

    run_id: str
    number: int
    sink: str
    position: str | None
    blocks: Sequence[bytes]

    def to_bytes(self) -> bytes:
        """Serialize the publication: a line of JSON, and the blocks."""
        head = {
            "run": self.run_id,
            "number": self.number,
            "sink": self.sink,
            "position": self.position,
            "blocks": [len(block) for block in self.blocks],
        }
        return b"\n".join([json.dumps(head).encode(), b"".join(self.blocks)])

    @classmethod
    def from_bytes(cls, data: bytes) -> Publication:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            ValueError, CheckpointError: it is anything else, or was damaged.
        """
        line, _, rest = data.partition(b"\n")
        try:
            head = json.loads(line)
            run_id, number, sink, position = (
                head[name] for name in ("run", "number", "sink", "position")
            )
            ends = np.cumsum([0, *head["blocks"]], dtype=np.int64).tolist()
        except (KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"its head is not whole ({error!r})") from error
        if not (isinstance(run_id, str) and type(number) is int and isinstance(sink, str)):
            raise ValueError("its head has values of other types")
        if not isinstance(position, str | None) or ends != sorted(ends) or ends[-1] != len(rest):
            raise ValueError("it does not have its length")
        blocks = [rest[start:end] for start, end in itertools.pairwise(ends)]
        RecordLog(blocks)
        return cls(run_id, number, sink, position, blocks)

    @property
    def log(self) -> RecordLog:
        """The records that count once this is published."""
        return RecordLog(self.blocks)


def unsettled(publication: Publication, snapshot: Snapshot) -> Snapshot:
    """Return the records of ``publication`` that no record in ``snapshot`` supersedes.

    None is left of a publication that was committed. If the table has the publication's mark,
    these are to be committed as they are; if it does not, their sources are pending.
    """
    log = publication.log
    rows = snapshot.find(log.digests)
    known = rows >= 0
    newest = np.zeros(len(log), np.uint64)
    newest[known] = snapshot.column("sequence", rows[known])
    left = np.flatnonzero(~known | (newest < log.column("sequence")))
    batches = (batch for _, batch in log.batches(left))
    return Snapshot({publication.run_id: RecordLog(encode_batches(batches))})


class Taken(NamedTuple):
    """The sources that are published together.

    ``again``: it was taken before, and it is not known whether it was published.
    """

    number: int
    completions: Sequence[Completion]
    again: bool = False

    @property
    def results(self) -> list[bytes]:
        """The results that the datasink's tasks have returned for these sources."""
        return [result for done in self.completions for result in done.results]

    @property
    def rows(self) -> int:
        """How many rows the sources have."""
        return sum(done.rows_written for done in self.completions)


class PublicationQueue:
    """The complete sources of a run that are not published yet, and the one open publication."""

    def __init__(self) -> None:
        self._waiting: list[Completion] = []
        self._open: Taken | None = None
        self._number = 0

    def add(self, completions: Iterable[Completion]) -> list[Completion]:
        """Queue completions; return those that have nothing to publish."""
        others: list[Completion] = []
        for done in completions:
            (self._waiting if done.results else others).append(done)
        return others

    def take(self) -> Taken | None:
        """Open a publication of what waits, None if nothing does; or return the open one again."""
        if self._open is not None:
            return self._open._replace(again=True)
        if not self._waiting:
            return None
        self._number += 1
        self._open, self._waiting = Taken(self._number, self._waiting), []
        return self._open

    def put_back(self) -> None:
        """Undo :meth:`take`, before any process was told. The number is not used again."""
        assert self._open is not None
        self._waiting = [*self._open.completions, *self._waiting]
        self._open = None

    def confirm(self, number: int) -> Taken:
        """Close the open publication: the table shows it."""
        taken = self._open
        if taken is None or taken.number != number:
            raise ValueError(f"publication {number} is not the open one")
        self._open = None
        return taken
