"""Reports as parsed HTML."""

from __future__ import annotations

from html.parser import HTMLParser

VOID_TAGS = {"meta", "img", "br"}


class ParsedPage(HTMLParser):
    """A parsed page; fails on tags that are not closed in order."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content)
        assert self.open_tags == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS and not (self.get_starttag_text() or "").endswith("/>"):
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.tags or tag not in ("polyline", "circle", "line"):
            assert self.open_tags.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def find_tags(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]
