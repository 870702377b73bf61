"""Which sources can only be replaced in one step, since their output is in the same files. Pure.

Sources are told by their rows in the union; one that is not on record yet has a number below 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np

from ray_resume.core.digests import Positions
from ray_resume.core.filenames import OutputName
from ray_resume.core.records import Flag
from ray_resume.core.snapshot import Union

__all__ = ["joined", "sharing_files"]


def joined(groups: Iterable[Iterable[int]]) -> list[list[int]]:
    """Join groups that have a member in common, however indirectly; return them sorted."""
    group_of: dict[int, set[int]] = {}
    for group in groups:
        members = set(group)
        for found in {id(g): g for g in (group_of.get(m) for m in group) if g is not None}.values():
            members |= found
        group_of.update(dict.fromkeys(members, members))
    distinct = {id(members): members for members in group_of.values()}
    return sorted(sorted(members) for members in distinct.values())


def sharing_files(seeds: Positions, union: Union) -> Iterator[list[int]]:
    """Group the rows ``seeds`` with all that share files with them, however indirectly.

    A row that shares its files with none is in no group.
    """
    shared = union.flagged(Flag.SHARED)
    left = set(np.intersect1d(seeds, shared).tolist())
    if not left:
        return
    files: dict[int, set[str]] = {}
    sources: defaultdict[str, set[int]] = defaultdict(set)
    for row in shared.tolist():
        files[row] = {file for file in union.record(row).files if _is_shared(file)}
        for file in files[row]:
            sources[file].add(row)
    while left:
        group: set[int] = set()
        reached = {left.pop()}
        while reached:
            group |= reached
            near = {file for row in reached for file in files[row]}
            reached = {mate for file in near for mate in sources[file]} - group
        left -= group
        if len(group) > 1:
            yield sorted(group)


def _is_shared(file: str) -> bool:
    name = OutputName.parse(file)
    return name is not None and name.is_shared
