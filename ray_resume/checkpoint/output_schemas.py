"""The output's schema in a checkpoint: an object for each run that changed it.

Several runs may be at work at once, each with some of the sources, and none waits for another. So
each run keeps the schema that it has agreed on, and the union of these counts.
"""

from __future__ import annotations

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

    def read(self) -> OutputSchema | None:
        """Return the schema that all runs have agreed on, None if there is none."""
        # Imported here, because it loads pyarrow.
        from ray_resume.core.output_schema import OutputSchema

        agreed: OutputSchema | None = None
        for name in sorted(self._objects.list(_FOLDER)):
            data = self._objects.get(name)
            if data is None:  # Another run has just replaced all of them by one.
                continue
            try:
                one = OutputSchema.from_bytes(data)
            except ValueError as error:
                raise CheckpointError(
                    f"The checkpoint file {self._objects.uri}/{name} cannot be read: {error}. It "
                    "only says which types the output has. Restore it from a copy, or remove it."
                ) from error
            agreed = one if agreed is None else agreed.merged(one)
        return agreed

    def write(self, run_id: str, agreed: OutputSchema) -> None:
        """Keep the schema that ``run_id`` has agreed on; durable when this returns."""
        self._objects.replace(f"{_FOLDER}/{run_id}.json", agreed.to_bytes())

    def settle(self, run_id: str, agreed: OutputSchema) -> None:
        """Replace all schemas by ``agreed``. Call this under a lease on everything."""
        others = [
            name for name in self._objects.list(_FOLDER) if name != f"{_FOLDER}/{run_id}.json"
        ]
        self.write(run_id, agreed)
        self._objects.delete(others)
