"""The schemas that runs have read with, in a checkpoint: an object for each run that changed it."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

from ray_resume.checkpoint.objects import Objects
from ray_resume.errors import CheckpointError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ReadSchemaStore"]

_FOLDER = "read_schemas"


class ReadSchemaStore:
    """The schemas that runs have read with.

    Raises:
        CheckpointError: every method, where the storage fails, or holds something else.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def read(self) -> list[pa.Schema]:
        """Return the schemas that count, in the order in which runs have recorded them."""
        return [schema for _, _, schema in self._all()]

    def write(self, run_id: str, schema: pa.Schema) -> None:
        """Record the schema that ``run_id`` reads with; durable when this returns."""
        number = max((number for number, _, _ in self._all()), default=0) + 1
        encoded = base64.b64encode(schema.serialize().to_pybytes()).decode()
        content = json.dumps({"number": number, "schema": encoded}).encode()
        self._objects.replace(_name(run_id), content)

    def settle(self, run_id: str, schema: pa.Schema) -> None:
        """Replace what is recorded by ``schema``. Call this while no other run is at work."""
        # A run that starts in this moment may add one, which stays.
        others = [name for name in self._objects.list(_FOLDER) if name != _name(run_id)]
        self.write(run_id, schema)
        self._objects.delete(others)

    def clear(self) -> None:
        """Forget what is recorded. Call this under a lease on everything."""
        self._objects.delete(list(self._objects.list(_FOLDER)))

    def _all(self) -> list[tuple[int, str, pa.Schema]]:
        # Imported here, because loading it takes time.
        import pyarrow as pa

        found = []
        for name in self._objects.list(_FOLDER):
            data = self._objects.get(name)
            if data is None:  # Another run has just replaced all of them by one.
                continue
            try:
                content = json.loads(data)
                schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(content["schema"])))
                found.append((int(content["number"]), name, schema))
            except (KeyError, TypeError, ValueError, pa.ArrowException, OSError) as error:
                raise CheckpointError(
                    f"The checkpoint file {self._objects.uri}/{name} cannot be read: {error}. It "
                    "only says which columns and types the input is read with. Restore it from a "
                    "copy, or remove it."
                ) from error
        return sorted(found, key=lambda one: one[:2])


def _name(run_id: str) -> str:
    return f"{_FOLDER}/{run_id}.json"
