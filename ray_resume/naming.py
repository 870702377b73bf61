"""How output files are called, so that anybody who sees a name can tell whose it is."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["OutputName"]

_NAME = re.compile(r"\.?([0-9a-f]{8})-([0-9a-f]{12})-([0-9a-f]{16}-[0-9a-f]{16})\.[a-z]+")


@dataclass(frozen=True)
class OutputName:
    """The name of an output file, and whose it is."""

    checkpoint: str
    run_id: str
    rest: str

    @classmethod
    def parse(cls, name: str) -> OutputName | None:
        """Read a name in the folder, hidden or not; None if it is not one of ours."""
        *folders, bare = name.split("/")
        match = _NAME.fullmatch(bare)
        # A copy that somebody made in a folder of his own, or under another ending, is his.
        if match is None or not all("=" in folder for folder in folders):
            return None
        return cls(*match.groups())
