"""The tables of `examples/what_works.md`, as the parameters of tests.

The first cell of a row says what the row is about: ``prefix: item, item and item with something``.
Each item is tested, under the name ``prefix: item with something``. What stands in brackets is a
remark.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from places import ROOT

PAGE = ROOT / "examples" / "what_works.md"

_CODE = re.compile(r"`[^`]*`")
_REMARK = re.compile(r" ?\([^()]*\)")
_HIDDEN = re.compile(r"<(\d+)>")


class Row(NamedTuple):
    """An item of a table, and what the other cell of its row says."""

    name: str
    text: str


def rows_of(heading: str) -> list[Row]:
    """Return the items of the first table under a heading."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table is not None
    _, _, *lines = table[0].splitlines()
    return [
        Row(name, text) for line in lines for cell, text in [_cells(line)] for name in items(cell)
    ]


def _cells(line: str) -> tuple[str, str]:
    first, second = line.strip("| ").split(" | ")
    return first, second


def items(cell: str) -> list[str]:
    """Return the names of the items in the first cell of a row."""
    code: list[str] = []

    def hide(found: re.Match[str]) -> str:
        code.append(found[0].strip("`"))
        return f"<{len(code) - 1}>"

    def shown(text: str) -> str:
        return _HIDDEN.sub(lambda found: code[int(found[1])], text)

    text = _REMARK.sub("", _CODE.sub(hide, cell))
    prefix, colon, rest = text.rpartition(": ")
    rest, separator, option = rest.partition(" with ")
    return [
        shown(f"{prefix}{colon}{item}{separator}{option}")
        for item in re.split(r"[,;] and |[,;] | and ", rest.rstrip(","))
    ]
