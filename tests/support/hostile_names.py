"""Names that no terminal or format expects."""

from __future__ import annotations

HOSTILE = [
    "line\nbreak",
    "\x1b[2J\x1b]0;title\x07red",
    "\x9b31m\x85\u2028\u202e",
    "tab\tand\rreturn",
    "\udcff\ud800",
    "nul\0",
    "del\x7f",
    "x" * 10_000,
    "",
    " ",
    "naïve ☃ 𝄞",
]
