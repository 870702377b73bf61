"""`Table`: a sink that shows rows only once they are published, as the driver sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ray_resume.core.publications import Mark

__all__ = ["Table"]


class Table(Protocol):
    """A sink that publishes. The driver calls all methods, one at a time.

    Attributes:
        has_marks: a publication can carry a mark. If not, a crash between publishing and committing
            publishes twice.

    Raises:
        Exception: every method, whatever the table's own library raises.
    """

    @property
    def has_marks(self) -> bool: ...

    def position(self) -> str | None:
        """Return where the table stands now; None if it does not exist, or has no marks."""

    def holds(self, mark: Mark, position: str | None) -> bool:
        """Return whether the table has ``mark``.

        Args:
            position: where the table stood before it could have been put there.

        Raises:
            Exception: that cannot be told, also because the table's history was cut.
        """

    def settle(self, mark: Mark, position: str | None) -> bool:
        """Return as :meth:`holds`, of a run that was declared dead, and may live on.

        If the table does not have ``mark``, it keeps it out from then on, where it has the means.
        """

    def publish(
        self, results: Sequence[bytes], rows: int, mark: Mark, check: Callable[[], None]
    ) -> None:
        """Make results visible, with ``mark`` in the same transaction if there is a place.

        Args:
            check: raises if the run may have been declared dead. It is called after the table was
                read, and before a commit that depends on what was read.
        """
