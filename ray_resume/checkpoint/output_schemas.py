"""The output's schema in a checkpoint: an object for each run that changed it.

Several runs may be at work at once, each with some of the sources, and none waits for another. So
each run keeps the schema that it has agreed on, and the union of these counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from ray_resume.checkpoint.objects import Objects
from ray_resume.errors import CheckpointError

if TYPE_CHECKING:
    from ray_resume.core.output_schema import OutputSchema

__all__ = ["SchemaStore"]

_FOLDER = "schemas"


class SchemaStore:
    """The output's schema in a checkpoint.

    Raises:
        CheckpointError: every method, where the storage fails, or holds something else.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def read(self, gone: Collection[str] = ()) -> OutputSchema | None:
        """Return the schema that all runs have agreed on, None if there is none.

        Args:
            gone: the ids of sources whose types do not count.

        Raises:
            SchemaMismatchError: runs that were at work at once have agreed on types that do not go
                together.
        """
        agreed: OutputSchema | None = None
        for each in self._all():
            one = each.without(gone)
            agreed = one if agreed is None else agreed.merged(one)
        return agreed

    def sources(self) -> set[str]:
        """Return the ids of the sources that are known to have given types."""
        return {source for one in self._all() for source in one.sources}

    def _all(self) -> Iterator[OutputSchema]:
        # Imported here, because it loads pyarrow.
        from ray_resume.core.output_schema import OutputSchema

        for name in sorted(self._objects.list(_FOLDER)):
            data = self._objects.get(name)
            if data is None:  # Another run has just replaced all of them by one.
                continue
            try:
                yield OutputSchema.from_bytes(data)
            except ValueError as error:
                raise CheckpointError(
                    f"The checkpoint file {self._objects.uri}/{name} cannot be read: {error}. It "
                    "only says which types the output has. Restore it from a copy, or remove it."
                ) from error

    def write(self, run_id: str, agreed: OutputSchema) -> None:
        """Keep the schema that ``run_id`` has agreed on; durable when this returns."""
        self._objects.replace(f"{_FOLDER}/{run_id}.json", agreed.to_bytes())

    def settle(self, run_id: str, agreed: OutputSchema, replaced: Collection[str]) -> None:
        """Replace the schemas called ``replaced``, see :meth:`names`, by ``agreed``."""
        self.write(run_id, agreed)
        self._objects.delete(name for name in replaced if name != f"{_FOLDER}/{run_id}.json")

    def names(self) -> list[str]:
        """Return how the schemas that :meth:`read` merges are called, or more than these."""
        return list(self._objects.list(_FOLDER))
