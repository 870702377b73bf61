"""Groups of sources that become complete in one step, because they share output files. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable

__all__ = ["Groups"]


class _Group:
    __slots__ = ("balanced", "members")

    def __init__(self, source: int) -> None:
        self.members = {source}
        self.balanced: set[int] = set()


class Groups:
    """Which sources of a pass are in a group, and which of them are balanced."""

    def __init__(self) -> None:
        self._group_of: dict[int, _Group] = {}

    def unite(self, sources: Iterable[int]) -> None:
        """Make one group of these sources and of all that are in a group with one of them."""
        united: _Group | None = None
        for source in sources:
            group = self._group_of.get(source)
            if group is None:
                group = self._group_of[source] = _Group(source)
            if united is None:
                united = group
            elif group is not united:
                small, united = sorted((group, united), key=lambda g: len(g.members))
                united.members |= small.members
                united.balanced |= small.balanced
                for member in small.members:
                    self._group_of[member] = united

    def settle(self, source: int, *, balanced: bool) -> Collection[int]:
        """Record whether ``source`` is balanced now; return the sources that this completes.

        They are its whole group if all of it is balanced, and the group is forgotten. A source
        without a group completes by itself.
        """
        group = self._group_of.get(source)
        if group is None:
            return (source,) if balanced else ()
        if not balanced:
            group.balanced.discard(source)
            return ()
        group.balanced.add(source)
        if len(group.balanced) < len(group.members):
            return ()
        for member in group.members:
            del self._group_of[member]
        return group.members

    def is_waiting(self, source: int) -> bool:
        """Return whether ``source`` is balanced, and not all others of its group are."""
        group = self._group_of.get(source)
        return group is not None and source in group.balanced

    def waiting(self) -> list[int]:
        """Return the sources that are waiting so, ascending."""
        return sorted(filter(self.is_waiting, self._group_of))
