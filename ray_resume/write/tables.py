"""A published datasink, as a run sees it: where its rows become visible. In the driver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ray.data.datasource import Datasink

from ray_resume.core.publications import Mark
from ray_resume.raydata.table_marks import marks_of
from ray_resume.write.datasinks import write_result

__all__ = ["DatasinkTable"]


class DatasinkTable:
    """The table behind a datasink; see `run.table.Table`."""

    def __init__(self, datasink: Datasink[Any]) -> None:
        self._datasink = datasink
        self._marks = marks_of(datasink)

    @property
    def has_marks(self) -> bool:
        """Whether a publication can carry a mark."""
        return self._marks is not None

    def position(self) -> str | None:
        """Return where the table stands now; None if it is empty, or has no marks."""
        return None if self._marks is None else self._marks.position()

    def holds(self, mark: Mark, position: str | None) -> bool:
        """Return whether the table has ``mark``."""
        assert self._marks is not None
        return self._marks.holds(mark, position)

    def settle(self, mark: Mark, position: str | None) -> bool:
        """Return whether the table has ``mark``; if not, keep it out where that is possible."""
        assert self._marks is not None
        return self._marks.settle(mark, position)

    def publish(
        self, results: Sequence[bytes], rows: int, mark: Mark, check: Callable[[], None]
    ) -> None:
        """Call ``on_write_complete``, with ``mark`` in its transaction if there is a place."""
        result = write_result(results, rows)
        if self._marks is None:
            check()
            self._datasink.on_write_complete(result)
        else:
            self._marks.publish(result, mark, check)
