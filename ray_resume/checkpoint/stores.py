"""`Stores`: what a checkpoint keeps beside the records, a store for each kind of object."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ray_resume.checkpoint.dead_letters import DeadLetterStore
from ray_resume.checkpoint.history import RunHistory
from ray_resume.checkpoint.objects import Objects
from ray_resume.checkpoint.output_schemas import SchemaStore
from ray_resume.checkpoint.publications import PublicationStore
from ray_resume.checkpoint.read_schemas import ReadSchemaStore

__all__ = ["Stores"]


class Stores(ABC):
    """The stores of a checkpoint, in whichever process has its objects."""

    @property
    @abstractmethod
    def _objects(self) -> Objects: ...

    def dead_letters(self) -> DeadLetterStore:
        """Return the store of dead letters."""
        return DeadLetterStore(self._objects)

    def history(self) -> RunHistory:
        """Return the history of the checkpoint's runs."""
        return RunHistory(self._objects)

    def schemas(self) -> SchemaStore:
        """Return the store of the output's schema."""
        return SchemaStore(self._objects)

    def read_schemas(self) -> ReadSchemaStore:
        """Return the store of the schemas that runs have read with."""
        return ReadSchemaStore(self._objects)

    def publications(self) -> PublicationStore:
        """Return the store of publications."""
        return PublicationStore(self._objects)
