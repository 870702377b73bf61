"""Marks in tables: which datasinks can put one into their table's own transaction.

A mark (`core.publications.Mark`) is in the table if and only if the rows of its publication are.
The datasinks themselves publish. They are told apart by the names of their classes, subclasses
included: a subclass whose ``on_write_complete`` does not call that of its base class puts no mark.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ray.data.datasource import Datasink, WriteResult

from ray_resume.core.publications import Mark
from ray_resume.raydata.delta_marks import DeltaMarks
from ray_resume.raydata.iceberg_marks import IcebergMarks
from ray_resume.raydata.lance_marks import LanceMarks

__all__ = ["TableMarks", "marks_of"]


class TableMarks(Protocol):
    """The marks in the table of one datasink.

    Raises:
        Exception: every method, whatever the table's library raises.
    """

    def position(self) -> str | None:
        """Return where the table stands now; None if it is empty or does not exist."""

    def holds(self, mark: Mark, position: str | None) -> bool:
        """Return whether the table has ``mark``, put there after it stood at ``position``.

        Raises:
            LookupError: the table's history does not reach back to ``position``.
        """

    def settle(self, mark: Mark, position: str | None) -> bool:
        """Return as :meth:`holds`, for a run that is dead or was declared dead.

        Delta and Iceberg keep the mark out from then on, if they do not have it. Lance does not.
        """

    def publish(self, result: WriteResult[Any], mark: Mark, check: Callable[[], None]) -> None:
        """Call ``on_write_complete`` of a fresh copy of the datasink, with ``mark``.

        Args:
            check: raises if the run may have been declared dead. `settle` of another process keeps
                out the commit that follows a check, if it comes between the two.
        """


# Ray's own classes, and that of the package lance-ray, which is called as Ray's.
_KINDS: dict[str, Callable[[Any], TableMarks]] = {
    "IcebergDatasink": IcebergMarks,
    "DeltaDatasink": DeltaMarks,
    "_BaseLanceDatasink": LanceMarks,
}


def marks_of(datasink: Datasink[Any]) -> TableMarks | None:
    """Return the marks in the table of ``datasink``; None if it has no place for them."""
    kinds = (_KINDS[kind.__name__] for kind in type(datasink).__mro__ if kind.__name__ in _KINDS)
    kind = next(kinds, None)
    return None if kind is None else kind(datasink)
