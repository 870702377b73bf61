"""HTML for notebooks. Pure. Everything that goes in is text, and is escaped: ids are hostile."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

__all__ = ["bar", "panel", "table"]

# Notebooks are light or dark: colors that both can show, and text that inherits its own.
_COLORS = {
    "completed": "#2e9e5b",
    "quarantined": "#8e5bb5",
    "failed": "#d64545",
    "pending": "#9aa0a6",
}
_CELL = "text-align:left;padding:1px 12px 1px 0;font-variant-numeric:tabular-nums"
_MAX_CHARS = 400


def panel(title: str, *parts: str) -> str:
    """Return a panel with a title (text), and parts that are HTML."""
    head = f'<div style="font-weight:600;margin-bottom:4px">{_text(title)}</div>'
    return f'<div style="max-width:60em;line-height:1.5">{head}{"".join(parts)}</div>'


def bar(counts: Iterable[tuple[str, int]]) -> str:
    """Return a bar of sources by state; empty if there is none."""
    known = [(state, count) for state, count in counts if count]
    total = sum(count for _, count in known)
    if not total:
        return ""
    cells = "".join(
        f'<div title="{_text(f"{count:,} {state}")}" '
        f'style="width:{100 * count / total:.3f}%;background:{_COLORS.get(state, "gray")}"></div>'
        for state, count in known
    )
    label = ", ".join(f"{count:,} {state}" for state, count in known)
    return (
        f'<div role="img" aria-label="{_text(label)}" style="display:flex;height:10px;'
        f'border-radius:3px;overflow:hidden;margin:2px 0 6px">{cells}</div>'
    )


def table(rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Return a table of texts; empty without rows."""
    body = "".join(f"<tr>{''.join(_cell('td', cell) for cell in row)}</tr>" for row in rows)
    if not body:
        return ""
    head = f"<tr>{''.join(_cell('th', cell) for cell in header)}</tr>" if header else ""
    return f'<table style="border-collapse:collapse">{head}{body}</table>'


def _cell(tag: str, value: str) -> str:
    return f'<{tag} style="{_CELL}">{_text(value)}</{tag}>'


def _text(value: str) -> str:
    """Escape a text, and cut a long one; a notebook can hold no lone surrogate."""
    cut = value if len(value) <= _MAX_CHARS else f"{value[: _MAX_CHARS - 1]}…"
    clean = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in cut)
    return html.escape(clean)
