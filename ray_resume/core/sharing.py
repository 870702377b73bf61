"""Which sources can only be replaced in one step, since their output is in the same files. Pure.

Sources are told by their rows in the union; one that is not on record yet has a number below 0.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator

import pyarrow.compute as pc

from ray_resume.core.columns import mask_of, parents_of, text_of
from ray_resume.core.digests import Positions
from ray_resume.core.filenames import SHARED_DIGEST, OutputName
from ray_resume.core.snapshot import Snapshot

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


def sharing_files(seeds: Positions, union: Snapshot) -> Iterator[list[int]]:
    """Group the rows ``seeds`` with all that share files with them, however indirectly.

    A row that shares its files with none is in no group.
    """
    if not len(seeds):
        return
    files: defaultdict[int, set[str]] = defaultdict(set)
    sources: defaultdict[str, set[int]] = defaultdict(set)
    for row, file in _shared_files(union):
        files[row].add(file)
        sources[file].add(row)
    left = files.keys() & set(seeds.tolist())
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


def _shared_files(union: Snapshot) -> Iterator[tuple[int, str]]:
    """Yield the files that may hold rows of several sources, with each row that lists them."""
    for rows, batch in union.batches():
        lists = batch.column("files")
        names = lists.flatten()
        # Few names are parsed: of most it is plain that they are of one source.
        maybe = pc.match_substring(names, f"-{SHARED_DIGEST}-")
        listing = rows[parents_of(lists)[mask_of(maybe)]]
        for row, name in zip(listing.tolist(), names.filter(maybe).to_pylist(), strict=True):
            if _is_shared(file := text_of(name)):
                yield row, file


@functools.lru_cache(1024)
def _is_shared(file: str) -> bool:
    name = OutputName.parse(file)
    return name is not None and name.is_shared
