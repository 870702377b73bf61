"""`HtmlText`: a parser that collects the text of HTML, and takes only tags that are expected."""

from __future__ import annotations

from collections.abc import Set
from html.parser import HTMLParser
from typing import ClassVar

from typing_extensions import override

__all__ = ["HtmlText"]


class HtmlText(HTMLParser):
    """The ``text`` of HTML. Parsing fails unless its tags are known and balanced.

    Subclasses say which ``tags`` and ``attributes`` there may be, and which tags have no end.
    """

    tags: ClassVar[Set[str]]
    attributes: ClassVar[Set[str]]
    empty: ClassVar[Set[str]] = frozenset()

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.text = ""
        self.open: list[str] = []
        markup.encode("utf-8")
        self.feed(markup)
        self.close()
        assert self.open == []

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.tags
        assert {name for name, _ in attrs} <= self.attributes
        if tag not in self.empty:
            self.open.append(tag)

    @override
    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " "

    @override
    def handle_data(self, data: str) -> None:
        assert all(c.isprintable() or c == "\n" for c in data)
        self.text += data
