"""The types that one column has in the output of several sources, and who has them. Pure."""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import pyarrow as pa

from ray_resume.core.common_types import Limits, common_type, misfit

__all__ = ["MAX_NAMED", "ClashError", "Variant", "Variants", "included", "type_of"]

MAX_NAMED = 32
"""A variant names so many sources. One that more have is taken to stay for ever."""


class ClashError(Exception):
    """No type holds the values of ``one`` and ``other``."""

    def __init__(self, one: Variant, other: Variant) -> None:
        super().__init__(one, other)
        self.one, self.other = one, other


@dataclass(frozen=True)
class Variant:
    """A type of a column, in the rows of some sources.

    Args:
        limits: what some of the values do not fit into.
        sources: the ids of the sources; of the first ones if there are ``many``.
        many: whether there may be more than these.
    """

    kind: pa.DataType
    limits: Limits = frozenset()
    sources: tuple[str, ...] = ()
    many: bool = False

    @property
    def origin(self) -> str:
        """A source that has it, for messages."""
        return self.sources[0] if self.sources else "another run"

    def joined(self, other: Variant) -> Variant:
        """Return the same variant with the sources of ``other`` as well; itself if it has them."""
        new = [source for source in other.sources if source not in self.sources]
        if self.many or not (new or other.many):
            return self
        every = (*self.sources, *new)
        return replace(self, sources=every[:MAX_NAMED], many=other.many or len(every) > MAX_NAMED)

    def without(self, gone: Collection[str]) -> Variant | None:
        """Return the same variant without these sources; None if no other has it."""
        if self.many:
            return self
        left = tuple(source for source in self.sources if source not in gone)
        return replace(self, sources=left) if left else None

    def clashes(self, other: Variant) -> bool:
        """Say whether no type holds the values of both."""
        common = common_type(self.kind, other.kind)
        return common is None or misfit(self.limits, common) or misfit(other.limits, common)

    def to_plain(self) -> list[Any]:
        """Return plain data, for JSON."""
        kind = pa.schema([("x", self.kind)]).serialize().to_pybytes()
        limits = sorted([list(path), target] for path, target in self.limits)
        return [base64.b64encode(kind).decode(), limits, list(self.sources), self.many]

    @classmethod
    def from_plain(cls, data: Any) -> Variant:
        """Make a variant of what :meth:`to_plain` returned.

        Raises:
            ValueError, TypeError, pyarrow.ArrowException: it is anything else.
        """
        encoded, limits, sources, many = data
        kind = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(encoded))).field(0).type
        paths = frozenset((tuple(map(str, path)), str(target)) for path, target in limits)
        return cls(kind, paths, tuple(map(str, sources)), many is True)


Variants: TypeAlias = tuple[Variant, ...]
"""All variants of one column, no two alike, in the order in which they came."""


def included(variants: Variants, new: Iterable[Variant]) -> Variants:
    """Return ``variants`` and the ``new`` ones; the same object if they are in it.

    The answer does not depend on the order in which variants come, but for its own order.

    Raises:
        ClashError: one does not go together with another.
    """
    for one in new:
        place = _place(variants, one)
        if place is not None:
            more = variants[place].joined(one)
            if more is not variants[place]:
                variants = (*variants[:place], more, *variants[place + 1 :])
            continue
        for known in variants:
            if known.clashes(one):
                raise ClashError(known, one)
        variants = (*variants, one)
    return variants


def type_of(variants: Variants) -> pa.DataType:
    """Return the narrowest type that holds the values of all."""
    kind = pa.null()
    for one in variants:
        kind = common_type(kind, one.kind)
        assert kind is not None, f"variants go together in pairs, and not all: {variants}"
    return kind


def _place(variants: Sequence[Variant], one: Variant) -> int | None:
    for place, known in enumerate(variants):
        if known.kind == one.kind and known.limits == one.limits:
            return place
    return None
