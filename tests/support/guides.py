"""The blocks of code in a page of the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_BLOCK = re.compile(r"(?:<!-- ([^\n]*) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)


class Block(NamedTuple):
    """A block, and the comment in the line above it."""

    mark: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """Return the blocks of ``page`` in their order."""
    return [Block(*found) for found in _BLOCK.findall(page.read_text())]
