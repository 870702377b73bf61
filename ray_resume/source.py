"""What a read is made of: its sources, and how each of them is read.

A :class:`Reading` knows all sources of one `resumable_read`, and makes Ray read tasks for any of
them. Nothing is opened before it is asked for tasks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from ray_resume.errors import ResumeError
from ray_resume.record import Fingerprint

__all__ = ["Reading", "Selection", "Source", "Watch", "refuse_repeated"]


_UNKNOWN = Fingerprint()


@dataclass(frozen=True, slots=True)
class Source:
    """One source: its identity, what the reading finds it by, and how it looked when listed."""

    source_id: str
    item: Any
    fingerprint: Fingerprint = _UNKNOWN


@dataclass(frozen=True)
class Selection:
    """Rows by predicates (all must hold), then columns; ``None`` for all columns."""

    predicates: tuple[Any, ...] = ()
    columns: tuple[str, ...] | None = None


Watch: TypeAlias = Callable[[Source], bool]
"""Says whether a source has changed since it was listed, as far as one can see; picklable."""


class Reading(Protocol):
    """All sources of a read, and how to read them."""

    @property
    def name(self) -> str:
        """A name for the plan, such as ``Parquet``."""

    @property
    def sources(self) -> Sequence[Source]:
        """All sources, in the order in which they are read."""

    @property
    def repeatable(self) -> bool:
        """Whether each read of a source gives the same rows in the same order."""

    def size_bytes(self, sources: Sequence[Source]) -> int | None:
        """Estimate what ``sources`` take in memory, None if nobody knows."""

    def open(
        self, sources: Sequence[Source], selection: Selection, data_context: Any
    ) -> tuple[Mapping[str, Any], Selection]:
        """Make a read task for each of ``sources``.

        Returns:
            ``({source id: task}, what is left to be selected after reading)``. A source without a
            task was found to have no row that satisfies the predicates.
        """

    def watch(self) -> Watch:
        """Return what says whether a source is still what it was when it was listed."""


def refuse_repeated(source_ids: Iterable[str]) -> None:
    """Make sure that no two sources have the same id.

    Raises:
        ResumeError: some have; the message lists them.
    """
    repeated = sorted(source_id for source_id, n in Counter(source_ids).items() if n > 1)
    if repeated:
        raise ResumeError(
            f"{len(repeated)} sources are named more than once, and a source can be read only "
            f"once: {', '.join(repeated[:10])}. Name each one once (a file, or its directory, but "
            "not both)."
        )
