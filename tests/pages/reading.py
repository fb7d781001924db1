"""What a browser would see of a page: tags, attributes and texts, by the standard library's parser."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """Collects elements with their attributes, the text of each kind of element, and the data."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self._data = ""
        self.feed(text)
        self.close()
        self.data: dict[str, Any] = json.loads(self._data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.elements.append((tag, given))
        self._open.append("data" if given.get("type") == "application/json" else tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() not in (tag, "data"):
            pass

    def handle_data(self, data: str) -> None:
        where = self._open[-1] if self._open else ""
        if where == "data":
            self._data += data
        elif data.strip():
            self.texts.append((where, data))

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}

    def text(self) -> str:
        return "\n".join(text for where, text in self.texts if where not in ("script", "style"))

    def ids(self, tag: str) -> list[str]:
        return [given.get("id", "") for name, given in self.elements if name == tag]
